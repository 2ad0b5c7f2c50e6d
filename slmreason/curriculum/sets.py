"""What each stage trains on: strata to rows. SFT, GRPO and CFT differ in nothing else the data module needs to know."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmreason.curriculum.affordable import TRIAL, Affordable
from slmreason.data.batches import PackedDataset, packed_batches
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.strata import Strata, acquisition_set, consolidation_set, still_unsolved
from slmreason.modules.by_hand import prompt_batches
from slmreason.records import (
    Band,
    BridgeResult,
    Critique,
    CritiqueKind,
    Example,
    Fault,
    Place,
    Problem,
    Reject,
    counted,
)
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.supervision.critique import CritiqueSettings, capped, critique_examples

log = logging.getLogger(__name__)

NO_CANDIDATE = "the dataset has no solution of it, the teacher gave none, and the student has not solved it"
UNUSABLE = "the dataset's solution of it cannot be used"
TOO_FEW_TOKENS = "curriculum.max_tokens leaves too few tokens to make a trace and train on it"
TAUGHT: tuple[Band, ...] = ("medium", "hard")
"""The bands that SFT has, in the order of `acquisition_set`."""
BridgeFn = Callable[[Sequence[Problem]], list[BridgeResult]]
"""Proposes, verifies and selects a trace for each problem, all at once."""


@dataclass
class AcquisitionStage:
    """SFT: medium problems with their teacher trace, hard problems with a bridged one (`bridged_bands` may widen that).

    A problem's trace is made once per fit: the epoch boundary asks only for those that moved. With a budget it is made
    for as many as can be trained on too, which are drawn by lot.
    """

    place: Place
    student: Student
    teach: BridgeFn
    """Raw teacher trace, verified."""
    bridge: BridgeFn
    """The Bridge."""
    route: Callable[[Strata], Strata]
    """Who is taken for what (`ReasoningDataModule.routed`)."""
    bridged_bands: Sequence[Band] = ("hard",)
    """Problems of these bands are bridged, the others have their raw trace."""
    critiques: Sequence[Critique] = ()
    """Critique records of the round before that are mixed into this fit."""
    critique_kinds: Sequence[CritiqueKind] = ()
    affordable: Affordable | None = None
    """None where no budget ends the run."""
    results: dict[tuple[str, str], BridgeResult] = field(default_factory=dict)
    """By (band, problem id), in the order they were made."""

    def build(self, strata: Strata, epoch: int) -> list[Example]:
        strata = self.route(strata)
        missing = [
            (band, problem)
            for band in TAUGHT
            for problem in getattr(strata, band)
            if (band, problem.id) not in self.results
        ]
        if self.affordable is None or len(missing) <= TRIAL:
            self._make_traces(missing)
        else:
            self._make_affordable(self.affordable, missing, strata, epoch)
        return self._examples(strata)

    def _examples(self, strata: Strata) -> list[Example]:
        """Of all traces that there are by now."""
        bands = strata.band_of
        examples = []
        for problem in acquisition_set(strata):
            result = self.results.get((bands[problem.id], problem.id))
            if result is None or result.chosen is None:
                continue
            target = self.student.encode_target(result.chosen.text)
            prompt = self.student.encode_problem(problem)
            examples.append(Example(prompt, target, problem.id, result.chosen.provenance))
        for record in self.critiques:
            examples += critique_examples(record, self.student, self.critique_kinds)
        return examples

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> PackedDataset:
        return packed_batches(rows, data, epoch, accumulate, self.student, self.place)

    def _maker(self, band: Band) -> BridgeFn:
        return self.bridge if band in self.bridged_bands else self.teach

    def _make_traces(self, missing: Sequence[tuple[Band, Problem]]) -> None:
        for band in TAUGHT:
            problems = [problem for its_band, problem in missing if its_band == band]
            for result in self._maker(band)(problems) if problems else []:
                self.results[band, result.problem.id] = replace(result, band=band)

    def _make_affordable(
        self, affordable: Affordable, missing: Sequence[tuple[Band, Problem]], strata: Strata, epoch: int
    ) -> None:
        """Makes the traces of a few, and by what those cost of as many of the others as there are tokens for."""
        lots = affordable.rng(epoch).sample(range(len(missing)), len(missing))
        trial, others = lots[:TRIAL], lots[TRIAL:]
        before = self._cost(affordable, strata, epoch)
        self._make_traces([missing[place] for place in sorted(trial)])
        after = self._cost(affordable, strata, epoch)
        making, training = ((then - now) / TRIAL for now, then in zip(before, after, strict=True))
        count = int(min(len(others), affordable.problems(held=after[1], each=making + training)))
        self._make_traces([missing[place] for place in sorted(others[:count])])
        for band, problem in (missing[place] for place in sorted(others[count:])):
            self.results[band, problem.id] = BridgeResult(problem, (), None, band, Fault(TOO_FEW_TOKENS))
        if count < len(others):
            log.info("%s, traces: curriculum.max_tokens has room for %d of %d problems, drawn by lot: each takes about "
                     "%.0f tokens for its trace and %.0f to train on it", self.place.label, TRIAL + count, len(lots),
                     making, training)  # fmt: skip

    def _cost(self, affordable: Affordable, strata: Strata, epoch: int) -> tuple[int, int]:
        """(tokens of the run so far, tokens that training on the set as it is takes)."""
        tokens = sum(len(example) for example in self._examples(strata))
        return affordable.spent(), affordable.trained(tokens, epoch)


def bridge_rejects(results: Sequence[BridgeResult]) -> list[Reject]:
    """Rejected candidates, each with its fault, and problems that have no candidate."""
    rejects = []
    for result in results:
        for candidate in result.candidates:
            if candidate.rejected:
                kind = f"{candidate.trace.provenance} trace"
                rejects.append(Reject(result.problem.id, kind, str(candidate.rejected)))
    for result in results:
        if not result.candidates:
            reason = f"no trace at all: {_no_candidate(result)}"
            rejects.append(Reject(result.problem.id, f"{result.band} problem", reason))
    return rejects


def _no_candidate(result: BridgeResult) -> str:
    if result.left_out is not None:
        return str(result.left_out)
    return UNUSABLE if result.problem.trace else NO_CANDIDATE


def traces_said(results: Sequence[BridgeResult]) -> str:
    """Who wrote the chosen traces, how many problems have none to be trained on, and why.

    Why is the fault of the first rejected candidate of each.
    """
    writers: Counter[str] = Counter(result.chosen.provenance for result in results if result.chosen is not None)
    chosen = f" (chosen: {counted(writers)})" if writers else ""
    reasons = Counter(_why_none(result) for result in results if result.chosen is None)
    if not reasons:
        return f"traces: all {len(results)} problems have one{chosen}"
    said = counted(reasons)
    return f"traces: {reasons.total()} of {len(results)} problems have none and are left out: {said}{chosen}"


def _why_none(result: BridgeResult) -> str:
    if not result.candidates:
        return _no_candidate(result)
    return next(candidate.rejected.kind for candidate in result.candidates if candidate.rejected)


@dataclass
class ConsolidationStage:
    """GRPO: what is solved sometimes, and a small review of what is mastered, in steps of so many prompts."""

    place: Place
    prompts_per_step: int
    review_share: float
    seed_source: ReasoningDataModule
    drawn: bool = False
    """Each step draws its problems when it begins."""
    older_than: int | None = None
    """A problem that policies older than this version failed is in the set too, as far as it was not measured since:
    what it is worth by now is left to the order. None where no order weighs that."""

    def build(self, strata: Strata, epoch: int) -> list[Problem]:
        data = self.seed_source
        if old := self._failed_long_ago(strata):
            strata = replace(strata, solved=strata.solved | old)
            log.info("%s: %d problems are in the set that only older policies failed", self.place.label, len(old))
        return list(
            consolidation_set(data.routed(strata), self.review_share, data.rng("review", self.place.round, epoch))
        )

    def _failed_long_ago(self, strata: Strata) -> set[str]:
        if self.older_than is None:
            return set()
        newest = self.seed_source.ledger.get
        unsolved = (p.id for p in strata.medium + strata.hard if p.id not in strata.solved)
        return {i for i in unsolved if (shown := newest(i)) is not None and shown.policy_version < self.older_than}

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> list[PromptBatch]:
        return prompt_batches(rows, data, self.place, epoch, self.prompts_per_step, self.drawn)


@dataclass
class CritiqueStage:
    """CFT: the critique records of harvested problems that no newer rollout has solved."""

    place: Place
    student: Student
    critiques: Sequence[Critique]
    settings: CritiqueSettings

    @property
    def problems(self) -> list[Problem]:
        return list({record.problem.id: record.problem for record in self.critiques}.values())

    def build(self, strata: Strata, epoch: int) -> list[Example]:
        unsolved = {problem.id for problem in still_unsolved(strata, self.problems)}
        examples = [
            example
            for record in self.critiques
            if record.problem.id in unsolved
            for example in critique_examples(record, self.student, self.settings.kinds)
        ]
        return capped(examples, self.settings.max_per_kind)

    def batches(self, rows: Sequence[Any], data: ReasoningDataModule, epoch: int, accumulate: int) -> PackedDataset:
        return packed_batches(rows, data, epoch, accumulate, self.student, self.place)

    def rejects(self) -> list[Reject]:
        return [
            Reject(record.problem.id, "critique", str(fault), {"attempt": record.attempt})
            for record in self.critiques
            for fault in record.rejected
        ]
