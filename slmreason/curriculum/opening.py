"""The beginning of a run, and of each process that goes on with it: what its folder holds is read or checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from slmreason.curriculum.resume import checkpoints, load_run
from slmreason.curriculum.state import RunState
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.identity import check_pool, pool_text
from slmreason.data.ledger import Ledger
from slmreason.records import Place, Problem, Reject
from slmreason.run.files import write_records, write_text
from slmreason.run.folder import RunFolder
from slmreason.run.journal import Journal
from slmreason.runtime.distributed import first_only, is_first
from slmreason.student import Student

log = logging.getLogger(__name__)


def open_run(
    files: RunFolder, student: Student, data: ReasoningDataModule, journal: Journal, rejects: Sequence[Reject]
) -> tuple[RunState, Path | None]:
    """Reads where a run stands: student, ledger and journal are as they were there.

    Args:
        rejects: of the benchmarks, to be written with those of the pool.

    Returns:
        The state, and the checkpoint of the fit to go on with, None when a stage is to begin.

    Raises:
        ValueError: a file of the run cannot be read; the message names it, and the line.
    """
    first_only(lambda: _keep_pool(files, data.problems))
    state, checkpoint = load_run(files.path, student)
    if state.within is not None and is_first():  # it was cut short, and what it answered then is of the past
        files.answers(state.within.label).unlink(missing_ok=True)
    journal.open()
    data.band_of = state.bands
    data.ledger = Ledger(files.path, data.bands.fading)
    if not len(data.ledger):
        data.ledger.take(data.given_evidence, Place(0, "stratify"))
    write_records(files.rejects, [*data.rejects, *data.unmatched, *rejects])
    log.info(data.describe_pool())
    return state, checkpoint


def _keep_pool(files: RunFolder, problems: Sequence[Problem]) -> None:
    """Notes which problems the run is begun with, or checks that it goes on with the same."""
    if files.pool.exists():
        check_pool(files.pool, problems)
    elif files.ledger.exists() or checkpoints(files.path):
        raise ValueError(f"{files.pool}: not there: an earlier version began this run, and nothing tells whether its "
                         "problems are those of data.train now; begin a new run")  # fmt: skip
    else:
        write_text(files.pool, pool_text(problems))
