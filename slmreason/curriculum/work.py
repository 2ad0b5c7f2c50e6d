"""Long work on the student: cut into batches of the rollout engine, noted one by one, and told to who watches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich.console import Console

from slmreason.curriculum.settings import CheckpointSettings
from slmreason.records import Problem
from slmreason.rollout.engine import RolloutEngine
from slmreason.run.journal import Notes
from slmreason.run.progress import Watch, watching
from slmreason.run.whole import Part, WholeRun, duration
from slmreason.runtime.distributed import world_size
from slmreason.student import Student

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
LONG_S = 90.0
"""Seconds after which a batch is too long to lose: those after it are half as large, and take about a minute."""
MOST_PARTS = 4
"""Smaller parts of the engine's room than this decode too slowly."""


class Work:
    """How problems are gone through, whoever measures, bridges or scores them."""

    def __init__(
        self,
        student: Student,
        engine: RolloutEngine,
        notes: Notes,
        settings: CheckpointSettings,
        console: Console,
        bar: bool = True,
        longest_first: bool = True,
    ) -> None:
        """
        Args:
            bar: shown where the console is a terminal.
            longest_first: prompts of one length stand together, as the engine would sort all of them.
        """
        self.student, self.engine, self.notes = student, engine, notes
        self.longest_first, self.console, self.bar = longest_first, console, bar
        self.whole = WholeRun()
        self.spent: dict[str, int] = {}
        """Tokens by what they went into, in this run."""
        self.parts = 1
        """Into so many the engine's room is cut, so that a batch takes about a minute. A run keeps it: in half
        precision a completion may depend on what is sampled beside it, and a run that goes on must make the same
        batches."""
        self._chunk = settings.chunk

    def at_a_time(self, completions: int) -> int:
        """Problems with so many completions each that fill the rollout engines of all processes once."""
        room = world_size() * self.engine.batch_size(self.student)
        return self._chunk or max(1, room // completions)

    def chunk_or(self, size: int) -> int:
        """`curriculum.checkpoint.chunk`, or a size for work that samples nothing."""
        return self._chunk or size

    @contextmanager
    def spending(self, use: str) -> Iterator[None]:
        """Counts what the run's tokens grow by within, noted work that is not done again too.

        Args:
            use: what they go into.
        """
        before = self.student.tokens.total
        yield
        self.spent[use] = self.spent.get(use, 0) + self.student.tokens.total - before

    def watching(
        self, label: str, units: float, max_new_tokens: int, part: Part, unit: str = "completions"
    ) -> AbstractContextManager[Watch]:
        """Tells how far work of so many units is.

        Args:
            max_new_tokens: that are sampled for a unit, at most; 0 where nothing is.
            part: of the stage, that it is.
        """
        return watching(label, units, max_new_tokens, self.console, self.whole, part, self.bar, unit)

    def in_batches(
        self,
        key: str,
        problems: Sequence[Problem],
        make: Callable[[list[Problem]], Sequence[T]],
        cls: type[T],
        completions: int,
        watch: Watch,
        part: int = 0,
    ) -> list[T]:
        """What `make` gives for each problem, in their order; made and noted a batch of the rollout engine at a time.

        Args:
            key: names the work.
            cls: of the results: a record, or `dict`.
            completions: of a problem.
            part: see `Notes.chunks`.
        """
        order = list(range(len(problems)))
        if self.longest_first:
            lengths = [self.student.prompt_length(problem) for problem in problems]
            order.sort(key=lambda index: -lengths[index])  # a stable sort: those of one length keep their order
        made = self.notes.chunks(
            key, [problems[index] for index in order], settling(make, watch, completions), cls,
            size=lambda: self._chunk or max(1, self.at_a_time(completions) // self.parts),
            noted=lambda count: watch.skip(count * completions), part=part, took=self._took,
        )  # fmt: skip
        by_index = dict(zip(order, made, strict=True))
        return [by_index[index] for index in range(len(problems))]

    def _took(self, seconds: float) -> None:
        """Halves the batches from the next one on, where one took too long."""
        if self._chunk or seconds <= LONG_S or self.parts >= MOST_PARTS:
            return
        self.parts *= 2
        log.info("a batch of the rollout engine took %s: from now on a %s of it is sampled between two notes "
                 "(curriculum.checkpoint.chunk sets it)", duration(seconds),
                 {2: "half", 4: "quarter"}[self.parts])  # fmt: skip


def settling(make: Callable[[list[T]], Sequence[R]], watch: Watch, each: int = 1) -> Callable[[list[T]], Sequence[R]]:
    """The same, after which a watch knows that so many units an item have ended, whether it was told or not."""

    def made(items: list[T]) -> Sequence[R]:
        before = watch.completions
        results = make(items)
        watch.settle(before + len(items) * each)
        return results

    return made
