"""Rounds and stages: which fit comes next, on which set, and what each leaves in the run folder.

A round is: probe rho, SFT on the Acquisition Set, measure again, GRPO on the Consolidation Set while failures are
harvested, CFT on what became of them. One student goes through all of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from slmreason.boundary import Boundary, StageReport, load_boundary, save_boundary
from slmreason.callbacks import HarvestAllZeroGroups, RecordRollouts, Reprobe, StageProgressBar
from slmreason.data.datamodule import ReasoningDataModule, StageSet
from slmreason.data.ledger import Ledger, Place
from slmreason.data.strata import stratify
from slmreason.distributed import first_only, is_first
from slmreason.evaluate.benchmarks import Benchmark, EvaluationSettings, Score, evaluate, save_scores, scores_table
from slmreason.modules.base import StudentModule
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Critique, Problem, Reject, RolloutGroup, Trace
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import RolloutEngine, Sampling, stable_seed
from slmreason.runfolder import write_records, write_text
from slmreason.stages import AcquisitionStage, ConsolidationStage, CritiqueStage
from slmreason.student import Student
from slmreason.teacher.bridge import BridgeSettings, bridge, given
from slmreason.teacher.critique import CritiqueSettings, critique, recheck
from slmreason.teacher.teacher import FirstProcessTeacher, Teacher
from slmreason.teacher.traces import TraceTeacher
from slmreason.trainer import FreshConfig, build_trainer, run_time
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)
StageName = Literal["sft", "grpo", "cft"]


@dataclass
class ProbeSettings:
    """How rho is measured outside GRPO. Rollouts are drawn as GRPO draws them."""

    attempts: int = 8
    """Rollouts of each problem (METHOD's k)."""
    refresh: Literal["stale", "missing"] = "stale"
    """What is measured before a stage. `stale`: before GRPO what is not evidence of the student as it stands, before
    SFT only what is older than the last GRPO fit, whose rollouts count for free. `missing`: problems never sampled."""
    epoch_share: float = 1.0
    """Share of the pool that is measured again at the end of each SFT epoch; 0 for none."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.epoch_share <= 1:
            raise ValueError("curriculum.probe: attempts must be at least 1 and epoch_share within 0 and 1")


@dataclass
class CurriculumSettings:
    """Which fits a run has."""

    rounds: int = 2
    """Rounds of the stages."""
    stages: list[StageName] = field(default_factory=lambda: ["sft", "grpo", "cft"])
    """The stages of a round, in order."""
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    """How rho is measured."""
    mix_critiques: bool = False
    """Put the critique records of the round before into the SFT fit too, beside or in place of a CFT stage."""
    evaluate: Literal["stage", "round", "ends"] = "stage"
    """When the benchmarks are run: after every stage, after every round, or before the first and after the last."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.stages:
            raise ValueError("curriculum: rounds must be at least 1 and stages must not be empty")


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
        given_traces: Sequence[BridgeResult] = (),
        given_critiques: Sequence[Critique] = (),
        console: Console | None = None,
    ) -> None:
        """
        Args:
            given_traces: of `slmreason bridge`; their problems' traces are taken from here.
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
        self.console = console or Console(quiet=not is_first())
        self.reports: list[StageReport] = []
        self.critiques: list[Critique] = []
        """Of the newest round that had any."""
        self._given_traces = {result.problem.id: result.chosen for result in given_traces if result.chosen}
        self._given_critiques = [recheck(record, student, reward, critique_settings) for record in given_critiques]
        self._began = time.monotonic()
        self._deadline: float | None = None
        self._accumulate = 1
        self._device = device
        self._last_grpo_began: int | None = None

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> list[StageReport]:
        """All rounds and stages, the benchmarks between them, the student at the end; nothing is done twice."""
        self._prepare()
        if not self.reports:
            self._report(Place(0, "base"), "done", 0.0, 0, evaluated=True)
        last = (self.settings.rounds, self.settings.stages[-1])
        done = {(report.place.round, report.place.stage) for report in self.reports}
        for round_number in range(1, self.settings.rounds + 1):
            for name in self.settings.stages:
                if (round_number, name) in done:
                    continue
                place = Place(round_number, name)
                started = time.perf_counter()
                # No stage depends on how many random numbers the ones before it drew.
                L.seed_everything(stable_seed(self.seed, place.round, place.stage) % 2**32, verbose=False)
                outcome, rows = self._stage(place)
                ends_round = name == self.settings.stages[-1]
                wanted = {"stage": True, "round": ends_round, "ends": (round_number, name) == last}
                evaluated = wanted[self.settings.evaluate] and (outcome == "done" or (round_number, name) == last)
                self._report(place, outcome, time.perf_counter() - started, rows, evaluated)
        self._finish()
        return self.reports

    def _prepare(self) -> None:
        self.grpo.token_budget = self.data.token_budget
        self._accumulate = self.trainer_config().get("accumulate_grad_batches") or 1
        self._restore(load_boundary(self.run_dir, self.student))
        self.data.ledger = Ledger(self.run_dir)
        if not len(self.data.ledger):
            self.data.ledger.take(self.data.evidence_rows, Place(0, "stratify"))
        write_records(self.run_dir / "rejects.jsonl", self._all_rejects())
        log.info("pool: %d problems from %s, %d set aside", len(self.data.problems), self.data.train,
                 len(self.data.rejects))  # fmt: skip
        if not self._has_teacher:
            log.info("no teacher: SFT has the dataset's own traces, hand-overs from them and the student's own right "
                     "solutions, without rewrites; CFT has the dataset's traces, without repairs")  # fmt: skip

    def _restore(self, boundary: Boundary | None) -> None:
        boundary = boundary or Boundary()
        if boundary.reports:
            log.info("going on after %s", label_of(boundary.reports[-1].place))
        self.reports, self.critiques = boundary.reports, boundary.critiques
        if any(report.place.stage == "cft" for report in boundary.reports):
            self._given_critiques = []  # an earlier CFT had them
        self._last_grpo_began, self.data.band_of = boundary.last_grpo_began, boundary.bands
        self._began = time.monotonic() - boundary.elapsed
        budget = run_time(self.trainer_config)
        self._deadline = self._began + budget.total_seconds() if budget is not None else None

    def _save_boundary(self) -> None:
        elapsed = time.monotonic() - self._began
        state = Boundary(
            self.reports, self.student.policy_version, self._last_grpo_began, elapsed, self.critiques, self.data.band_of
        )
        save_boundary(self.run_dir, state, self.student)

    def _all_rejects(self) -> list[Reject]:
        return [*self.data.rejects, *(reject for benchmark in self.benchmarks for reject in benchmark.rejects)]

    def _stage(self, place: Place) -> tuple[str, int]:
        """One stage: (`done` or why it was skipped, rows it started with)."""
        left = self._time_left()
        if left is not None and left <= timedelta(0):
            return "skipped: trainer.max_time is used up", 0
        enter: dict[str, Callable[[Place], tuple[StageSet | None, str]]] = {
            "sft": self._enter_sft,
            "grpo": self._enter_grpo,
            "cft": self._enter_cft,
        }
        stage_set, reason = enter[place.stage](place)
        if stage_set is None:
            return f"skipped: {reason}", 0
        stage_dir = self._stage_dir(place)
        rows = self.data.enter(stage_set, lambda epoch, drawn: self._write_set(stage_dir, epoch, drawn))
        if rows:
            self._fit(place, stage_dir)
        self._write_after(stage_dir, stage_set)
        return ("done", rows) if rows else (f"skipped: {reason}", 0)

    def _fit(self, place: Place, stage_dir: Path) -> None:
        module = self.modules[place.stage]
        callbacks: list[Callback] = [StageProgressBar(place, self.settings.rounds)]
        if place.stage == "grpo":
            ledger = self.data.ledger
            callbacks += [RecordRollouts(ledger, place), HarvestAllZeroGroups(ledger, place)]
            self._last_grpo_began = self.student.policy_version
        else:
            callbacks.append(Reprobe(lambda epoch: self._reprobe(place, epoch)))
        # What is left must be measured now: building the set may have taken long.
        trainer = build_trainer(self.trainer_config, module, stage_dir, module.epochs, callbacks, self._time_left())
        trainer.fit(module, datamodule=self.data)
        self.student.to(self._device)
        self.student.eval()

    # -- entering a stage -------------------------------------------------------------------------------------------

    def _enter_sft(self, place: Place) -> tuple[StageSet | None, str]:
        self._probe(place)
        mixed: list[Critique] = []
        if self.settings.mix_critiques:
            if "cft" not in self.settings.stages:
                self.critiques = self._make_critiques(self.data.ledger.harvested(place.round - 1))
            mixed = self.critiques
        stage = AcquisitionStage(
            place=place,
            student=self.student,
            teach=lambda problems: self._bridge(place, problems, self.bridge_settings.raw()),
            bridge=lambda problems: self._bridge(place, problems, self.bridge_settings),
            bridged_bands=self.bridge_settings.bands,
            critiques=mixed,
            critique_kinds=self.critique_settings.kinds,
        )  # fmt: skip
        return stage, "nobody is medium or hard with a trace that passes the checks"

    def _enter_grpo(self, place: Place) -> tuple[StageSet | None, str]:
        self._probe(place)
        size = self.grpo.prompts_per_step * self._accumulate
        stage = ConsolidationStage(place, size, self.data.review_share, self.data)
        return stage, "the Consolidation Set is empty: no problem short of mastery had a right rollout"

    def _enter_cft(self, place: Place) -> tuple[StageSet | None, str]:
        given_ids = {record.problem.id for record in self._given_critiques}
        groups = [group for group in self.data.ledger.harvested(place.round) if group.problem.id not in given_ids]
        self.critiques = []
        if not groups and not self._given_critiques:
            return None, "no all-zero group was harvested in this round"
        self.critiques = self._given_critiques + self._make_critiques(groups)
        self._given_critiques = []  # for the first CFT alone: the next round has failures of its own
        stage = CritiqueStage(place, self.student, self.critiques, self.critique_settings)
        return stage, (
            f"no critique of {len(groups)} harvested groups passed the checks, or newer rollouts solved them all; the "
            "groups are kept in harvest.jsonl"
        )

    def _make_critiques(self, groups: Sequence[RolloutGroup]) -> list[Critique]:
        return critique(groups, self.teacher, self.student, self.reward, self.critique_settings)

    def _bridge(self, place: Place, problems: Sequence[Problem], settings: BridgeSettings) -> list[BridgeResult]:
        known, given_traces = [p for p in problems if p.id in self._given_traces], self._given_traces
        results = [given(p, given_traces[p.id], self.student, self.reward, settings) for p in known]
        problems = [problem for problem in problems if problem.id not in given_traces]
        seed = stable_seed(self.grpo.seed, "handover", place.round, self.student.policy_version)
        sampling = Sampling(min(settings.max_trace_tokens, self.grpo.max_completion_tokens), 0.0, 1.0, seed)
        exemplars = self.data.ledger.exemplars(self.data.problems, self.data.band_of)
        return results + bridge(
            problems, self.student, self.engine, self.teacher, self.reward, settings, sampling,
            exemplars, self._more_traces(problems), self.data.token_budget,
        )  # fmt: skip

    def _more_traces(self, problems: Sequence[Problem]) -> list[Trace]:
        """The new traces of the critique round before, and what the student itself wrote right."""
        new = [Trace(c.problem.id, c.new_trace, "bridged") for c in self.critiques if c.new_trace]
        return new + self.data.ledger.own_traces(problems)

    # -- measuring --------------------------------------------------------------------------------------------------

    def _probe(self, place: Place) -> None:
        """Measures rho where the evidence is stale or missing."""
        ledger, oldest = self.data.ledger, self.student.policy_version
        if self.settings.probe.refresh == "missing":
            oldest = 0
        elif place.stage == "sft" and self._last_grpo_began is not None:
            oldest = self._last_grpo_began

        def wanted(problem: Problem) -> bool:
            difficulty = ledger.get(problem.id)
            return difficulty is None or difficulty.policy_version < oldest

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
        if not problems:
            return
        self.engine.sync(self.student)
        seed = stable_seed(self.grpo.seed, "probe", place.round, place.stage, self.student.policy_version)
        sampling = Sampling(self.grpo.max_completion_tokens, self.grpo.temperature, self.grpo.top_p, seed)
        attempts = self.settings.probe.attempts
        with self._track(label, len(problems)) as advance:
            groups = collect(self.student, self.engine, self.reward, problems, attempts, sampling, advance)
        self.data.ledger.record(groups, place)

    # -- results ----------------------------------------------------------------------------------------------------

    def _report(self, place: Place, outcome: str, seconds: float, rows: int, evaluated: bool) -> None:
        label = "base" if place.stage == "base" else f"round {place.round} {place.stage}"
        scores: list[Score] = []
        if evaluated and self.benchmarks:
            total = sum(len(benchmark.problems) for benchmark in self.benchmarks)
            with self._track(f"benchmarks after {label}", total) as advance:
                scores = evaluate(
                    self.student, self.engine, self.reward, self.benchmarks, self.evaluation.greedy(), advance
                )
            save_scores(self.run_dir / "benchmarks.jsonl", label, scores)
        self.reports.append(StageReport(place, outcome, seconds, rows, scores))
        text = " ".join(f"{score.benchmark} {100 * score.value:.1f}" for score in scores)
        log.info("%s: %s in %.0f s%s", label, outcome, seconds, f" | {text}" if text else "")
        summary = [
            {"stage": label_of(r.place), "outcome": r.outcome, "seconds": round(r.seconds, 1), "rows": r.rows,
             "scores": [asdict(s) for s in r.scores]}
            for r in self.reports
        ]  # fmt: skip
        write_text(self.run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        self._save_boundary()

    def _finish(self) -> None:
        strata = stratify(self.data.ledger, self.data.problems, self.data.bands)
        write_text(self.run_dir / "strata.json", json.dumps(strata.counts) + "\n")
        self.student.save(self.run_dir / "student")
        self.console.print(self.table())
        self.console.print(f"student: {self.run_dir / 'student'}", soft_wrap=True)

    def table(self) -> Table:
        """Accuracy on each benchmark, for the base and after each stage that was evaluated."""
        rows: list[tuple[str, Sequence[Score]]] = [(label_of(r.place), r.scores) for r in self.reports if r.scores]
        table = scores_table("greedy pass@1 in %, 95 % interval", rows)
        skipped = [f"{label_of(r.place)}: {r.outcome}" for r in self.reports if r.outcome != "done"]
        table.caption = "\n".join(skipped) or None
        return table

    def _write_set(self, stage_dir: Path, epoch: int, drawn: Sequence[Any]) -> None:
        """The exact set of one epoch, readable by a person."""
        rows: list[Any] = []
        for row in drawn:
            if isinstance(row, Problem):
                rows.append(asdict(row))
            else:
                text = self.student.tokenizer.decode
                rows.append({"problem_id": row.problem_id, "origin": row.origin,
                             "prompt": text(list(row.prompt_ids)), "target": text(list(row.target_ids))})  # fmt: skip
        write_records(stage_dir / f"set-epoch-{epoch}.jsonl", rows)

    def _write_after(self, stage_dir: Path, stage_set: StageSet) -> None:
        """What the stage decided on its way: strata at each boundary, bridged traces, critiques, rejects."""
        history = [change for change in self.data.history if (change.place.round, change.place.stage)
                   == (stage_set.place.round, stage_set.place.stage)]  # fmt: skip
        write_records(stage_dir / "strata.jsonl", history)
        if isinstance(stage_set, AcquisitionStage):
            write_records(stage_dir / "bridge.jsonl", stage_set.results.values())
            write_records(stage_dir / "rejects.jsonl", stage_set.rejects() + self.teacher.drain_rejects())
        if isinstance(stage_set, CritiqueStage):
            write_records(stage_dir / "critiques.jsonl", stage_set.critiques)
            write_records(stage_dir / "rejects.jsonl", stage_set.rejects() + self.teacher.drain_rejects())

    def _stage_dir(self, place: Place) -> Path:
        return self.run_dir / f"round-{place.round:02d}" / place.stage

    def _time_left(self) -> timedelta | None:
        """What is left of trainer.max_time, by the clock of the first process."""
        deadline = self._deadline
        return None if deadline is None else first_only(lambda: timedelta(seconds=deadline - time.monotonic()))

    @contextmanager
    def _track(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar for sampling; silent where the output is not a terminal."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        quiet = not self.console.is_terminal or self.trainer_config().get("enable_progress_bar") is False
        with Progress(*columns, console=self.console, disable=quiet, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda count: progress.advance(task, count)


def label_of(place: Place) -> str:
    return "base" if place.stage == "base" else f"round {place.round} {place.stage}"
