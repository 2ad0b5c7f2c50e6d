"""What the student's own rollouts showed of each problem: an append-only store with one writer.

`ledger.jsonl` has a line for each graded group (problem, attempts, successes, policy version, where it came from, and
the shortest right solution that the student wrote, if any);
`harvest.jsonl` has the all-zero groups of GRPO with their attempts. The newest evidence of a problem is its difficulty,
since difficulty is a property of the *current* student. Where it is predicted (`curriculum.probe.predictor`),
`trace_scores.jsonl` has what from, and `predicted.jsonl` who was not sampled for it. A torn last line, left by a crash,
is dropped on opening.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from slmreason.data.pooled import Pooled
from slmreason.data.posterior import Array, Counts, Posterior, fitted_prior
from slmreason.data.predictor import Predicted, features, predict
from slmreason.records import Band, Evidence, Exemplar, Place, Problem, RolloutGroup, Trace, TraceScores, to_json
from slmreason.run.files import append_records, placed_lines, record_of, written_rows
from slmreason.run.folder import RunFolder


@dataclass(frozen=True)
class HarvestRow:
    """A line of `harvest.jsonl`."""

    place: Place
    group: RolloutGroup


@dataclass(frozen=True)
class Spared:
    """A line of `predicted.jsonl`: a problem that was not sampled, since its band was certain enough by prediction."""

    problem_id: str
    band: Band
    certainty: float
    """Probability of the band."""
    a: float
    b: float
    """Of the Beta that is believed of its rho."""
    policy_version: int


@dataclass(frozen=True)
class Known:
    """What the evidence says of each of some problems."""

    counts: Counts
    first: Counts
    """When each was first sampled. Nobody had chosen it by its rollouts, so these show what the pool is like."""
    sampled: NDArray[np.bool_]
    """Whether there is any."""
    solved: NDArray[np.bool_]
    """Whether the newest has a right rollout."""


FIELDS = get_type_hints(Evidence)
"""Of a line of `ledger.jsonl`, those that hold the evidence, in their order."""
PLACE_FIELDS = get_type_hints(Place)
"""The others, which say where in the run the rollouts were drawn."""
LINE = (*FIELDS, *PLACE_FIELDS)
WHOLE = frozenset(product(*(get_args(kind) or (kind,) for kind in (*FIELDS.values(), *PLACE_FIELDS.values()))))
"""The types that the values of a line have, in the order that we write them in."""


class Ledger:
    """Difficulty evidence and harvested groups, in memory and on disk."""

    def __init__(self, folder: str | Path | None, half_life: float | None = None) -> None:
        """
        Args:
            folder: where the two files are kept and, if they exist, read back; None keeps all in memory. Of several
                processes, which all record the same, the first one writes.
            half_life: policy versions after which a rollout counts half in `counts`; None where only the newest
                evidence of a problem counts.
        """
        self._pooled = Pooled(half_life) if half_life is not None else None
        self._files = RunFolder(Path(folder)) if folder is not None else None
        self._newest: dict[str, Evidence] = {}
        self._first: dict[str, Evidence] = {}  # without a half-life; `_pooled` has its own
        self._solutions: dict[str, str] = {}
        self._harvest: list[tuple[Place, RolloutGroup]] = []
        self._sampled = [0, 0]  # completions, and their tokens
        self._scores: dict[str, TraceScores] = {}
        self._row: dict[str, int] = {}  # of a problem among those with scores
        self._features: Array | None = None  # of the scores as they are
        self._predicted: tuple[int, Predicted] | None = None  # and the version that it is of
        self.version = 0
        """Grows with each entry, so a reader can tell whether there is anything new."""
        if self._files is not None:
            self._files.path.mkdir(parents=True, exist_ok=True)
            for location, row in placed_lines(self._files.ledger):
                self._note(_evidence_in(row, location))
            for location, row in placed_lines(self._files.harvest):
                entry = record_of(HarvestRow, row, location)
                self._harvest.append((entry.place, entry.group))
            for location, row in placed_lines(self._files.trace_scores):
                known = {key: value for key, value in row.items() if key not in PLACE_FIELDS}
                self._note_scores(record_of(TraceScores, known, location))

    def __len__(self) -> int:
        return len(self._newest)

    def __contains__(self, problem_id: str) -> bool:
        return problem_id in self._newest

    def get(self, problem_id: str) -> Evidence | None:
        """The newest evidence of a problem, or None when it was never sampled."""
        return self._newest.get(problem_id)

    def counts(self, problems: Sequence[Problem]) -> Counts:
        """The rollouts of each problem, those of older policies with less weight; of its newest evidence alone where
        the ledger has no half-life. Zeros where it was never sampled.

        How far the policy has moved is counted up to the newest version that anything was sampled from: what is read
        back from the file says the same as what stood in memory.
        """
        return self.known(problems).counts

    def known(self, problems: Sequence[Problem]) -> Known:
        """The counts of each problem, and whether it was sampled and solved."""
        return self._known([problem.id for problem in problems])

    def _known(self, problem_ids: Sequence[str]) -> Known:
        if self._pooled is not None:
            rows = self._pooled.rows(problem_ids)
            pooled = self._pooled
            return Known(pooled.counts_in(rows), pooled.first_in(rows), rows >= 0, pooled.solved_in(rows))
        newest, first = (_counts_of(problem_ids, shown) for shown in (self._newest, self._first))
        return Known(newest, first, newest.total > 0, newest.right > 0)

    def posterior(
        self, problems: Sequence[Problem], among: Sequence[Problem] | None = None, known: Known | None = None
    ) -> Posterior:
        """What is believed of each problem, on its prior.

        Args:
            among: the pool, where `problems` are a part of it. A part that was chosen by its evidence shows another
                prior: where all were solved now and then, one beside which what each of them showed counts for little.
            known: of `problems`, where they have been looked up already.
        """
        if known is None:
            known = self.known(problems)
        prior = self.prior(problems, known.first if among is None else self.known(among).first)
        return Posterior(known.counts.right + prior.a, known.counts.wrong + prior.b)

    def prior(self, problems: Sequence[Problem], pool: Counts | None = None) -> Posterior:
        """What is believed of each problem before its own rollouts: by prediction where there is one that is used, else
        what the pool shows.

        Args:
            pool: what the problems of the pool showed when they were first sampled; `problems` are the pool where this
                is not given.
        """
        common = fitted_prior(self.known(problems).first if pool is None else pool)
        a, b = np.full(len(problems), common.a), np.full(len(problems), common.b)
        predicted = self.predicted
        if predicted is not None and predicted.is_used:
            rows = np.fromiter((self._row.get(problem.id, -1) for problem in problems), np.int64, len(problems))
            has = rows >= 0
            a[has], b[has] = predicted.a[rows[has]], predicted.b[rows[has]]
        return Posterior(a, b)

    @property
    def predicted(self) -> Predicted | None:
        """What the scores of traces predict, fitted to the evidence as it is now; None where no trace was scored."""
        if not self._scores:
            return None
        if self._predicted is None or self._predicted[0] != self.version:
            if self._features is None:
                self._features = features(list(self._scores.values()))
            self._predicted = self.version, predict(self._features, self._known(list(self._scores)).first)
        return self._predicted[1]

    def are_predicted(self, problem_ids: Sequence[str]) -> NDArray[np.bool_]:
        """Whether the prior of each problem is its own, by a prediction that is used."""
        if self.predicted is None or not self.predicted.is_used:
            return np.zeros(len(problem_ids), bool)
        return np.fromiter(map(self._row.__contains__, problem_ids), bool, len(problem_ids))

    def is_predicted(self, problem_id: str) -> bool:
        """Whether the prior of a problem is its own, by a prediction that is used."""
        return problem_id in self._row and self.predicted is not None and self.predicted.is_used

    def scores(self, problem_id: str) -> TraceScores | None:
        """The newest scores of a problem's trace."""
        return self._scores.get(problem_id)

    @property
    def pools(self) -> bool:
        """All evidence of a problem counts, not the newest alone."""
        return self._pooled is not None

    @property
    def mean_tokens(self) -> float:
        """Tokens of a completion, over all whose length is known; 0 before there are any."""
        completions, tokens = self._sampled
        return tokens / completions if completions else 0.0

    def solution(self, problem_id: str) -> str | None:
        """The newest right solution of a problem that the student wrote itself."""
        return self._solutions.get(problem_id)

    def own_traces(self, problems: Iterable[Problem]) -> list[Trace]:
        """What the student itself wrote right, of those problems of which there is any."""
        return [Trace(p.id, text, "self") for p in problems if (text := self.solution(p.id))]

    def exemplars(self, problems: Iterable[Problem], band_of: Mapping[str, Band]) -> list[Exemplar]:
        """The student's own right solutions, those of medium problems first."""
        order = sorted(problems, key=lambda problem: band_of.get(problem.id) != "medium")
        return [Exemplar(problem, text) for problem in order if (text := self.solution(problem.id))]

    def record(self, groups: Iterable[RolloutGroup], place: Place) -> None:
        """Adds one piece of evidence for each group: every rollout counts, whoever asked for it."""
        self.take(map(Evidence.of, groups), place)

    def take(self, evidence: Iterable[Evidence], place: Place) -> None:
        """Adds evidence that has been counted already."""
        new, where = list(evidence), to_json(place)
        if new:
            self._append(lambda files: files.ledger, ({**to_json(each), **where} for each in new))
        for each in new:
            self._note(each)

    def score(self, scores: Iterable[TraceScores], place: Place) -> None:
        """Adds scores of traces: from now on they predict the rates of their problems, where that is worth it."""
        new = list(scores)
        if new:
            self._append(lambda files: files.trace_scores, [{**to_json(each), **to_json(place)} for each in new])
        for each in new:
            self._note_scores(each)

    def spare(self, spared: Iterable[Spared], place: Place) -> None:
        """Writes down which problems are not sampled, for whoever wants to see it: nothing is read of it."""
        if rows := [{**to_json(each), **to_json(place)} for each in spared]:
            self._append(lambda files: files.predicted, rows)

    def harvest(self, groups: Iterable[RolloutGroup], place: Place) -> None:
        """Keeps all-zero groups, with their attempts, for the Critique Set of the next fit.

        Raises:
            ValueError: a group is not all-zero.
        """
        kept = list(groups)
        for group in kept:
            if not group.all_zero:
                raise ValueError(f"problem {group.problem.id}: only a group whose rollouts all failed is harvested")
        if kept:
            self._append(lambda files: files.harvest, (to_json(HarvestRow(place, group)) for group in kept))
        self._harvest.extend((place, group) for group in kept)
        self.version += len(kept)

    def harvested(self, round: int) -> list[RolloutGroup]:
        """The groups harvested in a round, the newest of each problem, in the order of harvest."""
        newest: dict[str, RolloutGroup] = {}
        for place, group in self._harvest:
            if place.round == round:
                newest.pop(group.problem.id, None)
                newest[group.problem.id] = group
        return list(newest.values())

    def _note(self, evidence: Evidence) -> None:
        self._newest[evidence.problem_id] = evidence
        if self._pooled is not None:
            self._pooled.add(evidence)
        else:
            self._first.setdefault(evidence.problem_id, evidence)
        if evidence.tokens:
            self._sampled[0] += evidence.attempts
            self._sampled[1] += evidence.tokens
        if evidence.solution:
            self._solutions[evidence.problem_id] = evidence.solution
        self.version += 1

    def _note_scores(self, scores: TraceScores) -> None:
        self._scores[scores.problem_id] = scores
        self._row.setdefault(scores.problem_id, len(self._row))
        self._features = None
        self.version += 1

    def _append(self, file: Callable[[RunFolder], Path], rows: Iterable[dict[str, Any]]) -> None:
        if self._files is not None:
            append_records(file(self._files), rows)


def _counts_of(problem_ids: Sequence[str], shown: Mapping[str, Evidence]) -> Counts:
    """The rollouts of one evidence of each problem; zeros where there is none."""
    found = [shown.get(problem_id) for problem_id in problem_ids]
    right = np.fromiter((each.successes if each else 0 for each in found), np.float64, len(found))
    attempts = np.fromiter((each.attempts if each else 0 for each in found), np.float64, len(found))
    return Counts(right, attempts - right, attempts)


def _evidence_in(row: dict[str, Any], location: str) -> Evidence:
    """The evidence in a line of `ledger.jsonl`.

    Raises:
        ValueError: a field is unknown, missing or of another type; the message says where it stands.
    """
    # A look at the types of a line as we write it: the check of each field by itself would take most of a resume.
    if tuple(row) == LINE and tuple(map(type, row.values())) in WHOLE:
        return Evidence(*islice(row.values(), len(FIELDS)))
    record_of(Place, {key: value for key, value in row.items() if key in PLACE_FIELDS}, location)
    return record_of(Evidence, {key: value for key, value in row.items() if key not in PLACE_FIELDS}, location)


def given_harvest(path: Path) -> list[RolloutGroup]:
    """The groups of another run's `harvest.jsonl`, in the order of harvest.

    Raises:
        ValueError: the file cannot be read, or a row is no group of failed rollouts; the message names file and line.
    """
    groups = []
    for location, row in written_rows(path):
        group = record_of(HarvestRow, row, location).group
        if not group.rollouts or not group.all_zero:
            raise ValueError(f"{location}: problem {group.problem.id}: not a group whose rollouts all failed")
        groups.append(group)
    return groups
