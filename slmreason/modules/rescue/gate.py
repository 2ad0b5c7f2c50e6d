"""The SFT gate: what no rollout solved is supervised in the same step, and everything else is left to GRPO.

HPT, arXiv 2509.04419: each problem has either the RL loss or, where too few of its rollouts are right (here none), the
SFT loss; the loss of a step is the mean over its problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slmreason.modules.rescue.base import Added, Rescue, SampledStep, WeighedTrace
from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.student import Student


class SFTGate(Rescue):
    """Adds SFT on the traces of what no rollout solved."""

    def __init__(self, student: Student, traces: VerifiedTraces, weight: float) -> None:
        """
        Args:
            weight: of such a problem's loss.
        """
        super().__init__(student, traces)
        self.weight = weight

    def add(self, step: SampledStep, traces: Mapping[str, str]) -> Added:
        gated = [problem for problem in step.failed if problem.id in traces]
        if not gated:
            return Added()
        examples = [self.example(problem, traces[problem.id]) for problem in gated]
        lengths = [len(example.target_ids) for example in examples]
        informative = sum(group.informative for group in step.groups)
        scale, weights = gate_weights(informative, lengths, self.weight)
        weighed = [WeighedTrace(example, weight) for example, weight in zip(examples, weights, strict=True)]
        return Added(traces=weighed, policy_scale=scale, rescued=len(gated))


def gate_weights(informative: int, lengths: Sequence[int], weight: float) -> tuple[float, list[float]]:
    """The weights that make the loss of a step the mean over the problems that it trains on.

    Args:
        informative: groups that the policy loss is a mean over.
        lengths: target tokens of each trace; each trace counts as a problem, by its mean over tokens.
        weight: of a trace beside a group.

    Returns:
        (what the policy loss is multiplied by, the weight of each target token of each trace).
    """
    problems = informative + len(lengths)
    return informative / problems, [weight / (problems * length) for length in lengths]
