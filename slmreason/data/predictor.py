"""A prior of each problem's correctness rate rho from the scores of its trace, and whether that prior is worth using.

How likely a trace is under the student (mean NLL, rank-surprisal ratio, NLL of the final answer, length) costs one
forward pass, and is there for problems that were never sampled. A logistic regression with a ridge, fitted to the
problems that were, gives each problem its expected rate; how much that counts for, the `a + b` of its Beta prior, is
chosen by the likelihood of rollouts that the regression has not seen. All functions are pure; an array has one float64
for each problem unless its comment says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slmreason.data.posterior import Array, Counts, fitted_prior, log_gamma
from slmreason.records import TraceScores

ENOUGH = 40
"""Problems with scores and evidence that a regression is fitted to, at least."""
LEAST_CORRELATION = 0.2
"""Held-out rank correlation below which the prediction is not used."""
FOLDS = 5
"""Parts of the problems with evidence; each is predicted from the others."""
RIDGE = 1.0
STRENGTHS = 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 20.0
"""What is tried for `a + b` of the priors."""
BOUND = 0.01
"""Predicted rates are kept so far from 0 and 1: no score makes a problem impossible."""
MOST_RATIO = 1e4
"""Rank-surprisal ratios are capped here; that of a trace known by heart is infinite."""
FAR = 3.0
"""Standard deviations from the mean at which a feature is cut off."""


@dataclass(frozen=True)
class Predicted:
    """What the scores of traces say of each problem's rho."""

    mean: Array
    """Expected rate of each problem that has scores; of those with evidence, by the problems outside of their fold."""
    strength: float
    """`a + b` of the Beta prior of each."""
    measured: int
    """Problems with scores and evidence, which the regression is fitted to."""
    correlation: float
    """Spearman's rank correlation of predicted and observed rates, each predicted by the problems outside its fold."""
    gain: float
    """By how much the rollouts of such a problem are likelier than on the prior that the pool's rates show, in nats."""
    off: str | None = None
    """Why the prediction is not used; None where it is."""

    @property
    def is_used(self) -> bool:
        return self.off is None

    def metrics(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"rank_correlation": self.correlation, "gain_nats": self.gain, "strength": self.strength}
        return {"used": float(self.is_used), "measured": self.measured, **{k: round(v, 4) for k, v in found.items()}}

    @property
    def a(self) -> Array:
        return self.strength * self.mean

    @property
    def b(self) -> Array:
        return self.strength * (1 - self.mean)


def features(scores: Sequence[TraceScores]) -> Array:
    """Mean NLL, logarithm of the rank-surprisal ratio, NLL of the answer, logarithm of the length. [problems, 4]

    Each has mean 0 and standard deviation 1 over these problems, and is cut off at `FAR`.
    """
    raw = np.array([
        (each.mean_nll, min(each.rank_surprisal_ratio, MOST_RATIO), each.answer_nll, max(1, each.num_tokens))
        for each in scores
    ]).reshape(-1, 4)  # fmt: skip
    raw[:, (1, 3)] = np.log(np.maximum(raw[:, (1, 3)], 1 / MOST_RATIO))
    spread = raw.std(axis=0)
    standard: Array = (raw - raw.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    return np.clip(standard, -FAR, FAR)


def predict(x: Array, counts: Counts) -> Predicted:
    """Fits the rates of the problems with evidence, and says of all what that predicts.

    Args:
        x: what is known without sampling. [problems, features]
        counts: what each problem showed when it was first sampled; later rollouts are of problems that were chosen by
            what they had shown. One with less than a whole rollout's weight counts as not measured.
    """
    has = counts.total >= 1
    pool = Counts(counts.right[has], counts.wrong[has], counts.squares[has])
    measured, flat = len(pool.right), np.full(len(x), 0.5)
    if measured < ENOUGH:
        off = f"{measured} problems with a trace have evidence, a regression needs {ENOUGH}"
        return Predicted(flat, 1.0, measured, 0.0, 0.0, off)
    if not 0 < pool.right.sum() < pool.total.sum():
        return Predicted(flat, 1.0, measured, 0.0, 0.0, "all rollouts agree")
    held_out = held_out_rates(x[has], pool)
    correlation = spearman(held_out, pool.right / pool.total)
    strength, gain = best_strength(held_out, pool)
    mean = rates_of(x, logistic_ridge(x[has], pool))
    mean[has] = held_out
    return Predicted(mean, strength, measured, correlation, gain, _why_not(correlation, gain))


def _why_not(correlation: float, gain: float) -> str | None:
    if correlation < LEAST_CORRELATION:
        return f"its rank correlation with rho on held-out problems is {correlation:.2f}, below {LEAST_CORRELATION}"
    if gain <= 0:
        return "held-out rollouts are no likelier by it than by the pool's own prior"
    return None


def held_out_rates(x: Array, counts: Counts) -> Array:
    """The rate of each problem, predicted from the problems of the other folds; every fifth is in one fold.

    Args:
        x: [problems, features]
        counts: of each problem at least one rollout's weight.
    """
    fold = np.arange(len(x)) % FOLDS
    rates = np.empty(len(x))
    for number in range(min(FOLDS, len(x))):
        others = fold != number
        seen = Counts(counts.right[others], counts.wrong[others], counts.squares[others])
        rates[~others] = rates_of(x[~others], logistic_ridge(x[others], seen))
    return rates


def logistic_ridge(x: Array, counts: Counts, ridge: float = RIDGE) -> Array:
    """Coefficients of a logistic regression of the rates on x, the constant first. [1 + features]

    They maximise `sum_i w_i (r_i log m_i + (1 - r_i) log(1 - m_i)) - ridge / 2 |beta - beta_0|^2` by Newton's method,
    with `m = 1 / (1 + exp(-beta x))`, `r` the observed rate, and beta_0 the rate of all with no slope. The n rollouts
    of a problem go together: `w = 2 n / (n + 1)` is how many independent ones tell as much where any two of them have
    a correlation of one half (the design effect of L. Kish, "Survey Sampling", 1965).

    Args:
        x: [problems, features]
        counts: of each problem at least one rollout's weight.
    """  # fmt: skip
    with_constant = np.column_stack([np.ones(len(x)), x])
    rates, weights = counts.right / counts.total, 2 * counts.total / (counts.total + 1)
    centre = np.zeros(with_constant.shape[1])
    mean_rate = np.clip(np.average(rates, weights=weights), BOUND, 1 - BOUND)
    centre[0] = np.log(mean_rate / (1 - mean_rate))
    beta = centre.copy()
    for _ in range(100):
        mean = 1 / (1 + np.exp(-with_constant @ beta))
        gradient = with_constant.T @ (weights * (rates - mean)) - ridge * (beta - centre)
        curvature = (with_constant.T * (weights * mean * (1 - mean))) @ with_constant + ridge * np.eye(len(beta))
        step = np.linalg.solve(curvature, gradient)
        largest = float(np.abs(step).max())
        beta += step * min(1.0, 2.0 / max(largest, 1e-300))  # far from the optimum Newton's steps overshoot
        if largest < 1e-10:
            break
    found: Array = beta
    return found


def rates_of(x: Array, coefficients: Array) -> Array:
    """The rates that coefficients predict, kept `BOUND` from 0 and 1."""
    rates: Array = np.clip(1 / (1 + np.exp(-coefficients[0] - x @ coefficients[1:])), BOUND, 1 - BOUND)
    return rates


def best_strength(mean: Array, counts: Counts) -> tuple[float, float]:
    """The strength of the priors with these means by which the rollouts are likeliest, and what that gains.

    Returns:
        (`a + b`, nats a problem more than on the one prior that the rates themselves show).
    """
    pool = fitted_prior(counts)
    found = {each: float(likelihoods(counts, each * mean, each * (1 - mean)).mean()) for each in STRENGTHS}
    strength = max(found, key=lambda each: found[each])
    one = np.ones_like(mean)
    return strength, found[strength] - float(likelihoods(counts, pool.a * one, pool.b * one).mean())


def likelihoods(counts: Counts, a: Array, b: Array) -> Array:
    """Log-likelihood of each problem's rollouts, in their order: `log B(a + s, b + f) - log B(a, b)`, in nats.

    Args:
        a, b: of the Beta of each problem, all above 0.
    """
    right, wrong = counts.right, counts.wrong
    after = log_gamma(a + right) + log_gamma(b + wrong) - log_gamma(a + b + right + wrong)
    found: Array = after - log_gamma(a) - log_gamma(b) + log_gamma(a + b)
    return found


def spearman(first: Array, second: Array) -> float:
    """Spearman's rank correlation; ties have the mean of their ranks. 0 where one of them does not vary."""
    ranks = [ranks_of(each) for each in (first, second)]
    centred = [each - each.mean() for each in ranks]
    scale = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else 0.0


def ranks_of(values: Array) -> Array:
    """Ranks from 1 on; equal values have the mean of theirs."""
    _, where, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    ranks: Array = (ends - (sizes - 1) / 2)[where.reshape(-1)]
    return ranks
