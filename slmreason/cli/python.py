"""`slmreason fit` from Python: the same config, the same run, its result as an object in place of an exit status."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from rich.console import Console
from rich.table import Table

from slmreason.cli.command import find
from slmreason.cli.errors import ConfigError
from slmreason.cli.fit import Fit
from slmreason.cli.screen import put_back, quiet
from slmreason.cli.status import LATE_MISTAKES, MISTAKES, requested
from slmreason.curriculum.state import StageReport
from slmreason.report.terminal import print_tables, scores_table
from slmreason.runtime import preemption
from slmreason.runtime.redact import shown
from slmreason.student import Student

Section = Mapping[str, Any]
Config = str | os.PathLike[str] | Section
"""A recipe's name, a YAML file, or what stands in one."""
ClassSection = str | Section | None
"""A class by its name or import path, or `{"class_path": ..., "init_args": {...}}`."""


class Sections(TypedDict, total=False):
    """The sections of a config; `slmreason fit --help` says what stands in each."""

    seed_everything: int
    run_dir: str | os.PathLike[str]
    student: Section
    data: Section
    curriculum: Section
    sft: Section
    grpo: Section
    cft: Section
    bridge: Section
    critique: Section
    rollout: ClassSection
    reward: ClassSection | Sequence[str | Section]
    normalize_rewards: bool
    teacher: ClassSection
    benchmarks: Sequence[str]
    evaluation: Section
    validation: Section
    backend: Section
    trainer: Section


@dataclass(frozen=True)
class ScoreTable:
    """The scores of a run. `print` shows the table that the command shows."""

    reports: tuple[StageReport, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """One for each stage, benchmark and metric: `stage`, then the fields of `Score`. For pandas and the like."""
        return [{"stage": report.place.label, **asdict(score)} for report in self.reports for score in report.scores]

    def __rich__(self) -> Table:
        rows = [(report.place.label, report.scores) for report in self.reports if report.scores]
        return scores_table("greedy pass@1 in %, 95 % interval", rows)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), color_system=None, force_terminal=False)
        with console.capture() as drawn:
            print_tables(console, self.__rich__())
        return drawn.get().rstrip()


@dataclass(frozen=True)
class FitResult:
    """What a run came to."""

    student: Student = field(repr=False)
    """Trained, in evaluation mode, on the device that it was trained on."""
    folder: Path
    """Of the run; `slmreason.run.folder.RunFolder` knows its files."""
    reports: tuple[StageReport, ...] = field(repr=False)
    """What became of each stage, the base first."""

    @property
    def table(self) -> ScoreTable:
        """Accuracy on each benchmark, for the base and after each stage that was evaluated."""
        return ScoreTable(self.reports)


def fit(
    config: Config | Sequence[Config] = (),
    *,
    resume: str | os.PathLike[str] | None = None,
    **sections: Unpack[Sections],
) -> FitResult:
    """Runs the whole method, as `slmreason fit` does.

    Signal handlers, logging and warnings are as before when it returns. Random numbers are seeded as the config says.

    Args:
        config: One config or several, stacked in order.
        resume: `auto` for the newest unfinished run by this config, or the folder of a run, which brings its config.
        sections: Override the config, key by key, as flags do: `grpo={"group_size": 4}` is `--grpo.group_size=4`.

    Raises:
        ValueError: the arguments, the config or the data they name are wrong, in the words of the command line.
        KeyboardInterrupt: it was stopped from the keyboard; what has been done is kept.
    """
    layers = [config] if isinstance(config, str | os.PathLike | Mapping) else config
    args = [arg for layer in [*layers, sections] for arg in as_arguments(layer)]
    if resume is not None:
        args.append(f"--resume={os.fspath(resume)}")
    with put_back(), preemption.listening():
        quiet()
        run = _prepared(args)
        _do(run)
    assert run.curriculum is not None
    return FitResult(run.parts.student, run.curriculum.files.path, tuple(run.curriculum.reports))


def _prepared(args: Sequence[str]) -> Fit:
    try:
        return Fit.of(requested(find("fit"), args))
    except MISTAKES as error:
        raise ConfigError(shown(str(error))) from error
    except SystemExit as stop:
        raise ConfigError("options that print something and leave are of the command line alone") from stop


def _do(run: Fit) -> None:
    try:
        run.run()
    except LATE_MISTAKES as error:
        raise ConfigError(shown(str(error))) from error
    except SystemExit as stop:
        # Within a fit Lightning catches the key and leaves with a status of its own.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt(f"what has been done is kept, {run.going_on}") from stop
        raise
    except Exception as error:
        error.add_note(f"what has been done is kept, {run.going_on}")
        raise


OPEN = (".optimizer", ".lora.options")
"""Ends of keys whose value is a mapping that is handed on whole."""


def as_arguments(layer: Config | Sections) -> list[str]:
    """A config as the command line takes it: a name or a file by `--config`, and anything else key by key.

    Raises:
        ConfigError: a value is nothing that can stand in a config.
    """
    if isinstance(layer, str | os.PathLike):
        return [f"--config={os.fspath(layer)}"]
    return [f"--{key}={text}" for name, value in layer.items() for key, text in _flags(str(name), value)]


def _flags(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """(`grpo.group_size`, `4`) of each value below a key; a class comes before its arguments."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if not isinstance(value, Mapping) or not value or key.endswith(OPEN):
        yield key, _as_text(key, value)
        return
    if "class_path" in value:
        yield key, str(value["class_path"])
    for name, below in value.items():
        if name != "class_path":
            yield from _flags(f"{key}.{name}", below)


def _as_text(key: str, value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)

    def within(other: Any) -> Any:
        if isinstance(other, os.PathLike):
            return os.fspath(other)
        if is_dataclass(other) and not isinstance(other, type):
            return asdict(other)
        raise TypeError

    try:
        return json.dumps(value, default=within)
    except TypeError:
        raise ConfigError(
            f"{key}: a config is saved with the run, and {type(value).__name__} cannot be written into it; name a "
            "class as {'class_path': ..., 'init_args': {...}}"
        ) from None
