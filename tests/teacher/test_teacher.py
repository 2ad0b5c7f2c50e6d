"""The teachers that write without a model: procedural, and the dataset's own solutions."""

from __future__ import annotations

import pytest

from slmreason.embedded.families import FAMILIES, make_problems, rebuild
from slmreason.records import Problem
from slmreason.teacher.dataset import TraceTeacher, tidy_trace
from slmreason.teacher.procedural import ProceduralTeacher, first_wrong_step
from slmreason.verify.answers import is_correct
from slmreason.verify.equations import false_equations
from slmreason.verify.rewards import AnswerReward
from tests.supervision.solutions import spoiled, true_solution

TEACHER, REWARD = ProceduralTeacher(), AnswerReward()


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


def test_trace_teacher_tidies_dataset_solutions() -> None:
    gsm8k = "He sold 48/2 = <<48/2=24>>24 clips.\n#### 24"
    assert tidy_trace(gsm8k, "24") == "He sold 48/2 = 24 clips.\nThe answer is \\boxed{24}."
    assert tidy_trace(r"so \boxed{3}", "3") == r"so \boxed{3}"
    assert tidy_trace("three", "3") == "three\nThe answer is \\boxed{3}."
    assert TraceTeacher().solve([Problem("p", "q", "3")]) == [None]
