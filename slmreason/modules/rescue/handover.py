"""Hand-over groups: what no rollout solved is sampled again behind the first steps of its trace.

BREAD (arXiv 2506.17211), Prefix-RFT (2507.01679), POPE (2601.18779). The fewest steps behind which one of a few
continuations is right are found by `least_help`, all problems side by side; then the group is filled up. The steps
belong to the prompt, so the policy loss is on the student's own tokens alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slmreason.modules.rescue.base import Added, Rescue, SampledStep
from slmreason.modules.rescue.settings import RescueSettings
from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.records import Problem, RolloutGroup
from slmreason.rollout.collect import Begun, graded_groups
from slmreason.rollout.engine import Completion, RolloutEngine
from slmreason.runtime.distributed import map_over_processes
from slmreason.student import Student
from slmreason.supervision.handover import Handover, Help, least_help
from slmreason.supervision.sampled import Draws
from slmreason.verify.rewards import RewardFn
from slmreason.verify.verdicts import graded_completions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tried:
    """Continuations of the first steps of a problem's trace."""

    begun: Begun
    completions: list[Completion]


class HandoverGroups(Rescue):
    """Adds a group behind the least help, where such a group has right and wrong rollouts."""

    def __init__(
        self,
        student: Student,
        traces: VerifiedTraces,
        engine: RolloutEngine,
        reward: RewardFn,
        settings: RescueSettings,
        group_size: int,
    ) -> None:
        super().__init__(student, traces)
        self.engine, self.reward, self.settings, self.group_size = engine, reward, settings, group_size
        self._has_said_too_long = False

    def add(self, step: SampledStep, traces: Mapping[str, str]) -> Added:
        problems = [problem for problem in step.failed if problem.id in traces]
        if not problems:
            return Added(metrics={"tokens": 0.0})
        each = self.settings.max_sampled_tokens
        # The engine has had the present weights since the step began.
        search = Draws(self.student, self.engine, step.sampling, each and each * len(problems), step.watch, sync=False)
        found = self._search(problems, [traces[problem.id] for problem in problems], search)
        rest = Draws(
            self.student, self.engine, replace(step.sampling, first=self.settings.samples), None, step.watch, sync=False
        )
        groups = [group for group in self._filled(found, rest) if group.informative]
        metrics = {"tokens": float(search.spent + rest.spent)}
        if found:
            metrics["help"] = sum(each.share for each in found) / len(found)
        return Added(groups=groups, rescued=len(groups), metrics=metrics)

    def _search(self, problems: Sequence[Problem], traces: Sequence[str], draws: Draws) -> list[Help[Tried]]:
        """The least help of each problem for which one was found."""

        def continue_from(handovers: list[Handover]) -> list[Tried | None]:
            begun = [self._begun(handover) for handover in handovers]
            fitting = [index for index, each in enumerate(begun) if len(each.prompt_ids) <= draws.limit.tokens]
            self._say_too_long(len(handovers) - len(fitting), len(handovers), draws.limit.why)
            prompts = [begun[index].prompt_ids for index in fitting]
            drawn = draws.of(prompts, self.settings.samples, "handover")
            tried = [Tried(begun[index], group) for index, group in zip(fitting, drawn, strict=True)]
            right = map_over_processes(self._right, tried)
            outcomes: list[Tried | None] = [None] * len(handovers)
            for index, each, is_right in zip(fitting, tried, right, strict=True):
                outcomes[index] = each if is_right else None
            return outcomes

        helps = least_help(problems, traces, continue_from, may_go_on=draws.may_go_on)
        return [each for each in helps if each is not None]

    def _begun(self, handover: Handover) -> Begun:
        prompt, steps = self.student.encode_problem(handover.problem), self.student.chat.text(handover.prefix)
        return Begun(handover.problem, prompt + steps, steps)

    def _right(self, tried: Sequence[Tried]) -> list[bool]:
        """Of each, whether one of its continuations is right; there may be none."""
        pairs = [
            (each.begun.problem, self.student.decode_completion((*each.begun.answer_ids, *completion.token_ids)))
            for each in tried
            for completion in each.completions
        ]
        truncated = [completion.truncated for each in tried for completion in each.completions]
        verdicts = iter(graded_completions(self.reward, pairs, truncated))
        return [sum(next(verdicts).correct for _ in each.completions) > 0 for each in tried]

    def _filled(self, found: Sequence[Help[Tried]], draws: Draws) -> list[RolloutGroup]:
        """Whole groups, graded as those of the step are: the continuations of the search are their first."""
        if not found:
            return []
        tried = [each.outcome for each in found]
        more = self.group_size - self.settings.samples
        prompts = [each.begun.prompt_ids for each in tried]
        drawn = draws.of(prompts, more, "handover") if more else [[] for _ in tried]
        whole = [(each.begun, each.completions + rest) for each, rest in zip(tried, drawn, strict=True)]
        size = self.group_size
        return map_over_processes(lambda share: graded_groups(self.student, self.reward, share, size), whole)

    def _say_too_long(self, count: int, handovers: int, why: str) -> None:
        """Says it the first time in a fit."""
        if count and not self._has_said_too_long:
            self._has_said_too_long = True
            log.info("grpo.rescue: %d of %d hand-overs are not tried, their steps are too long: %s; lower "
                     "bridge.max_trace_tokens or grpo.max_completion_tokens", count, handovers, why)  # fmt: skip
