"""What is believed of each problem's correctness rate rho, given what rollouts of older and newer policies showed.

Right and wrong rollouts of a problem are counted with a weight that halves each time the policy has moved by
`half_life` versions (optimizer steps); on top of a prior fitted to the pool these counts are a Beta posterior. All
functions are pure and take the whole pool at once; an array has one float64 for each problem unless its comment says
otherwise.

Source of the update `a <- lambda a + s, b <- lambda b + f`: arXiv 2507.04632.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HALF_LIFE = 32.0
"""Policy versions after which a rollout counts half, where nothing else is said."""
FALLBACK = 0.5, 0.5
"""The prior where the pool shows none: Jeffreys' of a proportion."""
ENOUGH = 20
"""Problems with evidence that a prior is fitted to, at least."""
STRENGTH = 0.2, 20.0
"""Bounds of a fitted prior's `a + b`: what a few odd problems show must not drown the evidence, nor be ignored."""
BLOCK = 1 << 15
"""Pairs that an incomplete beta function is computed of at a time: they stay in the processor's cache."""


@dataclass(frozen=True)
class Counts:
    """Weighted rollouts of each problem of a pool."""

    right: Array
    wrong: Array
    squares: Array
    """Sum of the squared weights of a problem's rollouts: `total**2 / squares` is how many equally weighted ones tell
    as much (Kish's effective sample size)."""

    @property
    def total(self) -> Array:
        return self.right + self.wrong


@dataclass(frozen=True)
class Prior:
    """Beta(a, b), what is believed of a problem before its own rollouts."""

    a: float = FALLBACK[0]
    b: float = FALLBACK[1]


def weight(versions: float, half_life: float) -> float:
    """What a rollout counts when the policy has moved by so many versions since."""
    return 0.5 ** (versions / half_life)


def fitted_prior(counts: Counts) -> Prior:
    """The prior that the pool shows: mean and spread of its correctness rates, by the method of moments.

    With r the rate of a problem, w its weight, n its effective number of rollouts, and sums over the N problems that
    have any: `p = sum(w r) / sum(w)`, `S = sum(w (r - p)^2)`. Binomial noise alone would give
    `E[S] = p (1 - p) sum(w (1 - w / W) / n)`; what `S` has beyond it is the pool's own spread, which gives the
    correlation `1 / (a + b + 1)` of two rollouts of one problem. `a + b` is kept within `STRENGTH`. Beta(0.5, 0.5)
    stands in where there are fewer than `ENOUGH` problems, all rollouts agree, or no problem has more than one.

    A probe that stops early samples the easy and the hard less than the medium; that moves `p` a little, and is left.
    Rollouts of problems that were chosen by what they had shown, as GRPO chooses, move all of it: they have no place
    here.

    Args:
        counts: what each problem of the pool showed when it was first sampled.

    Source: J. C. Kleinman, "Proportions with extraneous variance: single and independent samples", 1973.
    """
    has = counts.total > 1e-6  # what is older than twenty half-lives says nothing
    w = counts.total[has]
    if len(w) < ENOUGH:
        return Prior()
    r, n = counts.right[has] / w, w**2 / counts.squares[has]
    whole = w.sum()
    p = float((w * r).sum() / whole)
    spread, share = float((w * (r - p) ** 2).sum()), w * (1 - w / whole)
    noise = float((share / n).sum())
    most = p * (1 - p) * (float(share.sum()) - noise)
    if most <= 1e-9:
        return Prior()
    correlation = (spread - p * (1 - p) * noise) / most
    low, high = STRENGTH
    strength = min(high, max(low, 1 / correlation - 1)) if correlation > 0 else high
    return Prior(p * strength, (1 - p) * strength)


@dataclass(frozen=True)
class Posterior:
    """Beta(a, b) of each problem of a pool."""

    a: Array
    b: Array

    @classmethod
    def of(cls, counts: Counts, prior: Prior) -> Posterior:
        return cls(counts.right + prior.a, counts.wrong + prior.b)

    @property
    def mean(self) -> Array:
        """E[rho]"""
        return self.a / (self.a + self.b)

    def distinct(self) -> tuple[Posterior, NDArray[np.intp]]:
        """The different ones among these posteriors, and which of them each problem has: many share their counts."""
        a, of_a = np.unique(self.a, return_inverse=True)
        b, of_b = np.unique(self.b, return_inverse=True)
        # Sorting whole numbers is many times faster than sorting pairs.
        pairs, where = np.unique(of_a * len(b) + of_b, return_inverse=True)
        return Posterior(a[pairs // len(b)], b[pairs % len(b)]), where

    def bands(self, medium: float, simple: float) -> Array:
        """P(hard), P(medium), P(simple) of each problem. [problems, 3]

        Args:
            medium, simple: rho from which a problem is in these bands.
        """
        below_medium = below(self.a, self.b, medium)
        below_simple = below(self.a, self.b, simple) if simple < 1 else np.ones_like(self.a)
        shares = (below_medium, below_simple - below_medium, 1 - below_simple)
        return np.clip(np.stack(shares, axis=1), 0, 1)

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


def below(a: Array, b: Array, x: float) -> Array:
    """P(rho < x) under Beta(a, b): the regularised incomplete beta function I_x(a, b), to about 1e-10.

    Args:
        a, b: of one shape [n], all above 0.
        x: within 0 and 1.

    Source: the continued fraction of NIST DLMF 8.17.22, by the modified method of Lentz.
    """
    found = np.empty(len(a))
    for start in range(0, len(a), BLOCK):
        block = slice(start, start + BLOCK)
        found[block] = _incomplete_beta(a[block], b[block], x)
    return found


def _incomplete_beta(a: Array, b: Array, x: float) -> Array:
    # The fraction converges fast below the mean; above it I_x(a, b) = 1 - I_(1 - x)(b, a) is used.
    mirrored = x > (a + 1) / (a + b + 2)
    first, second = np.where(mirrored, b, a), np.where(mirrored, a, b)
    at = np.where(mirrored, 1 - x, x)
    front = log_gamma(a + b) - log_gamma(a) - log_gamma(b) + first * np.log(at) + second * np.log1p(-at)
    value: Array = np.exp(front) * _fraction(first, second, at) / first
    return np.where(mirrored, 1 - value, value)


def _fraction(a: Array, b: Array, x: Array) -> Array:
    tiny, c = 1e-300, np.ones_like(a)
    d = 1 / (1 - (a + b) * x / (a + 1) + tiny)
    value = d.copy()
    for m in range(1, 200):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / (1 + numerator * d + tiny)
            c = 1 + numerator / c + tiny
            step = c * d
            value *= step
        if np.abs(step - 1).max() < 1e-11:
            break
    return value


def log_gamma(x: Array) -> Array:
    """log Gamma(x) for x > 0: Stirling's series at x + 8, and the eight factors below it. NIST DLMF 5.11.1."""
    product = np.ones_like(x)
    for step in range(8):
        product *= x + step
    y = x + 8
    series = 1 / (12 * y) - 1 / (360 * y**3) + 1 / (1260 * y**5) - 1 / (1680 * y**7)
    value: Array = (y - 0.5) * np.log(y) - y + 0.5 * math.log(2 * math.pi) + series - np.log(product)
    return value
