"""`slmreason bridge`: traces for what is not mastered, bridged for the bands that are bridged, else raw."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, fresh_trainer_config, instantiate
from slmreason.cli.datasteps import (
    StepFile,
    StepRows,
    add_step_options,
    keep_rejects,
    prober_of,
    show,
    show_plan,
    take_step_options,
    tell_pool,
    work_of,
)
from slmreason.cli.parts import load_data, place, traces_to_score
from slmreason.curriculum.sets import traces_said
from slmreason.curriculum.traces import TraceMaker
from slmreason.curriculum.trainer import Processes
from slmreason.data.identity import Identity, identity_of
from slmreason.data.strata import Strata, stratify
from slmreason.modules.settings import GRPOSettings
from slmreason.records import BridgeResult, Place, Problem, to_json
from slmreason.report.terminal import bridge_table
from slmreason.run.files import record_of
from slmreason.run.journal import Unnoted
from slmreason.supervision.bridge import Bridge
from slmreason.supervision.critique import Critic
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.teacher.dataset import TraceTeacher

log = logging.getLogger(__name__)
HERE = Place(0, "bridge")


def options(parser: Parser) -> None:
    add_step_options(parser, "bridge")


def prepare(request: Request) -> Job:
    config = request.config
    out, dry_run = take_step_options(config, "bridge")
    made = instantiate(request.parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    benchmarks = load_data(made, config)
    made.data.ledger.take(made.data.given_evidence, Place(0, "stratify"))
    teacher = FirstProcessTeacher(made.teacher or TraceTeacher())
    step = _Bridging(made, config, teacher)
    traces = traces_to_score(made, {}) if step.missing else {}
    if dry_run:
        return Job(step.show_plan)
    file = StepFile(out, StepRows(made.data.problems, _read, to_json, _problem_of), request, {})
    tell_pool(out, made.data, benchmarks)

    def job() -> None:
        if step.may_ask(file):
            teacher.check()
        place(made.student, made.rollout, processes)
        step.measure(traces)
        results = step.make(file)
        show(bridge_table(results))
        log.info(traces_said(results))
        keep_rejects(out, teacher.drain_rejects())
        log.info("traces: %s; fit trains on them with --bridge.traces %s", out, out)

    return Job(lambda: processes.run(job))


COMMAND = Command(name="bridge", options=options, prepare=prepare)


def _read(row: dict[str, Any], location: str) -> tuple[Identity, BridgeResult]:
    result = record_of(BridgeResult, row, location)
    return identity_of(result.problem), result


def _problem_of(result: BridgeResult) -> Problem:
    return result.problem


@dataclass
class _Bridging:
    """The step at hand."""

    made: Namespace
    config: Namespace
    teacher: FirstProcessTeacher

    @property
    def missing(self) -> list[Problem]:
        """Problems without evidence."""
        data = self.made.data
        return [problem for problem in data.problems if problem.id not in data.ledger]

    @property
    def strata(self) -> Strata:
        data = self.made.data
        return stratify(data.ledger, data.problems, data.bands)

    def may_ask(self, file: StepFile[BridgeResult]) -> bool:
        """Whether the teacher may be asked for rows that the file has not yet."""
        strata = self.strata
        return bool(self.missing or file.left([*strata.medium, *strata.hard]))

    def measure(self, traces: Mapping[str, str]) -> None:
        """Samples what there is no evidence of.

        Args:
            traces: that `curriculum.probe.predictor` reads.
        """
        if missing := self.missing:
            log.info("%d problems have no evidence yet (data.evidence): they are measured first", len(missing))
            prober_of(self.made, self.config, Unnoted(), traces).measure(missing, Place(0, "stratify"), "probe")

    def make(self, file: StepFile[BridgeResult]) -> list[BridgeResult]:
        """The traces of what is not mastered: medium problems first."""
        made, strata = self.made, self.strata
        made.data.band_of = strata.band_of
        bridge = Bridge(
            made.student, made.rollout, self.teacher, made.reward.verifier, made.bridge, made.data.token_budget
        )
        critic = Critic(self.teacher, made.student, made.reward.verifier, made.critique)
        grpo = GRPOSettings(**vars(self.config.grpo))
        maker = TraceMaker(work_of(made, file), made.data, grpo, bridge, critic, given_traces={})
        medium = maker.traces(HERE, strata.medium, bridged="medium" in made.bridge.bands)
        return medium + maker.traces(HERE, strata.hard, bridged="hard" in made.bridge.bands)

    def show_plan(self) -> None:
        """What would be made, at most."""
        strata, missing = self.strata, len(self.missing)
        asked = [*strata.medium, *strata.hard]
        bridged = [problem for problem in asked if strata.band_of[problem.id] in self.made.bridge.bands]
        if missing:  # who of them is mastered is not known before they are measured
            asked, bridged = [*asked, *strata.unknown], [*bridged, *strata.unknown]
        counts = {"problems without evidence, to be measured": missing, "traces, at most": len(asked),
                  "of them bridged, at most": len(bridged)}  # fmt: skip
        show_plan("bridge", counts, self.teacher.estimate({"solve": asked, "rewrite": bridged}))
