"""The command line of slmreason."""

from slmreason.cli.command import COMMANDS
from slmreason.cli.main import entry_point, main

__all__ = ["COMMANDS", "entry_point", "main"]
