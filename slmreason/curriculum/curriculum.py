"""Rounds and stages: which fit comes next, on which set, and what each leaves in the run folder.

A round is: probe rho, SFT on the Acquisition Set, measure again, GRPO on the Consolidation Set while failures are
harvested, CFT on what became of them. One student goes through all of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table

from slmreason.callbacks import (
    HarvestAllZeroGroups,
    KeepCheckpoints,
    OutOfTime,
    RecordRollouts,
    Reprobe,
    SeedSteps,
    StageLines,
    StageProgressBar,
    TokenBudget,
    TrainingHealth,
)
from slmreason.curriculum.resume import (
    RunState,
    StageReport,
    checkpoints,
    load_run,
    next_checkpoint,
    prune,
    save_after_stage,
    sizes,
)
from slmreason.curriculum.stages import (
    AcquisitionStage,
    ConsolidationStage,
    CritiqueStage,
    bridge_rejects,
    without_trace,
)
from slmreason.curriculum.trainer import FreshConfig, build_trainer, run_time
from slmreason.data.datamodule import ReasoningDataModule, Restratified, StageSet
from slmreason.data.identity import check_pool, pool_text
from slmreason.data.ledger import Ledger, evidence_of
from slmreason.data.sources import most_common
from slmreason.data.strata import stratify
from slmreason.evaluate.benchmarks import (
    Benchmark,
    EvaluationSettings,
    Sample,
    Score,
    evaluate,
    save_scores,
    scores_table,
)
from slmreason.modules.base import StudentModule
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Critique, Example, Place, Problem, Reject, RolloutGroup, Trace, from_json
from slmreason.report.terminal import print_tables
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine, Sampling, stable_seed
from slmreason.run.files import append_records, read_lines, read_records, write_records, write_text
from slmreason.run.folder import RunFolder, StageFolder
from slmreason.run.journal import Journal
from slmreason.run.progress import Pace, Watch, duration, watching
from slmreason.runtime import preemption
from slmreason.runtime.distributed import first_only, gathered, is_first, world_size
from slmreason.runtime.redact import shown
from slmreason.student import Student
from slmreason.supervision.bridge import KNOWN, BridgeSettings, bridge, given
from slmreason.supervision.critique import CritiqueSettings, critique, recheck
from slmreason.teacher.base import FirstProcessTeacher, Teacher
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)
T = TypeVar("T")
StageName = Literal["sft", "grpo", "cft"]
LATE = "trainer.max_time is used up"
CRITIQUED_AT_A_TIME = 64
"""Harvested groups; a teacher that is asked over a network takes a second or so for each of their attempts."""


@dataclass
class ProbeSettings:
    """How rho is measured outside GRPO. Rollouts are drawn as GRPO draws them."""

    attempts: int = 8
    """Rollouts of each problem: the k of the method."""
    refresh: Literal["stale", "unsolved", "missing", "never"] = "stale"
    """What is measured before a stage. `stale`: before GRPO what is not evidence of the student as it stands, before
    SFT only what is older than the last GRPO fit, whose rollouts count for free. `missing`: problems never sampled.
    `unsolved`: those, and before GRPO what no rollout solved before the SFT fit: GRPO itself measures the others.
    `never`: nothing; then `data.routing` must be `all`, or there must be `data.evidence`."""
    epoch_share: float = 1.0
    """Share of the pool that is measured again at the end of each SFT epoch; 0 for none."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.epoch_share <= 1:
            raise ValueError("curriculum.probe: attempts must be at least 1 and epoch_share within 0 and 1")


@dataclass
class CheckpointSettings:
    """How often a fit can be gone on with after a crash. After each stage there is a checkpoint in any case."""

    every_n_steps: int | None = None
    """Optimizer steps between two checkpoints."""
    every_minutes: float | None = 10.0
    """Minutes between two checkpoints; with `every_n_steps` too, whichever comes first."""
    keep: int = 2
    """The newest checkpoints that are kept, beside the newest after a stage."""
    chunk: int | None = None
    """Problems that are measured, bridged or critiqued at a time: what has been done is noted after each chunk. When
    not given, as many as fill the rollout engine once."""

    def __post_init__(self) -> None:
        if min(self.keep, self.chunk or 1, self.every_n_steps or 1) < 1 or (self.every_minutes or 1) <= 0:
            raise ValueError(
                "curriculum.checkpoint: keep, chunk and every_n_steps must be at least 1, every_minutes > 0"
            )


@dataclass
class CurriculumSettings:
    """Which fits a run has."""

    rounds: int = 2
    """Rounds of the stages."""
    stages: list[StageName] = field(default_factory=lambda: ["sft", "grpo", "cft"])
    """The stages of a round, in order; none measures the base alone."""
    max_tokens: int | None = None
    """The run ends with the optimizer step at which its tokens, sampled, trained on and written by the teacher, reach
    this, whatever rounds and epochs are left. Benchmarks are not counted."""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """How rho is measured."""
    mix_critiques: bool = False
    """Put the critique records of the round before into the SFT fit too, beside or in place of a CFT stage."""
    evaluate: Literal["stage", "round", "ends"] = "stage"
    """When the benchmarks are run: after every stage, after every round, or before the first and after the last."""

    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """How often the run is saved."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError("curriculum: rounds and max_tokens must be at least 1")


class Curriculum:
    """Runs the whole method on one student."""

    def __init__(
        self,
        settings: CurriculumSettings,
        student: Student,
        data: ReasoningDataModule,
        sft: SFTModule,
        grpo: GRPOModule,
        cft: CFTModule,
        engine: RolloutEngine,
        reward: RewardFn,
        teacher: Teacher | None,
        bridge_settings: BridgeSettings,
        critique_settings: CritiqueSettings,
        benchmarks: Sequence[Benchmark],
        evaluation: EvaluationSettings,
        trainer_config: FreshConfig,
        device: torch.device,
        run_dir: Path,
        seed: int = 0,
        given_traces: Mapping[str, Trace] | None = None,
        given_critiques: Sequence[Critique] = (),
        console: Console | None = None,
    ) -> None:
        """
        Args:
            given_traces: of `slmreason bridge`, by the pool's ids; their problems' traces are taken from here.
            given_critiques: of `slmreason critique`; the next CFT trains on them too.
        """
        self.settings, self.student, self.data = settings, student, data
        self.modules: dict[str, StudentModule] = {"sft": sft, "grpo": grpo, "cft": cft}
        self.grpo, self.engine, self.reward = grpo, engine, reward
        self._has_teacher = teacher is not None
        self.teacher = FirstProcessTeacher(teacher or TraceTeacher())
        self.bridge_settings, self.critique_settings = bridge_settings, critique_settings
        self.benchmarks, self.evaluation = benchmarks, evaluation
        self.trainer_config, self.run_dir, self.seed = trainer_config, run_dir, seed
        self.files = RunFolder(run_dir)
        self.console = console or Console(quiet=not is_first())
        self.reports: list[StageReport] = []
        self.critiques: list[Critique] = []
        """Of the newest round that had any."""
        self._given_traces = dict(given_traces or {})
        self._given_critiques = [recheck(record, student, reward, critique_settings) for record in given_critiques]
        self.pace = Pace()
        self._began = time.monotonic()
        self._deadline: float | None = None
        self.stopped: str | None = None
        """Why the run stopped before its last stage, and the config key that lets it go on; None where it did not."""
        self._accumulate = 1
        self._device = device
        self._last_grpo_began: int | None = None
        self._evaluate_due = False
        self._teacher_traces: list[Trace] = []
        self._going_on: tuple[Path, RunState] | None = None
        """The checkpoint that the next fit goes on from, in its middle."""

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> list[StageReport]:
        """All rounds and stages, the benchmarks between them, the student at the end; nothing is done twice.

        `prepare` comes first.
        """
        places = [Place(number + 1, name) for number in range(self.settings.rounds) for name in self.settings.stages]
        if not self.reports:
            self.pace.ahead = sum(self._completions(place) for place in [Place(0, "base"), *places])
            self._report(Place(0, "base"), "done", 0.0, 0, evaluate_now=True)
        elif self._evaluate_due:
            self._score()
        for place in places[len(self.reports) - 1 :]:
            if self._going_on is None and self._is_late:
                self._stop_short(places[len(self.reports) - 1 :])
                break
            if self._is_spent and self._going_on is None:
                break
            started = time.monotonic() - (self._going_on[1].stage_seconds if self._going_on else 0.0)
            self.pace.ahead = sum(self._completions(later) for later in places[places.index(place) :])
            # No stage depends on how many random numbers the ones before it drew.
            L.seed_everything(stable_seed(self.seed, place.round, place.stage) % 2**32, verbose=False)
            try:
                outcome, rows = self._stage(place, started)
            except OutOfTime:
                self._cut_short(place, time.monotonic() - started)
                self._stop_short(places[len(self.reports) - 1 :])
                break
            is_last = place == places[-1] or self._is_spent
            ends_round = place.stage == self.settings.stages[-1]
            wanted = {"stage": True, "round": ends_round or is_last, "ends": is_last}
            evaluated = wanted[self.settings.evaluate] and (outcome == "done" or is_last)
            self._report(place, outcome, time.monotonic() - started, rows, evaluated)
        self._finish()
        if self._is_spent and len(self.reports) <= len(places):
            self.stopped = (
                f"curriculum.max_tokens is spent, {len(places) + 1 - len(self.reports)} stages were not begun"
            )
        return self.reports

    def _completions(self, place: Place) -> int:
        """What a stage samples, about: probe, re-measuring, rollouts and the benchmarks after it."""
        settings, probe = self.settings, self.settings.probe
        pool, often = len(self.data.problems), settings.evaluate
        is_due = often == "stage" or place.stage in ("base", settings.stages[-1] if often == "round" else "")
        count = sum(len(benchmark.problems) for benchmark in self.benchmarks) * is_due
        measured = probe.refresh != "never"
        if place.stage == "sft":
            first = measured and place.round == 1 and not len(self.data.ledger)
            count += round(pool * probe.attempts * (first + probe.epoch_share * self.modules["sft"].epochs))
        elif place.stage == "grpo":
            again = measured and probe.refresh == "stale"
            count += round(pool * probe.attempts * (1 - probe.epoch_share) * again)
            count += pool * self.grpo.group_size * self.grpo.epochs
        return count

    @property
    def _is_spent(self) -> bool:
        limit = self.settings.max_tokens
        return limit is not None and self.student.tokens.total >= limit

    def prepare(self) -> None:
        """Reads where the run stands.

        Raises:
            ValueError: a file of the run cannot be read; the message names it, and the line.
        """
        self.grpo.token_budget = self.data.token_budget
        self._accumulate = self.trainer_config().get("accumulate_grad_batches") or 1
        first_only(self._keep_pool)
        self._restore(*load_run(self.run_dir, self.student))
        self._journal = Journal(self.run_dir, self._drain, self.student.tokens)
        self.data.ledger = Ledger(self.run_dir)
        if not len(self.data.ledger):
            self.data.ledger.take(self.data.evidence_rows, Place(0, "stratify"))
        write_records(self.files.rejects, self._all_rejects())
        aside = self.data.rejects
        log.info("pool: %d problems from %s, %d set aside%s", len(self.data.problems), self.data.train, len(aside),
                 f": {most_common(aside)}" if aside else "")  # fmt: skip
        if not self._has_teacher:
            log.info("no teacher: SFT has the dataset's own traces, hand-overs from them and the student's own right "
                     "solutions, without rewrites; CFT has the dataset's traces, without repairs")  # fmt: skip

    def _keep_pool(self) -> None:
        """Notes which problems the run is begun with, or checks that it goes on with the same."""
        path = self.files.pool
        if path.exists():
            check_pool(path, self.data.problems)
        elif (self.files.ledger).exists() or checkpoints(self.run_dir):
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
        self.reports, self.critiques = state.reports, state.critiques
        if state.within is not None and is_first():  # it was cut short, and what it answered then is of the past
            self.files.answers(state.within.label).unlink(missing_ok=True)
        begun = [report.place.stage for report in state.reports] + ([state.within.stage] if state.within else [])
        if "cft" in begun:
            self._given_critiques = []  # an earlier CFT had them, or this one has them among its own
        self._last_grpo_began, self.data.band_of = state.last_grpo_began, state.bands
        self._evaluate_due = state.evaluate
        self._began = time.monotonic() - state.elapsed
        budget = run_time(self.trainer_config)
        self._deadline = self._began + budget.total_seconds() if budget is not None else None

    def _state(self) -> RunState:
        return RunState(
            reports=self.reports,
            policy_version=self.student.policy_version,
            last_grpo_began=self._last_grpo_began,
            elapsed=time.monotonic() - self._began,
            critiques=self.critiques,
            bands=self.data.band_of,
            evaluate=self._evaluate_due,
            tokens=replace(self.student.tokens),
        )

    def _drain(self) -> list[Reject]:
        return self.teacher.drain_rejects() + gathered(self.reward.drain_rejects())

    def _all_rejects(self) -> list[Reject]:
        return [
            *self.data.rejects,
            *self.data.unmatched,
            *(reject for benchmark in self.benchmarks for reject in benchmark.rejects),
        ]

    def _stage(self, place: Place, started: float) -> tuple[str, int]:
        """One stage, which began at `started`: (`done` or why it was skipped, rows it started with)."""
        enter: dict[str, Callable[[Place], tuple[StageSet | None, str]]] = {
            "sft": self._enter_sft,
            "grpo": self._enter_grpo,
            "cft": self._enter_cft,
        }
        stage_set, reason = enter[place.stage](place)
        if stage_set is None:
            return f"skipped: {reason}", 0
        folder = self.files.stage(place)
        rows = self.data.enter(stage_set, lambda *drawn: self._write_set(stage_set, *drawn), self._drawn(folder))
        if self._going_on is not None:
            rows = self._going_on[1].stage_rows
        if self._is_spent and self._going_on is None:
            rows, reason = 0, "curriculum.max_tokens was spent on measuring and on traces"
        if rows:
            self._fit(place, folder.path, started, rows)
        self._write_rejects(place)
        return ("done", rows) if rows else (f"skipped: {reason}", 0)

    def _fit(self, place: Place, stage_dir: Path, started: float, rows: int) -> None:
        module, often = self.modules[place.stage], self.settings.checkpoint

        def state(epoch: int) -> dict[str, Any]:
            self._write_rejects(place)
            now = self._state()
            now.within, now.sizes = Place(place.round, place.stage, epoch), sizes(self.run_dir)
            now.stage_seconds, now.stage_rows = time.monotonic() - started, rows
            return now.as_tree()

        callbacks: list[Callback] = [
            StageProgressBar(place, self.settings.rounds),
            *([] if self.console.is_terminal else [StageLines(place.label, self.pace)]),
            SeedSteps(self.seed, place.round, place.stage),
            TrainingHealth(),
            KeepCheckpoints(
                path=lambda name: next_checkpoint(self.run_dir, f"in-round-{place.round}-{name}"),
                state=state,
                saved=lambda: prune(self.run_dir, often.keep) if is_first() else None,
                every_n_steps=often.every_n_steps,
                every_minutes=often.every_minutes,
                deadline=self._deadline,
            ),
        ]
        if self.settings.max_tokens is not None:
            budget = TokenBudget(self.student.tokens, self.settings.max_tokens)
            module.share_spent = budget.share_spent
            callbacks.append(budget)
        if place.stage == "grpo":
            ledger = self.data.ledger
            callbacks += [RecordRollouts(ledger, place), HarvestAllZeroGroups(ledger, place)]
            if self._going_on is None:
                self._last_grpo_began = self.student.policy_version
        else:
            callbacks.append(Reprobe(lambda epoch: self._reprobe(place, epoch)))
        # What is left must be measured now: building the set may have taken long.
        trainer = build_trainer(self.trainer_config, module, stage_dir, module.epochs, callbacks, self._time_left())
        checkpoint, self._going_on = self._going_on[0] if self._going_on else None, None
        try:
            with preemption.between_steps():
                trainer.fit(module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        except OutOfTime:
            module.on_fit_end()
            self._take_back_student()
            raise
        self._take_back_student()

    def _take_back_student(self) -> None:
        """Lightning moves a module to the CPU when its fit is over."""
        self.student.to(self._device)
        self.student.eval()

    # -- entering a stage -------------------------------------------------------------------------------------------

    def _enter_sft(self, place: Place) -> tuple[StageSet | None, str]:
        mixed: list[Critique] = []
        if self._going_on is None:
            self._probe(place)
        if self.settings.mix_critiques:
            if "cft" not in self.settings.stages and self._going_on is None:
                self.critiques = self._make_critiques(self.data.ledger.harvested(place.round - 1))
            mixed = self.critiques
        stage = AcquisitionStage(
            place=place,
            student=self.student,
            teach=lambda problems: self._bridge(place, problems, self.bridge_settings.raw()),
            bridge=lambda problems: self._bridge(place, problems, self.bridge_settings),
            route=self.data.routed,
            bridged_bands=self.bridge_settings.bands,
            critiques=mixed,
            critique_kinds=self.critique_settings.kinds,
        )  # fmt: skip
        if self._going_on is not None:
            made = read_records(self.files.stage(place).bridge, BridgeResult)
            stage.results = {(result.band or "", result.problem.id): result for result in made}
        self._bridged = len(stage.results)
        self._teacher_traces = self._known_traces(place.round)
        return stage, "nobody is medium or hard with a trace that passes the checks"

    def _enter_grpo(self, place: Place) -> tuple[StageSet | None, str]:
        if self._going_on is None:
            self._probe(place)
        size = self.grpo.prompts_per_step * self._accumulate
        stage = ConsolidationStage(place, size, self.data.review_share, self.data)
        return stage, "the Consolidation Set is empty: no problem short of mastery had a right rollout"

    def _enter_cft(self, place: Place) -> tuple[StageSet | None, str]:
        if self._going_on is not None:
            return CritiqueStage(place, self.student, self.critiques, self.critique_settings), ""
        given_ids = {record.problem.id for record in self._given_critiques}
        groups = [group for group in self.data.ledger.harvested(place.round) if group.problem.id not in given_ids]
        self.critiques = []
        if not groups and not self._given_critiques:
            return None, "no all-zero group was harvested in this round"
        self.critiques = self._given_critiques + self._make_critiques(groups)
        self._given_critiques = []  # for the first CFT alone: the next round has failures of its own
        stage = CritiqueStage(place, self.student, self.critiques, self.critique_settings)
        write_records(self.files.stage(place).critiques, self.critiques)
        append_records(self.files.stage(place).rejects, stage.rejects())
        return stage, (
            f"no critique of {len(groups)} harvested groups passed the checks, or newer rollouts solved them all; the "
            "groups are kept in harvest.jsonl"
        )

    def _make_critiques(self, groups: Sequence[RolloutGroup]) -> list[Critique]:
        def make(chunk: list[RolloutGroup]) -> list[Critique]:
            return critique(chunk, self.teacher, self.student, self.reward, self.critique_settings)

        key = f"critique {stable_seed(*(group.problem.id for group in groups))} policy {self.student.policy_version}"
        return self._journal.chunks(key, groups, make, Critique, self.settings.checkpoint.chunk or CRITIQUED_AT_A_TIME)

    def _bridge(self, place: Place, problems: Sequence[Problem], settings: BridgeSettings) -> list[BridgeResult]:
        ids = stable_seed(settings.select, *(problem.id for problem in problems))
        key = f"{place.label} bridge {ids} policy {self.student.policy_version}"
        with self._watching(f"{place.label} traces", len(problems), settings.max_trace_tokens) as watch:
            return self._journal.chunks(
                key, problems, lambda chunk: self._bridge_chunk(place, chunk, settings, watch), BridgeResult,
                self._at_a_time(1), watch.skip,
            )  # fmt: skip

    def _bridge_chunk(
        self, place: Place, problems: Sequence[Problem], settings: BridgeSettings, watch: Watch
    ) -> list[BridgeResult]:
        known, given_traces = [p for p in problems if p.id in self._given_traces], self._given_traces
        results = [given(p, given_traces[p.id], self.student, self.reward, settings) for p in known]
        problems = [problem for problem in problems if problem.id not in given_traces]
        seed = stable_seed(self.grpo.seed, "handover", place.round, self.student.policy_version)
        limit = min(settings.max_trace_tokens, self.grpo.max_completion_tokens)
        sampling = Sampling(limit, 0.0, 1.0, seed, with_log_probs=False)
        exemplars = self.data.ledger.exemplars(self.data.problems, self.data.band_of)
        return results + bridge(
            problems, self.student, self.engine, self.teacher, self.reward, settings, sampling,
            exemplars, self._more_traces(problems), self._teacher_traces, self.data.token_budget, watch,
        )  # fmt: skip

    def _known_traces(self, round: int) -> list[Trace]:
        """What the teacher wrote in the rounds before, but for rewrites that are wrong: those it may do better now."""
        files = [self.files.stage(Place(number, "sft")).bridge for number in range(1, round)]
        results = [result for path in files if path.exists() for result in read_records(path, BridgeResult)]
        candidates = [candidate for result in results for candidate in result.candidates]
        return [
            c.trace for c in candidates if c.trace.provenance == "teacher" or (c.rejected or KNOWN).startswith(KNOWN)
        ]

    def _more_traces(self, problems: Sequence[Problem]) -> list[Trace]:
        """The new traces of the critique round before, and what the student itself wrote right."""
        new = [Trace(c.problem.id, c.new_trace, "bridged") for c in self.critiques if c.new_trace]
        return new + self.data.ledger.own_traces(problems)

    # -- measuring --------------------------------------------------------------------------------------------------

    def _probe(self, place: Place) -> None:
        """Measures rho where the evidence is stale or missing."""
        ledger, refresh = self.data.ledger, self.settings.probe.refresh
        if refresh == "never":
            return
        oldest = self.student.policy_version
        if refresh == "missing" or (refresh == "unsolved" and place.stage == "sft"):
            oldest = 0
        elif place.stage == "sft" and self._last_grpo_began is not None:
            oldest = self._last_grpo_began

        def wanted(problem: Problem) -> bool:
            difficulty = ledger.get(problem.id)
            if difficulty is None or difficulty.policy_version >= oldest:
                return difficulty is None
            return refresh != "unsolved" or difficulty.successes == 0

        self._sample([p for p in self.data.problems if wanted(p)], place, f"round {place.round} probe")

    def _reprobe(self, place: Place, epoch: int) -> None:
        """Measures again what the epoch that ends may have changed: a share of the pool, or the Critique Set."""
        if place.stage == "cft":
            ids = {record.problem.id for record in self.critiques}
            problems = [problem for problem in self.data.problems if problem.id in ids]
        else:
            size = round(len(self.data.problems) * self.settings.probe.epoch_share)
            problems = self.data.rng("reprobe", place.round, epoch).sample(self.data.problems, size)
        self._sample(problems, Place(place.round, place.stage, epoch), f"round {place.round} {place.stage} re-measure")

    def _sample(self, problems: Sequence[Problem], place: Place, label: str) -> None:
        if not problems or not self._is_affordable(len(problems) * self.settings.probe.attempts, label):
            return
        self.engine.sync(self.student)
        seed = stable_seed(self.grpo.seed, "probe", place.round, place.stage, self.student.policy_version)
        sampling = Sampling(
            self.grpo.max_completion_tokens, self.grpo.temperature, self.grpo.top_p, seed, with_log_probs=False
        )
        attempts = self.settings.probe.attempts
        key = f"{label} epoch {place.epoch} policy {self.student.policy_version}"
        with self._watching(label, len(problems) * attempts, sampling.max_new_tokens) as watch:

            def measure(chunk: list[Problem]) -> list[dict[str, Any]]:
                groups = collect(self.student, self.engine, self.reward, chunk, attempts, sampling, watch)
                self.student.tokens.sampled += sum(group.num_tokens for group in groups)
                return [evidence_of(group) for group in groups]

            rows = self._longest_first(key, problems, measure, dict, attempts, watch)
        self.data.ledger.take(rows, place)
        right, sampled = sum(row["successes"] for row in rows), sum(row["attempts"] for row in rows)
        tokens = sum(row["tokens"] for row in rows)
        log.info("%s: rho %.2f over %d problems, %d tokens in %s", label, right / sampled, len(rows), tokens,
                 duration(watch.seconds))  # fmt: skip

    def _longest_first(
        self,
        key: str,
        problems: Sequence[Problem],
        make: Callable[[list[Problem]], Sequence[T]],
        cls: type[T],
        completions: int,
        watch: Watch,
    ) -> list[T]:
        """What `make` gives for each problem, in their order; made and noted a batch of the rollout engine at a time.

        Prompts of one length stand together, as the engine would sort all of them.

        Args:
            completions: of a problem.
        """
        lengths = [self.student.prompt_length(problem.question) for problem in problems]
        order = sorted(range(len(problems)), key=lambda index: (-lengths[index], index))
        made = self._journal.chunks(
            key, [problems[index] for index in order], make, cls, self._at_a_time(completions),
            lambda count: watch.skip(count * completions),
        )  # fmt: skip
        by_index = dict(zip(order, made, strict=True))
        return [by_index[index] for index in range(len(problems))]

    def _at_a_time(self, completions: int) -> int:
        """Problems with so many completions each that fill the rollout engines of all processes once."""
        room = world_size() * self.engine.batch_size(self.student)
        return self.settings.checkpoint.chunk or max(1, room // completions)

    def _watching(self, label: str, completions: int, max_new_tokens: int) -> AbstractContextManager[Watch]:
        self.pace.ahead = max(0, self.pace.ahead - completions)  # what is said of the rest is without this
        bar = self.trainer_config().get("enable_progress_bar") is not False
        return watching(label, completions, max_new_tokens, self.console, self.pace, bar)

    def _is_affordable(self, completions: int, label: str) -> bool:
        """False when measuring would take more than half of the tokens that are left: older evidence must do."""
        if self.settings.max_tokens is None:
            return True
        cost, left = completions * self.data.ledger.mean_tokens, self.settings.max_tokens - self.student.tokens.total
        if cost > left / 2:
            log.info("%s: left out, it would take %.0f of the last %d tokens", label, cost, max(0, left))
        return cost <= left / 2

    @property
    def elapsed(self) -> timedelta:
        """What the run has taken, over all its processes in time."""
        return timedelta(seconds=time.monotonic() - self._began)

    # -- stopping early -----------------------------------------------------------------------------------------------

    @property
    def _is_late(self) -> bool:
        left = self._time_left()
        return left is not None and left <= timedelta(0)

    def _cut_short(self, place: Place, seconds: float) -> None:
        """Reports a fit that trainer.max_time ended. Its checkpoint lies in its middle, so none follows."""
        self.reports.append(StageReport(place, f"cut short: {LATE}", seconds, 0, [], replace(self.student.tokens)))
        self._evaluate_due = bool(self.benchmarks)
        self._score(note=" (cut short)")  # the journal may hold it when the stage has gone on to its end

    def _stop_short(self, places: Sequence[Place]) -> None:
        """Reports the stages that there is no time for. No checkpoint knows of it: given more time, they are run."""
        self.stopped = f"trainer.max_time is used up, {len(places)} stages were not begun"
        if self.settings.evaluate != "stage" and not self.reports[-1].scores:
            self._evaluate_due = bool(self.benchmarks)
            self._score()
        for place in places:
            self.reports.append(StageReport(place, f"skipped: {LATE}", 0.0, 0, [], replace(self.student.tokens)))
            self._score()

    # -- results ----------------------------------------------------------------------------------------------------

    def _report(self, place: Place, outcome: str, seconds: float, rows: int, evaluate_now: bool) -> None:
        """Ends a stage: what it did is kept first, then the benchmarks are run."""
        self.reports.append(StageReport(place, outcome, seconds, rows, [], replace(self.student.tokens)))
        self._evaluate_due = evaluate_now
        save_after_stage(self.run_dir, self._state(), self.student, self.settings.checkpoint.keep)
        self._journal.clear()
        self._score()

    def _score(self, note: str = "") -> None:
        """The benchmarks after the newest stage, if they are due, and the summary of the run so far.

        Args:
            note: tells the benchmarks of a stage that was cut short from those after its end.
        """
        report, label = self.reports[-1], self.reports[-1].place.label
        if self._evaluate_due and self.benchmarks:
            self._run_benchmarks(report, f"benchmarks after {label}{note}")
            save_scores(self.files.benchmarks, label, report.scores)
        self._evaluate_due = False
        spent = report.tokens.total - (self.reports[-2].tokens.total if len(self.reports) > 1 else 0)
        said = [f"{label}: {report.outcome}"]
        if report.place.stage != "base":
            said.append(f"{report.seconds:.0f} s, {spent} tokens")
        if report.scores:
            said.append(" ".join(f"{score.benchmark} {100 * score.value:.1f}" for score in report.scores))
            said.append(f"benchmarks {report.benchmark_seconds:.0f} s, {report.benchmark_tokens} tokens")
        log.info("%s", " | ".join(said))
        summary = [
            {"stage": r.place.label, "outcome": r.outcome, "seconds": round(r.seconds, 1), "rows": r.rows,
             "tokens": asdict(r.tokens), "scores": [asdict(s) for s in r.scores],
             "benchmark_seconds": round(r.benchmark_seconds, 1), "benchmark_tokens": r.benchmark_tokens}
            for r in self.reports
        ]  # fmt: skip
        write_text(self.files.summary, json.dumps(summary, indent=1) + "\n")

    def _run_benchmarks(self, report: StageReport, key: str) -> None:
        settings = self.evaluation.greedy()
        total = sum(len(benchmark.problems) for benchmark in self.benchmarks) * settings.samples
        with self._watching(key, total, settings.max_new_tokens) as watch:

            def in_parts(problems: Sequence[Problem], sample: Sample) -> list[RolloutGroup]:
                groups = self._longest_first(key, problems, sample, RolloutGroup, settings.samples, watch)
                report.benchmark_tokens = sum(group.num_tokens for group in groups)
                return groups

            answers = self.files.answers(report.place.label)
            report.scores = evaluate(
                self.student, self.engine, self.reward, self.benchmarks, settings, watch, answers, in_parts
            )
            report.benchmark_seconds = watch.seconds

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

    def _write_set(self, stage: StageSet, change: Restratified, drawn: Sequence[Any]) -> None:
        """What an epoch boundary decided: the strata, the exact set, and the traces that were made for it."""
        folder = self.files.stage(change.place)
        append_records(folder.strata, [change])
        if isinstance(stage, AcquisitionStage):
            new = list(stage.results.values())[self._bridged :]
            self._bridged = len(stage.results)
            append_records(folder.bridge, new)
            append_records(folder.rejects, bridge_rejects(new))
            is_first = len(new) == len(stage.results)
            if new and (is_first or any(result.chosen is None for result in new)):
                log.info("%s, %s", change.place.label, without_trace(new))
        text = self.student.tokenizer.decode
        rows = [
            row if isinstance(row, Problem)
            else {"problem_id": row.problem_id, "origin": row.origin, "prompt": text(list(row.prompt_ids)),
                  "target": text(list(row.target_ids)), "prompt_ids": row.prompt_ids, "target_ids": row.target_ids}
            for row in drawn
        ]  # fmt: skip
        write_records(folder.set(change.place.epoch), rows)

    def _drawn(self, folder: StageFolder) -> tuple[int, list[Any]] | None:
        """The epoch and the set that the fit at hand goes on with; None when it begins."""
        if self._going_on is None or (place := self._going_on[1].within) is None:
            return None
        path = folder.set(place.epoch)
        if place.stage == "grpo":
            return place.epoch, read_records(path, Problem)
        shown = ("prompt", "target")
        return place.epoch, [
            from_json(Example, {k: v for k, v in row.items() if k not in shown}) for row in read_lines(path)
        ]

    def _write_rejects(self, place: Place) -> None:
        """What teacher and verifier set aside since the last call."""
        if rejects := self._journal.take_rejects():
            append_records(self.files.stage(place).rejects, rejects)

    def _time_left(self) -> timedelta | None:
        """What is left of trainer.max_time, by the clock of the first process."""
        deadline = self._deadline
        return None if deadline is None else first_only(lambda: timedelta(seconds=deadline - time.monotonic()))
