"""What is believed of each problem's correctness rate rho, as Beta distributions, and what a group will probably tell.

All functions are pure and take many problems at once; an array has one float64 for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FALLBACK = 0.5, 0.5
"""The prior where the pool shows none: Jeffreys' of a proportion."""


@dataclass(frozen=True)
class Posterior:
    """Beta(a, b) of each problem of a pool."""

    a: Array
    b: Array

    @property
    def mean(self) -> Array:
        """E[rho]"""
        return self.a / (self.a + self.b)

    def informative(self, group_size: int) -> Array:
        """See `informative_probability`."""
        return informative_probability(self.a, self.b, group_size)

    def draws(self, rng: np.random.Generator) -> Array:
        """A draw of rho for each problem, for Thompson sampling."""
        return rng.beta(self.a, self.b)


def informative_probability(a: Array, b: Array, group_size: int) -> Array:
    """The probability that a group of G rollouts is neither all right nor all wrong.

    `1 - E[rho^G] - E[(1 - rho)^G] = 1 - B(a + G, b) / B(a, b) - B(a, b + G) / B(a, b)`. For a whole G these ratios of
    beta functions are products of G factors, which is exact and needs no logarithm.

    Args:
        a, b: of the Beta posteriors; of one shape, all above 0.
    """
    all_right, all_wrong = np.ones_like(a), np.ones_like(b)
    for drawn in range(group_size):
        all_right *= (a + drawn) / (a + b + drawn)
        all_wrong *= (b + drawn) / (a + b + drawn)
    return np.clip(1 - all_right - all_wrong, 0, 1)


def informative_rate(rho: Array, group_size: int) -> Array:
    """The same probability where rho is known, or drawn: `1 - rho^G - (1 - rho)^G`."""
    rate: Array = 1 - rho**group_size - (1 - rho) ** group_size
    return rate
