"""The runs of one config, `run_dir`, `run_dir-2`, ...: how each stands, and the command that goes on with one."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from slmreason.cli.difference import GROWS, MAY_CHANGE, differing_keys, flat
from slmreason.cli.errors import ConfigError
from slmreason.run.folder import RunFolder

log = logging.getLogger(__name__)
State = Literal["unfinished", "finished", "other", "unreadable"]


@dataclass(frozen=True)
class FoundRun:
    """A run that was begun under a name of `run_dir`."""

    folder: Path
    state: State
    """`other`: it was begun by another config."""
    says: str
    """How it stands, in words."""
    began: tuple[int, int]
    """What tells the newer of two runs."""

    def __str__(self) -> str:
        return f"{self.folder}: {self.says}"


# -- finding --------------------------------------------------------------------------------------------------------


def newest_unfinished(run_dir: Path, now: dict[str, Any]) -> Path | None:
    """The run that `--resume auto` goes on with: the newest by this config that is not finished.

    Where all of them are finished it is the newest, which has nothing left to do.

    Args:
        now: the config of this command.

    Returns:
        Its folder; None when no run was begun.

    Raises:
        ConfigError: there are runs, and all are by another config; the message lists them.
    """
    found = [stand_of(folder, now) for folder in run_folders(run_dir)]
    if not found:
        return None
    by_age = sorted(found, key=lambda run: run.began, reverse=True)
    listing = "\n".join(f"  {run}" for run in by_age)
    for state in ("unfinished", "finished"):
        chosen = next((run for run in by_age if run.state == state), None)
        if chosen is None:
            continue
        if state == "finished":
            log.info(
                "--resume auto: no run by this config is unfinished; without --resume a new one begins:\n%s", listing
            )
        elif len(found) > 1:
            log.info("--resume auto: %s is the newest unfinished run by this config, of:\n%s", chosen.folder, listing)
        return chosen.folder
    raise ConfigError(
        f"--resume auto: there is no run by this config in {run_dir.parent}; there are:\n{listing}\n"
        f"a run goes on as it was begun, by --resume FOLDER without --config; without --resume a new one begins"
    )


def run_folders(run_dir: Path) -> list[Path]:
    """The folders of the runs that were begun as `run_dir`, under the free names that were found for them.

    Raises:
        ConfigError: the folder that they are in cannot be read.
    """
    name = re.compile(rf"{re.escape(run_dir.name)}(?:-(?:[2-9]|[1-9]\d+))?")
    try:
        beside = list(run_dir.parent.iterdir()) if run_dir.parent.is_dir() else []
        return sorted(path for path in beside if name.fullmatch(path.name) and RunFolder(path).config.is_file())
    except OSError as error:
        raise ConfigError(f"run_dir: {run_dir.parent} cannot be read ({error.strerror})") from error


def stand_of(folder: Path, now: dict[str, Any]) -> FoundRun:
    """How a run stands, by its files, beside the config of this command."""
    saved = RunFolder(folder).config
    number = re.search(r"-(\d+)$", folder.name)
    began = (saved.stat().st_mtime_ns, int(number[1]) if number else 1)
    try:
        before = read_config(folder)
    except ConfigError:
        return FoundRun(folder, "unreadable", "its config.yaml cannot be read", began)
    if keys := differing_keys(before, now, GROWS):
        return FoundRun(folder, "other", f"by another config, which differs in {', '.join(keys)}", began)
    finished, says = _progress(folder, flat(now))
    return FoundRun(folder, "finished" if finished else "unfinished", says, began)


def _progress(folder: Path, config: dict[str, Any]) -> tuple[bool, str]:
    """Whether a run is finished, and how far it is."""
    try:
        stages = json.loads(RunFolder(folder).summary.read_text(encoding="utf-8"))
        # What a run had no time for it has not done.
        done = [stage for stage in stages if "trainer.max_time" not in stage["outcome"]]
        wanted = 1 + config["curriculum.rounds"] * len(config["curriculum.stages"])
        most = config.get("curriculum.max_tokens")
        spent = bool(most) and sum(stages[-1]["tokens"].values()) >= most
        newest = str(done[-1]["stage"])
    except (OSError, ValueError, LookupError, TypeError):
        return False, "unfinished: begun, no stage is done"
    if RunFolder(folder).student.is_dir() and (len(done) >= wanted or (spent and len(done) == len(stages))):
        return True, "finished"
    return False, f"unfinished: {newest} is done"


def read_config(folder: Path) -> dict[str, Any]:
    """The config that a run was begun with.

    Raises:
        ConfigError: the folder holds no run, or the file cannot be read.
    """
    saved = RunFolder(folder).config
    if not saved.is_file():
        raise ConfigError(f"--resume {folder}: no run there ({saved} is missing)")
    try:
        config = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--resume {folder}: {saved} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--resume {folder}: {saved} holds no config")
    return config


# -- going on -------------------------------------------------------------------------------------------------------


@dataclass
class GoingOn:
    """How the run at hand is gone on with, once it has a folder."""

    now: dict[str, Any]
    """The config of this command."""
    max_time: timedelta | None = None
    """The budget of the whole run."""
    folder: Path | None = None

    def __str__(self) -> str:
        return self.words()

    def words(self, *flags: str) -> str:
        """`go on with: ` and the command, or what to do where nothing has been begun."""
        return "run the same command again" if self.folder is None else f"go on with: {self.command(*flags)}"

    def command(self, *flags: str) -> str:
        """The command as a shell takes it: the folder, and what may change and was changed since the run began.

        Args:
            flags: further ones, such as a larger budget.
        """
        assert self.folder is not None
        before, now = flat(read_config(self.folder)), flat(self.now)
        given = {flag.partition("=")[0] for flag in flags}
        changed = [
            f"--{key}={_as_text(value)}"
            for key, value in now.items()
            if key != "run_dir" and f"--{key}" not in given and before.get(key) != value
            and (MAY_CHANGE.fullmatch(key) or GROWS.fullmatch(key))
        ]  # fmt: skip
        return " ".join([program(), "fit", "--resume", shlex.quote(_as_folder(self.folder)),
                         *map(shlex.quote, [*changed, *flags])])  # fmt: skip

    def after(self, stopped: str, elapsed: timedelta = timedelta(0)) -> str:
        """What is said of a run that a budget ended: why, and the command that goes on, with twice that budget.

        Args:
            elapsed: what the run has taken; measuring may take longer than the budget, and twice that be too little.
        """
        flags = []
        if "trainer.max_time" in stopped and self.max_time is not None:
            flags.append(f"--trainer.max_time={days_to_seconds(self.max_time + max(self.max_time, elapsed))}")
        if "curriculum.max_tokens" in stopped:
            flags.append(f"--curriculum.max_tokens={2 * flat(self.now)['curriculum.max_tokens']}")
        return f"{stopped}; with a larger one {self.words(*flags)}"


def program() -> str:
    """How this program is called from a shell."""
    return "slmreason" if shutil.which("slmreason") else f"{shlex.quote(sys.executable)} -m slmreason.cli"


def days_to_seconds(time: timedelta) -> str:
    """A duration as trainer.max_time takes it: `DD:HH:MM:SS`."""
    minutes, seconds = divmod(max(1, round(time.total_seconds())), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02d}:{hours:02d}:{minutes:02d}:{seconds:02d}"


def with_saved_config(args: Sequence[str]) -> list[str]:
    """The arguments of `fit`, with the config of the run that `--resume FOLDER` names where they name none.

    Raises:
        ConfigError: there is no run in that folder, or its config cannot be read.
    """
    wanted = None
    for flag, following in zip(args, [*args[1:], ""], strict=True):
        if flag in ("-c", "--config") or flag.startswith(("--config=", "-c=")):
            return list(args)
        if flag == "--resume":
            wanted = following
        elif flag.startswith("--resume="):
            wanted = flag.partition("=")[2]
    if wanted in (None, "", "auto", "null"):
        return list(args)
    folder = Path(os.path.expanduser(str(wanted)))
    read_config(folder)
    return [f"--config={RunFolder(folder).config}", *args]


def _as_folder(folder: Path) -> str:
    """A folder's name that no word of the command line can be taken for: `auto` and `null` are words."""
    text = str(folder)
    return text if "/" in text else f"./{text}"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
