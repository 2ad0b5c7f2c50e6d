"""pass@1, unbiased pass@k and maj@k as torchmetrics, each with an interval over problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from slmreason.records import RolloutGroup, wilson_interval
from slmreason.verify.notation import tidy
from slmreason.verify.quantities import exact, without_unit
from slmreason.verify.rewards import read_answer


class ShareOfProblems(Metric):
    """Mean over problems of a score in [0, 1], with a 95 % interval.

    The interval is Wilson's when every score is 0 or 1, else a percentile bootstrap over problems with a fixed seed.
    """

    full_state_update = False
    scores: list[Tensor]

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, groups: Sequence[RolloutGroup]) -> None:
        """Adds the score of each group.

        Raises:
            ValueError: a group has fewer than k rollouts.
        """
        for group in groups:
            if len(group.rollouts) < self.k:
                raise ValueError(f"problem {group.problem.id}: {len(group.rollouts)} rollouts, k is {self.k}")
        self.scores.append(torch.tensor([self.score(group) for group in groups], dtype=torch.float64))

    def score(self, group: RolloutGroup) -> float:
        raise AssertionError("a subclass scores a group")

    def compute(self) -> Tensor:
        return dim_zero_cat(self.scores).mean()

    def interval(self, resamples: int = 1000) -> tuple[float, float]:
        scores = dim_zero_cat(self.scores)
        if bool(((scores == 0) | (scores == 1)).all()):
            return wilson_interval(float(scores.sum()), len(scores))
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(scores), (resamples, len(scores)), generator=generator)
        means = scores.cpu()[draws].mean(dim=1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
        return low, high


class PassAtK(ShareOfProblems):
    """Unbiased pass@k: `1 - C(n - c, k) / C(n, k)` with c of n rollouts right (arXiv 2107.03374, eq. 1)."""

    def score(self, group: RolloutGroup) -> float:
        return pass_at_k(len(group.rollouts), group.num_correct, self.k)


class MajAtK(ShareOfProblems):
    """maj@k: whether the most frequent answer of the first k rollouts is right (arXiv 2203.11171).

    Numbers are equal in value, other answers as text; of equally frequent answers the one seen first counts, and a
    rollout without an answer has no vote.
    """

    def score(self, group: RolloutGroup) -> float:
        votes: Counter[str] = Counter()
        right: dict[str, bool] = {}
        for rollout in group.rollouts[: self.k]:
            answer = read_answer(group.problem, rollout.text, rollout.truncated)
            if answer is not None:
                value, _ = without_unit(tidy(answer))
                number = exact(value)
                key = value if number is None else f"{number.value}{'%' if number.is_percent else ''}"
                votes[key] += 1
                right.setdefault(key, rollout.correct)
        return float(right[votes.most_common(1)[0][0]]) if votes else 0.0


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k rollouts, drawn without replacement from n with c right, is right."""
    return 1.0 - comb(n - c, k) / comb(n, k)
