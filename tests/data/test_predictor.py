"""Priors from the scores of traces: the regression against plain loops, simulated pools, and the bands that follow."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.posterior import Array, Counts, Posterior, fitted_prior
from slmreason.data.predictor import (
    ENOUGH,
    FAR,
    Predicted,
    best_strength,
    features,
    held_out_rates,
    likelihoods,
    logistic_ridge,
    predict,
    ranks_of,
    rates_of,
    spearman,
)
from slmreason.data.strata import Bands, consolidation_set, likeliest, stratify
from slmreason.records import Evidence, Place, Problem, TraceScores

PLACE = Place(1, "sft")
BANDS = Bands(evidence_model="posterior")


def counted(right: Array, attempts: int | Array) -> Counts:
    """Unweighted rollouts."""
    total = np.broadcast_to(np.asarray(attempts, dtype=float), right.shape)
    return Counts(right.astype(float), total - right, total.copy())


def simulated(seed: int, size: int, slope: float = 1.5, strength: float = 3.0) -> tuple[Array, Array]:
    """(features [size, 4], true rates): the first two features move the log-odds of a Beta's mean, the others none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4))
    mean = 1 / (1 + np.exp(-(-0.5 - slope * x[:, 0] - 0.5 * slope * x[:, 1])))
    mean = np.clip(mean, 0.02, 0.98)
    return x, rng.beta(strength * mean, strength * (1 - mean))


def scores_of(x: Array, version: int = 0) -> list[TraceScores]:
    """Scores whose features are x, near enough."""
    return [
        TraceScores(f"p{i}", 1 + 0.1 * row[0], float(np.exp(row[1])), row[2], round(100 * math.exp(0.3 * row[3])), 150,
                    version)
        for i, row in enumerate(x.tolist())
    ]  # fmt: skip


# -- the functions ---------------------------------------------------------------------------------------------------


def plain_fit(x: list[list[float]], right: list[float], total: list[float], ridge: float) -> list[float]:
    """The same optimum by plain gradient ascent."""
    rows = [[1.0, *row] for row in x]
    weights = [2 * n / (n + 1) for n in total]
    pooled = sum(w * r / n for w, r, n in zip(weights, right, total, strict=True)) / sum(weights)
    centre = [math.log(pooled / (1 - pooled))] + [0.0] * len(x[0])
    beta = list(centre)
    for _ in range(4000):
        gradient = [-ridge * (b - c) for b, c in zip(beta, centre, strict=True)]
        for row, r, n, w in zip(rows, right, total, weights, strict=True):
            mean = 1 / (1 + math.exp(-sum(b * value for b, value in zip(beta, row, strict=True))))
            for column, value in enumerate(row):
                gradient[column] += w * (r / n - mean) * value
        beta = [b + 0.03 * g for b, g in zip(beta, gradient, strict=True)]
    return beta


def test_the_regression_is_the_optimum_that_plain_loops_find() -> None:
    rng = np.random.default_rng(1)
    x, total = rng.normal(size=(30, 2)), rng.integers(1, 9, 30).astype(float)
    right = np.array([rng.binomial(int(n), 1 / (1 + math.exp(-row[0]))) for n, row in zip(total, x, strict=True)])
    ours = logistic_ridge(x, counted(right, total), ridge=1.5)
    theirs = plain_fit(x.tolist(), right.tolist(), total.tolist(), ridge=1.5)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_the_regression_stands_a_feature_that_parts_the_problems() -> None:
    x = np.linspace(-3, 3, 60)[:, None]
    counts = counted(np.where(x[:, 0] > 0, 8.0, 0.0), 8)
    rates = rates_of(x, logistic_ridge(x, counts))
    assert (np.diff(rates) >= 0).all()
    assert 0 < rates.min() < 0.1 < 0.9 < rates.max() < 1


def test_rank_correlation_is_that_of_plain_ranks() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 6, 50).astype(float), rng.normal(size=50).round(1)

    def plain_ranks(values: list[float]) -> list[float]:
        return [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]

    a, b = plain_ranks(first.tolist()), plain_ranks(second.tolist())
    np.testing.assert_allclose(ranks_of(first), a)
    mean = (len(a) + 1) / 2
    top = sum((p - mean) * (q - mean) for p, q in zip(a, b, strict=True))
    bottom = math.sqrt(sum((p - mean) ** 2 for p in a) * sum((q - mean) ** 2 for q in b))
    assert spearman(first, second) == pytest.approx(top / bottom, abs=1e-12)
    assert spearman(first, -first) == pytest.approx(-1)
    assert spearman(first, np.zeros(50)) == 0


def test_rollouts_are_as_likely_as_drawing_them_one_by_one_says() -> None:
    a, b = 0.7, 2.3
    chance, right, wrong = 1.0, 0, 0
    for is_right in (True, False, False, True, False):
        chance *= (a + right if is_right else b + wrong) / (a + b + right + wrong)
        right, wrong = right + is_right, wrong + (not is_right)
    found = likelihoods(counted(np.array([2.0]), 5), np.array([a]), np.array([b]))
    assert found[0] == pytest.approx(math.log(chance), abs=1e-10)


def test_features_are_standard_and_stand_what_is_infinite_or_far_off() -> None:
    scores = [TraceScores(f"p{i}", 1 + 0.1 * i, 2.0 + i, 0.5 * i, 20 + i, 50) for i in range(30)]
    x = features([*scores, TraceScores("odd", 0.0, 3.4e38, 900.0, 1, 10)])
    assert x.shape == (31, 4)
    assert np.isfinite(x).all()
    assert np.abs(x).max() <= FAR
    np.testing.assert_allclose(features(scores).mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(features(scores).std(axis=0), 1, atol=1e-12)
    assert (features([scores[0]] * 5) == 0).all()


def test_a_problem_is_held_out_of_its_own_prediction() -> None:
    x, rho = simulated(seed=0, size=60)
    right = np.random.default_rng(0).binomial(8, rho).astype(float)
    before = held_out_rates(x, counted(right, 8))
    right[10] = 8 - right[10]
    after = held_out_rates(x, counted(right, 8))
    same_fold = np.arange(60) % 5 == 0
    assert (before[same_fold] == after[same_fold]).all()
    assert (before[~same_fold] != after[~same_fold]).any()


def test_the_strength_is_that_of_the_pool() -> None:
    for strength in (1.0, 8.0):
        rng = np.random.default_rng(3)
        mean = rng.uniform(0.1, 0.9, 4000)
        right = rng.binomial(8, rng.beta(strength * mean, strength * (1 - mean)))
        assert best_strength(mean, counted(right, 8))[0] == strength


# -- simulated pools -------------------------------------------------------------------------------------------------


def predicted_from(seed: int, measured: int, size: int, **pool: float) -> tuple[Predicted, Array, Counts, Array]:
    """(prediction from the first `measured` problems, true rates, their counts, the second rollouts of all)."""
    x, rho = simulated(seed, size, **pool)
    rng = np.random.default_rng(seed + 1000)
    right = rng.binomial(8, rho).astype(float)
    has = np.arange(size) < measured
    counts = Counts(right * has, (8 - right) * has, 8.0 * has)
    return predict(x, counts), rho, counts, rng.random((size, 2)) < rho[:, None]


@pytest.mark.parametrize("rollouts", [0, 1, 2])
def test_more_true_bands_at_equal_rollouts_than_on_the_pools_own_prior(rollouts: int) -> None:
    with_it, without = [], []
    for seed in range(6):
        predicted, rho, counts, drawn = predicted_from(seed, measured=200, size=1500)
        assert predicted.is_used
        assert predicted.correlation > 0.4
        others = slice(200, None)
        own = drawn[others, :rollouts].sum(axis=1)
        pool = fitted_prior(Counts(counts.right[:200], counts.wrong[:200], counts.squares[:200]))
        true = [BANDS.of(rate) for rate in rho[others].tolist()]
        for found, a, b in ((with_it, predicted.a[others], predicted.b[others]), (without, pool.a, pool.b)):
            bands, _ = likeliest(Posterior(a + own, b + rollouts - own), BANDS)
            found.append(np.mean([band == other for band, other in zip(bands, true, strict=True)]))
    print(
        f"\n{rollouts} rollouts: true bands {np.mean(with_it):.3f} with the prediction, {np.mean(without):.3f} without"
    )
    assert np.mean(with_it) > np.mean(without) + 0.02


def test_bands_by_prediction_alone_are_as_certain_as_they_are_true() -> None:
    said, is_true = [], []
    for seed in range(4):
        predicted, rho, _, _ = predicted_from(seed, measured=400, size=2000)
        bands, certainty = likeliest(Posterior(predicted.a[400:], predicted.b[400:]), BANDS)
        said += certainty
        is_true += [band == BANDS.of(rate) for band, rate in zip(bands, rho[400:].tolist(), strict=True)]
    sure, true = np.array(said), np.array(is_true)
    for low, high in ((0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        within = (sure >= low) & (sure < high)
        assert within.sum() > 100
        assert true[within].mean() == pytest.approx(sure[within].mean(), abs=0.08)


def test_noise_is_switched_off_with_its_reason() -> None:
    found = [predicted_from(seed, measured=200, size=400, slope=0.0)[0] for seed in range(20)]
    assert all(not each.is_used for each in found)
    assert all("below 0.2" in (each.off or "") for each in found)
    assert (
        np.mean([each.correlation for each in found]) < 0.05
    )  # rather below 0: who is left out pulls the others' mean


def test_little_evidence_and_rollouts_that_all_agree_are_not_fitted() -> None:
    x, rho = simulated(0, 100)
    few = np.arange(100) < ENOUGH - 1
    right = np.random.default_rng(0).binomial(8, rho)
    predicted = predict(x, Counts(right * few, (8.0 - right) * few, 8.0 * few))
    assert predicted.off == f"{ENOUGH - 1} problems with a trace have evidence, a regression needs {ENOUGH}"
    assert predict(x, counted(np.zeros(100), 8)).off == "all rollouts agree"
    faded = predict(x, Counts(0.05 * right, 0.05 * (8.0 - right), np.full(100, 0.02)))
    assert faded.measured == 0


# -- in the ledger ---------------------------------------------------------------------------------------------------


def ledger_of(folder: Path | None, seed: int = 0, slope: float = 1.5) -> tuple[Ledger, list[Problem]]:
    """Three hundred problems with scores, the first hundred of them sampled, and ten without any scores."""
    x, rho = simulated(seed, 300, slope)
    ledger = Ledger(folder, BANDS.fading)
    ledger.score(scores_of(x), PLACE)
    right = np.random.default_rng(seed).binomial(8, rho).tolist()
    ledger.take([Evidence(f"p{i}", 8, right[i]) for i in range(100)], PLACE)
    return ledger, [Problem(f"p{i}", "q", "a") for i in range(310)]


def test_problems_that_were_never_sampled_are_in_the_band_that_is_predicted() -> None:
    ledger, problems = ledger_of(None)
    strata = stratify(ledger, problems, BANDS)
    assert strata.predicted == {f"p{i}" for i in range(100, 300)}
    assert {problem.id for problem in strata.unknown} == {f"p{i}" for i in range(300, 310)}
    assert len({strata.band_of[name] for name in strata.predicted}) > 1
    assert all(1 / 3 < strata.certainty[name] <= 1 for name in strata.predicted)
    prior = ledger.prior(problems)
    expected = dict(zip((p.id for p in problems), likeliest(prior, BANDS)[0], strict=True))
    assert all(strata.band_of[name] == expected[name] for name in strata.predicted)


def test_what_is_predicted_to_be_medium_may_be_consolidated() -> None:
    import random

    ledger, problems = ledger_of(None)
    strata = stratify(ledger, problems, BANDS)
    drawn = {problem.id for problem in consolidation_set(strata, 0.0, random.Random(0))}
    by_prediction = drawn & strata.predicted
    assert by_prediction == {name for name in strata.predicted if strata.band_of[name] == "medium"} != set()


def test_scores_without_use_leave_everything_as_it_was() -> None:
    ledger, problems = ledger_of(None, slope=0.0)
    plain = Ledger(None, BANDS.fading)
    plain.take([found for p in problems if (found := ledger.get(p.id))], PLACE)
    assert ledger.predicted is not None
    assert not ledger.predicted.is_used
    assert stratify(ledger, problems, BANDS) == stratify(plain, problems, BANDS)
    for ours, theirs in zip(
        vars(ledger.posterior(problems)).values(), vars(plain.posterior(problems)).values(), strict=True
    ):
        assert (ours == theirs).all()


def test_a_ledger_that_is_read_back_predicts_the_same_to_the_last_bit(tmp_path: Path) -> None:
    written, problems = ledger_of(tmp_path)
    newer = scores_of(simulated(7, 20)[0], version=3)
    written.score(newer, Place(1, "grpo"))
    read = Ledger(tmp_path, BANDS.fading)
    assert read.scores("p3") == written.scores("p3") == newer[3]
    for ours, theirs in zip(
        vars(read.posterior(problems)).values(), vars(written.posterior(problems)).values(), strict=True
    ):
        assert (ours == theirs).all()


def test_the_prediction_is_fitted_again_when_there_is_more_evidence() -> None:
    ledger, problems = ledger_of(None)
    before = ledger.predicted
    assert before is not None
    assert ledger.predicted is before
    ledger.take([Evidence("p200", 8, 0)], PLACE)
    after = ledger.predicted
    assert after is not None
    assert after.measured == before.measured + 1
    assert (ledger.prior(problems).a != 0).all()


def test_what_is_sampled_again_since_it_is_solved_now_and_then_does_not_move_the_prediction() -> None:
    ledger, problems = ledger_of(None)
    before, prior = ledger.predicted, ledger.prior(problems)
    drawn = [f"p{i}" for i in range(100) if 0 < ledger.counts([problems[i]]).right[0] < 8]
    for version in range(1, 11):
        ledger.take([Evidence(name, 8, 4, version) for name in drawn], Place(1, "grpo"))
    after, later = ledger.predicted, ledger.prior(problems)
    assert before is not None
    assert after is not None
    assert (after.measured, after.strength) == (before.measured, before.strength)
    assert (later.a == prior.a).all()
    assert (later.b == prior.b).all()
