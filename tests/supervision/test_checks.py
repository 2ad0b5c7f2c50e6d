"""Checks of a trace, and how learnable it is."""

from __future__ import annotations

import pytest

from slmreason.embedded.families import make_problems
from slmreason.records import Fault, Problem
from slmreason.student import Student
from slmreason.supervision.checks import shown_fault, trace_fault
from slmreason.supervision.learnability import score_traces
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.rewards import AnswerReward
from tests.supervision.solutions import true_solution

TEACHER, REWARD = ProceduralTeacher(), AnswerReward()


def test_a_fault_of_a_trace_has_its_kind_and_what_was_seen() -> None:
    problem = Problem("p", "q", "5")
    assert trace_fault(problem, r"2+3=5 \boxed{5}", 9, 10, REWARD) is None
    assert trace_fault(problem, r"\boxed{5}", 11, 10, REWARD) == Fault("too long", "11 tokens, the cap is 10")
    assert trace_fault(problem, r"\boxed{6}", 9, 10, REWARD) == Fault("final answer does not verify")
    assert trace_fault(problem, r"2+2=5 \boxed{5}", 9, 10, REWARD) == Fault("false equation", "2+2=5")


def test_what_is_written_with_a_solution_in_view_may_be_near_it_and_may_not_copy_or_mention_it() -> None:
    solution = "2 + 3 = 5\n5 * 2 = 10\nThe answer is \\boxed{10}."
    copied = Fault("copies the solution it was shown")
    assert shown_fault("2 + 3 = 5\n5 + 5 = 10\nThe answer is \\boxed{10}.", solution) is None
    assert shown_fault("2  + 3 = 5 5 * 2 = 10, so \\boxed{10}", solution) == copied
    assert shown_fault("First, \\boxed{10}", "\\boxed{10}\n") == copied  # a single line is all that it says
    for mention in ("the given solution", "The solution provided", "according to the solution", "In my own words"):
        found = shown_fault(f"{mention}: \\boxed{{10}}", solution)
        assert found == Fault("speaks of the solution it was shown", mention.removeprefix("the ").removeprefix("The "))
    for own in ("The original solution has 3 l of salt.", "so the correct answer is B", "That is the solution."):
        assert shown_fault(own, solution) is None


def test_scores_do_not_depend_on_packing(student: Student) -> None:
    problems = make_problems("chain", "train", 8)
    texts = [true_solution(p) for p in problems]
    together = score_traces(problems, texts, student)
    alone = [score_traces([p], [t], student)[0] for p, t in zip(problems, texts, strict=True)]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.rank_surprisal_ratio == pytest.approx(theirs.rank_surprisal_ratio, rel=1e-3)
        assert ours.num_tokens == theirs.num_tokens
