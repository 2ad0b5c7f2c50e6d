"""What the stages of a run will do, by its settings and by what is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slmreason.curriculum.forecast import RunForecast, SetSizes, groups_of_epoch
from slmreason.curriculum.settings import CurriculumSettings, ProbeSettings
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.embedded.families import make_problems
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Evidence, Place
from slmreason.run.whole import Plan, Portion
from slmreason.supervision.critique import CritiqueSettings
from slmreason.supervision.settings import BridgeSettings

PROBLEMS = tuple(make_problems("chain", "train", 10))
RIGHT = [0, 0, 0, 0, 1, 4, 4, 6, 8, 8]
"""Of eight rollouts each: five are hard, two are medium, three are mastered."""


def pool(measured: bool = True, **settings: Any) -> ReasoningDataModule:
    data = ReasoningDataModule("embedded:chain/train?count=10", review_share=0.0, **settings)
    data.problems = PROBLEMS
    if measured:
        evidence = [Evidence(p.id, 8, right, tokens=800) for p, right in zip(PROBLEMS, RIGHT, strict=True)]
        data.ledger.take(evidence, Place(1, "sft"))
    return data


def forecast(data: ReasoningDataModule, may_take: float | None = None, **settings: Any) -> RunForecast:
    held_out = settings.pop("held_out", None)
    probe = ProbeSettings(**settings.pop("probe", {}))
    run = CurriculumSettings(probe=probe, **settings)
    grpo = GRPOSettings(epochs=2, group_size=4, prompts_per_step=2, max_completion_tokens=90)
    epochs = {"sft": 3, "grpo": 2, "cft": 1}
    stages = {name: SimpleNamespace(module=SimpleNamespace(settings=SimpleNamespace(epochs=n)))
              for name, n in epochs.items()}  # fmt: skip
    bought = [SimpleNamespace(tokens=1000)]
    allowed = None if may_take is None else lambda round: may_take
    prober = SimpleNamespace(grpo=grpo, settings=probe, may_take=allowed, bought=bought)
    curve = SimpleNamespace(completions_ahead=60)
    scorer = SimpleNamespace(completions=30, settings=SimpleNamespace(max_new_tokens=200))
    others: Any = (stages, data, prober, scorer, curve, held_out)
    critique = CritiqueSettings(attempts_per_problem=2, kinds=("diagnosis", "repair"))
    return RunForecast(run, *others, BridgeSettings(), critique)


def plans(made: list[Plan] | None) -> list[Plan]:
    assert made is not None
    return made


def test_before_anything_is_measured_nothing_is_foretold_unless_all_are_in_all_sets() -> None:
    assert forecast(pool(measured=False))(0) is None
    made = plans(forecast(pool(measured=False, routing="all"), rounds=1)(0))
    assert made[1]["fit"] == Portion(3 * 10)
    assert made[1]["probe"] == Portion(8 * 10, 90)


def test_sets_are_as_large_as_the_ledger_says() -> None:
    sizes = SetSizes.of(pool(), group_size=4)
    assert sizes is not None
    assert (sizes.taught, sizes.tried, sizes.unsolved) == (7, 3, 4)
    assert sizes.failing == pytest.approx((7 / 8) ** 4 + 2 * 0.5**4)
    assert sizes.informative == pytest.approx(
        (1 - (1 / 8) ** 4 - (7 / 8) ** 4 + 2 * (1 - 2 * 0.5**4)) / 3
    )  # fmt: skip


def test_every_stage_from_the_present_one_on_is_planned() -> None:
    made = plans(forecast(pool(), rounds=1, probe={"epoch_share": 0.5})(0))
    failing = (7 / 8) ** 4 + 2 * 0.5**4
    scored = Portion(30, 200)
    assert [sorted(plan) for plan in made] == [
        ["benchmarks", "curve"], ["again", "benchmarks", "fit", "probe", "traces"], ["benchmarks", "fit", "probe"],
        ["again", "benchmarks", "critiques", "fit"],
    ]  # fmt: skip
    assert made[0] == {"benchmarks": scored, "curve": Portion(60, 200)}  # where the run stands, whenever it comes
    assert made[1]["probe"].units == 0  # it has been measured
    assert made[1]["again"] == Portion(8 * 10 * 0.5 * 3, 90)
    assert made[2]["probe"] == Portion(8 * 10 * 0.5, 90)
    assert made[2]["fit"] == Portion(3 * 4 * 2, 90)
    assert made[3]["critiques"].units == pytest.approx(failing * 2)
    assert made[3]["fit"].units == pytest.approx(failing * 2 * 2 * 2)
    last = plans(forecast(pool(), rounds=1, probe={"epoch_share": 0.5})(3))
    assert last == [{**made[3], "curve": Portion(60, 200)}]


def test_a_later_sft_measures_what_grpo_did_not_and_a_budget_bounds_it() -> None:
    made = plans(forecast(pool(), rounds=2)(4))
    assert made[0]["probe"].units == 8 * (10 - 3)
    bounded = plans(forecast(pool(), may_take=3000.0, rounds=2)(4))
    assert bounded[0]["probe"].units == 2000 / 100
    never = plans(forecast(pool(), rounds=2, probe={"refresh": "never"})(4))
    assert never[0]["probe"].units == 0


@pytest.mark.parametrize(("evaluate", "scored"), [("stage", [1] * 7), ("round", [1, 0, 0, 1, 0, 0, 1]),
                                                  ("ends", [1, 0, 0, 0, 0, 0, 1])])  # fmt: skip
def test_benchmarks_are_planned_where_they_are_due(evaluate: str, scored: list[int]) -> None:
    made = plans(forecast(pool(), rounds=2, evaluate=evaluate)(0))
    assert ["benchmarks" in plan for plan in made] == [bool(each) for each in scored]


def test_refills_lengthen_an_epoch_only_where_problems_come_back() -> None:
    plain = GRPOSettings(prompts_per_step=4)
    assert groups_of_epoch(plain, 20, 0.5) == 20
    refilled = GRPOSettings(prompts_per_step=4, order="informative", max_sampled_groups=12)
    assert groups_of_epoch(refilled, 20, 0.5) == 20  # the same set in fewer steps
    coming_back = GRPOSettings(prompts_per_step=4, order="informative", max_sampled_groups=12, cooldown=1)
    assert groups_of_epoch(coming_back, 20, 0.5) == 5 * 8
    assert groups_of_epoch(coming_back, 20, 0.01) == 5 * 12  # the cap


def test_held_out_problems_are_planned_where_students_are_compared() -> None:
    held_out = SimpleNamespace(problems=PROBLEMS[:3], validation=SimpleNamespace(settings=SimpleNamespace(samples=4)))
    made = plans(forecast(pool(), rounds=1, held_out=held_out)(0))
    assert [plan["validation"].units for plan in made] == [3, 0, 0, 0]  # the base's completions, for the KL
    made = plans(forecast(pool(), rounds=1, held_out=held_out, keep="best")(0))
    assert [plan["validation"].units for plan in made] == [3 * 6, 3 * 5, 3 * 5, 3 * 5]
