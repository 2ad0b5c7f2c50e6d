"""`python -m slmreason.cli`."""

from slmreason.cli import entry_point

entry_point()
