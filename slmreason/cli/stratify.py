"""`slmreason stratify`: bands of a pool, from new rollouts of the student or from recorded ones."""

from __future__ import annotations

import logging
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, fresh_trainer_config, instantiate
from slmreason.cli.datasteps import (
    StepFile,
    StepRows,
    add_step_options,
    prober_of,
    show,
    show_plan,
    take_step_options,
    tell_pool,
)
from slmreason.cli.parts import load_data, place, traces_to_score
from slmreason.curriculum.trainer import Processes
from slmreason.data.evidence import evidence_in, readable_row
from slmreason.data.identity import Identity, identity_in
from slmreason.data.ledger import Ledger
from slmreason.data.posterior import Prior
from slmreason.data.recorded import read_recorded
from slmreason.data.strata import Bands, stratify
from slmreason.records import Evidence, Place, Problem, RolloutGroup
from slmreason.report.terminal import strata_table

log = logging.getLogger(__name__)
HERE = Place(0, "stratify")


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
    benchmarks = load_data(made, config)
    problems = made.data.problems
    if dry_run:
        return _plan(problems, len(problems) * made.curriculum.probe.attempts)
    traces = traces_to_score(made, {})
    file = StepFile(out, _rows(problems, _bands(config)), request, {"recorded": None})
    tell_pool(out, made.data, benchmarks)

    def job() -> None:
        place(made.student, made.rollout, processes)
        prober_of(made, config, file, traces).measure(problems, HERE, "stratify")
        in_waves = made.curriculum.probe.waves is not None
        _end(file, made.data.ledger, problems, made.data.bands, in_waves)

    return Job(lambda: processes.run(job))


def _of_recorded(request: Request, recorded: Path) -> Job:
    """Bands from rollouts in a file; there is no student."""
    config = request.config
    out, dry_run = take_step_options(config, "stratify")
    groups = {group.problem.id: group for group in _graded(recorded)}
    problems = [group.problem for group in groups.values()]
    if dry_run:
        return _plan(problems, 0)
    bands = _bands(config)
    if config.curriculum.probe.predictor != "none":
        log.info("curriculum.probe.predictor: recorded rollouts have no student that could read traces; not used")
    file = StepFile(out, _rows(problems, bands), request, {"recorded": str(recorded)})

    def look_up(chunk: list[Problem]) -> list[Evidence]:
        return [Evidence.of(groups[problem.id]) for problem in chunk]

    def job() -> None:
        ledger = Ledger(None, bands.fading)
        ledger.take(file.chunks("recorded", problems, look_up, Evidence, size=len(problems)), HERE)
        _end(file, ledger, problems, bands)

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


def _rows(problems: Sequence[Problem], bands: Bands) -> StepRows[Evidence]:
    """A row for each problem: what rollouts showed of it, and its band."""
    by_id = {problem.id: problem for problem in problems}

    def read(row: dict[str, Any], location: str) -> tuple[Identity, Evidence]:
        return identity_in(row), evidence_in(row, location)

    def write(evidence: Evidence) -> dict[str, Any]:
        return readable_row(evidence, by_id[evidence.problem_id], bands)

    return StepRows(problems, read, write, problem_of=lambda evidence: by_id[evidence.problem_id], under=_under)


def _under(evidence: Evidence, problem: Problem) -> Evidence:
    return replace(evidence, problem_id=problem.id)


def _end(
    file: StepFile[Evidence], ledger: Ledger, problems: Sequence[Problem], bands: Bands, in_waves: bool = False
) -> None:
    """Says which bands the file makes, and what to do with it.

    One line for each problem is written where there may be several, of waves, or where the prior that its band goes by
    is known only now.
    """
    out = file.path
    if in_waves or bands.fading is not None:
        file.write_again(_readable_rows(ledger, problems, bands))
    strata = stratify(ledger, problems, bands)
    show(strata_table(strata, ledger))
    if strata.predicted:
        log.info("%d problems have no rollouts and no line in the file: their bands are predicted from their traces, "
                 "by fit too with curriculum.probe.predictor: forward", len(strata.predicted))  # fmt: skip
    log.info("bands: %s; fit starts from them with --data.evidence %s", out, out)


def _readable_rows(ledger: Ledger, problems: Sequence[Problem], bands: Bands) -> list[dict[str, Any]]:
    """A row for each problem that was sampled, with the prior that its band goes by where it has one of its own."""
    prior = ledger.prior(problems)
    return [
        readable_row(found, problem, bands, Prior(a, b), ledger.is_predicted(problem.id))
        for problem, a, b in zip(problems, prior.a.tolist(), prior.b.tolist(), strict=True)
        if (found := ledger.get(problem.id))
    ]
