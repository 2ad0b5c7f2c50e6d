"""`slmreason stratify`: bands of a pool, from new rollouts of the student or from recorded ones."""

from __future__ import annotations

import logging
from argparse import SUPPRESS
from collections.abc import Sequence
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
    probe,
    show,
    show_plan,
    take_step_options,
)
from slmreason.cli.parts import load_data, place
from slmreason.curriculum.trainer import Processes
from slmreason.data.evidence import as_ledger_rows, evidence_in, evidence_row, matched_evidence
from slmreason.data.identity import Identity, identity_in
from slmreason.data.ledger import Ledger
from slmreason.data.recorded import read_recorded
from slmreason.data.strata import Bands, stratify
from slmreason.records import Place, Problem, RolloutGroup
from slmreason.report.terminal import strata_table
from slmreason.run.progress import Watch

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    parser.add_argument("--recorded", type=str, default=SUPPRESS, help="JSONL of recorded rollouts to grade.")
    add_step_options(parser, "stratify")


def prepare(request: Request) -> Job:
    recorded = request.config.pop("recorded", None)
    return _of_the_student(request) if recorded is None else _of_recorded(request, Path(recorded))


COMMAND = Command(name="stratify", options=options, prepare=prepare)


def _of_the_student(request: Request) -> Job:
    """Bands from new rollouts."""
    config = request.config
    out, dry_run = take_step_options(config, "stratify")
    made = instantiate(request.parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    load_data(made, config)
    problems, attempts = list(made.data.problems), made.curriculum.probe.attempts
    if dry_run:
        return _plan(problems, len(problems) * attempts)
    bands = _bands(config)
    done = done_before(out, request, {"recorded": None}, problems, _of_evidence)

    def sample(chunk: list[Problem], watch: Watch) -> Rows:
        return [evidence_row(group, bands) for group in probe(made, config, chunk, watch)]

    def job() -> None:
        place(made.student, made.rollout, processes)
        size = max(1, made.rollout.batch_size(made.student) // attempts)
        work = ("stratify", attempts, config.grpo.max_completion_tokens)
        in_chunks(out, problems, done, sample, size, work)
        _tell(out, problems, bands)

    return Job(lambda: processes.run(job))


def _of_recorded(request: Request, recorded: Path) -> Job:
    """Bands from rollouts in a file; there is no student."""
    config = request.config
    out, dry_run = take_step_options(config, "stratify")
    groups = _graded(recorded)
    by_key = {group.problem.key: group for group in groups}
    problems = [group.problem for group in groups]
    if dry_run:
        return _plan(problems, 0)
    bands = _bands(config)
    done = done_before(out, request, {"recorded": str(recorded)}, problems, _of_evidence)

    def look_up(chunk: list[Problem], watch: Watch) -> Rows:
        return [evidence_row(by_key[problem.key], bands) for problem in chunk]

    def job() -> None:
        work = ("stratify", config.curriculum.probe.attempts, config.grpo.max_completion_tokens)
        in_chunks(out, problems, done, look_up, len(problems), work)
        _tell(out, problems, bands)

    return Job(job)


def _graded(recorded: Path) -> list[RolloutGroup]:
    """The rollouts of a file; where it has labels of its own, how many agree with the verifier is said."""
    groups, disagreements, labelled = read_recorded(recorded)
    log.info("%s: %d rollouts of %d problems", recorded, sum(len(g.rollouts) for g in groups), len(groups))
    if labelled:
        log.info("the verifier agrees with %d of %d recorded labels", labelled - len(disagreements), labelled)
        for row in disagreements[:10]:
            log.warning("differs from its label: %s", row)
    return groups


def _plan(problems: Sequence[Problem], rollouts: int) -> Job:
    return Job(lambda: show_plan("stratify", {"problems": len(problems), "rollouts to draw": rollouts}, None))


def _bands(config: Namespace) -> Bands:
    return Bands(**vars(config.data.bands))


def _of_evidence(row: dict[str, Any], where: str) -> Identity:
    evidence_in(row, where)
    return identity_in(row)


def _tell(out: Path, problems: Sequence[Problem], bands: Bands) -> None:
    """The bands that the file makes, and what to do with it."""
    ledger = Ledger(None)
    ledger.take(as_ledger_rows(matched_evidence(out, problems)), Place(0, "stratify"))
    show(strata_table(stratify(ledger, problems, bands), ledger))
    log.info("bands: %s; fit starts from them with --data.evidence %s", out, out)
