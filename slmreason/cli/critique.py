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
    Rows,
    add_step_options,
    done_before,
    in_chunks,
    keep_rejects,
    show,
    show_plan,
    take_step_options,
)
from slmreason.cli.errors import ConfigError
from slmreason.cli.parts import place
from slmreason.curriculum.trainer import Processes
from slmreason.data.identity import Identity, identity_of
from slmreason.data.ledger import given_harvest
from slmreason.records import Critique, Problem, RolloutGroup, from_json, to_json
from slmreason.report.terminal import critique_table
from slmreason.run.files import read_lines, record_of
from slmreason.run.progress import Watch
from slmreason.runtime.distributed import first_only
from slmreason.supervision.critique import critique, pick_attempts
from slmreason.teacher.base import Teacher
from slmreason.teacher.dataset import TraceTeacher

log = logging.getLogger(__name__)
CHUNK = 64
"""Problems between two writes to the file: none of them is sampled from."""


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
    teacher = made.teacher or TraceTeacher()
    if dry_run:
        return _plan(teacher, list(groups.values()), made.critique.attempts_per_problem)
    problems = [group.problem for group in groups.values()]
    done = done_before(out, request, {"harvest": str(harvest)}, problems, _of_record)

    def make_once(chunk: list[Problem]) -> Rows:
        records = critique([groups[p.key] for p in chunk], teacher, made.student, made.reward, made.critique)
        return [to_json(record) for record in records]

    def make(chunk: list[Problem], watch: Watch) -> Rows:
        return first_only(lambda: make_once(chunk))

    def job() -> None:
        place(made.student, made.rollout, processes)
        in_chunks(out, problems, done, make, CHUNK, ("critique", 1, 0))
        show(critique_table([from_json(Critique, row) for row in read_lines(out)]))
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


def _of_record(row: dict[str, Any], where: str) -> Identity:
    return identity_of(record_of(Critique, row, where).problem)
