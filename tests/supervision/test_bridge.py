"""The Bridge: what is proposed, verified and selected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from slmreason.curriculum.sets import NO_CANDIDATE, traces_said
from slmreason.embedded.families import make_problems, rebuild
from slmreason.records import BridgeCandidate, Exemplar, Fault, Learnability, Problem, Trace
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.supervision.bridge import Bridge, Material, most_learnable
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.dataset import TraceTeacher
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.answers import is_correct
from slmreason.verify.rewards import AnswerReward
from tests.supervision.solutions import spoiled, true_solution

TEACHER, REWARD = ProceduralTeacher(), AnswerReward()


def run_bridge(student: Student, settings: BridgeSettings, count: int = 12):  # type: ignore[no-untyped-def]
    problems = make_problems("chain", "train", count, (4, 5))
    return Bridge(student, HFEngine(), TEACHER, REWARD, settings).make(problems, Sampling(80, temperature=0.0))


def test_bridge_proposes_verifies_and_selects_by_rank_surprisal(student: Student) -> None:
    results = run_bridge(student, BridgeSettings(max_trace_tokens=400))
    kinds = {candidate.trace.provenance for result in results for candidate in result.candidates}
    assert {"teacher", "bridged"} <= kinds
    for result in results:
        passed = [c.trace for c in result.candidates if c.rejected is None]
        within = [t for t in passed if t.learnability and t.learnability.mean_nll <= 3.0]
        assert result.chosen is not None
        assert within
        best = min(within, key=lambda t: t.learnability.rank_surprisal_ratio if t.learnability else 1e9)
        assert result.chosen == best
        assert is_correct(result.chosen.text, result.problem.answer)
        assert all(c.trace.learnability is not None for c in result.candidates)  # the rejected too


def test_a_handover_starts_with_the_teachers_first_steps(student: Student) -> None:
    for result in run_bridge(student, BridgeSettings(max_trace_tokens=400)):
        steps = [step.text for step in rebuild(result.problem.id).steps]
        for candidate in result.candidates:
            if candidate.trace.provenance == "handover":
                assert candidate.trace.text.splitlines()[: (len(steps) + 1) // 2] == steps[: (len(steps) + 1) // 2]


def test_without_selection_the_raw_trace_is_taken(student: Student) -> None:
    for result in run_bridge(student, BridgeSettings(select=False, max_trace_tokens=400), 4):
        assert [c.trace.provenance for c in result.candidates] == ["teacher"]
        assert result.chosen is not None
        assert result.chosen.provenance == "teacher"


class Counted(ProceduralTeacher):
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        self.asked.append(("solve", [p.id for p in problems]))
        return super().solve(problems)

    def rewrite(
        self, problems: Sequence[Problem], raw_traces: Sequence[str], exemplars: Sequence[Exemplar]
    ) -> list[str | None]:
        self.asked.append(("rewrite", [p.id for p in problems]))
        assert all(raw_traces)
        return super().rewrite(problems, raw_traces, exemplars)


def test_a_teacher_is_not_asked_again_for_what_it_wrote_before(student: Student) -> None:
    problems = make_problems("chain", "train", 6, (4,))
    settings, sampling = BridgeSettings(max_trace_tokens=400), Sampling(80, temperature=0.0)
    first = Bridge(student, HFEngine(), TEACHER, REWARD, settings).make(problems[:4], sampling)
    known = [c.trace for result in first for c in result.candidates if c.trace.provenance == "teacher"]
    known += [c.trace for result in first[:2] for c in result.candidates if c.trace.provenance == "bridged"]
    teacher, before = Counted(), student.tokens.written
    again = Bridge(student, HFEngine(), teacher, REWARD, settings).make(problems, sampling, Material(written=known))
    ids = [problem.id for problem in problems]
    assert teacher.asked == [("solve", ids[4:]), ("rewrite", ids[2:])]
    new = {("teacher", i) for i in ids[4:]} | {("bridged", i) for i in ids[2:]}
    candidates = [candidate.trace for result in again for candidate in result.candidates]
    paid = [trace.text for trace in candidates if (trace.provenance, trace.problem_id) in new]
    assert student.tokens.written - before == sum(len(student.encode_target(text)) for text in paid)
    fresh = Bridge(student, HFEngine(), TEACHER, REWARD, settings).make(problems, sampling)
    assert [result.chosen for result in again] == [result.chosen for result in fresh]


def test_a_trace_known_by_heart_is_not_trained_on(student: Student) -> None:
    free = run_bridge(student, BridgeSettings(max_trace_tokens=400))
    scores = {r.problem.id: r.chosen.learnability.mean_nll for r in free if r.chosen and r.chosen.learnability}
    limit = sorted(scores.values())[len(scores) // 2]
    results = run_bridge(student, BridgeSettings(max_trace_tokens=400, min_mean_nll=limit))
    assert {r.problem.id for r in results if r.chosen is None} == {i for i, score in scores.items() if score < limit}
    for before, after in zip(free, results, strict=True):
        if after.chosen is None:
            [rejected] = [new for old, new in zip(before.candidates, after.candidates, strict=True) if old != new]
            assert rejected.trace == before.chosen
            assert rejected.rejected is not None
            assert rejected.rejected.kind == "known by heart"
        else:
            assert after == before


@pytest.mark.parametrize(
    ("settings", "passed", "chosen"),
    [
        (BridgeSettings(), {"teacher", "handover", "self"}, "teacher"),
        (BridgeSettings(raw="last"), {"teacher", "handover", "self"}, "handover"),
        (BridgeSettings(raw="last"), {"teacher", "self"}, "self"),
        (BridgeSettings(raw="last"), {"teacher"}, "teacher"),
        (BridgeSettings(raw="last", max_mean_nll=0.2), {"teacher", "handover", "self"}, "self"),
    ],
)
def test_a_raw_trace_may_be_the_last_resort(settings: BridgeSettings, passed: set[str], chosen: str) -> None:
    """The raw trace has the lowest ratio, the student's own solution the highest, as on a real student."""
    scores = {"teacher": (3.6, 1.1), "handover": (5.0, 0.6), "self": (10.8, 0.1)}
    candidates = [
        BridgeCandidate(
            Trace("p", name, name, Learnability(ratio, mean_nll, 50)),  # type: ignore[arg-type]
            None if name in passed else Fault("final answer does not verify"),
            num_steps=3,
        )
        for name, (ratio, mean_nll) in scores.items()
    ]
    found = most_learnable(candidates, settings)
    assert found is not None
    assert found.provenance == chosen


def test_a_near_impossible_trace_is_the_last_resort(student: Student) -> None:
    [only] = run_bridge(student, BridgeSettings(max_trace_tokens=400, max_mean_nll=1e-9, handover=False), 1)
    passed = [c.trace for c in only.candidates if c.rejected is None]
    assert only.chosen == min(passed, key=lambda t: t.learnability.mean_nll if t.learnability else 1e9)


def test_a_handover_that_is_not_verified_is_rejected_and_kept_with_its_fault(student: Student) -> None:
    candidates = [c for r in run_bridge(student, BridgeSettings(max_trace_tokens=400), 24) for c in r.candidates]
    kinds = {(c.trace.provenance, c.rejected.kind) for c in candidates if c.rejected}
    assert kinds
    assert kinds <= {("handover", "final answer does not verify"), ("handover", "false equation")}


class NoTeacher(TraceTeacher):
    """A dataset without solutions."""

    def solve(self, problems: Sequence[Problem]) -> list[str | None]:
        return [None] * len(problems)


@pytest.mark.parametrize("select", [True, False])
def test_without_a_trace_the_students_own_solution_is_taken(student: Student, select: bool) -> None:
    problems = make_problems("chain", "train", 4, (3,))
    own = [Trace(p.id, true_solution(p), "self") for p in problems[:3]]
    own[2] = Trace(problems[2].id, spoiled(problems[2], 0), "self")
    settings = BridgeSettings(select=select, max_trace_tokens=400)
    bridge = Bridge(student, HFEngine(), NoTeacher(), REWARD, settings)
    results = bridge.make(problems, Sampling(80, temperature=0.0), Material(traces=own))
    assert [result.chosen.provenance if result.chosen else None for result in results] == ["self", "self", None, None]
    assert [len(result.candidates) for result in results] == [1, 1, 1, 0]
    assert results[2].candidates[0].rejected


@pytest.mark.parametrize("select", [True, False])
def test_the_solution_that_came_with_a_problem_is_a_candidate_whoever_the_teacher_is(
    student: Student, select: bool
) -> None:
    [known] = make_problems("chain", "train", 1, (3,))
    both = replace(known, trace=f"{true_solution(known)} And so on.")
    alone = Problem("p-1", "What is 2 + 3?", "5", "2 + 3 = <<2+3=5>>5\n#### 5")
    wrong = Problem("p-2", "What is 2 + 4?", "6", "2 + 4 = 7\n#### 7")
    unclosed = Problem("p-3", "What is 2 + 5?", "7", "<think>2 + 5 = 7")
    settings = BridgeSettings(select=select, handover=False, max_trace_tokens=400)
    problems = [both, alone, wrong, unclosed, Problem("p-4", "What is 2 + 6?", "8")]
    results = Bridge(student, HFEngine(), TEACHER, REWARD, settings).make(problems, Sampling(80, temperature=0.0))
    texts = [[candidate.trace.text for candidate in result.candidates] for result in results]
    assert texts[0][:2] == [TEACHER.solve([known])[0], both.trace]
    assert results[1].chosen is not None
    assert texts[1] == [results[1].chosen.text] == ["2 + 3 = 5\nThe answer is \\boxed{5}."]
    assert [result.chosen is None for result in results[2:]] == [True] * 3
    unusable = Fault("the dataset's solution cannot be used", "the block of thoughts never closes")
    assert results[3].candidates[0].rejected == unusable
    said = traces_said(results)
    assert "3 of 5 problems have none and are left out: " in said
    for reason in ("final answer does not verify (1)", "the dataset's solution cannot be used (1)", NO_CANDIDATE):
        assert reason in said
    assert said.endswith("(chosen: teacher (2))")
    assert traces_said(results[:1]) == "traces: all 1 problems have one (chosen: teacher (1))"


def test_a_teacher_is_asked_again_where_only_the_dataset_had_a_solution(student: Student) -> None:
    problem = Problem("p-1", "What is 2 + 3?", "5", "2 + 3 = 5\n#### 5")
    asked: list[str] = []

    class Later(ProceduralTeacher):
        def solve(self, problems: Sequence[Problem]) -> list[str | None]:
            asked.extend(problem.id for problem in problems)
            return [None] * len(problems)

    settings = BridgeSettings(select=False, max_trace_tokens=400)
    known: list[Trace] = []
    for _ in range(2):
        bridge = Bridge(student, HFEngine(), Later(), REWARD, settings)
        [result] = bridge.make([problem], Sampling(80), Material(written=known))
        known = [candidate.trace for candidate in result.candidates]
        assert len(known) == 1
    assert asked == ["p-1", "p-1"]
