"""A pool of several data sets, each with the verifier that its answers need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.records import Problem, Reject
from slmreason.verify.rewards import RewardFn, Verdict
from slmreason.verify.verdicts import graded, verdict_on


class RewardBySource(RewardFn):
    """Has the answers to each data set graded by its own reward, by the source of the problem."""

    def __init__(self, default: RewardFn, by_source: Mapping[str, RewardFn]) -> None:
        """
        Args:
            default: of the data sets that have none of their own.
            by_source: rewards by `Problem.source`.
        """
        self.default, self.by_source = default, dict(by_source)

    def reward_for(self, problem: Problem) -> RewardFn:
        return self.by_source.get(problem.source, self.default)

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return verdict_on(self.reward_for(problem), problem, text)

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        places: dict[int, list[int]] = {}
        for at, (problem, _) in enumerate(pairs):
            places.setdefault(id(self.reward_for(problem)), []).append(at)
        verdicts: dict[int, Verdict] = {}
        for mine in places.values():
            reward = self.reward_for(pairs[mine[0]][0])
            verdicts |= dict(zip(mine, graded(reward, [pairs[at] for at in mine]), strict=True))
        return [verdicts[at] for at in range(len(pairs))]

    def drain_rejects(self) -> list[Reject]:
        rewards = {id(reward): reward for reward in (self.default, *self.by_source.values())}
        return [reject for reward in rewards.values() for reject in reward.drain_rejects()]
