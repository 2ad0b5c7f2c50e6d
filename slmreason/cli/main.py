"""The command line. `slmreason --help` answers without importing torch; a command imports what it needs when used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from slmreason.cli.command import COMMANDS, find
from slmreason.cli.errors import ConfigError, fail
from slmreason.cli.help import is_short, short_help
from slmreason.cli.recipes import check_arguments

TAKE_WORDS = ("data", "report", "export")
"""Commands that are told a file or a folder without a flag."""
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
  slmreason fit --help                              the keys that people set; --help all has every key
  slmreason fit --rollout.help HFEngine             the options of one class
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status, of which `slmreason.cli.status.run` has the list; 2 where there is no such command.

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
    try:
        if is_short(args[0], args[1:]):
            print(short_help(args[0], COMMANDS[args[0]]))
            return 0
        check_arguments(args[0], args[1:], takes_words=args[0] in TAKE_WORDS)
    except ConfigError as error:
        return fail(error)
    # The tokenizer's threads and dataloader workers do not mix; nothing here needs them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from slmreason.cli.status import run

    return run(find(args[0]), args[1:])


def entry_point() -> None:
    """The console script."""
    from slmreason.runtime.redact import guard

    guard()
    sys.exit(main())
