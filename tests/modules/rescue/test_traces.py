"""Which trace a problem is rescued with, and why it has none."""

from __future__ import annotations

from dataclasses import replace

from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.records import Fault, Problem
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward, Verdict
from tests.modules.rescue.made import traces_of, with_solutions


class Counted(AnswerReward):
    """Counts what it is asked."""

    asked = 0

    def __call__(self, problem: Problem, text: str) -> Verdict:
        self.asked += 1
        return super().__call__(problem, text)


def test_what_the_bridge_chose_comes_before_what_came_with_the_problem(student: Student) -> None:
    first, second = with_solutions(2)
    traces = traces_of(student)
    traces.chosen = {first.id: "bridged"}
    assert traces.of([first, second]) == {first.id: "bridged", second.id: second.trace}


def test_a_solution_that_does_not_pass_is_none_and_is_verified_once(student: Student) -> None:
    [good] = with_solutions(1)
    problems = {
        "wrong": replace(good, id="wrong", trace="1 + 1 = 2\nThe answer is \\boxed{-7}."),
        "open": replace(good, id="open", trace="<think> one and one"),
        "none": replace(good, id="none", trace=None),
        "good": replace(good, id="good"),
    }
    reward = Counted()
    traces = VerifiedTraces(student, reward, 512)
    for _ in range(2):
        assert traces.of(list(problems.values())) == {
            "wrong": Fault("final answer does not verify"),
            "open": Fault("the dataset's solution cannot be used", "the block of thoughts never closes"),
            "none": Fault("the dataset has no solution of it"),
            "good": good.trace,
        }
    assert reward.asked == 2
    assert [traces.may_have(problem) for problem in problems.values()] == [True, True, False, True]


def test_a_solution_longer_than_a_completion_may_be_is_none(student: Student) -> None:
    [problem] = with_solutions(1)
    tokens = len(student.encode_target(problem.trace or ""))
    assert VerifiedTraces(student, AnswerReward(), tokens).of([problem]) == {problem.id: problem.trace}
    found = VerifiedTraces(student, AnswerReward(), tokens - 1).of([problem])
    assert found == {problem.id: Fault("too long", f"{tokens} tokens, the cap is {tokens - 1}")}
