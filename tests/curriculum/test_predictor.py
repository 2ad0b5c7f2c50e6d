"""Who is measured where rho is predicted: on simulated pools, with a student, cut off and gone on with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from slmreason.curriculum import prober as module
from slmreason.curriculum.predictor import FIRST, Prediction, Predictor, scorable
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.settings import CheckpointSettings, CurriculumSettings, ProbeSettings
from slmreason.curriculum.state import RunState
from slmreason.curriculum.work import Work
from slmreason.data.columns import Columns
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.ledger import Ledger
from slmreason.data.strata import Bands, stratify
from slmreason.embedded.families import make_problems
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Evidence, Place, Problem, Trace, TraceScores
from slmreason.rollout.transformers import HFEngine
from slmreason.run.journal import Journal, Unnoted
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.runs import pool_with_traces

PLACE = Place(1, "sft")
BANDS = Bands(evidence_model="posterior")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What our logger says, which may be kept from others by a command before."""
    ours = logging.getLogger("slmreason")
    before, ours.propagate = ours.propagate, True
    with caplog.at_level(logging.INFO, "slmreason"):
        yield caplog
    ours.propagate = before


# -- simulated pools -------------------------------------------------------------------------------------------------


class Pool:
    """Problems with known rates and scores that tell of them; whoever is measured gets eight rollouts."""

    def __init__(self, size: int, slope: float, seed: int = 0, certain: float = 0.9, evidence: int = 0) -> None:
        """
        Args:
            slope: by which the scores move the log-odds; 0 for noise.
            evidence: problems that were sampled from an older policy, all wrong.
        """
        rng = np.random.default_rng(seed)
        x = rng.normal(size=size)
        mean = np.clip(1 / (1 + np.exp(0.5 + slope * x)), 0.01, 0.99)
        self.rho = rng.beta(8 * mean, 8 * (1 - mean))
        self.right = rng.binomial(8, self.rho).tolist()
        self.problems = [Problem(f"p{number}", "q", "a") for number in range(size)]
        self.number = {problem.id: number for number, problem in enumerate(self.problems)}
        data = ReasoningDataModule("nowhere", bands=BANDS)
        data.problems, data.ledger = tuple(self.problems), Ledger(None, BANDS.fading)
        data.ledger.take([Evidence(p.id, 8, 0) for p in self.problems[:evidence]], PLACE)
        self.version = 50 if evidence else 0
        data.ledger.score(
            [TraceScores(f"p{i}", 1 + 0.1 * v, 2.0, 1.0, 90, 120, self.version) for i, v in enumerate(x.tolist())],
            PLACE,
        )
        work: Any = SimpleNamespace(student=SimpleNamespace(policy_version=self.version))
        self.data = data
        self.predictor = Predictor(work, data, {p.id: "trace" for p in self.problems}, certain, Unnoted())
        self.calls: list[list[str]] = []
        self.room = size

    def measure(self, problems: Sequence[Problem], label: str) -> int:
        assert label == f"probe part {len(self.calls) + 1}"
        now = problems[: self.room]
        self.room -= len(now)
        self.calls.append([problem.id for problem in now])
        shown = [Evidence(p.id, 8, self.right[self.number[p.id]], self.version) for p in now]
        self.data.ledger.take(shown, PLACE)
        return len(now)

    @property
    def measured(self) -> list[str]:
        return [name for call in self.calls for name in call]

    def right_bands(self) -> float:
        band_of = stratify(self.data.ledger, self.problems, BANDS).band_of
        true = [BANDS.of(rate) for rate in self.rho.tolist()]
        return float(np.mean([band_of.get(p.id) == band for p, band in zip(self.problems, true, strict=True)]))


def test_what_is_certain_by_prediction_is_not_sampled_and_in_its_band_nevertheless() -> None:
    saved, lost = [], []
    for seed in range(4):
        pool, all_of_them = Pool(800, slope=3.0, seed=seed), Pool(800, slope=3.0, seed=seed, certain=0.9999999)
        spared = pool.predictor.lead(pool.problems, PLACE, "probe", pool.measure)
        all_of_them.predictor.lead(all_of_them.problems, PLACE, "probe", all_of_them.measure)
        assert sorted(pool.measured + [problem.id for problem in spared]) == sorted(pool.number)
        assert len(pool.calls[0]) == FIRST
        saved.append(len(spared) / 800)
        lost.append(all_of_them.right_bands() - pool.right_bands())
    print(f"\nspared {np.mean(saved):.2f} of the problems, true bands {np.mean(lost):+.3f} fewer")
    assert min(saved) > 0.2
    assert np.mean(lost) < 0.05


def test_noise_spares_nobody_and_says_so(said: pytest.LogCaptureFixture) -> None:
    pool = Pool(400, slope=0.0)
    assert pool.predictor.lead(pool.problems, PLACE, "probe", pool.measure) == []
    assert sorted(pool.measured) == sorted(pool.number)
    assert [len(call) for call in pool.calls] == [64, 64, 128, 144]
    lines = [record.getMessage() for record in said.records]
    assert any(line.startswith("probe: curriculum.probe.predictor is off, the 336 others are not predicted: its rank "
                               "correlation with rho on held-out problems is ") for line in lines)  # fmt: skip


def test_older_evidence_spares_nobody_before_the_student_as_it_stands_was_sampled() -> None:
    pool = Pool(300, slope=3.0, evidence=300)
    pool.predictor.lead(pool.problems, PLACE, "probe", pool.measure)
    assert len(pool.calls[0]) == FIRST


def test_with_a_budget_the_least_certain_are_next_and_the_end_of_the_tokens_ends_it() -> None:
    pool = Pool(800, slope=3.0)
    pool.room = 100
    spared = pool.predictor.lead(pool.problems, PLACE, "probe", pool.measure, least_known_first=True)
    assert [len(call) for call in pool.calls] == [64, 36]
    again = Pool(800, slope=3.0)
    again.room = 64
    again.predictor.lead(again.problems, PLACE, "probe", again.measure, least_known_first=True)
    certainty = stratify(again.data.ledger, again.problems, BANDS).certainty
    others = [certainty[name] for name in again.number if name not in pool.measured]
    assert max(certainty[name] for name in pool.calls[1]) <= min(others) + 1e-12
    assert spared


def test_a_measurement_too_small_for_it_is_not_worth_a_forward_pass() -> None:
    pool = Pool(100, slope=3.0)
    assert pool.predictor.lacks(64) == "64 problems are to be sampled before any is predicted, there are 64"
    assert pool.predictor.lacks(65) is None
    pool.measure(pool.problems[:60], "probe part 1")
    assert pool.predictor.lacks(4) is not None
    assert pool.predictor.lacks(5) is None


# -- with a student --------------------------------------------------------------------------------------------------


def prober_in(
    folder: Path, count: int = 110, round_tokens: float | None = None, certain: float = 0.6, **probe: Any
) -> Prober:
    student = Student("embedded:qwen2", instruction="")
    journal = Journal(folder / "run", list, lambda: student.tokens)
    journal.open()
    work = Work(student, HFEngine(max_sequences=64), journal, CheckpointSettings(), Console(quiet=True))
    pool = pool_with_traces(folder.parent / "pool.jsonl", count)  # ids have its place
    data = ReasoningDataModule(str(pool), columns=Columns(trace="trace"), bands=BANDS)
    data.load(student.prompt_length, {})
    data.ledger = Ledger(folder / "run", BANDS.fading)
    grpo, settings = GRPOSettings(max_completion_tokens=80), ProbeSettings(attempts=4, predictor="forward", **probe)
    predictor = Predictor(work, data, scorable(data.problems, {}, student, 512), certain, journal)
    may_take = None if round_tokens is None else lambda _: round_tokens
    return Prober(work, data, grpo, AnswerReward(), settings, None, may_take, predictor)


def files(prober: Prober, folder: Path) -> dict[str, bytes]:
    names = ("ledger.jsonl", "trace_scores.jsonl", "predicted.jsonl")
    return {name: path.read_bytes() for name in names if (path := folder / "run" / name).exists()}


def test_a_student_is_measured_for_fewer_rollouts_and_all_that_it_cost_is_counted(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    prober = prober_in(tmp_path, count=160)
    prober.measure(prober.data.problems, PLACE, "probe")
    ledger, tokens = prober.data.ledger, prober.work.student.tokens
    [found] = prober.predictor.predictions if prober.predictor else []
    assert found.off is None
    assert found.rank_correlation > 0.2
    assert 0 < found.spared == 160 - len(ledger)
    assert (found.traces, found.scored) == (160, tokens.scored)
    assert tokens.scored == sum(ledger.scores(p.id).cost for p in prober.data.problems)  # type: ignore[union-attr]
    assert tokens.total == tokens.sampled + tokens.scored
    strata = stratify(ledger, prober.data.problems, BANDS)
    assert strata.unknown == ()
    rows = [json.loads(line) for line in (tmp_path / "run" / "predicted.jsonl").read_text().splitlines()]
    assert {row["problem_id"] for row in rows} == strata.predicted
    assert all(row["certainty"] >= 0.6 and row["band"] == strata.band_of[row["problem_id"]] for row in rows)
    lines = [record.getMessage() for record in said.records]
    assert any(line.startswith("probe: the traces of 160 of 160 problems scored") for line in lines)
    assert any("rho predicted from traces: rank correlation" in line for line in lines)


def test_waves_stop_where_the_prior_makes_a_band_certain(tmp_path: Path) -> None:
    prober = prober_in(tmp_path, count=160, waves=[1, 1, 1, 1], certain=0.65)
    prober.measure(prober.data.problems, PLACE, "probe")
    shown = [found for p in prober.data.problems if (found := prober.data.ledger.get(p.id))]
    stopped = [found for found in shown if found.attempts == 1]
    assert stopped  # no band of four rollouts is known after one of them by the counts alone
    certainty = stratify(prober.data.ledger, prober.data.problems, BANDS).certainty
    assert np.mean([certainty[found.problem_id] for found in stopped]) > 0.6


class Cut(Exception):
    """The process ends here."""


def measured_until(folder: Path, calls: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Prober, int]:
    """A measurement that ends with an error once the engine was called so often, and how often it was."""
    made, collect = [0], module.collect

    def counting(*args: Any) -> Any:
        if made[0] == calls:
            raise Cut
        made[0] += 1
        return collect(*args)

    prober = prober_in(folder, waves=[2, 2])
    with monkeypatch.context() as patch:
        patch.setattr(module, "collect", counting)
        prober.measure(prober.data.problems, PLACE, "probe")
    return prober, made[0]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_measurement_that_was_cut_off_comes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    whole, calls = measured_until(tmp_path / "whole", None, monkeypatch)
    expected = files(whole, tmp_path / "whole")
    assert set(expected) == {"ledger.jsonl", "trace_scores.jsonl", "predicted.jsonl"}
    assert calls > 4
    with pytest.raises(Cut):
        measured_until(tmp_path / "cut", int(share * calls), monkeypatch)
    for name in expected:  # as the beginning of a run takes back what no checkpoint has
        (tmp_path / "cut" / "run" / name).unlink(missing_ok=True)
    again, others = measured_until(tmp_path / "cut", None, monkeypatch)
    assert others == calls - int(share * calls)
    assert files(again, tmp_path / "cut") == expected
    assert again.work.student.tokens == whole.work.student.tokens
    assert again.predictor is not None
    assert whole.predictor is not None
    assert again.predictor.predictions == whole.predictor.predictions


def test_traces_are_scored_anew_only_when_the_student_has_changed(tmp_path: Path) -> None:
    prober = prober_in(tmp_path)
    prober.measure(prober.data.problems, PLACE, "probe")
    predictor, student = prober.predictor, prober.work.student
    assert predictor is not None
    assert predictor.unscored() == []
    student.policy_version = 7
    assert len(predictor.unscored()) == 110
    prober.before(Place(1, "grpo"), None)
    assert {row.policy_version for p in prober.data.problems if (row := prober.data.ledger.scores(p.id))} == {7}
    assert len(predictor.predictions) == 2


def test_the_forward_pass_is_paid_for_by_the_budget_of_measuring(tmp_path: Path) -> None:
    prober = prober_in(tmp_path / "a", round_tokens=60_000.0)
    prober.measure(prober.data.problems, PLACE, "probe")
    assert prober.bought[0].rollouts == 0
    assert prober.bought[0].tokens == prober.work.student.tokens.scored > 0
    assert sum(each.tokens for each in prober.bought) == prober.work.student.tokens.total
    poor = prober_in(tmp_path / "b", round_tokens=1000.0)
    poor.measure(poor.data.problems, PLACE, "probe")
    assert poor.work.student.tokens.scored == 0


def test_why_problems_have_no_trace_to_score_is_counted_and_too_few_are_refused(
    said: pytest.LogCaptureFixture,
) -> None:
    student = Student("embedded:qwen2", instruction="")
    problems = [
        replace(p, trace=f"{p.answer} it is.\nThe answer is \\boxed{{{p.answer}}}.")
        for p in make_problems("chain", "train", 70)
    ]
    problems[0] = replace(problems[0], trace=None)
    problems[1] = replace(problems[1], trace="<think> never closed")
    problems[2] = replace(problems[2], trace="1 + " * 400 + "1")
    problems[3] = replace(problems[3], trace=None)
    given = {problems[3].id: Trace(problems[3].id, "given", "bridged")}
    found = scorable(problems, given, student, 300)
    assert len(found) == 67
    assert found[problems[3].id] == "given"
    [line] = [record.getMessage() for record in said.records]
    assert line.startswith("curriculum.probe.predictor: 67 of 70 problems have a trace to predict from; 1 not: ")
    assert "1 not: none came with them (data.columns.trace)" in line
    assert "1 not: too long (bridge.max_trace_tokens is 300)" in line
    with pytest.raises(ValueError, match=r"curriculum\.probe\.predictor: 64 problems are sampled.*10 of 11 problems"):
        scorable([problems[0], *problems[60:]], {}, student, 300)


# -- settings and state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"certain": 0.8}, r"curriculum\.probe\.certain: nothing is certain without curriculum\.probe\.predictor"),
        ({"predictor": "forward", "certain": 1.0}, r"curriculum\.probe\.certain must be"),
        ({"predictor": "forward", "certain": 0.3}, r"curriculum\.probe\.certain must be"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(probe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSettings(**probe)


def test_bands_by_the_newest_evidence_have_no_use_for_it() -> None:
    settings = CurriculumSettings(probe=ProbeSettings(predictor="forward", waves=[2, 2, 4]))
    with pytest.raises(ValueError, match=r"curriculum\.probe\.predictor: .* data\.bands\.evidence_model: posterior"):
        settings.probe.check(Bands())
    settings.probe.check(BANDS)  # waves that no count stops may be stopped by a prior
    with pytest.raises(ValueError, match="never stop early"):
        ProbeSettings(waves=[2, 2, 4]).check(BANDS)


def test_what_it_came_to_is_kept_in_the_state_of_the_run() -> None:
    state = RunState(predictions=[Prediction(1, "sft", "probe", 9, 90, 9, 0.5, 0.1, 3.0, 4, None)])
    assert RunState.from_tree(state.as_tree()) == state
    assert state.predictions_for(Place(1, "sft")) == state.predictions
    assert state.predictions_for(Place(1, "grpo")) == []
    old = state.as_tree()
    del old["predictions"]
    assert RunState.from_tree(old).predictions == []
