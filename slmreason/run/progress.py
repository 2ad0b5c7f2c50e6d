"""How far long work is: a bar on a terminal, and a line every half minute where there is none.

Completions that are still being sampled have no length yet. Their mean length is estimated as the tokens so far over
the completions that have ended, and never above the limit: with a constant chance of ending at each token that is the
likeliest value, and it does not take the short ones, which end first, for all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slmreason.records import RolloutGroup

log = logging.getLogger(__name__)
LINE_EVERY_S = 30.0
"""Seconds between two lines of the same work."""
Clock = Callable[[], float]


@dataclass
class Pace:
    """How fast a run samples, over all that it has sampled, and how much of that is still to come."""

    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ahead: int = 0
    """Completions that the run will sample after the work at hand, about."""

    def add(self, watch: Watch) -> None:
        """Counts what a watch has seen."""
        self.completions += watch.completions
        self.tokens += watch.tokens
        self.seconds += watch.seconds

    def seconds_ahead(self, max_new_tokens: int) -> float | None:
        """What they will take at the pace so far; None where no completion has ended yet."""
        if not self.completions:
            return None
        return self.ahead * min(self.tokens / self.completions, max_new_tokens) * self.seconds / self.tokens


class Lines:
    """Says lines about one work, no more often than every half minute."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.began = self._said = clock()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return max(self._clock() - self.began, 1e-9)

    def say(self, line: Callable[[], str]) -> None:
        """Says the line if it is time for one."""
        now = self._clock()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            log.info("%s", line())


class Watch:
    """Sampling that is under way."""

    def __init__(
        self,
        label: str,
        total: int,
        max_new_tokens: int,
        pace: Pace | None = None,
        show: Callable[[int], None] = lambda completions: None,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            total: completions of the whole work.
            max_new_tokens: no completion is longer.
            pace: of the run; what is seen here is added to it.
            show: called with the completions that have ended so far, for a bar.
        """
        self.label, self.total, self.max_new_tokens, self.pace = label, total, max_new_tokens, pace
        self.completions, self.tokens = 0, 0
        """Sampled so far: those that have ended, and the tokens of all."""
        self.known = 0
        """Completions that an earlier process has sampled: they say nothing of the speed."""
        self.graded, self.correct = 0, 0
        self._lines, self._show = Lines(clock), show

    def advance(self, completions: int, tokens: int) -> None:
        """Notes completions that have ended and tokens that were sampled since the last call (`Progress`)."""
        self.completions += completions
        self.tokens += tokens
        self._show(self.completions + self.known)
        self._lines.say(self.line)

    def skip(self, completions: int) -> None:
        """Notes completions that need not be sampled."""
        self.known += completions
        self._show(self.completions + self.known)

    def grade(self, groups: Sequence[RolloutGroup]) -> None:
        """Notes groups whose answers have been verified: rho so far is of them."""
        self.graded += sum(len(group.rollouts) for group in groups)
        self.correct += sum(group.num_correct for group in groups)

    def line(self) -> str:
        """What is said: done, tokens a second, rho, time left."""
        done = self.completions + self.known
        said = [f"{done:,} of {self.total:,} completions ({100 * done / max(1, self.total):.0f} %)",
                f"{self.tokens / self._lines.seconds:,.0f} tokens/s"]  # fmt: skip
        if self.graded:
            said.append(f"rho {self.correct / self.graded:.2f} of {self.graded:,}")
        left = self.seconds_left()
        if left is not None:
            said.append(f"about {duration(left)} left")
            if ahead := self._seconds_ahead():
                said.append(f"the whole run about {duration(left + ahead)}, counting sampling alone")
        return f"{self.label}: {', '.join(said)}"

    def seconds_left(self) -> float | None:
        """What the rest will take; None where no completion has ended yet."""
        if not self.completions:
            return None
        mean = min(self.tokens / self.completions, self.max_new_tokens)
        tokens_left = max(0.0, (self.total - self.known) * mean - self.tokens)
        return tokens_left * self._lines.seconds / self.tokens

    def _seconds_ahead(self) -> float | None:
        if self.pace is None:
            return None
        so_far = replace(self.pace)
        so_far.add(self)
        return so_far.seconds_ahead(self.max_new_tokens)

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return self._lines.seconds


@contextmanager
def watching(
    label: str, total: int, max_new_tokens: int, console: Console, pace: Pace | None = None, bar: bool = True
) -> Iterator[Watch]:
    """A `Watch` for work that samples `total` completions.

    Args:
        bar: show one where the console is a terminal.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    quiet = not (bar and console.is_terminal)
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        task = progress.add_task(label, total=total)
        watch = Watch(label, total, max_new_tokens, pace, lambda done: progress.update(task, completed=done))
        try:
            yield watch
        finally:
            if pace is not None:
                pace.add(watch)


@contextmanager
def counting(label: str, total: int, console: Console | None = None) -> Iterator[Callable[[int, str], None]]:
    """A bar, or lines, for work of `total` requests. What it yields takes how many are done since, and a note."""
    console, lines, done = console or Console(), Lines(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(finished: int, note: str) -> None:
            nonlocal done
            done += finished
            progress.update(task, advance=finished, note=note)
            if done and not console.is_terminal:
                left = duration((total - done) * lines.seconds / done)
                said = [f"{done:,} of {total:,}", *([note] if note else []), f"about {left} left"]
                lines.say(lambda: f"{label}: {', '.join(said)}")

        yield advance


def duration(seconds: float) -> str:
    """Seconds as a person says them: `40 s`, `7 min`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
