"""What GRPO's set holds besides what is solved sometimes."""

from __future__ import annotations

from slmreason.curriculum.sets import ConsolidationStage
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.strata import stratify
from slmreason.records import Evidence, Place, Problem

POOL = tuple(
    Problem(name, f"What is {name}?", "1") for name in ("never", "failed before", "failed since", "solved", "all")
)
PLACE = Place(1, "grpo")


def chosen(older_than: int | None) -> list[str]:
    data = ReasoningDataModule("embedded:chain/train?count=1")
    data.problems = POOL
    shown = [("failed before", 0, 3), ("failed since", 0, 5), ("solved", 2, 3), ("all", 4, 3)]
    data.ledger.take([Evidence(name, 4, right, version) for name, right, version in shown], PLACE)
    stage = ConsolidationStage(PLACE, 4, 0.0, data, True, older_than)
    return [problem.id for problem in stage.build(stratify(data.ledger, data.problems, data.bands), 0)]


def test_a_failure_of_older_policies_is_left_to_an_order_that_weighs_it() -> None:
    assert chosen(older_than=5) == ["solved", "failed before"]


def test_without_such_an_order_only_what_is_solved_is_in_the_set() -> None:
    assert chosen(older_than=None) == ["solved"]
