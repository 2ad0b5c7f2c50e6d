"""CHORD's mix of SFT and GRPO: `(1 - mu) L_GRPO + mu L_SFT`, mu falling (arXiv 2508.11408).

SFT has the traces of all problems of the step. Its tokens weigh `p (1 - p)`: `slmreason.objectives.trace_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from slmreason.modules.rescue.base import Added, Rescue, SampledStep, WeighedTrace
from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.records import Problem
from slmreason.student import Student


class Chord(Rescue):
    """Mixes SFT on the traces of a step's problems with GRPO."""

    def __init__(self, student: Student, traces: VerifiedTraces, mu: float, mu_end: float) -> None:
        super().__init__(student, traces)
        self.mu, self.mu_end = mu, mu_end

    def wanted(self, step: SampledStep) -> list[Problem]:
        return [group.problem for group in step.groups]

    def add(self, step: SampledStep, traces: Mapping[str, str]) -> Added:
        mu = falling(self.mu, self.mu_end, step.share_done)
        problems = {problem.id: problem for problem in self.wanted(step) if problem.id in traces}
        examples = [self.example(problem, traces[name]) for name, problem in problems.items()]
        tokens = sum(len(example.target_ids) for example in examples)
        weighed = [WeighedTrace(example, mu / tokens) for example in examples] if mu > 0 else []
        failed = sum(problem.id in traces for problem in step.failed) if weighed else 0
        return Added(traces=weighed, policy_scale=1 - mu, rescued=failed, metrics={"mu": mu})


def falling(begin: float, end: float, share: float) -> float:
    """From `begin` at share 0 to `end` at share 1 along half a cosine."""
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * share))
