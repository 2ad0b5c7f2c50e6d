"""Beta posteriors of a pool: the functions against exact sums, the prior against a known one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slmreason.data.posterior import (
    FALLBACK,
    Counts,
    Posterior,
    Prior,
    below,
    fitted_prior,
    informative_probability,
    informative_rate,
    weight,
)


def counted(right: np.ndarray, attempts: int) -> Counts:
    """Unweighted rollouts."""
    return Counts(right.astype(float), attempts - right.astype(float), np.full(len(right), float(attempts)))


@pytest.mark.parametrize("x", [0.01, 0.25, 0.75, 0.99])
def test_the_incomplete_beta_function_is_a_binomial_sum_at_whole_numbers(x: float) -> None:
    a, b = (each.ravel().astype(float) for each in np.meshgrid(np.arange(1, 40), np.arange(1, 40)))
    n = a + b - 1
    theirs = [
        sum(math.comb(int(m), j) * x**j * (1 - x) ** (int(m) - j) for j in range(int(k), int(m) + 1))
        for k, m in zip(a, n, strict=True)
    ]
    np.testing.assert_allclose(below(a, b, x), theirs, atol=1e-10)


def test_the_incomplete_beta_function_is_an_arcsine_at_one_half() -> None:
    half, x = np.array([0.5]), 0.3
    np.testing.assert_allclose(below(half, half, x), 2 / math.pi * math.asin(math.sqrt(x)), atol=1e-9)


def test_an_informative_group_is_as_likely_as_the_formula_by_log_gamma_says() -> None:
    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    rng, size = np.random.default_rng(0), 8
    a, b = rng.uniform(0.05, 60, 200), rng.uniform(0.05, 60, 200)
    theirs = [
        1 - math.exp(log_beta(p + size, q) - log_beta(p, q)) - math.exp(log_beta(p, q + size) - log_beta(p, q))
        for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(informative_probability(a, b, size), theirs, atol=1e-10)


def test_an_informative_group_is_as_likely_as_drawn_rates_say() -> None:
    a, b = np.array([0.4, 3.0, 9.0]), np.array([0.4, 6.0, 0.5])
    rng = np.random.default_rng(0)
    drawn = np.array([informative_rate(Posterior(a, b).draws(rng), 8) for _ in range(20_000)])
    np.testing.assert_allclose(drawn.mean(axis=0), informative_probability(a, b, 8), atol=0.01)


def test_the_different_posteriors_of_a_pool_are_given_once_each() -> None:
    rng = np.random.default_rng(0)
    pool = Posterior(0.5 + rng.integers(0, 9, 500), 0.5 + rng.integers(0, 5, 500))
    distinct, where = pool.distinct()
    np.testing.assert_array_equal(distinct.a[where], pool.a)
    np.testing.assert_array_equal(distinct.b[where], pool.b)
    assert len(distinct.a) == len(set(zip(pool.a.tolist(), pool.b.tolist(), strict=True))) < 500


def test_one_rollout_is_never_an_informative_group() -> None:
    np.testing.assert_allclose(informative_probability(np.array([0.3]), np.array([7.0]), 1), 0, atol=1e-12)


def test_the_prior_of_a_pool_is_found_again() -> None:
    rng = np.random.default_rng(0)
    rho = rng.beta(0.6, 1.4, 20_000)
    prior = fitted_prior(counted(rng.binomial(8, rho), 8))
    assert (prior.a, prior.b) == pytest.approx((0.6, 1.4), rel=0.05)


def test_the_prior_is_found_again_from_faded_counts() -> None:
    rng = np.random.default_rng(0)
    rho, fade = rng.beta(0.6, 1.4, 20_000), rng.uniform(0.2, 1, 20_000)
    right = rng.binomial(8, rho)
    prior = fitted_prior(Counts(right * fade, (8 - right) * fade, 8 * fade**2))
    assert (prior.a, prior.b) == pytest.approx((0.6, 1.4), rel=0.05)


def test_a_pool_of_equal_problems_has_a_strong_prior_within_the_bound() -> None:
    rng = np.random.default_rng(0)
    prior = fitted_prior(counted(rng.binomial(8, 0.5, 2000), 8))
    assert 15 < prior.a + prior.b <= 20
    assert prior.a / (prior.a + prior.b) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("right", "attempts"), [(np.array([0, 4, 8] * 6), 8), (np.zeros(100), 8), (np.array([0, 1] * 50), 1)],
    ids=["few problems", "all agree", "one rollout each"],
)  # fmt: skip
def test_a_pool_that_shows_no_prior_gets_the_fallback(right: np.ndarray, attempts: int) -> None:
    assert fitted_prior(counted(right, attempts)) == Prior(*FALLBACK)


def test_band_probabilities_sum_to_one_and_follow_the_evidence() -> None:
    posterior = Posterior(np.array([0.5, 4.5, 8.5]), np.array([8.5, 4.5, 0.5]))
    shares = posterior.bands(medium=0.25, simple=0.75)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)
    assert shares.argmax(axis=1).tolist() == [0, 1, 2]


def test_no_problem_is_above_a_simple_band_that_begins_at_one() -> None:
    assert Posterior(np.array([9.0]), np.array([0.5])).bands(medium=0.25, simple=1.0)[0, 2] == 0


def test_a_rollout_counts_half_after_the_half_life() -> None:
    assert (weight(0, 32), weight(32, 32), weight(64, 32)) == (1, 0.5, 0.25)
