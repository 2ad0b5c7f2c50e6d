"""Rounds and stages: which fit comes next, on which set, and what each leaves in the run folder.

A round is: probe rho, SFT on the Acquisition Set, measure again, GRPO on the Consolidation Set while failures are
harvested, CFT on what became of them. One student goes through all of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from slmreason.callbacks import LogPrediction, OutOfTime
from slmreason.curriculum.choice import Choice
from slmreason.curriculum.clock import RunClock
from slmreason.curriculum.curve import CurvePoints
from slmreason.curriculum.experiment import Experiment
from slmreason.curriculum.fits import Fits
from slmreason.curriculum.forecast import RunForecast
from slmreason.curriculum.heldout import held_out_of
from slmreason.curriculum.opening import open_run
from slmreason.curriculum.parts import Parts
from slmreason.curriculum.predictor import Predictor
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.results import Results
from slmreason.curriculum.resume import save_after_stage, sizes
from slmreason.curriculum.scorer import Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.stages import Stage, make_stages
from slmreason.curriculum.state import Resumed, RunState, StageReport
from slmreason.curriculum.trainer import given_loggers, run_time
from slmreason.curriculum.work import Work
from slmreason.data.strata import stratify
from slmreason.records import Place
from slmreason.rollout.engine import stable_seed
from slmreason.run.bars import bars, row, screen
from slmreason.run.files import write_text
from slmreason.run.folder import RunFolder
from slmreason.run.journal import Journal
from slmreason.runtime.distributed import gather, is_first
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.teacher.dataset import TraceTeacher

log = logging.getLogger(__name__)
LATE = "trainer.max_time is used up"
SPENT = "curriculum.max_tokens was spent on measuring and on traces"
NO_TEACHER = """\
no teacher: SFT has the dataset's own traces, hand-overs from them and the student's own right solutions, without \
rewrites; CFT has the dataset's traces, without repairs"""


class Curriculum:
    """Runs the whole method on one student: the loop over rounds and stages."""

    def __init__(
        self,
        settings: CurriculumSettings,
        parts: Parts,
        run_dir: Path,
        seed: int = 0,
        console: Console | None = None,
    ) -> None:
        self.settings, self.parts, self.seed = settings, parts, seed
        self.student, self.data = parts.student, parts.data
        self.files = RunFolder(run_dir)
        self.console = console or Console(quiet=not is_first())
        self.state = RunState()
        self.stopped: str | None = None
        """Why the run stopped before its last stage, and the config key that lets it go on; None where it did not."""
        self._resumed: Resumed | None = None
        """The fit that the run goes on in the middle of."""
        flags = parts.trainer_config()
        self.clock = RunClock(run_time(parts.trainer_config))
        self.teacher = FirstProcessTeacher(parts.teacher or TraceTeacher())
        drain = lambda: self.teacher.drain_rejects() + gather(parts.reward.drain_rejects())  # noqa: E731
        self.journal = Journal(run_dir, drain, lambda: self.student.tokens)
        bar = flags.get("enable_progress_bar") is not False
        self.work = Work(parts.student, parts.engine, self.journal, settings.checkpoint, console or screen(), bar)
        predictor = None
        if parts.scored_traces:
            certain = settings.probe.least_certainty
            predictor = Predictor(self.work, parts.data, parts.scored_traces, certain, self.journal)
        self.prober = Prober(
            self.work, parts.data, parts.grpo.settings, parts.reward, settings.probe, settings.max_tokens,
            None if settings.probe.share is None else lambda round: settings.probe_tokens(self.state.ended(round)),
            predictor,
        )  # fmt: skip
        scorer = Scorer(self.work, parts.reward, parts.benchmarks, parts.evaluation, self.files)
        self.experiment = Experiment(given_loggers(flags), self.files, lambda: self.student.tokens)
        self.results = Results(scorer, settings, self.files, self.console, self.experiment.show_scores)
        self.curve = CurvePoints(scorer, settings, self.files, self.experiment.show_scores)
        self.fits = Fits(
            settings=settings,
            data=parts.data,
            trainer_config=parts.trainer_config,
            device=parts.device,
            files=self.files,
            clock=self.clock,
            experiment=self.experiment,
            seed=seed,
            whole=self.work.whole,
            console=self.work.console,
            bar=bar,
        )
        is_off = flags.get("limit_val_batches") == 0 and settings.keep == "last"
        held_out = None if is_off else held_out_of(parts.data, parts.sft.validation, self.work, self.files)
        self.choice = Choice(held_out, settings, parts.student)
        self.stages = make_stages(
            parts, settings, self.prober, self.teacher, self.files, self.journal, flags, self.experiment.show_bands,
        )  # fmt: skip
        self.work.whole.forecast = RunForecast(
            settings, self.stages, parts.data, self.prober, scorer, self.curve, held_out, parts.bridge,
            parts.critique,
        )  # fmt: skip

    @property
    def reports(self) -> list[StageReport]:
        """What became of each stage so far, the base first."""
        return self.state.reports

    def prepare(self) -> None:
        """Reads where the run stands, and begins its experiment in the loggers, or goes on with it.

        Raises:
            ValueError: a file of the run cannot be read, and the message names it, and the line; or a logger cannot
                begin.
        """
        self.parts.grpo.token_budget = self.data.token_budget
        rejects = [reject for benchmark in self.parts.benchmarks for reject in benchmark.rejects]
        self._restore(*open_run(self.files, self.student, self.data, self.journal, rejects))
        self.experiment.open(self.state.axis, is_within=self._resumed is not None)
        if self.parts.teacher is None:
            log.info(NO_TEACHER)

    def check_teacher(self) -> None:
        """Finds out whether the teacher can be asked, where a stage that is still to come may ask it.

        `prepare` comes first.

        Raises:
            TeacherError: it cannot.
        """
        left = [] if self._is_spent or self.clock.is_late() else self._left
        begun = left[0] if left and self._resumed is not None else None
        if any(self.stages[place.stage].asks_teacher(is_prepared=place is begun) for place in left):
            self.teacher.check()

    def run(self) -> list[StageReport]:
        """All rounds and stages, the benchmarks between them, the student at the end; nothing is done twice.

        `prepare` comes first.
        """
        with self.experiment.closing():
            with self._shown():
                self._run_stages()
            self._finish()
        return self.reports

    @contextmanager
    def _shown(self) -> Iterator[None]:
        """The run has a row of the display, above those of the work at hand."""
        whole, work, settings = self.work.whole, self.work, self.settings
        if is_first():  # nobody watches the others
            whole.stages = ["base", *(place.stage for place in settings.places)]
        whole.began, whole.deadline = self.clock.began, self.clock.deadline
        if (limit := settings.max_tokens) is not None:
            whole.spent = lambda: self.student.tokens.total / limit
        with bars(work.console, work.bar), row("run", work.console, work.bar and bool(settings.stages)) as whole.draw:
            yield

    def _run_stages(self) -> None:
        self.work.whole.enter(max(0, len(self.reports) - 1))
        if not self.reports:
            self._end_stage(Place(0, "base"), "done", seconds=0.0, rows=0, is_scored=True)
        elif self.state.evaluate:
            self._score()
        while left := self._left:
            if self._resumed is None and self.clock.is_late():
                self._stop_short(left)
                break
            if self._resumed is None and self._is_spent:
                break
            self.work.whole.enter(len(self.reports))
            if not self._run_stage(left[0]):
                self._stop_short(left[1:])
                break

    @property
    def _left(self) -> Sequence[Place]:
        """The stages that are still to come; the first of them may be in its middle."""
        return self.settings.places[max(0, len(self.reports) - 1) :]

    # -- one stage --------------------------------------------------------------------------------------------------

    def _run_stage(self, place: Place) -> bool:
        """One stage and its report; False where the time of the run ended within it."""
        began = time.monotonic() - (self._resumed.seconds if self._resumed else 0.0)
        self.curve.seconds = 0.0
        # No stage depends on how many random numbers the ones before it drew.
        L.seed_everything(stable_seed(self.seed, place.round, place.stage) % 2**32, verbose=False)
        try:
            outcome, rows = self._stage(place, began)
        except OutOfTime:
            self._cut_short(place, self._seconds_since(began))
            return False
        is_last = place == self.settings.places[-1] or self._is_spent
        is_scored = self.results.is_due(place, outcome, is_last)
        self._end_stage(place, outcome, self._seconds_since(began), rows, is_scored)
        return True

    def _stage(self, place: Place, began: float) -> tuple[str, int]:
        """(`done` or why it was skipped, rows it started with).

        Args:
            began: when, of the monotonic clock.
        """
        stage, resumed = self.stages[place.stage], self._resumed
        rows = stage.enter(place, self.state, resumed)
        reason = stage.reason if resumed or not self._is_spent else SPENT
        if rows and reason != SPENT:
            self._fit(place, stage, began, rows)
        stage.write_rejects(place)
        return ("done", rows) if rows and reason != SPENT else (f"skipped: {reason}", 0)

    def _fit(self, place: Place, stage: Stage, began: float, rows: int) -> None:
        def state(epoch: int) -> dict[str, Any]:
            stage.write_rejects(place)
            now = replace(
                self._between_stages(),
                within=replace(place, epoch=epoch),
                axis=self.experiment.here(),
                sizes=sizes(self.files.path),
                stage_seconds=self._seconds_since(began),
                stage_rows=rows,
            )
            return now.as_tree()

        resumed, self._resumed = self._resumed, None
        if resumed is None:
            stage.began(self.state)
        more = (*self.curve.callbacks(place), *self.choice.callbacks())
        callbacks = [*stage.callbacks(place, self.state), *more]
        if self.prober.predictor is not None:
            callbacks.append(LogPrediction(self.data.ledger))
        checkpoint = resumed.checkpoint if resumed else None
        self.fits.run(place, stage.module, callbacks, state, checkpoint, rows)

    # -- where the run stands ---------------------------------------------------------------------------------------

    def _restore(self, state: RunState, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self._resumed = Resumed.of(checkpoint, state)
            within = self._resumed.place
            log.info("going on in %s, epoch %d: %s", within.label, within.epoch + 1, checkpoint.name)
        elif state.reports:
            log.info("going on after %s", state.reports[-1].place.label)
        self.state = state
        self.work.parts = state.batch_parts
        self.prober.bought = state.bought  # one list: what is bought from now on stands in the state
        if self.prober.predictor is not None:
            self.prober.predictor.predictions = state.predictions
        self.work.spent = state.axis.spent  # and one dictionary
        for place in (*(report.place for report in state.reports), state.within):
            if place is not None and place.stage in self.stages:
                self.stages[place.stage].was_begun()
        self.clock.go_on(state.elapsed)
        self.curve.go_on()

    def _between_stages(self) -> RunState:
        """The state as it stands now, in no fit."""
        self.state.batch_parts = self.work.parts
        return self.state.between_stages(self.student, self.data.band_of, self.clock.seconds)

    @property
    def _is_spent(self) -> bool:
        limit = self.settings.max_tokens
        return limit is not None and self.student.tokens.total >= limit

    # -- reports ----------------------------------------------------------------------------------------------------

    def _end_stage(self, place: Place, outcome: str, seconds: float, rows: int, is_scored: bool) -> None:
        """Reports a stage: what it did is kept first, then the benchmarks are run."""
        self.state.report(place, outcome, self.student.tokens, seconds, rows)
        if place.stage == "base":
            self.choice.begin(self.state)
        else:
            self.choice.end(self.state)
        if not is_scored:
            self.curve.measure(place)
        self.state.evaluate = is_scored
        self.experiment.show(self.reports[-1].validated)
        save_after_stage(self.files.path, self._between_stages(), self.student, self.settings.checkpoint.keep)
        self.journal.clear()
        self._score()

    def _score(self) -> None:
        """The benchmarks after the newest stage, where they are due, which are the curve's too."""
        self.results.score(self.state)
        self.curve.take(self.reports[-1])

    def _seconds_since(self, began: float) -> float:
        """What a stage has taken, without what the curve was measured in.

        Args:
            began: when it began, of the monotonic clock.
        """
        return time.monotonic() - began - self.curve.seconds

    def _cut_short(self, place: Place, seconds: float) -> None:
        """Reports a fit that trainer.max_time ended. Its checkpoint lies in its middle, so none follows."""
        self.state.report(place, f"cut short: {LATE}", self.student.tokens, seconds)
        self.state.evaluate = True
        # The journal may hold this note when the stage has gone on to its end.
        self.results.score(self.state, note=" (cut short)")

    def _stop_short(self, places: Sequence[Place]) -> None:
        """Reports the stages that there is no time for. No checkpoint knows of it: given more time, they are run."""
        self.stopped = f"{LATE}, {len(places)} stages were not begun"
        if self.settings.evaluate != "stage" and not self.reports[-1].scores:
            self.state.evaluate = True
            self.results.score(self.state)
        for place in places:
            self.state.report(place, f"skipped: {LATE}", self.student.tokens)
            self.results.score(self.state)

    def _finish(self) -> None:
        left_out = len(self.settings.places) + 1 - len(self.reports)
        strata = stratify(self.data.ledger, self.data.problems, self.data.bands)
        write_text(self.files.strata, json.dumps(strata.counts) + "\n")
        self.experiment.show_bands(strata.counts)
        self.student.save(self.files.student)
        self.results.show(self.reports)
        self.curve.tell_unreached()
        if left_out and self._is_spent:
            self.stopped = f"curriculum.max_tokens is spent, {left_out} stages were not begun"
