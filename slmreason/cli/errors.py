"""Mistakes of the user, in words: what is wrong and the nearest keys; never a value, which may be a secret."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence

from slmreason.runtime.redact import shown


class ConfigError(ValueError):
    """A mistake in the arguments or the configuration, in words for the user."""


def tidy(message: str) -> str:
    """A parser's message without colours, and without the values it was given: one may be a key in a wrong place."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    pattern = r"\s*(?:Given value(?: type)?: .*|Got value: .*?(?=\n *- (?:Expected|Option) |\n *Given value|\Z))"
    return re.sub(pattern, "", message, flags=re.DOTALL) or message


def explain(message: str, known: Sequence[str]) -> str:
    """A parser's message with, for a key that does not exist, the nearest keys that do."""
    message = tidy(message)
    unknown = re.match(r"(?P<head>[Uu]nrecognized arguments: ).*?(?P<flags>(?<!\S)--.*)", message, flags=re.DOTALL)
    if unknown:  # what was given with them may be a key
        message = unknown["head"] + " ".join(re.findall(r"(?<!\S)--[\w.+-]+", unknown["flags"]))
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    match = re.search(
        r"[Uu]nrecognized arguments?:? (?:--)?([\w.]+)|[Kk]ey ['\"]?([\w.]+)['\"]? is not expected", message
    )
    if in_group:
        key = f"{in_group.group(1)}.{in_group.group(2)}"
    elif match:
        key = match.group(1) or match.group(2)
    else:
        return message
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    group = key.rpartition(".")[0]
    siblings = [name for name in known if group and name.rpartition(".")[0] == group]
    hints = f"\ndid you mean: {', '.join(near)}?" if near else ""
    return f"{message}{hints}" + (
        f"\nkeys of {group}: {', '.join(n[len(group) + 1 :] for n in siblings)}" if siblings else ""
    )


def fail(error: Exception | str, status: int = 2) -> int:
    """Prints an error for a person and gives the exit status."""
    print(f"error: {shown(str(error))}", file=sys.stderr)
    return status
