"""The folder of a run: what its files are called, and who may use it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO

from slmreason.records import Place


class RunFolder:
    """Where each file of a run lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.pool = path / "pool.json"
        self.ledger = path / "ledger.jsonl"
        self.harvest = path / "harvest.jsonl"
        self.trace_scores = path / "trace_scores.jsonl"
        self.predicted = path / "predicted.jsonl"
        self.rejects = path / "rejects.jsonl"
        self.benchmarks = path / "benchmarks.jsonl"
        self.curve = path / "curve.jsonl"
        self.base_completions = path / "base_completions.jsonl"
        self.summary = path / "summary.json"
        self.strata = path / "strata.json"
        self.student = path / "student"
        self.resume = path / "resume"
        self.journal = self.resume / "journal.jsonl"
        self.experiments = self.resume / "experiments.json"

    def answers(self, stage: str) -> Path:
        """What the student answered to the benchmarks: after a stage, by its label (`base`, `round 1 sft`), or at a
        budget (`100000 tokens`)."""
        return self.path / "answers" / f"{stage.replace(' ', '-')}.jsonl"

    def stage(self, place: Place) -> StageFolder:
        return StageFolder(self.path / place.folder)

    def stages(self) -> list[Place]:
        """The stages that were begun, by their folders' names."""
        folders = [folder for folder in self.path.glob("round-[0-9][0-9]*/*") if folder.is_dir()]
        return sorted(
            (Place(int(folder.parent.name.removeprefix("round-")), folder.name) for folder in folders),
            key=lambda place: (place.round, place.stage),
        )


class StageFolder:
    """Where each file of a stage lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.strata = path / "strata.jsonl"
        self.bridge = path / "bridge.jsonl"
        self.critiques = path / "critiques.jsonl"
        self.rejects = path / "rejects.jsonl"
        self.metrics = path / "metrics.csv"
        self.samples = path / "samples.jsonl"
        self.rollouts = path / "rollouts"
        self.health = path / "health.jsonl"

    def set(self, epoch: int) -> Path:
        """The rows that an epoch trained on. The first is 0 in code and in records, and 1 in names and words."""
        return self.path / f"set-epoch-{epoch + 1}.jsonl"


def lock_folder(folder: Path) -> TextIO:
    """Takes a run folder for this process, until the file that is given back is closed or the process ends.

    Raises:
        ValueError: another process has it; the message gives its number.
    """
    file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the run
    try:
        # A lock of this process alone: one by flock would live on in forked dataloader workers.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"{folder}: in use by process {owner}; wait for it, or stop it first") from error
    file.truncate(0)
    file.write(f"{os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    return file


def checked_folder(key: str, text: str) -> Path:
    """The path of a folder that can be made or written to, as far as can be told without making it.

    Args:
        key: of the config, for the message.

    Raises:
        ValueError: it has no name, a file or a link that leads nowhere is in the way, or it cannot be written to.
    """
    folder = Path(text)
    if "\0" in text or not text.strip() or folder.name in ("", ".."):
        raise ValueError(f"{key}: {text!r} is no name of a folder; give one such as runs/first")
    try:
        place = folder
        while not place.exists():
            if place.is_symlink():
                raise ValueError(f"{key}: {place} is a link to {os.readlink(place)}, which does not exist")
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{key}: {place} is a file; a folder is needed{'' if place == folder else ' there'}")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{key}: {folder} cannot be written: no permission to write to {place}")
    except OSError as error:
        raise ValueError(f"{key}: {folder} cannot be a folder ({error.strerror})") from error
    return folder


def free_folder(wanted: Path) -> Path:
    """`wanted` when it does not exist or is empty, else the first free of `wanted-2`, `wanted-3`, ..."""
    number, folder = 1, wanted
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
