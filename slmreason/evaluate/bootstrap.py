"""Intervals of means over runs: seeds and problems are drawn anew, the same ones for every arm.

Runs differ by seed, and a benchmark is a sample of problems: an interval is of both. Since all arms have the same
draws, a difference between two of them is paired in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def signed(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def estimate(centre: float, draws: Numbers) -> Estimate:
    """The percentile interval of draws of shape (draws,), about the value itself."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(centre), float(low), float(high))


def shared_seeds(runs: Iterable[tuple[str, int]], arms: Sequence[str]) -> tuple[list[str], list[int]]:
    """Which of the arms have runs, in the order of `arms`, and the seeds that all of those have.

    Args:
        runs: (arm, seed) of each run.

    Raises:
        ValueError: there is no such seed.
    """
    found = set(runs)
    present = [arm for arm in arms if any(name == arm for name, _ in found)]
    seeds = (
        sorted(set.intersection(*({seed for name, seed in found if name == arm} for arm in present))) if present else []
    )
    if not seeds:
        raise ValueError("no seed has come to its end in every arm")
    return present, seeds


def resampled(right: Mapping[str, Mapping[str, Numbers]], rng_seed: int = 0) -> dict[str, dict[str, Numbers]]:
    """Means over seeds and problems, `DRAWS` times: arm -> benchmark -> (draws, ...).

    Args:
        right: arm -> benchmark -> verdicts as 0 and 1, (seeds, ..., problems); all arms have the same seeds, benchmarks
            and problems in the same order.
    """
    rng = np.random.default_rng(rng_seed)
    first = next(iter(right.values()))
    seeds = next(iter(first.values())).shape[0]
    seed_weights = _weights(rng, seeds)  # (draws, seeds)
    draws: dict[str, dict[str, Numbers]] = {arm: {} for arm in right}
    for name, verdicts in first.items():
        problem_weights = _weights(rng, verdicts.shape[-1])  # (draws, problems)
        for arm in right:
            by_seed = np.tensordot(problem_weights, right[arm][name], axes=(1, -1))  # (draws, seeds, ...)
            draws[arm][name] = np.einsum("ds,ds...->d...", seed_weights, by_seed)
    return draws


def _weights(rng: np.random.Generator, count: int) -> Numbers:
    """How often each of `count` things is drawn, as a share: (draws, count)."""
    return rng.multinomial(count, [1 / count] * count, DRAWS) / count
