"""How far long work is: a row of bars on a terminal, and a line every half minute where there is none.

Completions that are still being sampled have no length yet. Until a batch of them has ended, their mean length is
estimated as the tokens so far over the completions that have ended, and never above the limit: with a constant chance
of ending at each token that is the likeliest value, and it does not take the short ones, which end first, for all.
From then on it is the mean of the batches that have ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from slmreason.records import RolloutGroup
from slmreason.run.bars import Draw, are_shown, row, screen
from slmreason.run.whole import Clock, Part, WholeRun, duration

log = logging.getLogger(__name__)
LINE_EVERY_S = 30.0
"""Seconds between two lines of the same work."""


class Lines:
    """Says lines about one work, no more often than every half minute, and none where there are bars."""

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
        if now - self._said >= LINE_EVERY_S and not are_shown():
            self._said = now
            log.info("%s", line())


class Watch:
    """Work that is under way: completions that are sampled, or other units that are done one by one."""

    def __init__(
        self,
        label: str,
        total: float,
        max_new_tokens: int = 0,
        whole: WholeRun | None = None,
        kind: str = "",
        draw: Draw = lambda share, said: None,
        clock: Clock = time.monotonic,
        unit: str = "completions",
    ) -> None:
        """
        Args:
            total: units of the whole work.
            max_new_tokens: that are sampled for a unit, at most; 0 where nothing is.
            whole: the run that it is part of; what is seen here is told to it.
            kind: of the work, for what it takes.
            draw: draws a bar.
        """
        self.label, self.total, self.max_new_tokens = label, total, max_new_tokens
        self.whole, self.kind, self.draw, self.unit = whole, kind, draw, unit
        self.completions, self.tokens = 0.0, 0
        """Done so far: units that have ended, and the tokens of all."""
        self.known = 0.0
        """Units that an earlier process has done: they say nothing of the speed."""
        self.graded, self.correct = 0, 0
        self.away = 0.0
        """Seconds in which other work was done within this one."""
        self.notes: list[str] = []
        """Said beside, such as the epoch."""
        self._settled = 0.0, 0, 0.0
        self._shown = 0.0
        self._lines = Lines(clock)

    # -- what is told -----------------------------------------------------------------------------------------------

    def advance(self, completions: float, tokens: int) -> None:
        """Notes units that have ended and tokens that were sampled since the last call (`Progress`)."""
        self.completions += completions
        self.tokens += tokens
        self._tell()

    def skip(self, completions: float) -> None:
        """Notes units that need not be done."""
        self.known += completions
        self._tell()

    def settle(self, completions: float | None = None) -> None:
        """A batch has ended: from now on it tells the speed.

        Args:
            completions: all that have ended by now, where they were not counted one by one.
        """
        if completions is not None:
            self.completions = completions
        now = self.completions, self.tokens, self.seconds
        if self.whole is not None:
            before = self._settled
            self.whole.measured(self.kind, now[0] - before[0], now[1] - before[1], now[2] - before[2])
        self._settled = now
        self._tell()

    def grade(self, groups: Sequence[RolloutGroup]) -> None:
        """Notes groups whose answers have been verified: rho so far is of them."""
        self.graded += sum(len(group.rollouts) for group in groups)
        self.correct += sum(group.num_correct for group in groups)

    # -- what is said -----------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Since the work began, but for those of other work within it."""
        return max(self._lines.seconds - self.away, 1e-9)

    @property
    def wall_seconds(self) -> float:
        """Since the work began."""
        return self._lines.seconds

    @property
    def left(self) -> float:
        """Units that are still to be done; one that has begun counts by its tokens."""
        return max(0.0, self.total - self.known - self._done)

    @property
    def share(self) -> float:
        """Of the work, that is done; it never shrinks."""
        if self.total > 0:
            self._shown = max(self._shown, min(1.0, 1 - self.left / self.total))
        return self._shown

    def line(self) -> str:
        """What is said where there is no terminal: done, tokens a second, rho, time left, and where the run stands."""
        done = self.completions + self.known
        counts = f"{done:,.0f} of {self.total:,.0f} {self.unit} ({100 * done / max(1, self.total):.0f} %)"
        left = self.seconds_left()
        said = [counts, *self.notes, *self._speed(), *([] if left is None else [f"about {duration(left)} left"])]
        where = self.whole.said() if self.whole is not None else ""
        return f"{self.label}: {', '.join(said)}{f'; the run: {where}' if where else ''}"

    def beside_bar(self) -> str:
        """What is said beside the bar, the most wanted first: the end may not fit."""
        left, done = self.seconds_left(), self.completions + self.known
        said = [] if left is None else [f"{duration(left)} left"]
        return ", ".join([*said, f"{done:,.0f} of {self.total:,.0f} {self.unit}", *self.notes, *self._speed()])

    def seconds_left(self) -> float | None:
        """What the rest will take; None where nothing has ended yet."""
        if not self.completions:
            return None
        return self.left * self.seconds / self._done

    @property
    def _done(self) -> float:
        """Units that have ended, and those that are being sampled as far as they are."""
        ended, tokens, _ = self._settled
        mean = tokens / ended if ended and tokens else self.max_new_tokens
        begun = (self.tokens - tokens) / mean if mean else 0.0
        return ended + max(self.completions - ended, begun)

    def _speed(self) -> list[str]:
        said = [f"{self.tokens / self.seconds:,.0f} tokens/s"] if self.tokens else []
        return said + ([f"rho {self.correct / self.graded:.2f} of {self.graded:,}"] if self.graded else [])

    def _tell(self) -> None:
        if are_shown():
            self.draw(self.share, self.beside_bar())
        if self.whole is not None:
            self.whole.show()
        self._lines.say(self.line)


@contextmanager
def watching(
    label: str,
    total: float,
    max_new_tokens: int,
    console: Console,
    whole: WholeRun | None = None,
    part: Part = "probe",
    bar: bool = True,
    unit: str = "completions",
) -> Iterator[Watch]:
    """A `Watch` for work of `total` units.

    Args:
        part: of the stage, that the work is.
        bar: show one where the console is a terminal.
    """
    with row(label, console, bar) as draw:
        kind = whole.kind_of(part) if whole is not None else ""
        watch = Watch(label, total, max_new_tokens, whole, kind, draw, unit=unit)
        with within(whole, part, watch):
            yield watch


@contextmanager
def within(whole: WholeRun | None, part: Part, watch: Watch) -> Iterator[None]:
    """The work of a watch is under way in a run."""
    if whole is None:
        yield
        return
    whole.begin(part, watch)
    try:
        yield
    finally:
        whole.end(watch, watch.wall_seconds)


@contextmanager
def counting(label: str, total: int, console: Console | None = None) -> Iterator[Callable[[int, str], None]]:
    """A bar, or lines, for work of `total` requests. What it yields takes how many are done since, and a note."""
    lines, done = Lines(), 0
    with row(label, console or screen()) as draw:

        def advance(finished: int, note: str) -> None:
            nonlocal done
            done += finished
            if not done:
                return
            left = duration((total - done) * lines.seconds / done)
            notes = [note] if note else []
            draw(done / total, ", ".join([f"{left} left", f"{done:,} of {total:,}", *notes]))
            lines.say(lambda: f"{label}: {', '.join([f'{done:,} of {total:,}', *notes, f'about {left} left'])}")

        yield advance
