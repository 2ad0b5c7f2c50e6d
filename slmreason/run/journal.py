"""Results of long work, noted as it goes, so that what was done before a crash is not done again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from slmreason.records import Reject, Tokens, from_json, to_json
from slmreason.run.files import append_records, read_lines
from slmreason.run.folder import RunFolder
from slmreason.runtime.distributed import barrier, first_only, is_first

T = TypeVar("T")
R = TypeVar("R")
Size = int | Callable[[], int]
"""Items of a chunk, or what says it before each."""


def _since(began: float) -> float:
    return time.monotonic() - began


def spans(items: int, size: Size) -> Iterator[tuple[int, int]]:
    """The first item of each chunk, and the first after it."""
    start = 0
    while start < items:
        end = min(items, start + (size if isinstance(size, int) else size()))
        yield start, end
        start = end


class Notes(Protocol):
    """Where the results of long work are noted, chunk by chunk; what is noted already is not done again."""

    def chunks(
        self,
        key: str,
        items: Sequence[T],
        make: Callable[[list[T]], Sequence[R]],
        cls: type[R],
        size: Size,
        noted: Callable[[int], None] = lambda items: None,
        part: int = 0,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> list[R]:
        """Applies `make` to `size` items at a time. What it gives depends on the key and the items alone.

        Args:
            key: names the work and its place in the run.
            make: items -> results, any number of them.
            cls: of the results: a record, or `dict`.
            size: items of a chunk, or what says it before each.
            noted: called with the number of items that are not made again.
            took: called with the seconds that a chunk took, in whichever process it was made; not by notes that do not
                keep them. All of several processes are told those of the first.
            part: which part of their results this is, from 1 on, where items are worked on more than once (the key
                tells the parts apart too); 0 where it is the whole.
        """
        ...


class Unnoted:
    """Notes nothing: what is cut off is done again."""

    def chunks(
        self,
        key: str,
        items: Sequence[T],
        make: Callable[[list[T]], Sequence[R]],
        cls: type[R],
        size: Size,
        noted: Callable[[int], None] = lambda items: None,
        part: int = 0,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> list[R]:
        """See `Notes.chunks`."""
        return [result for start, end in spans(len(items), size) for result in make(list(items[start:end]))]


class Journal:
    """The notes of a run, between two checkpoints."""

    def __init__(self, run_dir: Path, drain: Callable[[], list[Reject]], cost: Callable[[], Tokens]) -> None:
        """
        Args:
            drain: gives what was rejected since the last call; it is noted with the chunk that it came up in.
            cost: gives what the run has cost so far, to be added to; what a chunk cost is noted with it.
        """
        self._path, self._drain, self._cost = RunFolder(run_dir).journal, drain, cost
        self._noted: dict[str, dict[str, Any]] = {}
        self._rejects: list[Reject] = []

    def open(self) -> None:
        """Reads what an earlier process has noted."""
        self._noted = {row["key"]: row for row in read_lines(self._path)}
        barrier()  # the first process must not add to it before all have read it

    def chunks(
        self,
        key: str,
        items: Sequence[T],
        make: Callable[[list[T]], Sequence[R]],
        cls: type[R],
        size: Size,
        noted: Callable[[int], None] = lambda items: None,
        part: int = 0,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> list[R]:
        """See `Notes.chunks`."""
        results: list[R] = []
        for start, end in spans(len(items), size):
            name = f"{key}/{start}-{end}"  # an engine may have the room for another size than in an earlier process
            row = self._noted.pop(name, None)
            if row is None:
                before, began = replace(self._cost()), time.monotonic()
                made = list(make(list(items[start:end])))
                seconds = first_only(partial(_since, began))
                rejects = self._drain()
                append_records(self._path, [{
                    "key": name,
                    "results": [r if isinstance(r, dict) else to_json(r) for r in made],
                    "rejects": [to_json(r) for r in rejects],
                    "tokens": vars(self._cost() - before),
                    "seconds": seconds,
                }])  # fmt: skip
            else:
                noted(end - start)
                seconds = row.get("seconds", 0.0)
                cost = self._cost()
                cost += Tokens(**row["tokens"])
                made = row["results"] if cls is dict else [from_json(cls, result) for result in row["results"]]
                rejects = [from_json(Reject, reject) for reject in row["rejects"]]
            took(seconds)
            results += made
            self._rejects += rejects
        return results

    def take_rejects(self) -> list[Reject]:
        """What was rejected since the last call."""
        taken, self._rejects = self._rejects + self._drain(), []
        return taken

    def clear(self) -> None:
        """Forgets everything: a later checkpoint has it."""
        self._noted.clear()
        if is_first():
            self._path.unlink(missing_ok=True)
