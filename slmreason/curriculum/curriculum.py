"""Rounds and stages: which fit comes next, on which set, and what each leaves in the run folder.

A round is: probe rho, SFT on the Acquisition Set, measure again, GRPO on the Consolidation Set while failures are
harvested, CFT on what became of them. One student goes through all of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from slmreason.callbacks import OutOfTime
from slmreason.curriculum.clock import RunClock
from slmreason.curriculum.fits import Fits
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.resume import (
    RunState,
    StageReport,
    checkpoints,
    load_run,
    save_after_stage,
    sizes,
    write_summary,
)
from slmreason.curriculum.scorer import Scorer
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.stages import CFTStage, GRPOStage, SFTStage, Stage
from slmreason.curriculum.traces import TraceMaker
from slmreason.curriculum.trainer import FreshConfig, run_time
from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule, Restratified
from slmreason.data.identity import check_pool, pool_text
from slmreason.data.ledger import Ledger
from slmreason.data.sources import most_common
from slmreason.data.strata import stratify
from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings, Score
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import Critique, Place, Reject, Trace
from slmreason.report.terminal import print_tables, scores_table
from slmreason.rollout.engine import RolloutEngine, stable_seed
from slmreason.run.files import append_records, write_records, write_text
from slmreason.run.folder import RunFolder
from slmreason.run.journal import Journal
from slmreason.runtime.distributed import first_only, gather, is_first
from slmreason.runtime.redact import shown
from slmreason.student import Student
from slmreason.supervision.bridge import BridgeSettings
from slmreason.supervision.critique import CritiqueSettings, recheck
from slmreason.teacher.base import FirstProcessTeacher, Teacher
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)
LATE = "trainer.max_time is used up"
SPENT = "curriculum.max_tokens was spent on measuring and on traces"
NO_TEACHER = """\
no teacher: SFT has the dataset's own traces, hand-overs from them and the student's own right solutions, without \
rewrites; CFT has the dataset's traces, without repairs"""


@dataclass
class Parts:
    """What a run works with, as the config makes it."""

    student: Student
    data: ReasoningDataModule
    sft: SFTModule
    grpo: GRPOModule
    cft: CFTModule
    engine: RolloutEngine
    reward: RewardFn
    teacher: Teacher | None
    bridge: BridgeSettings
    critique: CritiqueSettings
    benchmarks: Sequence[Benchmark]
    evaluation: EvaluationSettings
    trainer_config: FreshConfig
    device: torch.device
    given_traces: Mapping[str, Trace] = field(default_factory=dict)
    """Of `slmreason bridge`, by the pool's ids; their problems' traces are taken from here."""
    given_critiques: Sequence[Critique] = ()
    """Of `slmreason critique`; the next CFT trains on them too."""


class Curriculum:
    """Runs the whole method on one student."""

    def __init__(
        self,
        settings: CurriculumSettings,
        parts: Parts,
        run_dir: Path,
        seed: int = 0,
        console: Console | None = None,
    ) -> None:
        self.settings, self.parts, self.seed = settings, parts, seed
        self.student, self.data, self.reward = parts.student, parts.data, parts.reward
        self.files = RunFolder(run_dir)
        self.console = console or Console(quiet=not is_first())
        self.state = RunState()
        self.stopped: str | None = None
        """Why the run stopped before its last stage, and the config key that lets it go on; None where it did not."""
        self._going_on: tuple[Path, RunState] | None = None
        """The checkpoint that the next fit goes on from, in its middle, and what it says."""
        flags = parts.trainer_config()
        self.clock = RunClock(run_time(parts.trainer_config))
        self.teacher = FirstProcessTeacher(parts.teacher or TraceTeacher())
        self.journal = Journal(run_dir, self._drain, lambda: self.student.tokens)
        bar = flags.get("enable_progress_bar") is not False
        self.work = Work(parts.student, parts.engine, self.journal, settings.checkpoint, self.console, bar)
        self.prober = Prober(self.work, parts.data, parts.grpo, parts.reward, settings.probe, settings.max_tokens)
        self.scorer = Scorer(self.work, parts.reward, parts.benchmarks, parts.evaluation, self.files)
        traces = TraceMaker(
            self.work, parts.data, parts.grpo, parts.reward, self.teacher, parts.bridge, parts.critique,
            parts.given_traces,
        )  # fmt: skip
        lines = None if self.console.is_terminal else self.work.pace
        self.fits = Fits(
            settings, parts.data, parts.trainer_config, parts.device, self.files, self.clock, seed, lines
        )  # fmt: skip
        makes = "cft" not in settings.stages
        given = [recheck(record, parts.student, parts.reward, parts.critique) for record in parts.given_critiques]
        accumulate = flags.get("accumulate_grad_batches") or 1
        self.stages: dict[str, Stage] = {
            "sft": SFTStage(parts.sft, self.prober, traces, self.files, settings.mix_critiques, makes),
            "grpo": GRPOStage(parts.grpo, self.prober, traces, self.files, accumulate),
            "cft": CFTStage(parts.cft, self.prober, traces, self.files, given),
        }

    @property
    def reports(self) -> list[StageReport]:
        """What became of each stage so far, the base first."""
        return self.state.reports

    @property
    def places(self) -> list[Place]:
        """All stages of the run, in their order."""
        rounds = range(1, self.settings.rounds + 1)
        return [Place(number, name) for number in rounds for name in self.settings.stages]

    # -- where the run stands ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Reads where the run stands.

        Raises:
            ValueError: a file of the run cannot be read; the message names it, and the line.
        """
        self.parts.grpo.token_budget = self.data.token_budget
        first_only(self._keep_pool)
        self._restore(*load_run(self.files.path, self.student))
        self.journal.open()
        self.data.ledger = Ledger(self.files.path)
        if not len(self.data.ledger):
            self.data.ledger.take(self.data.evidence_rows, Place(0, "stratify"))
        of_benchmarks = [reject for benchmark in self.parts.benchmarks for reject in benchmark.rejects]
        write_records(self.files.rejects, [*self.data.rejects, *self.data.unmatched, *of_benchmarks])
        aside = self.data.rejects
        log.info("pool: %d problems from %s, %d set aside%s", len(self.data.problems), self.data.pool_name, len(aside),
                 f": {most_common(aside)}" if aside else "")  # fmt: skip
        if self.parts.teacher is None:
            log.info(NO_TEACHER)

    def _keep_pool(self) -> None:
        """Notes which problems the run is begun with, or checks that it goes on with the same."""
        path = self.files.pool
        if path.exists():
            check_pool(path, self.data.problems)
        elif self.files.ledger.exists() or checkpoints(self.files.path):
            raise ValueError(f"{path}: not there: an earlier version began this run, and nothing tells whether its "
                             "problems are those of data.train now; begin a new run")  # fmt: skip
        else:
            write_text(path, pool_text(self.data.problems))

    def _restore(self, state: RunState, checkpoint: Path | None) -> None:
        if checkpoint is not None and state.within is not None:
            self._going_on = checkpoint, state
            log.info("going on in %s, epoch %d: %s", state.within.label, state.within.epoch, checkpoint.name)
        elif state.reports:
            log.info("going on after %s", state.reports[-1].place.label)
        self.state = state
        if state.within is not None and is_first():  # it was cut short, and what it answered then is of the past
            self.files.answers(state.within.label).unlink(missing_ok=True)
        begun = [report.place for report in state.reports] + ([state.within] if state.within else [])
        for place in begun:
            if place.stage in self.stages:
                self.stages[place.stage].was_begun()
        self.data.band_of = state.bands
        self.clock.go_on(state.elapsed)

    def _snapshot(self) -> RunState:
        """The state as it stands now, between two stages."""
        return replace(
            self.state,
            policy_version=self.student.policy_version,
            elapsed=self.clock.seconds,
            bands=self.data.band_of,
            within=None,
            stage_seconds=0.0,
            stage_rows=0,
            tokens=replace(self.student.tokens),
        )

    def _drain(self) -> list[Reject]:
        return self.teacher.drain_rejects() + gather(self.reward.drain_rejects())

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> list[StageReport]:
        """All rounds and stages, the benchmarks between them, the student at the end; nothing is done twice.

        `prepare` comes first.
        """
        if not self.reports:
            self._expect([Place(0, "base"), *self.places])
            self._report(Place(0, "base"), "done", 0.0, 0, evaluate=True)
        elif self.state.evaluate:
            self._score()
        for place in self.places[len(self.reports) - 1 :]:
            left = self.places[len(self.reports) - 1 :]
            if self._going_on is None and self.clock.is_late():
                self._stop_short(left)
                break
            if self._going_on is None and self._is_spent:
                break
            began = time.monotonic() - (self._going_on[1].stage_seconds if self._going_on else 0.0)
            self._expect(left)
            # No stage depends on how many random numbers the ones before it drew.
            L.seed_everything(stable_seed(self.seed, place.round, place.stage) % 2**32, verbose=False)
            try:
                outcome, rows = self._stage(place, began)
            except OutOfTime:
                self._cut_short(place, time.monotonic() - began)
                self._stop_short(left[1:])
                break
            self._report(place, outcome, time.monotonic() - began, rows, self._is_evaluated(place, outcome))
        self._finish()
        if self._is_spent and len(self.reports) <= len(self.places):
            left_out = len(self.places) + 1 - len(self.reports)
            self.stopped = f"curriculum.max_tokens is spent, {left_out} stages were not begun"
        return self.reports

    @property
    def _is_spent(self) -> bool:
        limit = self.settings.max_tokens
        return limit is not None and self.student.tokens.total >= limit

    def _is_evaluated(self, place: Place, outcome: str) -> bool:
        """Whether the benchmarks are due after a stage."""
        is_last = place == self.places[-1] or self._is_spent
        ends_round = place.stage == self.settings.stages[-1]
        wanted = {"stage": True, "round": ends_round or is_last, "ends": is_last}
        return wanted[self.settings.evaluate] and (outcome == "done" or is_last)

    def _expect(self, places: Sequence[Place]) -> None:
        """Tells those who watch what the rest of the run samples, about."""
        often, total = self.settings.evaluate, 0
        for place in places:
            is_due = often == "stage" or place.stage in ("base", self.settings.stages[-1] if often == "round" else "")
            total += self.scorer.completions * is_due
            if place.stage == "base":
                continue
            epochs = self.stages[place.stage].module.epochs
            is_first = place.round == 1 and not len(self.data.ledger)
            total += self.prober.completions(place, epochs, is_first)
            if place.stage == "grpo":
                total += len(self.data.problems) * self.parts.grpo.group_size * epochs
        self.work.pace.ahead = total

    def _stage(self, place: Place, began: float) -> tuple[str, int]:
        """One stage: (`done` or why it was skipped, rows it started with).

        Args:
            began: when, of the monotonic clock.
        """
        stage, folder, saved = self.stages[place.stage], self.files.stage(place), self._going_on
        stage_set = stage.restore(place, self.state) if saved else stage.prepare(place, self.state)
        if stage_set is None:
            return f"skipped: {stage.reason}", 0

        def on_set(change: Restratified, drawn: Sequence[Any]) -> None:
            append_records(folder.strata, [change])
            stage.wrote(change)
            write_records(folder.set(change.place.epoch), stage.as_rows(drawn))

        epoch = saved[1].within.epoch if saved and saved[1].within else 0
        rows = self.data.enter(stage_set, on_set, (epoch, stage.read_rows(folder.set(epoch))) if saved else None)
        if saved:
            rows = saved[1].stage_rows
        elif self._is_spent:
            self._write_rejects(place)
            return f"skipped: {SPENT}", 0
        if rows:
            self._fit(place, stage, began, rows)
        self._write_rejects(place)
        return ("done", rows) if rows else (f"skipped: {stage.reason}", 0)

    def _fit(self, place: Place, stage: Stage, began: float, rows: int) -> None:
        def state(epoch: int) -> dict[str, Any]:
            self._write_rejects(place)
            now = replace(
                self._snapshot(),
                within=Place(place.round, place.stage, epoch),
                sizes=sizes(self.files.path),
                stage_seconds=time.monotonic() - began,
                stage_rows=rows,
            )
            return now.as_tree()

        saved, self._going_on = self._going_on, None
        if saved is None:
            stage.began(self.state)
        callbacks = stage.callbacks(place, self.state)
        self.fits.run(place, stage.module, callbacks, state, saved[0] if saved else None)

    def _write_rejects(self, place: Place) -> None:
        """What teacher and verifier set aside since the last call."""
        if rejects := self.journal.take_rejects():
            append_records(self.files.stage(place).rejects, rejects)

    # -- results ----------------------------------------------------------------------------------------------------

    def _report(self, place: Place, outcome: str, seconds: float, rows: int, evaluate: bool) -> None:
        """Ends a stage: what it did is kept first, then the benchmarks are run."""
        self.reports.append(StageReport(place, outcome, seconds, rows, [], replace(self.student.tokens)))
        self.state.evaluate = evaluate
        save_after_stage(self.files.path, self._snapshot(), self.student, self.settings.checkpoint.keep)
        self.journal.clear()
        self._score()

    def _cut_short(self, place: Place, seconds: float) -> None:
        """Reports a fit that trainer.max_time ended. Its checkpoint lies in its middle, so none follows."""
        self.reports.append(StageReport(place, f"cut short: {LATE}", seconds, 0, [], replace(self.student.tokens)))
        self.state.evaluate = bool(self.parts.benchmarks)
        self._score(note=" (cut short)")  # the journal may hold it when the stage has gone on to its end

    def _stop_short(self, places: Sequence[Place]) -> None:
        """Reports the stages that there is no time for. No checkpoint knows of it: given more time, they are run."""
        self.stopped = f"{LATE}, {len(places)} stages were not begun"
        if self.settings.evaluate != "stage" and not self.reports[-1].scores:
            self.state.evaluate = bool(self.parts.benchmarks)
            self._score()
        for place in places:
            self.reports.append(StageReport(place, f"skipped: {LATE}", 0.0, 0, [], replace(self.student.tokens)))
            self._score()

    def _score(self, note: str = "") -> None:
        """The benchmarks after the newest stage, if they are due, and the summary of the run so far."""
        report = self.reports[-1]
        if self.state.evaluate and self.parts.benchmarks:
            self.scorer.score(report, note)
        self.state.evaluate = False
        spent = report.tokens.total - (self.reports[-2].tokens.total if len(self.reports) > 1 else 0)
        log.info("%s", report.describe(spent))
        write_summary(self.files, self.reports)

    def _finish(self) -> None:
        strata = stratify(self.data.ledger, self.data.problems, self.data.bands)
        write_text(self.files.strata, json.dumps(strata.counts) + "\n")
        self.student.save(self.files.student)
        if any(report.scores for report in self.reports):
            print_tables(self.console, self.table())
        for line in (*self.lines(), f"student: {self.files.student}"):
            self.console.print(shown(line), soft_wrap=True, markup=False, highlight=False)

    def table(self) -> Table:
        """Accuracy on each benchmark, for the base and after each stage that was evaluated."""
        rows: list[tuple[str, Sequence[Score]]] = [(r.place.label, r.scores) for r in self.reports if r.scores]
        return scores_table("greedy pass@1 in %, 95 % interval", rows)

    def lines(self) -> list[str]:
        """What the table does not say: which stages were not done, and what the run did where nothing was scored."""
        others = [f"{r.place.label}: {r.outcome}" for r in self.reports if r.outcome != "done"]
        if any(report.scores for report in self.reports):
            return others
        done, tokens = sum(r.outcome == "done" for r in self.reports[1:]), self.reports[-1].tokens
        seconds = sum(report.seconds for report in self.reports)
        return [
            f"no benchmark was run (benchmarks is empty); {done} of {len(self.reports) - 1} stages done in "
            f"{seconds:.0f} s with {tokens.total:,} tokens: {tokens.sampled:,} sampled, {tokens.trained:,} trained on, "
            f"{tokens.written:,} written by the teacher",
            *others,
        ]
