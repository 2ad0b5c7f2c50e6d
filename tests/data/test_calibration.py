"""Simulated pools: true rates are known and the policy drifts, so bands can be compared with the true ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.posterior import fitted_prior
from slmreason.data.strata import Bands, likeliest, stratify
from slmreason.records import Evidence, Place, Problem

STEPS = 12
"""Policy versions between two times that the pool is sampled."""
TIMES = 4


def simulated(seed: int, size: int = 3000, drift: float = 0.15) -> tuple[list[Evidence], np.ndarray]:
    """Eight rollouts of each problem at each of `TIMES`, and the true rates at the last.

    Rates begin as Beta(0.4, 0.4) and walk in log-odds, most of them upwards: the student learns.
    """
    rng = np.random.default_rng(seed)
    rho = np.clip(rng.beta(0.4, 0.4, size), 1e-4, 1 - 1e-4)
    shown = []
    for point in range(TIMES):
        if point:
            odds = np.log(rho / (1 - rho)) + rng.normal(drift, 2 * drift, size)
            rho = 1 / (1 + np.exp(-odds))
        right = rng.binomial(8, rho)
        shown += [Evidence(f"p{i}", 8, int(count), point * STEPS) for i, count in enumerate(right)]
    return shown, rho


def measured(shown: list[Evidence], rho: np.ndarray) -> dict[str, tuple[float, float]]:
    """(share of true bands, Brier score of the bands' probabilities) by evidence model, of the same rollouts.

    The newest eight alone say nothing of how sure they are; their probabilities are those of a posterior of them.
    """
    problems = [Problem(f"p{i}", "q", "a") for i in range(len(rho))]
    true = [Bands().of(rate) for rate in rho.tolist()]
    hot = np.array([[band == name for name in ("hard", "medium", "simple")] for band in true], dtype=float)
    found = {}
    for name, bands in (("newest", Bands()), ("posterior", Bands(evidence_model="posterior"))):
        ledger = Ledger(None, bands.fading)
        ledger.take(shown, Place(1, "grpo"))
        band_of = stratify(ledger, problems, bands).band_of
        right = float(np.mean([band_of[p.id] == band for p, band in zip(problems, true, strict=True)]))
        shares = ledger.posterior(problems).bands(0.25, 0.75)
        found[name] = right, float(((shares - hot) ** 2).sum(axis=1).mean())
    return found


@pytest.mark.parametrize("drift", [0.0, 0.15, 0.3])
def test_the_posterior_finds_more_true_bands_than_the_newest_eight_at_equal_rollouts(drift: float) -> None:
    scores = [measured(*simulated(seed, drift=drift)) for seed in range(4)]
    newest, posterior = (np.mean([score[name] for score in scores], axis=0) for name in ("newest", "posterior"))
    print(f"\ndrift {drift} in log-odds each time: true bands {newest[0]:.3f} by the newest 8, {posterior[0]:.3f} by "
          f"the posterior ({posterior[0] - newest[0]:+.3f}); Brier score {newest[1]:.3f}, {posterior[1]:.3f} "
          f"({posterior[1] - newest[1]:+.3f})")  # fmt: skip
    assert posterior[0] > newest[0] + 0.01
    assert posterior[1] < newest[1] - 0.01


def test_bands_are_as_certain_as_they_are_true() -> None:
    shown, rho = simulated(seed=5, drift=0.15)
    bands, problems = Bands(evidence_model="posterior"), [Problem(f"p{i}", "q", "a") for i in range(len(rho))]
    ledger = Ledger(None, bands.fading)
    ledger.take(shown, Place(1, "grpo"))
    strata = stratify(ledger, problems, bands)
    said = np.array([strata.certainty[problem.id] for problem in problems])
    is_true = np.array([
        strata.band_of[problem.id] == Bands().of(float(rate)) for problem, rate in zip(problems, rho, strict=True)
    ])  # fmt: skip
    for low, high in ((0.34, 0.6), (0.6, 0.8), (0.8, 0.95), (0.95, 1.01)):
        within = (said >= low) & (said < high)
        assert within.sum() > 100
        assert is_true[within].mean() == pytest.approx(said[within].mean(), abs=0.08)


@pytest.mark.parametrize("half_life", [None, 64.0])
def test_what_grpo_draws_over_and_over_does_not_make_the_pool_seem_to_be_of_its_kind(half_life: float | None) -> None:
    """Two rollouts of each problem, then twelve steps of groups that are chosen by what they will tell."""
    rng = np.random.default_rng(0)
    bands = Bands(evidence_model="posterior", half_life=half_life or 64.0)
    pool = [Problem(f"p{number}", "q", "a") for number in range(600)]
    rho = rng.beta(0.4, 0.4, len(pool))
    true = np.array([Bands().of(rate) for rate in rho.tolist()])
    ledger = Ledger(None, half_life)

    def sample(chosen: Iterable[int], attempts: int, version: int) -> None:
        shown = [Evidence(f"p{i}", attempts, int(rng.binomial(attempts, rho[i])), version) for i in chosen]
        ledger.take(shown, Place(1, "grpo"))

    def share_of_true_bands() -> float:
        found, _ = likeliest(ledger.posterior(pool), bands)
        return float((np.array(found) == true).mean())

    sample(range(len(pool)), 2, 0)
    prior, share = fitted_prior(ledger.known(pool).first), share_of_true_bands()
    for version in range(1, 13):
        rates = ledger.posterior(pool).informative(8)
        sample(np.argsort(-rates)[:32].tolist(), 8, version)
    after = fitted_prior(ledger.known(pool).first)
    assert (after.a, after.b) == pytest.approx((prior.a, prior.b), abs=0.01)
    assert prior.a + prior.b < 1.5  # that of all rollouts by then is 2 or more
    assert share_of_true_bands() > share + 0.01
