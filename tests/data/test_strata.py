"""Bands by the posterior: what counts, what is said of it, and that the default says nothing new."""

from __future__ import annotations

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


def test_an_epoch_boundary_by_the_newest_evidence_is_written_as_before() -> None:
    change = Restratified(PLACE, {"hard": 1}, {}, 1, sorted_by(Bands()).mean_certainty)
    assert set(to_json(change)) == {"place", "counts", "moves", "rows"}
    assert change.describe() == "round 1 grpo epoch 0: hard 1 | nobody moved | 1 rows to train on"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"half_life": 8.0}, "needs evidence_model: posterior"),
     ({"half_life": 0.0, "evidence_model": "posterior"}, r"data\.bands\.half_life must be above 0")],
)  # fmt: skip
def test_a_half_life_that_does_nothing_or_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bands(**settings)  # type: ignore[arg-type]
