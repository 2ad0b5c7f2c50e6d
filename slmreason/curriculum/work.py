"""Long work on the student: cut into batches of the rollout engine, noted one by one, and told to who watches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from rich.console import Console

from slmreason.curriculum.settings import CheckpointSettings
from slmreason.records import Problem
from slmreason.rollout.engine import RolloutEngine
from slmreason.run.journal import Journal
from slmreason.run.progress import Pace, Watch, watching
from slmreason.runtime.distributed import world_size
from slmreason.student import Student

T = TypeVar("T")


class Work:
    """How problems are gone through, whoever measures, bridges or scores them."""

    def __init__(
        self,
        student: Student,
        engine: RolloutEngine,
        journal: Journal,
        settings: CheckpointSettings,
        console: Console,
        bar: bool = True,
    ) -> None:
        """
        Args:
            bar: shown where the console is a terminal.
        """
        self.student, self.engine, self.journal = student, engine, journal
        self.pace = Pace()
        self._chunk, self._console, self._bar = settings.chunk, console, bar

    def at_a_time(self, completions: int) -> int:
        """Problems with so many completions each that fill the rollout engines of all processes once."""
        room = world_size() * self.engine.batch_size(self.student)
        return self._chunk or max(1, room // completions)

    def chunk_or(self, size: int) -> int:
        """`curriculum.checkpoint.chunk`, or a size for work that samples nothing."""
        return self._chunk or size

    def watching(self, label: str, completions: int, max_new_tokens: int) -> AbstractContextManager[Watch]:
        """Tells how far work is that samples so many completions."""
        self.pace.ahead = max(0, self.pace.ahead - completions)  # what is said of the rest is without this
        return watching(label, completions, max_new_tokens, self._console, self.pace, self._bar)

    def longest_first(
        self,
        key: str,
        problems: Sequence[Problem],
        make: Callable[[list[Problem]], Sequence[T]],
        cls: type[T],
        completions: int,
        watch: Watch,
    ) -> list[T]:
        """What `make` gives for each problem, in their order; made and noted a batch of the rollout engine at a time.

        Prompts of one length stand together, as the engine would sort all of them.

        Args:
            key: names the work in the journal.
            cls: of the results: a record, or `dict`.
            completions: of a problem.
        """
        lengths = [self.student.prompt_length(problem) for problem in problems]
        order = sorted(range(len(problems)), key=lambda index: (-lengths[index], index))
        made = self.journal.chunks(
            key, [problems[index] for index in order], make, cls, self.at_a_time(completions),
            lambda count: watch.skip(count * completions),
        )  # fmt: skip
        by_index = dict(zip(order, made, strict=True))
        return [by_index[index] for index in range(len(problems))]
