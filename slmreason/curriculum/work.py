"""Long work on the student: cut into batches of the rollout engine, noted one by one, and told to who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from rich.console import Console

from slmreason.curriculum.settings import CheckpointSettings
from slmreason.records import Problem
from slmreason.rollout.engine import RolloutEngine
from slmreason.run.journal import Notes
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
        self.longest_first = longest_first
        self.pace = Pace()
        self.spent: dict[str, int] = {}
        """Tokens by what they went into, in this run."""
        self._chunk, self._console, self._bar = settings.chunk, console, bar

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

    def watching(self, label: str, completions: int, max_new_tokens: int) -> AbstractContextManager[Watch]:
        """Tells how far work is that samples so many completions."""
        self.pace.ahead = max(0, self.pace.ahead - completions)  # what is said of the rest is without this
        return watching(label, completions, max_new_tokens, self._console, self.pace, self._bar)

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
            key, [problems[index] for index in order], make, cls, self.at_a_time(completions),
            lambda count: watch.skip(count * completions), part,
        )  # fmt: skip
        by_index = dict(zip(order, made, strict=True))
        return [by_index[index] for index in range(len(problems))]
