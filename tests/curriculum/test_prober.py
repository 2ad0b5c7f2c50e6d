"""Measuring outside GRPO: in waves as at once, cut off and gone on with, and within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slmreason.curriculum import prober as module
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.settings import CheckpointSettings, CurriculumSettings, ProbeSettings
from slmreason.curriculum.state import RunState
from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Evidence, Place, RolloutGroup, Tokens
from slmreason.rollout.transformers import HFEngine
from slmreason.run.journal import Journal
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward

PLACE = Place(1, "sft")


class Cut(Exception):
    """The process ends here."""


def prober_in(folder: Path, count: int = 12, round_tokens: float | None = None, **probe: Any) -> Prober:
    student = Student("embedded:qwen2", instruction="")
    journal = Journal(folder, list, lambda: student.tokens)
    journal.open()
    work = Work(student, HFEngine(max_sequences=64), journal, CheckpointSettings(), Console(quiet=True))
    data = ReasoningDataModule(f"embedded:chain/train?count={count}")
    data.load(student.prompt_length, {})
    grpo = GRPOSettings(max_completion_tokens=80)
    may_take = None if round_tokens is None else lambda _: round_tokens
    return Prober(work, data, grpo, AnswerReward(), ProbeSettings(**probe), None, may_take)


def shown(prober: Prober) -> dict[str, Evidence]:
    return {problem.id: found for problem in prober.data.problems if (found := prober.data.ledger.get(problem.id))}


def measured(prober: Prober) -> dict[str, Evidence]:
    prober.measure(prober.data.problems, PLACE, "probe")
    return shown(prober)


def counts(evidence: dict[str, Evidence]) -> dict[str, tuple[int, int, int]]:
    return {name: (each.attempts, each.successes, each.tokens) for name, each in evidence.items()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[RolloutGroup]]:
    """The groups of each call of the engine."""
    calls: list[list[RolloutGroup]] = []
    collect = module.collect

    def noting(*args: Any) -> list[RolloutGroup]:
        calls.append(collect(*args))
        return calls[-1]

    monkeypatch.setattr(module, "collect", noting)
    return calls


def test_the_attempts_of_a_problem_are_the_same_in_waves_as_at_once(
    tmp_path: Path, drawn: list[list[RolloutGroup]]
) -> None:
    texts: list[dict[str, list[str]]] = []
    for name, waves in (("at once", None), ("in waves", [5, 1, 1, 1])):
        drawn.clear()
        measured(prober_in(tmp_path / name, waves=waves))
        texts.append({})
        for group in (group for call in drawn for group in call):
            texts[-1].setdefault(group.problem.id, []).extend(rollout.text for rollout in group.rollouts)
    at_once, in_waves = texts
    assert in_waves == {name: at_once[name][: len(found)] for name, found in in_waves.items()}
    assert sum(map(len, in_waves.values())) < sum(map(len, at_once.values()))


def test_bands_in_waves_are_those_of_all_rollouts(tmp_path: Path) -> None:
    whole, waves = prober_in(tmp_path / "a", count=24), prober_in(tmp_path / "b", count=24, waves=[5, 1, 1, 1])
    band_of = whole.data.bands.of
    bands = [{name: band_of(each.rho) for name, each in measured(prober).items()} for prober in (whole, waves)]
    assert bands[0] == bands[1]
    assert len(set(bands[0].values())) > 1
    assert waves.work.student.tokens.sampled < whole.work.student.tokens.sampled


def test_waves_that_were_noted_are_not_drawn_again(
    tmp_path: Path, drawn: list[list[RolloutGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(prober_in(tmp_path / "whole", waves=[5, 1, 1, 1]))
    calls, collect = len(drawn), module.collect
    assert calls > 2

    def cut(*args: Any) -> list[RolloutGroup]:
        if len(drawn) == calls + 2:
            raise Cut
        return collect(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "collect", cut)
        with pytest.raises(Cut):
            measured(prober_in(tmp_path / "cut", waves=[5, 1, 1, 1]))
    drawn.clear()
    again = prober_in(tmp_path / "cut", waves=[5, 1, 1, 1])
    assert measured(again) == whole
    assert len(drawn) == calls - 2
    assert again.work.student.tokens.sampled == sum(each.tokens for each in whole.values())


def test_a_budget_buys_what_it_can_pay_and_says_what_that_changed(tmp_path: Path) -> None:
    everything = sum(each.tokens for each in measured(prober_in(tmp_path / "a", count=40)).values())
    prober = prober_in(tmp_path / "b", count=40, round_tokens=0.75 * everything)
    known = measured(prober)
    [bought] = prober.bought
    assert 0 < len(known) < 40
    assert (bought.wanted, bought.problems, bought.first_bands, bought.moved) == (40, len(known), len(known), 0)
    assert bought.tokens == prober.work.student.tokens.sampled == sum(each.tokens for each in known.values())
    assert bought.tokens <= 0.8 * everything  # a mean length is what a piece is paid by


def test_what_is_not_known_is_bought_first(tmp_path: Path) -> None:
    prober = prober_in(tmp_path, count=16, round_tokens=8 * 80 * 8.5)
    old = [Evidence(problem.id, 8, 4, tokens=8 * 80) for problem in prober.data.problems[:8]]
    prober.data.ledger.take(old, PLACE)
    known = measured(prober)
    assert all(problem.id in known for problem in prober.data.problems[8:])


def test_a_round_without_tokens_left_buys_nothing_and_says_that_nothing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prober = prober_in(tmp_path, round_tokens=10)
    assert measured(prober) == {}
    assert prober.bought[0].tokens == 0
    assert "curriculum.probe.share leaves 10 tokens, and one problem may take 640" in caplog.text


def test_what_earlier_rounds_bought_counts(tmp_path: Path) -> None:
    prober = prober_in(tmp_path, count=40, round_tokens=8 * 80 * 10)
    measured(prober)
    first = prober.bought[0].tokens
    prober.measure(prober.data.problems, Place(2, "sft"), "probe")
    assert first > 8 * 80 * 10 / 2
    assert sum(bought.tokens for bought in prober.bought) < 1.2 * 8 * 80 * 10


def test_without_a_budget_too_it_is_noted_what_was_measured(tmp_path: Path) -> None:
    prober = prober_in(tmp_path)
    known = measured(prober)
    measured(prober)
    first, again = prober.bought
    assert (first.wanted, first.problems, first.first_bands, first.rollouts) == (12, 12, 12, 96)
    assert (again.problems, again.first_bands) == (12, 0)
    assert first.tokens == sum(each.tokens for each in known.values())
    assert first.tokens + again.tokens == prober.work.student.tokens.sampled


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"waves": [2, 2]}, r"curriculum\.probe\.waves: \[2, 2\].*curriculum\.probe\.attempts \(8\)"),
        ({"waves": [8, 0]}, r"curriculum\.probe\.waves"),
        ({"screen": True}, r"curriculum\.probe\.screen: .*needs curriculum\.probe\.waves"),
        ({"share": 0.0}, r"curriculum\.probe\.share must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(probe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**probe)


def test_a_share_of_a_round_needs_to_know_what_a_round_has() -> None:
    with pytest.raises(ValueError, match=r"curriculum\.probe\.share: .*curriculum\.max_tokens"):
        CurriculumSettings(probe=ProbeSettings(share=0.15))
    settings = CurriculumSettings(probe=ProbeSettings(share=0.15), rounds=2, max_tokens=1000)
    assert settings.probe_tokens([]) == pytest.approx(75)


@pytest.mark.parametrize(
    ("ended", "foreseen"),
    [([], 2500), ([4000], 8000), ([4000, 5000], 6000), ([4000, 9000], 10_000)],
)
def test_a_round_is_taken_to_be_as_long_as_the_one_before_it(ended: list[int], foreseen: int) -> None:
    settings = CurriculumSettings(probe=ProbeSettings(share=0.1), rounds=1000, max_tokens=10_000)
    assert settings.probe_tokens(ended) == pytest.approx(0.1 * foreseen)


def test_rounds_have_ended_at_the_tokens_of_their_last_stage() -> None:
    run = RunState()
    for place, tokens in ((Place(0, "base"), 0), (Place(1, "sft"), 10), (Place(1, "grpo"), 30), (Place(2, "sft"), 50)):
        run.report(place, "done", Tokens(sampled=tokens))
    assert (run.ended(before=1), run.ended(before=2), run.ended(before=3)) == ([], [30], [30, 50])
