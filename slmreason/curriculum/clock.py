"""What a run has taken, and what trainer.max_time leaves it."""

from __future__ import annotations

import time
from datetime import timedelta

from slmreason.runtime.distributed import first_only


class RunClock:
    """Time since a run began, over all its processes; the first process's clock counts for all."""

    def __init__(self, budget: timedelta | None) -> None:
        """
        Args:
            budget: of the whole run; None for no end.
        """
        self.budget = budget
        self.began = time.monotonic()

    def go_on(self, elapsed: float) -> None:
        """Counts the seconds that earlier processes took."""
        self.began = time.monotonic() - elapsed

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def deadline(self) -> float | None:
        """Of the monotonic clock, in seconds."""
        return None if self.budget is None else self.began + self.budget.total_seconds()

    def left(self) -> timedelta | None:
        """What is left of the budget."""
        deadline = self.deadline
        return None if deadline is None else first_only(lambda: timedelta(seconds=deadline - time.monotonic()))

    def is_late(self) -> bool:
        """Whether the budget is used up."""
        left = self.left()
        return left is not None and left <= timedelta(0)
