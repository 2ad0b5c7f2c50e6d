"""The command. `slmreason --help` answers without importing torch; a subcommand builds its parser when used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "fit": "run the whole method: rounds of SFT, GRPO and CFT on one student",
    "test": "pass@k and maj@k of a student on the benchmarks, with intervals",
    "compare": "the method beside its controls, each with the same budget of tokens and the same seeds",
    "report": "one HTML page of a run: accuracy, how problems moved, curves, traces, critiques, answers",
    "export": "write a run's student as a folder that transformers, peft and vLLM load",
    "stratify": "measure difficulty and sort a pool into bands, from new or recorded rollouts",
    "bridge": "make the traces of what is not mastered, to a file that can be read and edited",
    "critique": "make critique records of a run's harvested failures, to a file that can be read and edited",
}

HELP = """\
usage: slmreason COMMAND [--config FILE ...] [--KEY VALUE ...]

Difficulty-aware SFT-then-RL for small language models.

commands:
{commands}

try:
  slmreason fit --config quickstart                 two rounds on an embedded student, a few minutes on 2 cores
  slmreason fit --config quickstart --resume auto   go on with a run that was cut off, at the step where it was
  slmreason fit --resume runs/quickstart            the same by its folder, which has the config
  slmreason fit --config quickstart --print_config  every key with its value
  slmreason export runs/quickstart my-student       the trained student for other tools
  slmreason fit --help                              every key with what it means
  slmreason fit --rollout.help HFEngine             the options of one class
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 when all went well, 2 for a mistake in the arguments, the configuration or the data, 1 when
        the disk is full.

    Raises:
        SystemExit: with 143, after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:10s}{text}" for name, text in COMMANDS.items())
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(commands=listing))
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("slmreason"))
        return 0
    if args[0] not in COMMANDS:
        print(f"error: no command {args[0]!r}; there are:\n{listing}", file=sys.stderr)
        return 2
    # The tokenizer's threads and dataloader workers do not mix; nothing here needs them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from slmreason.cli import commands

    return commands.run(args[0], args[1:], COMMANDS[args[0]])


def entry_point() -> None:
    """The console script."""
    from slmreason.runtime.redact import guard

    guard()
    sys.exit(main())
