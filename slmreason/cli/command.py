"""What a command is. A new one is a line of `COMMANDS`, and a file of that name beside this one that gives `COMMAND`.

Nothing heavy is imported here: `slmreason --help` reads `COMMANDS` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from slmreason.cli.config import Parser

COMMANDS = {
    "fit": "run the whole method: rounds of SFT, GRPO and CFT on one student",
    "test": "pass@k and maj@k of a student on the benchmarks, with intervals",
    "compare": "the method beside its controls, each with the same budget of tokens and the same seeds",
    "report": "one HTML page of a run: accuracy, how problems moved, curves, traces, critiques, answers",
    "export": "write a run's student as a folder that transformers, peft and vLLM load",
    "data": "show how a data set is read: rows, prompts, tokens, what is rejected and which key to set",
    "stratify": "measure difficulty and sort a pool into bands, from new or recorded rollouts",
    "bridge": "make the traces of what is not mastered, to a file that can be read and edited",
    "critique": "make critique records of a run's harvested failures, to a file that can be read and edited",
}
"""Name -> help line, in the order in which they are listed."""


@dataclass(frozen=True)
class Request:
    """A command as it was called."""

    parser: Parser
    args: tuple[str, ...]
    config: Namespace
    """What the parser made of the arguments."""


@dataclass(frozen=True)
class Job:
    """What is left of a command when its arguments, its config and the data they name are known to be good."""

    do: Callable[[], int | None]
    """The long part; gives the exit status where it is another than 0."""
    go_on: Callable[[], str] = lambda: "run the same command again"
    """What to do where it was cut off; asked when that has happened."""


@dataclass(frozen=True)
class Command:
    """One command of `slmreason`."""

    name: str
    options: Callable[[Parser], None]
    """Adds the options that this command alone has."""
    prepare: Callable[[Request], Job]
    """Finds every mistake that can be found before the long part begins (ValueError, ConfigError)."""
    arguments: Callable[[Sequence[str]], Sequence[str]] = list
    """Completes the arguments before they are parsed."""
    reads_config: bool = True
    """False where a command has its own options and no config."""

    @property
    def help(self) -> str:
        """The line of `slmreason --help`, which heads `slmreason NAME --help` too."""
        return COMMANDS[self.name]


def find(name: str) -> Command:
    """The command of a name of `COMMANDS`; imports what it works with."""
    command: Command = import_module(f"slmreason.cli.{name}").COMMAND
    return command
