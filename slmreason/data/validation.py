"""A data set that fits are validated on, and what of the pool stands in it: that is not trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from slmreason.data.contamination import contaminated
from slmreason.data.mixture import Entry
from slmreason.data.reading import Loaded
from slmreason.records import Problem

log = logging.getLogger(__name__)


def read_validation(entries: Sequence[Entry], fits: Callable[[Problem], bool]) -> tuple[Problem, ...]:
    """The problems of `data.validation`, without those whose prompt is too long.

    Args:
        entries: its data sets; none where there is no such key.
        fits: whether a problem's prompt is short enough.

    Raises:
        ValueError: it cannot be read, or no problem of it can be used.
    """
    if not entries:
        return ()
    read = [problem for entry in entries for problem in entry.read("data.validation").problems]
    usable = tuple(problem for problem in read if fits(problem))
    location = ", ".join(entry.path for entry in entries)
    if not usable:
        raise ValueError(f"data.validation: {location}: no problem of it can be used: all prompts are too long")
    log.info("data.validation: %d of %d problems of %s are validated on", len(usable), len(read), location)
    return usable


def without_validation(loaded: Loaded, validation: Sequence[Problem]) -> Loaded:
    """What was read of the pool, without the problems that `data.validation` asks too."""
    return loaded.without(contaminated(loaded.problems, {"data.validation": validation})) if validation else loaded
