"""Measuring with the help of a prediction: the scores of traces say of which problems no rollout is needed.

A random part of the problems is sampled first. A regression of what that shows on the scores of their traces gives the
others a prior; those whose band is certain enough by it are spared, and of the rest the next part is sampled. Each part
is as large as all before it, so that there are few fits and full batches. Where the prediction is not worth it, nobody
is spared.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slmreason.curriculum.work import Work, settling
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.ledger import Spared
from slmreason.data.posterior import Posterior
from slmreason.data.predictor import Predicted
from slmreason.data.strata import likeliest
from slmreason.records import Place, Problem, Trace, TraceScores
from slmreason.run.journal import Notes
from slmreason.run.whole import duration
from slmreason.student import Student
from slmreason.supervision.learnability import trace_scores
from slmreason.teacher.dataset import dataset_solution

log = logging.getLogger(__name__)
KEY = "curriculum.probe.predictor"
FIRST = 64
"""Problems that are sampled before any is predicted."""
AT_A_TIME = 1024
"""Traces that are scored before it is noted."""
Measure = Callable[[Sequence[Problem], str], int]
"""Samples problems under a label, and says how many of them there were tokens for."""


@dataclass(frozen=True)
class Prediction:
    """What the predictor came to in one measurement."""

    round: int
    stage: str
    label: str
    """For those who watch."""
    traces: int
    """That a forward pass went over."""
    scored: int
    """Tokens that it read."""
    measured: int
    """Problems that the last regression was fitted to."""
    rank_correlation: float
    """On held-out problems."""
    gain_nats: float
    """Of a held-out problem's rollouts, over the pool's own prior."""
    strength: float
    """Rollouts that a prior counts for."""
    spared: int
    """Problems that were not sampled, since their band was certain enough."""
    off: str | None
    """Why the prediction was not used; None where it was."""

    def as_summary(self) -> dict[str, Any]:
        """What a stage's entry in summary.json says of it."""
        shown = {name: value for name, value in asdict(self).items() if name not in ("round", "stage")}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in shown.items()}


class Predictor:
    """Scores traces, and tells by them which problems need not be sampled."""

    def __init__(
        self, work: Work, data: ReasoningDataModule, traces: Mapping[str, str], certain: float, notes: Notes
    ) -> None:
        """
        Args:
            traces: to be scored, by the pool's ids (`scorable`).
            certain: a problem whose band has this probability is not sampled.
            notes: of the forward pass.
        """
        self.work, self.data, self.traces = work, data, traces
        self.certain, self.notes = certain, notes
        self.predictions: list[Prediction] = []
        """What it came to so far, in this run."""
        self._costs: dict[str, int] = {}

    # -- the forward pass -------------------------------------------------------------------------------------------

    def unscored(self) -> list[Problem]:
        """Problems whose trace has not been scored under the student as it stands."""
        ledger, version = self.data.ledger, self.work.student.policy_version

        def is_old(problem: Problem) -> bool:
            scores = ledger.scores(problem.id)
            return scores is None or scores.policy_version < version

        return [problem for problem in self.data.problems if problem.id in self.traces and is_old(problem)]

    def cost(self, problems: Sequence[Problem]) -> int:
        """Tokens that a forward pass over the traces of these problems reads."""
        student = self.work.student
        for problem in problems:
            if problem.id not in self._costs:
                trace = student.encode_target(self.traces[problem.id])
                self._costs[problem.id] = student.prompt_length(problem) + len(trace)
        return sum(self._costs[problem.id] for problem in problems)

    def score(self, problems: Sequence[Problem], place: Place, label: str) -> int:
        """Scores the traces of these problems, and takes what comes out into the ledger.

        Returns:
            Tokens that were read.
        """
        student, began = self.work.student, time.monotonic()

        def make(chunk: list[Problem]) -> list[TraceScores]:
            texts = [self.traces[problem.id] for problem in chunk]
            scores = trace_scores(chunk, texts, student, token_budget=self.data.token_budget)
            student.tokens.scored += sum(each.cost for each in scores)
            return scores

        key = f"{label} traces epoch {place.epoch} policy {student.policy_version}"
        watching = self.work.watching(f"{label}, scores of traces", len(problems), 0, "scores", "traces")
        with self.work.spending("probe"), watching as watch:
            scored, size = settling(make, watch), self.work.chunk_or(AT_A_TIME)
            found = self.notes.chunks(key, problems, scored, TraceScores, size, watch.skip)
        self.data.ledger.score(found, place)
        tokens = sum(each.cost for each in found)
        log.info("%s: the traces of %d of %d problems scored, %d tokens in %s", label, len(found),
                 len(self.data.problems), tokens, duration(time.monotonic() - began))  # fmt: skip
        return tokens

    # -- who is measured --------------------------------------------------------------------------------------------

    def lacks(self, count: int) -> str | None:
        """Why so many problems are not worth a forward pass; None where they are."""
        left = FIRST - self._measured_now()
        if count > left:
            return None
        return f"{left} problems are to be sampled before any is predicted, there are {count}"

    def lead(
        self, problems: Sequence[Problem], place: Place, label: str, measure: Measure, least_known_first: bool = False
    ) -> list[Problem]:
        """Has those of the problems measured whose band is not certain.

        Args:
            label: for those who watch, and for the journal.
            least_known_first: in which order; else by lot.

        Returns:
            The problems that were spared.
        """
        todo, begun, part = list(problems), self._measured_now(), 0
        self.data.rng("predictor", place.round, place.stage, place.epoch).shuffle(todo)
        while wanted := self._wanted(todo, least_known_first, begun):
            part += 1
            now = wanted[: begun if begun >= FIRST else FIRST - begun]
            done = measure(now, f"{label} part {part}")
            begun += done
            sampled = {problem.id for problem in now}
            todo = [problem for problem in todo if problem.id not in sampled]
            if done < len(now):  # there were no more tokens
                break
            self._say(label, todo)
        return [problem for problem, sure in zip(todo, self._certainties(todo), strict=True) if sure >= self.certain]

    def belief(self, problems: Sequence[Problem]) -> Posterior | None:
        """What is believed of each problem; None while the prediction is not used, or is of an older student."""
        predicted = self.data.ledger.predicted
        if predicted is None or not predicted.is_used or self._measured_now() < FIRST:
            return None
        return self.data.ledger.posterior(problems)

    def are_certain(self, posterior: Posterior) -> list[bool]:
        """Whether the most probable band of each problem is probable enough."""
        return [certainty >= self.certain for certainty in likeliest(posterior, self.data.bands)[1]]

    def tell(self, place: Place, label: str, traces: int, tokens: int, spared: Sequence[Problem]) -> None:
        """Says what a measurement came to, and keeps it; who was spared is written down with the prior that did it.

        Args:
            traces: that were scored for it.
            tokens: that this read.
        """
        predicted = self.data.ledger.predicted
        if predicted is None:
            return
        self.predictions.append(Prediction(
            round=place.round, stage=place.stage, label=label, traces=traces, scored=tokens,
            measured=predicted.measured, rank_correlation=predicted.correlation, gain_nats=predicted.gain,
            strength=predicted.strength, spared=len(spared), off=predicted.off,
        ))  # fmt: skip
        if not spared:
            return
        posterior, version = self.data.ledger.posterior(spared), self.work.student.policy_version
        bands, certainties = likeliest(posterior, self.data.bands)
        columns = zip(spared, bands, certainties, posterior.a.tolist(), posterior.b.tolist(), strict=True)
        rows = (Spared(problem.id, band, sure, a, b, version) for problem, band, sure, a, b in columns)
        self.data.ledger.spare(rows, place)

    def _measured_now(self) -> int:
        """Problems with a trace that were sampled from the student as it stands."""
        ledger, version = self.data.ledger, self.work.student.policy_version
        newest = (ledger.get(problem_id) for problem_id in self.traces)
        return sum(evidence is not None and evidence.policy_version >= version for evidence in newest)

    def _certainties(self, problems: Sequence[Problem]) -> list[float]:
        """Of each problem: the probability of its band; 0 where nothing is predicted of it."""
        if not problems:
            return []
        known = self.belief(problems)
        if known is None:
            return [0.0] * len(problems)
        sure, is_predicted = likeliest(known, self.data.bands)[1], self.data.ledger.is_predicted
        return [each if is_predicted(problem.id) else 0.0 for problem, each in zip(problems, sure, strict=True)]

    def _wanted(self, todo: Sequence[Problem], least_known_first: bool, begun: int) -> list[Problem]:
        """Those that are to be measured. The first are no choice of older evidence, which has not faded yet.

        Args:
            begun: how many have been measured.
        """
        if begun < FIRST:
            return list(todo)
        pairs = list(zip(self._certainties(todo), todo, strict=True))
        if least_known_first:
            pairs.sort(key=lambda pair: pair[0])
        return [problem for sure, problem in pairs if sure < self.certain]

    def _say(self, label: str, todo: Sequence[Problem]) -> None:
        predicted = self.data.ledger.predicted
        if predicted is not None and todo:
            certain = sum(sure >= self.certain for sure in self._certainties(todo))
            log.info("%s: %s", label, describe(predicted, len(todo), certain))


def describe(predicted: Predicted, left: int, certain: int) -> str:
    """The line that says whether the prediction is used, and what for.

    Args:
        left: problems that are not sampled yet.
        certain: of these, those whose band is certain enough.
    """
    if predicted.off is not None:
        return f"{KEY} is off, the {left} others are not predicted: {predicted.off}"
    return (
        f"rho predicted from traces: rank correlation {predicted.correlation:.2f} on {predicted.measured} held-out "
        f"problems, as good as {predicted.strength:g} rollouts; {certain} of {left} others need none"
    )


def scorable(problems: Sequence[Problem], given: Mapping[str, Trace], student: Student, longest: int) -> dict[str, str]:
    """The traces that rho is predicted from, by problem: that which came with it, else one that was given for it.

    How many there are is said, and why the other problems have none.

    Args:
        longest: tokens of a trace, at most (bridge.max_trace_tokens).

    Raises:
        ValueError: there are so few that no problem could be spared.
    """
    found: dict[str, str] = {}
    faults: Counter[str] = Counter()
    for problem in problems:
        try:
            text = _trace_of(problem, given)
            tokens = len(student.encode_target(text))
            if tokens > longest or student.prompt_length(problem) + tokens > student.max_length:
                raise ValueError(f"too long (bridge.max_trace_tokens is {longest})")
        except ValueError as error:
            faults[str(error)] += 1
        else:
            found[problem.id] = text
    why = "".join(f"; {count} not: {fault}" for fault, count in faults.most_common())
    said = f"{len(found)} of {len(problems)} problems have a trace to predict from{why}"
    if len(found) <= FIRST:
        raise ValueError(f"{KEY}: {FIRST} problems are sampled before any is predicted, and {said}")
    log.info("%s: %s", KEY, said)
    return found


def _trace_of(problem: Problem, given: Mapping[str, Trace]) -> str:
    """
    Raises:
        ValueError: there is none.
    """
    try:
        text = dataset_solution(problem)
    except ValueError:
        if problem.id not in given:
            raise
        text = None
    if text is None and problem.id in given:
        text = given[problem.id].text
    if text is None:
        raise ValueError("none came with them (data.columns.trace)")
    return text
