"""The procedural teacher, the Bridge and the critique builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from slmreason.curriculum.sets import NO_CANDIDATE, without_trace
from slmreason.embedded.families import FAMILIES, make_problems, rebuild, write_solution
from slmreason.records import Diagnosis, Exemplar, Problem, Rollout, RolloutGroup, Trace
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.supervision.bridge import BridgeSettings, bridge, check_trace, score_traces
from slmreason.supervision.critique import CritiqueSettings, critique, critique_examples, pick_attempts, prefix_before
from slmreason.teacher.dataset import TraceTeacher, tidy_trace
from slmreason.teacher.procedural import ProceduralTeacher, first_wrong_step
from slmreason.verify.answers import is_correct
from slmreason.verify.equations import false_equations
from slmreason.verify.rewards import AnswerReward

TEACHER, REWARD = ProceduralTeacher(), AnswerReward()


def true_solution(problem: Problem) -> str:
    return write_solution([step.text for step in rebuild(problem.id).steps], problem.answer)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_everything_the_procedural_teacher_writes_verifies(family: str) -> None:
    problems = make_problems(family, "train", 60)
    for texts in (TEACHER.solve(problems), TEACHER.new_trace(problems)):
        for problem, text in zip(problems, texts, strict=True):
            assert text is not None
            assert is_correct(text, problem.answer, problem.choices is not None)
            assert false_equations(text) == []


def test_raw_traces_leap_and_digress_and_the_rewrite_does_not() -> None:
    problems = make_problems("chain", "train", 40, (4, 5, 6))
    raw = [text or "" for text in TEACHER.solve(problems)]
    rewritten = [text or "" for text in TEACHER.rewrite(problems, raw, [])]
    assert sum(" - " in text and " + " in text or text.count(" + ") > 1 for text in raw) > 10  # two operations a line
    assert all(
        len(text.splitlines()) == len(rebuild(p.id).steps) + 1 for p, text in zip(problems, rewritten, strict=True)
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_true_solution_has_no_wrong_step(family: str) -> None:
    for problem in make_problems(family, "train", 20):
        assert first_wrong_step(rebuild(problem.id), true_solution(problem)) is None


def spoiled(problem: Problem, step: int) -> str:
    lines = true_solution(problem).splitlines()
    left, _, value = lines[step].partition("=")
    lines[step] = f"{left}={int(value) + 1}"
    return "\n".join(lines)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_first_wrong_step_is_found_and_explained(step: int) -> None:
    for problem in make_problems("chain", "train", 20, (4,)):
        [diagnosis] = TEACHER.locate([problem], [spoiled(problem, step)])
        assert diagnosis is not None
        assert diagnosis.wrong_step == step + 1
        assert rebuild(problem.id).steps[step].value in diagnosis.explanation


def test_other_ways_to_fail_are_located() -> None:
    [problem] = make_problems("chain", "train", 1, (3,))
    program, lines = rebuild(problem.id), true_solution(problem).splitlines()
    early = first_wrong_step(program, "\n".join([lines[0], lines[-1]]))
    assert early is not None
    assert early.wrong_step == 2
    assert "too early" in early.explanation
    cut = first_wrong_step(program, lines[0])
    assert cut is not None
    assert "2 more steps" in cut.explanation
    wrong_end = first_wrong_step(program, "\n".join([*lines[:-1], r"The answer is \boxed{0}."]))
    assert wrong_end is not None
    assert wrong_end.wrong_step == 4


def rollout(text: str, right: bool = False, truncated: bool = False) -> Rollout:
    return Rollout((1,), tuple(range(len(text))), (), text, float(right), right, truncated, 0)


def failed_group(problem: Problem, texts: Sequence[str]) -> RolloutGroup:
    return RolloutGroup(problem, tuple(rollout(text) for text in texts))


def test_attempts_with_different_wrong_answers_are_picked_shortest_first() -> None:
    [problem] = make_problems("chain", "train", 1, (2,))
    group = failed_group(problem, [r"long way \boxed{5}", r"\boxed{5}", r"\boxed{6}", r"it is \boxed{7}"])
    assert pick_attempts(group, 2) == [r"\boxed{5}", r"\boxed{6}"]


def test_critique_makes_three_kinds_and_each_verifies(student: Student) -> None:
    problems = make_problems("chain", "train", 6, (3,))
    records = critique(
        [failed_group(p, [spoiled(p, 1)]) for p in problems], TEACHER, student, REWARD, CritiqueSettings()
    )
    assert len(records) == 6
    for record in records:
        assert record.kinds == ("diagnosis", "repair", "new_trace")
        assert record.attempt.startswith(record.prefix)
        assert record.prefix == record.attempt.splitlines(keepends=True)[0]
        assert is_correct(record.prefix + (record.repair or ""), record.problem.answer)
        diagnosis, repair, new_trace = critique_examples(record, student, record.kinds)
        prompt = student.tokenizer.decode(list(diagnosis.prompt_ids))
        assert record.problem.question in prompt
        assert record.attempt in prompt
        assert student.decode(diagnosis.target_ids).startswith("Step 2 is wrong.")
        assert student.decode(repair.target_ids) == record.repair
        assert new_trace.prompt_ids == student.encode_question(record.problem.question)


class BadTeacher(ProceduralTeacher):
    """Calls wrong answers right, names steps that are not there, repairs into the void."""

    def __init__(self, diagnosis: Diagnosis | None) -> None:
        self.diagnosis = diagnosis

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        return [self.diagnosis] * len(problems)

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [r"2+2=5 so \boxed{1}"] * len(problems)


@pytest.mark.parametrize(
    ("diagnosis", "reason"),
    [
        (Diagnosis(1, "fine", "right"), "calls a wrong answer right"),
        (Diagnosis(99, "there"), "names a step that does not exist"),
        (None, "no diagnosis"),
        (Diagnosis(1, "wrong"), "repair: final answer does not verify"),
    ],
)
def test_what_a_bad_teacher_says_is_refused_with_the_reason(
    student: Student, diagnosis: Diagnosis | None, reason: str
) -> None:
    [problem] = make_problems("chain", "train", 1, (3,))
    [record] = critique(
        [failed_group(problem, [spoiled(problem, 0)])], BadTeacher(diagnosis), student, REWARD, CritiqueSettings()
    )
    assert any(reason in fault for fault in record.rejected)
    assert "repair" not in record.kinds
    assert "new_trace" in record.kinds


def test_prefix_before_keeps_the_text_to_the_letter() -> None:
    assert prefix_before("a \n\n b\nc", 3) == "a \n\n b\n"
    assert prefix_before("a", 1) == ""
    assert prefix_before("a", 2) is None


def test_check_trace_names_the_reason() -> None:
    problem = Problem("p", "q", "5")
    assert check_trace(problem, r"2+3=5 \boxed{5}", 9, 10, REWARD) is None
    assert "too long" in (check_trace(problem, r"\boxed{5}", 11, 10, REWARD) or "")
    assert "does not verify" in (check_trace(problem, r"\boxed{6}", 9, 10, REWARD) or "")
    assert check_trace(problem, r"2+2=5 \boxed{5}", 9, 10, REWARD) == "false equation: 2+2=5"


def run_bridge(student: Student, settings: BridgeSettings, count: int = 12):  # type: ignore[no-untyped-def]
    problems = make_problems("chain", "train", count, (4, 5))
    return bridge(problems, student, HFEngine(), TEACHER, REWARD, settings, Sampling(80, temperature=0.0))


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
        assert all(c.trace.learnability is not None for c in result.candidates)  # the fallen too


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
    first = bridge(problems[:4], student, HFEngine(), TEACHER, REWARD, settings, sampling)
    known = [c.trace for result in first for c in result.candidates if c.trace.provenance == "teacher"]
    known += [c.trace for result in first[:2] for c in result.candidates if c.trace.provenance == "bridged"]
    teacher, before = Counted(), student.tokens.written
    again = bridge(problems, student, HFEngine(), teacher, REWARD, settings, sampling, known=known)
    ids = [problem.id for problem in problems]
    assert teacher.asked == [("solve", ids[4:]), ("rewrite", ids[2:])]
    new = {("teacher", i) for i in ids[4:]} | {("bridged", i) for i in ids[2:]}
    candidates = [candidate.trace for result in again for candidate in result.candidates]
    paid = [trace.text for trace in candidates if (trace.provenance, trace.problem_id) in new]
    assert student.tokens.written - before == sum(len(student.encode_target(text)) for text in paid)
    fresh = bridge(problems, student, HFEngine(), TEACHER, REWARD, settings, sampling)
    assert [result.chosen for result in again] == [result.chosen for result in fresh]


def test_a_trace_known_by_heart_is_not_trained_on(student: Student) -> None:
    free = run_bridge(student, BridgeSettings(max_trace_tokens=400))
    scores = {r.problem.id: r.chosen.learnability.mean_nll for r in free if r.chosen and r.chosen.learnability}
    limit = sorted(scores.values())[len(scores) // 2]
    results = run_bridge(student, BridgeSettings(max_trace_tokens=400, min_mean_nll=limit))
    assert {r.problem.id for r in results if r.chosen is None} == {i for i, score in scores.items() if score < limit}
    for before, after in zip(free, results, strict=True):
        if after.chosen is None:
            [fallen] = [new for old, new in zip(before.candidates, after.candidates, strict=True) if old != new]
            assert fallen.trace == before.chosen
            assert (fallen.rejected or "").startswith("known by heart: ")
        else:
            assert after == before


def test_a_near_impossible_trace_is_the_last_resort(student: Student) -> None:
    [only] = run_bridge(student, BridgeSettings(max_trace_tokens=400, max_mean_nll=1e-9, handover=False), 1)
    passed = [c.trace for c in only.candidates if c.rejected is None]
    assert only.chosen == min(passed, key=lambda t: t.learnability.mean_nll if t.learnability else 1e9)


def test_a_handover_that_is_not_verified_is_dropped_and_kept_with_its_reason(student: Student) -> None:
    candidates = [c for r in run_bridge(student, BridgeSettings(max_trace_tokens=400), 24) for c in r.candidates]
    fallen = [c for c in candidates if c.rejected]
    assert fallen
    assert {c.trace.provenance for c in fallen} == {"handover"}
    assert all("does not verify" in (c.rejected or "") or "false equation" in (c.rejected or "") for c in fallen)


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
    results = bridge(
        problems, student, HFEngine(), NoTeacher(), REWARD, settings, Sampling(80, temperature=0.0), more=own
    )
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
    results = bridge(problems, student, HFEngine(), TEACHER, REWARD, settings, Sampling(80, temperature=0.0))
    texts = [[candidate.trace.text for candidate in result.candidates] for result in results]
    assert texts[0][:2] == [TEACHER.solve([known])[0], both.trace]
    assert results[1].chosen is not None
    assert texts[1] == [results[1].chosen.text] == ["2 + 3 = 5\nThe answer is \\boxed{5}."]
    assert [result.chosen is None for result in results[2:]] == [True] * 3
    assert (
        results[3].candidates[0].rejected == "the dataset's solution cannot be used: the block of thoughts never closes"
    )
    said = without_trace(results)
    assert "3 of 5 problems have none and are left out: " in said
    for reason in ("final answer does not verify (1)", "the dataset's solution cannot be used (1)", NO_CANDIDATE):
        assert reason in said


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
        [result] = bridge([problem], student, HFEngine(), Later(), REWARD, settings, Sampling(80), known=known)
        known = [candidate.trace for candidate in result.candidates]
        assert len(known) == 1
    assert asked == ["p-1", "p-1"]


def test_scores_do_not_depend_on_packing(student: Student) -> None:
    problems = make_problems("chain", "train", 8)
    texts = [true_solution(p) for p in problems]
    together = score_traces(problems, texts, student)
    alone = [score_traces([p], [t], student)[0] for p, t in zip(problems, texts, strict=True)]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.rank_surprisal_ratio == pytest.approx(theirs.rank_surprisal_ratio, rel=1e-3)
        assert ours.num_tokens == theirs.num_tokens


def test_trace_teacher_tidies_dataset_solutions() -> None:
    gsm8k = "He sold 48/2 = <<48/2=24>>24 clips.\n#### 24"
    assert tidy_trace(gsm8k, "24") == "He sold 48/2 = 24 clips.\nThe answer is \\boxed{24}."
    assert tidy_trace(r"so \boxed{3}", "3") == r"so \boxed{3}"
    assert tidy_trace("three", "3") == "three\nThe answer is \\boxed{3}."
    assert TraceTeacher().solve([Problem("p", "q", "3")]) == [None]
