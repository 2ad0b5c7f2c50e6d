"""Bands by the posterior: what counts, what is said of it, and that the default says nothing new."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from slmreason.data.datamodule import Restratified
from slmreason.data.ledger import Ledger
from slmreason.data.strata import Bands, Strata, stratify
from slmreason.records import Evidence, Place, Problem, to_json

PLACE = Place(1, "grpo")
PROBLEMS = [Problem(name, "q", "a") for name in "abc"]


def sorted_by(bands: Bands) -> Strata:
    ledger = Ledger(None, bands.fading)
    ledger.take([Evidence("a", 64, 64, 0), Evidence("b", 8, 0, 0), Evidence("a", 2, 1, 1)], PLACE)
    return stratify(ledger, PROBLEMS, bands)


def test_older_evidence_outweighs_two_new_rollouts_in_the_posterior_alone() -> None:
    assert sorted_by(Bands()).band_of == {"a": "medium", "b": "hard"}
    assert sorted_by(Bands(evidence_model="posterior")).band_of == {"a": "simple", "b": "hard"}


def test_older_evidence_that_has_faded_does_not() -> None:
    assert sorted_by(Bands(evidence_model="posterior", half_life=0.1)).band_of["a"] == "medium"


def test_each_band_is_said_with_its_probability_and_the_unmeasured_have_none() -> None:
    strata = sorted_by(Bands(evidence_model="posterior"))
    assert set(strata.certainty) == {"a", "b"}
    assert strata.mean_certainty["simple"] > 0.99
    assert strata.unknown == (PROBLEMS[2],)


@pytest.mark.parametrize("half_life", [None, 8.0])
def test_bands_by_the_posterior_are_those_of_each_problem_alone(half_life: float | None) -> None:
    rng = random.Random(0)
    pool = [Problem(f"p{number}", "q", "a") for number in range(300)]
    bands, ledger = Bands(evidence_model="posterior", half_life=8.0), Ledger(None, half_life)
    for version in range(3):
        asked = rng.sample(pool, 150)
        ledger.take([Evidence(problem.id, 8, rng.choice([0, 0, 1, 4, 8, 8]), version) for problem in asked], PLACE)
    strata, posterior = stratify(ledger, pool, bands), ledger.posterior(pool)
    expected: dict[str, list[Problem]] = {name: [] for name in strata.counts}
    for problem, shares in zip(pool, posterior.bands(bands.medium, bands.simple).tolist(), strict=True):
        name = ("hard", "medium", "simple")[shares.index(max(shares))] if problem.id in ledger else "unknown"
        expected[name].append(problem)
        if problem.id in ledger:
            assert strata.certainty[problem.id] == pytest.approx(max(shares))
    assert {name: list(getattr(strata, name)) for name in expected} == expected
    assert min(map(len, expected.values())) > 10
    assert strata.solved == {p.id for p in pool if (shown := ledger.get(p.id)) is not None and shown.successes}
    assert set(strata.certainty) == {problem.id for problem in pool if problem.id in ledger}


def test_moves_are_those_of_each_problem() -> None:
    rng = random.Random(0)
    pool = [Problem(f"p{number}", "q", "a") for number in range(200)]
    ledger, strata = Ledger(None), []
    for known in (150, 200):
        ledger.take([Evidence(problem.id, 8, rng.randint(0, 8)) for problem in pool[:known]], PLACE)
        strata.append(stratify(ledger, pool, Bands()))
    before, after = (each.band_of for each in strata)
    plain = Counter(f"{before[i]}->{band}" for i, band in after.items() if i in before and before[i] != band)
    assert strata[1].moves_from(before) == plain
    assert len(plain) == 6


def test_an_epoch_boundary_by_the_newest_evidence_is_written_as_before() -> None:
    change = Restratified(PLACE, {"hard": 1}, {}, 1, sorted_by(Bands()).mean_certainty)
    assert set(to_json(change)) == {"place", "counts", "moves", "rows"}
    assert change.describe() == "round 1 grpo epoch 1: hard 1 | nobody moved | 1 rows to train on"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"half_life": 8.0}, "needs evidence_model: posterior"),
     ({"half_life": 0.0, "evidence_model": "posterior"}, r"data\.bands\.half_life must be above 0"),
     ({"simple": 1.0, "evidence_model": "posterior"}, r"data\.bands\.simple: 1\.0: .*none would be mastered")],
)  # fmt: skip
def test_bands_that_do_nothing_or_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bands(**settings)  # type: ignore[arg-type]
