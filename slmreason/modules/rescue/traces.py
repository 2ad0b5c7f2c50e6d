"""The worked solutions that problems are rescued with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.records import Fault, Problem
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.supervision.checks import usable_solution
from slmreason.verify.rewards import RewardFn


class VerifiedTraces:
    """The trace of each problem that has one: what the Bridge chose, else what came with the problem, verified."""

    def __init__(self, student: Student, reward: RewardFn, max_tokens: int) -> None:
        """
        Args:
            max_tokens: a longer solution that came with a problem is not taken.
        """
        self.student, self.reward, self.max_tokens = student, reward, max_tokens
        self.chosen: Mapping[str, str] = {}
        """By problem id: those that have been verified, by the Bridge."""
        self._came: dict[str, str | Fault] = {}
        """By problem id: what came with it, once that has been verified."""

    def of(self, problems: Sequence[Problem]) -> dict[str, str | Fault]:
        """By problem id its trace, or why it has none. Every process must ask for the same problems.

        What is not known yet is verified, shared out over the processes, so that all go on with the same verdicts.
        """
        known = self.chosen.keys() | self._came.keys()
        new = list({problem.id: problem for problem in problems if problem.id not in known}.values())
        found = map_over_processes(lambda share: [self._checked(problem) for problem in share], new)
        self._came.update(zip((problem.id for problem in new), found, strict=True))
        return {p.id: self.chosen[p.id] if p.id in self.chosen else self._came[p.id] for p in problems}

    def may_have(self, problem: Problem) -> bool:
        """Whether there is a text at all, verified or not."""
        return problem.id in self.chosen or bool(problem.trace)

    def _checked(self, problem: Problem) -> str | Fault:
        return usable_solution(problem, self.student, self.max_tokens, self.reward)
