"""Where a run stands, kept so that one that was cut off goes on at the stage, epoch and step where it was.

`resume/` holds checkpoints: one after each stage, and others within a fit (`KeepCheckpoints`), which are Lightning's
and carry the optimizer and the loops too. Each is one file, written whole or not at all, that knows how long every
growing file of the run was: what came later is cut off, and made again. Random numbers come from seeds that name the
place they are drawn at, so a run that goes on ends, bit by bit, as one that was never cut off. `journal.jsonl` holds
what long work between two checkpoints (measuring, the Bridge, critiques, benchmarks) has given so far.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from slmreason.curriculum.state import RunState
from slmreason.run.files import write_text
from slmreason.run.folder import RunFolder
from slmreason.run.tree import load_tree, save_tree
from slmreason.runtime.distributed import barrier, is_first
from slmreason.student import Student

log = logging.getLogger(__name__)
PREFIX = "student.network."
"""Of the student's parameters in a checkpoint: what they are called in the LightningModules."""


# -- checkpoints ----------------------------------------------------------------------------------------------------


def save_after_stage(run_dir: Path, state: RunState, student: Student, keep: int) -> None:
    """A checkpoint between two stages, of the trainable weights; every process must call it, the first one writes."""
    weights = {PREFIX + name: t.to("cpu", copy=True) for name, t in student.trained.state() if is_first()}
    if is_first():
        state.sizes = sizes(run_dir)
        name = f"after-{state.reports[-1].place.label}".replace(" ", "-")
        save_tree(next_checkpoint(run_dir, name), {"run": state.as_tree(), "state_dict": weights})
        prune(run_dir, keep)
    barrier()


def next_checkpoint(run_dir: Path, name: str) -> Path:
    """The file of the next checkpoint: numbers tell their order."""
    numbers = [int(path.name.partition("-")[0]) for path in checkpoints(run_dir)]
    return RunFolder(run_dir).resume / f"{max(numbers, default=0) + 1:06d}-{name}.ckpt"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    files = RunFolder(run_dir).resume.glob("[0-9]*-*.ckpt")
    return sorted(files, key=lambda path: int(path.name.partition("-")[0]))


def prune(run_dir: Path, keep: int) -> None:
    """Removes checkpoints but for the newest `keep` and the newest after a stage: a fit may go on from its start."""
    files = checkpoints(run_dir)
    last_stage = [path for path in files if "-after-" in path.name][-1:]
    for path in files[:-keep]:
        if path not in last_stage:
            path.unlink()


def newest_checkpoint(run_dir: Path, after_stage: bool = False) -> tuple[Path, RunState] | None:
    """The newest checkpoint that can be read, and where the run stood there; None when there is none at all.

    Args:
        after_stage: looks at those after a stage alone.

    Raises:
        ValueError: there are some, and none can be read; the message names the newest.
    """
    fault: ValueError | None = None
    for path in reversed(checkpoints(run_dir)):
        if after_stage and "-after-" not in path.name:
            continue
        try:
            state = RunState.from_tree(load_tree(path, with_tensors=False)["run"])
        except (ValueError, KeyError, TypeError) as error:
            what = error if isinstance(error, ValueError) else f"{path}: not a checkpoint of a run ({error!r})"
            fault = fault or ValueError(f"no checkpoint can be read, so the run cannot go on; the newest: {what}")
            log.warning("%s cannot be read; an older checkpoint is looked for", path)
        else:
            return path, state
    if fault is not None:
        raise fault
    return None


def load_weights(path: Path, student: Student) -> None:
    """Reads the weights of a checkpoint into the student, and nothing else of it.

    Raises:
        ValueError: they are not those of this student; the message names the first that differs.
    """
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in load_tree(path)["state_dict"].items()}
    student.trained.load(weights, str(path))


def load_run(run_dir: Path, student: Student) -> tuple[RunState, Path | None]:
    """Reads where a run stands, and takes back what its files hold beyond that.

    The student gets the weights at the end of the newest stage: a fit that goes on in its middle reads the later ones
    itself, and its reference policy is what it began with.

    Returns:
        The state, and the checkpoint of the fit to go on with, None when a stage is to begin.
    """
    found = newest_checkpoint(run_dir)
    state, path = (found[1], found[0]) if found else (RunState(), None)
    if (after_stage := newest_checkpoint(run_dir, after_stage=True)) is not None:
        load_weights(after_stage[0], student)
    student.policy_version, student.tokens = state.policy_version, state.tokens
    barrier()
    if is_first():
        take_back(run_dir, state)
    barrier()
    return state, path if state.within else None


# -- files that grow ------------------------------------------------------------------------------------------------


def sizes(run_dir: Path) -> dict[str, int]:
    """How long each growing file of the run is."""
    return {
        str(path.relative_to(run_dir)): _rows(path) if path.suffix == ".csv" else path.stat().st_size
        for path in _growing(run_dir)
    }


def take_back(run_dir: Path, state: RunState) -> None:
    """Cuts the run's files back to what they were at a checkpoint; stages that were not begun by then are removed."""
    begun = {(report.place.round, report.place.stage) for report in state.reports}
    if state.within:
        begun.add((state.within.round, state.within.stage))
    files = RunFolder(run_dir)
    for place in files.stages():
        if (place.round, place.stage) not in begun:
            shutil.rmtree(files.stage(place).path)
    for path in _growing(run_dir):
        size = state.sizes.get(str(path.relative_to(run_dir)))
        if size is None:
            path.unlink()
        elif path.suffix == ".csv":
            _cut_rows(path, size)
        elif path.stat().st_size > size:
            os.truncate(path, size)


def _growing(run_dir: Path) -> Iterable[Path]:
    files = RunFolder(run_dir)
    return sorted(
        path
        for folder in (run_dir, *(files.stage(place).path for place in files.stages()))
        for path in folder.glob("*")
        if path.suffix in (".jsonl", ".csv") and path.is_file() and not path.name.startswith(".")
    )


def _rows(path: Path) -> int:
    with open(path, newline="", encoding="utf-8") as file:
        return max(0, sum(1 for _ in csv.reader(file)) - 1)


def _cut_rows(path: Path, rows: int) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.read().splitlines(keepends=True)  # our metrics have no line break within a cell
    write_text(path, "".join(lines[: rows + 1]))
