"""Ledger to bands to sets: the data strategy as pure functions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, repeat
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slmreason.data.ledger import Ledger
from slmreason.data.posterior import HALF_LIFE, Posterior
from slmreason.records import BAND_NAMES, Band, Problem


@dataclass(frozen=True)
class Bands:
    """Where the bands of rho begin: simple `[simple, 1]`, medium `[medium, simple)`, hard `[0, medium)`."""

    simple: float = 0.75
    """Mastered from this correctness rate on."""
    medium: float = 0.25
    """Partly mastered from this correctness rate on; below it a problem is hard."""
    evidence_model: Literal["newest", "posterior"] = "newest"
    """What a band goes by. `newest`: the correctness rate in a problem's newest evidence. `posterior`: all evidence of
    it, older policies' with less weight, on a prior fitted to the pool; the most probable band is taken, and how
    probable it is is said."""
    half_life: float | None = None
    """Policy versions (optimizer steps) after which a rollout counts half in the posterior; 32 when not given."""

    def __post_init__(self) -> None:
        if not 0 < self.medium < self.simple <= 1:
            raise ValueError(f"bands need 0 < medium < simple <= 1, got medium={self.medium}, simple={self.simple}")
        if self.evidence_model == "posterior" and self.simple == 1:
            raise ValueError(
                "data.bands.simple: 1.0: by the posterior no problem is sure to be solved always, so none would be "
                "mastered; set it below 1, such as 0.9, or evidence_model: newest"
            )
        if self.half_life is None:
            return
        if self.half_life <= 0:
            raise ValueError(f"data.bands.half_life must be above 0, got {self.half_life}")
        if self.evidence_model == "newest":
            raise ValueError("data.bands.half_life: newest evidence does not fade; it needs evidence_model: posterior")

    @property
    def fading(self) -> float | None:
        """The half-life that a ledger needs for these bands; None where only the newest evidence counts."""
        return None if self.evidence_model == "newest" else self.half_life or HALF_LIFE

    def of(self, rho: float) -> Band:
        return "simple" if rho >= self.simple else "medium" if rho >= self.medium else "hard"


Routing = Literal["difficulty", "random", "all"]
"""Who goes where: by the student's own correctness rate, or, as controls, by lot in sets of the same sizes, or all
problems into both."""


@dataclass(frozen=True)
class Strata:
    """The pool by band, as the ledger shows it now; each tuple keeps the order of the pool."""

    simple: tuple[Problem, ...]
    medium: tuple[Problem, ...]
    hard: tuple[Problem, ...]
    unknown: tuple[Problem, ...]
    """Problems that were never sampled, and whose rho is not predicted."""
    solved: frozenset[str]
    """Ids of problems with at least one accepted rollout (non-all-zero) in their newest evidence, and of those that are
    predicted to be medium or simple."""
    certainty: Mapping[str, float] = field(default_factory=dict)
    """Probability of the band that a problem is in, by id; empty where bands go by the newest evidence."""
    predicted: frozenset[str] = frozenset()
    """Ids of problems that were never sampled, and are in a band by what the scores of their traces predict."""

    @property
    def band_of(self) -> dict[str, Band]:
        return {problem.id: band for band in BAND_NAMES for problem in getattr(self, band)}

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in (*BAND_NAMES, "unknown")}

    @property
    def mean_certainty(self) -> dict[str, float]:
        """Of each band that is not empty: the share of its problems that is expected to belong there."""
        if not self.certainty:
            return {}
        shares = {name: [self.certainty[p.id] for p in getattr(self, name)] for name in BAND_NAMES}
        return {name: round(sum(found) / len(found), 4) for name, found in shares.items() if found}

    def moves_from(self, before: Mapping[str, Band]) -> Counter[str]:
        """How many problems moved between which bands since `before` (band by id), as `{"hard->medium": 12}`."""
        moves: Counter[str] = Counter()
        for band in BAND_NAMES:
            ids = [problem.id for problem in getattr(self, band)]
            came = Counter(map(before.get, ids, repeat(band)))
            moves |= Counter({f"{old}->{band}": count for old, count in came.items() if old != band})
        return moves


def stratify(ledger: Ledger, problems: Iterable[Problem], bands: Bands) -> Strata:
    """Sorts the pool into bands, by the newest evidence or by the posterior (`Bands.evidence_model`)."""
    if bands.fading is not None:
        return _by_posterior(ledger, problems, bands)
    groups: dict[str, list[Problem]] = {name: [] for name in (*BAND_NAMES, "unknown")}
    solved = []
    for problem in problems:
        evidence = ledger.get(problem.id)
        if evidence is None:
            groups["unknown"].append(problem)
            continue
        groups[bands.of(evidence.rho)].append(problem)
        if evidence.successes:
            solved.append(problem.id)
    return _strata(groups, solved)


BANDS_OF_POSTERIOR: tuple[Band, ...] = ("hard", "medium", "simple")
"""The columns of `Posterior.bands`."""


def likeliest(posterior: Posterior, bands: Bands) -> tuple[list[Band], list[float]]:
    """The most probable band of each problem, and how probable it is."""
    columns, certainty = _likeliest(posterior, bands)
    return [BANDS_OF_POSTERIOR[column] for column in columns.tolist()], certainty


def _likeliest(posterior: Posterior, bands: Bands) -> tuple[NDArray[np.intp], list[float]]:
    """The column of the most probable band of each problem, and how probable it is."""
    distinct, where = posterior.distinct()
    shares = distinct.bands(bands.medium, bands.simple)  # [distinct posteriors, 3]
    best = shares.argmax(axis=1)
    certainty = np.take_along_axis(shares, best[:, None], axis=1)[:, 0].tolist()
    return best[where], [certainty[place] for place in where.tolist()]


def _by_posterior(ledger: Ledger, problems: Iterable[Problem], bands: Bands) -> Strata:
    """In passes over the whole pool, each in C: a million problems are looked up once."""
    pool = list(problems)
    known, ids = ledger.known(pool), [problem.id for problem in pool]
    columns, certainty = _likeliest(ledger.posterior(pool, known=known), bands)
    alone = ledger.are_predicted(ids) & ~known.sampled
    has_band = known.sampled | alone
    groups: dict[str, Sequence[Problem]] = {
        band: tuple(compress(pool, ((columns == column) & has_band).tolist()))
        for column, band in enumerate(BANDS_OF_POSTERIOR)
    }
    groups["unknown"] = tuple(compress(pool, (~has_band).tolist()))
    solved = known.solved | (alone & (columns != BANDS_OF_POSTERIOR.index("hard")))
    sure = has_band.tolist()
    return replace(
        _strata(groups, compress(ids, solved.tolist())),
        certainty=dict(zip(compress(ids, sure), compress(certainty, sure), strict=True)),
        predicted=frozenset(compress(ids, alone.tolist())),
    )


def _strata(groups: Mapping[str, Sequence[Problem]], solved: Iterable[str]) -> Strata:
    members = {name: tuple(found) for name, found in groups.items()}
    return Strata(members["simple"], members["medium"], members["hard"], members["unknown"], frozenset(solved))


def routed(strata: Strata, routing: Routing, rng: random.Random) -> Strata:
    """The strata that the sets of SFT and GRPO are drawn from.

    `random` gives each problem the evidence of another one, so that all sets keep their sizes; `all` takes every
    problem for a hard one that was solved once, so that both stages have all of them.

    Args:
        rng: of the lot; the same state gives the same lot for the same pool.
    """
    if routing == "difficulty":
        return strata
    pool = [p for name in (*BAND_NAMES, "unknown") for p in getattr(strata, name)]
    if routing == "all":
        return Strata((), (), tuple(pool), (), frozenset(p.id for p in pool))
    by_id = sorted(pool, key=lambda problem: problem.id)
    other = dict(zip((p.id for p in by_id), rng.sample(by_id, len(by_id)), strict=True))
    groups = {name: [other[p.id] for p in getattr(strata, name)] for name in (*BAND_NAMES, "unknown")}
    return _strata(groups, (other[i].id for i in strata.solved))


def acquisition_set(strata: Strata) -> tuple[Problem, ...]:
    """What SFT learns: medium problems (teacher trace), then hard ones (bridged trace). [paper]"""
    return strata.medium + strata.hard


def consolidation_set(strata: Strata, review_share: float, rng: random.Random) -> tuple[Problem, ...]:
    """What GRPO trains on: every problem with at least one success that is not mastered, and a review of the mastered.

    Args:
        review_share: share of the set that mastered problems make up, at most; 0 for none.
    """
    core = tuple(p for p in strata.medium + strata.hard if p.id in strata.solved)
    wanted = round(len(core) * review_share / (1 - review_share)) if review_share < 1 else len(strata.simple)
    review = rng.sample(strata.simple, min(wanted, len(strata.simple)))
    return core + tuple(review)


def still_unsolved(strata: Strata, problems: Sequence[Problem]) -> tuple[Problem, ...]:
    """The Critique Set at an epoch boundary: harvested problems that no newer rollout has solved."""
    return tuple(problem for problem in problems if problem.id not in strata.solved)
