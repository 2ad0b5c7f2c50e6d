"""What a posterior says of groups, against sums over its distribution."""

from __future__ import annotations

import numpy as np
import pytest

from slmreason.data.posterior import Posterior, informative_probability, informative_rate


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.5, 6.5), (8.5, 0.5)])
@pytest.mark.parametrize("group_size", [2, 8])
def test_the_probability_is_the_mean_of_the_rate_over_the_posterior(a: float, b: float, group_size: int) -> None:
    rho = np.random.default_rng(0).beta(a, b, size=200_000)
    [ours] = informative_probability(np.array([a]), np.array([b]), group_size)
    assert ours == pytest.approx(informative_rate(rho, group_size).mean(), abs=3e-3)


def test_a_coin_of_group_two_is_mixed_every_second_time() -> None:
    assert informative_rate(np.array([0.5, 0.0, 1.0]), 2).tolist() == [0.5, 0.0, 0.0]


def test_draws_are_of_each_problem_s_own_posterior() -> None:
    posterior = Posterior(np.array([900.0, 1.0]), np.array([1.0, 900.0]))
    high, low = posterior.draws(np.random.default_rng(0))
    assert high > 0.9 > 0.1 > low
