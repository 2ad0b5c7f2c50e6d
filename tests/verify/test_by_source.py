"""Answers to several data sets, each graded by its own reward."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from slmreason.records import Problem, Reject
from slmreason.verify.by_source import RewardBySource
from slmreason.verify.rewards import RewardFn, Verdict
from slmreason.verify.verdicts import RewardError, graded_completions, try_rewards, verdict_on

A, B = Problem("a", "?", "1", source="a"), Problem("b", "?", "1", source="b")


class Fixed(RewardFn):
    """The same verdict on everything, and a note of what was asked."""

    def __init__(self, worth: float, finished: bool = False) -> None:
        self.worth, self.calls = worth, 0
        self.wants_finished_answer = finished  # type: ignore[misc]

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return Verdict(self.worth, True)

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        self.calls += 1
        return [self(problem, text) for problem, text in pairs]

    def drain_rejects(self) -> list[Reject]:
        return [Reject("x", "verifier", f"limit {self.worth}")]


class Broken(RewardFn):
    def __call__(self, problem: Problem, text: str) -> Verdict:
        return "yes"  # type: ignore[return-value]


def test_each_answer_is_graded_by_the_reward_of_its_source_in_one_call_for_each() -> None:
    own, default = Fixed(2.0), Fixed(3.0)
    reward = RewardBySource(default, {"a": own})
    verdicts = graded_completions(reward, [(A, "1"), (B, "1"), (A, "2"), (B, "2")], [False] * 4)
    assert [verdict.reward for verdict in verdicts] == [2.0, 3.0, 2.0, 3.0]
    assert (own.calls, default.calls) == (1, 1)
    assert verdict_on(reward, A, "1").reward == 2.0


def test_only_the_reward_that_wants_finished_answers_gets_them() -> None:
    reward = RewardBySource(Fixed(1.0, finished=True), {"a": Fixed(1.0)})
    verdicts = graded_completions(reward, [(A, "it may be 1"), (B, "it may be 1")], [True, True])
    assert [verdict.correct for verdict in verdicts] == [True, False]


def test_rejects_are_those_of_all() -> None:
    rejects = RewardBySource(Fixed(1.0), {"a": Fixed(2.0), "b": Fixed(3.0)}).drain_rejects()
    assert [reject.reason for reject in rejects] == ["limit 1.0", "limit 2.0", "limit 3.0"]


def test_every_reward_is_tried_and_a_broken_one_is_named() -> None:
    reward = RewardBySource(Fixed(1.0), {"b": Broken()})
    try_rewards(reward, [A, A])
    with pytest.raises(RewardError, match=r"reward: .*Broken: the verdict on a completion is 'yes'"):
        try_rewards(reward, [A, A, B])
