"""`slmreason bridge`: traces for what is not mastered, bridged for the bands that are bridged, else raw."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, fresh_trainer_config, instantiate
from slmreason.cli.datasteps import (
    Rows,
    add_step_options,
    done_before,
    in_chunks,
    keep_rejects,
    probe,
    show,
    show_plan,
    take_step_options,
    watched,
)
from slmreason.cli.parts import load_data, place
from slmreason.curriculum.sets import without_trace
from slmreason.curriculum.trainer import Processes
from slmreason.data.identity import Identity, identity_of
from slmreason.data.ledger import Ledger
from slmreason.data.strata import Strata, stratify
from slmreason.records import BridgeResult, Place, Problem, from_json, to_json
from slmreason.report.terminal import bridge_table
from slmreason.rollout.engine import Sampling, stable_seed
from slmreason.run.files import read_lines, record_of
from slmreason.run.progress import Watch
from slmreason.supervision.bridge import BridgeSettings, bridge
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.teacher.dataset import TraceTeacher

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    add_step_options(parser, "bridge")


def prepare(request: Request) -> Job:
    config = request.config
    out, dry_run = take_step_options(config, "bridge")
    made = instantiate(request.parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    load_data(made, config)
    teacher, ledger = FirstProcessTeacher(made.teacher or TraceTeacher()), Ledger(None)
    ledger.take(made.data.evidence_rows, Place(0, "stratify"))
    step = _Bridging(made, config, teacher, ledger, out)
    if dry_run:
        return Job(step.show_plan)
    done = done_before(out, request, {}, made.data.problems, _of_result)

    def job() -> None:
        place(made.student, made.rollout, processes)
        step.measure()
        step.make_all(done)
        step.tell()

    return Job(lambda: processes.run(job))


COMMAND = Command(name="bridge", options=options, prepare=prepare)


def _of_result(row: dict[str, Any], where: str) -> Identity:
    return identity_of(record_of(BridgeResult, row, where).problem)


@dataclass
class _Bridging:
    """The step at hand."""

    made: Namespace
    config: Namespace
    teacher: FirstProcessTeacher
    ledger: Ledger
    out: Path

    @property
    def missing(self) -> list[Problem]:
        """Problems without evidence."""
        return [problem for problem in self.made.data.problems if problem.id not in self.ledger]

    @property
    def strata(self) -> Strata:
        return stratify(self.ledger, self.made.data.problems, self.made.data.bands)

    def measure(self) -> None:
        """Samples what there is no evidence of."""
        missing = self.missing
        if not missing:
            return
        log.info("%d problems have no evidence yet (data.evidence): they are measured first", len(missing))
        config = self.config
        completions = len(missing) * config.curriculum.probe.attempts
        with watched("probe", completions, config.grpo.max_completion_tokens) as watch:
            self.ledger.record(probe(self.made, config, missing, watch), Place(0, "probe"))

    def make_all(self, done: set[str]) -> None:
        """Writes the traces of what is not mastered."""
        strata, made = self.strata, self.made
        wanted = [*strata.medium, *strata.hard]

        def make(chunk: list[Problem], watch: Watch) -> Rows:
            return self._bridged(strata, chunk, watch)

        size = made.rollout.batch_size(made.student)
        in_chunks(self.out, wanted, done, make, size, ("bridge", 1, made.bridge.max_trace_tokens))

    def _bridged(self, strata: Strata, chunk: list[Problem], watch: Watch) -> Rows:
        made, config, settings = self.made, self.config, self._settings
        sampling = Sampling(
            min(settings.max_trace_tokens, config.grpo.max_completion_tokens),
            0.0,
            1.0,
            stable_seed(config.grpo.seed, "handover"),
            with_log_probs=False,
        )
        exemplars = self.ledger.exemplars(made.data.problems, strata.band_of)
        own = self.ledger.own_traces(chunk)
        results: dict[str, BridgeResult] = {}
        for bridged in (True, False):
            part = [p for p in chunk if (strata.band_of[p.id] in settings.bands) == bridged]
            chosen = settings if bridged else settings.raw()
            if part:
                made_of = bridge(
                    part, made.student, made.rollout, self.teacher, made.reward, chosen, sampling, exemplars, own,
                    token_budget=made.data.token_budget, watch=watch,
                )  # fmt: skip
                results |= {result.problem.id: result for result in made_of}
        return [to_json(results[problem.id]) for problem in chunk]

    @property
    def _settings(self) -> BridgeSettings:
        settings: BridgeSettings = self.made.bridge
        return settings

    def tell(self) -> None:
        """What became of each problem, and what to do with the file."""
        asked = {problem.key for problem in self.made.data.problems}
        results = [from_json(BridgeResult, row) for row in read_lines(self.out)]
        results = [result for result in results if result.problem.key in asked]
        show(bridge_table(results))
        log.info(without_trace(results))
        keep_rejects(self.out, self.teacher.drain_rejects())
        log.info("traces: %s; fit trains on them with --bridge.traces %s", self.out, self.out)

    def show_plan(self) -> None:
        """What would be made, at most."""
        strata, missing = self.strata, len(self.missing)
        asked = [*strata.medium, *strata.hard]
        bridged = [p for p in asked if strata.band_of[p.id] in self._settings.bands]
        if missing:  # who of them is mastered is not known before they are measured
            asked, bridged = [*asked, *strata.unknown], [*bridged, *strata.unknown]
        counts = {"problems without evidence, to be measured": missing, "traces, at most": len(asked),
                  "of them bridged, at most": len(bridged)}  # fmt: skip
        show_plan("bridge", counts, self.teacher.estimate({"solve": asked, "rewrite": bridged}))
