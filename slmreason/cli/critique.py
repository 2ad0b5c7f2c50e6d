"""`slmreason critique`: critique records of groups whose rollouts all failed, from a run's harvest."""

from __future__ import annotations

import logging
from argparse import SUPPRESS
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, fresh_trainer_config, instantiate
from slmreason.cli.datasteps import (
    StepFile,
    StepRows,
    add_step_options,
    keep_rejects,
    show,
    show_plan,
    take_step_options,
    work_of,
)
from slmreason.cli.errors import ConfigError
from slmreason.cli.parts import place
from slmreason.curriculum.traces import TraceMaker
from slmreason.curriculum.trainer import Processes
from slmreason.data.identity import Identity, identity_of
from slmreason.data.ledger import given_harvest
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Critique, RolloutGroup, to_json
from slmreason.report.terminal import critique_table
from slmreason.run.files import record_of
from slmreason.supervision.bridge import Bridge
from slmreason.supervision.critique import Critic, pick_attempts
from slmreason.teacher.base import FirstProcessTeacher, Teacher
from slmreason.teacher.dataset import TraceTeacher

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    parser.add_argument("--harvest", type=str, default=SUPPRESS, help="The harvest.jsonl of a run.")
    add_step_options(parser, "critique")


def prepare(request: Request) -> Job:
    config = request.config
    out, dry_run = take_step_options(config, "critique")
    harvest = config.pop("harvest", None)
    groups = _harvested(harvest)
    made = instantiate(request.parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    teacher = FirstProcessTeacher(made.teacher or TraceTeacher())
    if dry_run:
        return _plan(teacher, list(groups.values()), made.critique.attempts_per_problem)
    problems = [group.problem for group in groups.values()]
    rows: StepRows[Critique] = StepRows(problems, _read, to_json, problem_of=lambda record: record.problem)
    file = StepFile(out, rows, request, {"harvest": str(harvest)})

    def job() -> None:
        if file.left(problems):
            teacher.check()
        place(made.student, made.rollout, processes)
        bridge = Bridge(made.student, made.rollout, teacher, made.reward.verifier, made.bridge)
        critic = Critic(teacher, made.student, made.reward.verifier, made.critique)
        grpo = GRPOSettings(**vars(config.grpo))
        maker = TraceMaker(work_of(made, file), made.data, grpo, bridge, critic, given_traces={})
        show(critique_table(maker.critiques(list(groups.values()))))
        keep_rejects(out, teacher.drain_rejects())
        log.info("records: %s; fit trains on them with --critique.records %s", out, out)

    return Job(lambda: processes.run(job))


COMMAND = Command(name="critique", options=options, prepare=prepare)


def _harvested(harvest: str | None) -> dict[str, RolloutGroup]:
    """The newest group of each problem in a harvest, by the problem's key.

    Raises:
        ConfigError: no harvest is named, or there is nothing in it.
        FileNotFoundError, ValueError: it cannot be read.
    """
    if harvest is None:
        raise ConfigError("--harvest is needed: the harvest.jsonl of a run")
    lines = given_harvest(Path(harvest))
    groups = {group.problem.key: group for group in lines}
    if not groups:
        raise ConfigError(f"--harvest {harvest}: no group in it")
    log.info("--harvest %s: %d groups of %d problems, told apart by question and gold; the newest of each counts",
             harvest, len(lines), len(groups))  # fmt: skip
    return groups


def _plan(teacher: Teacher, groups: Sequence[RolloutGroup], attempts: int) -> Job:
    asked = [group.problem for group in groups for _ in pick_attempts(group, attempts)]
    cost = teacher.estimate({"locate": asked, "repair": asked, "new_trace": asked})
    counts = {"harvested groups": len(groups), "failed attempts": len(asked)}
    return Job(lambda: show_plan("critique", counts, cost))


def _read(row: dict[str, Any], location: str) -> tuple[Identity, Critique]:
    record = record_of(Critique, row, location)
    return identity_of(record.problem), record
