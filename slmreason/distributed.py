"""Several training processes of one run: who does which share of the work, and how all come to know the same.

Each process holds the same student, ledger and strata. Sampling is shared out and its results are gathered, so every
rollout is made once and every process knows all of them; files have one writer, the first process. Without several
processes each function here is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")


def world_size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 is the first, which writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def barrier() -> None:
    """Waits until every process is here."""
    if world_size() > 1:
        dist.barrier()


def first_only(function: Callable[[], T]) -> T:
    """Calls `function` in the first process alone; its result goes to every process.

    Raises:
        RuntimeError: in the other processes, where the first one raised; they would wait for it for ever.
    """
    if world_size() == 1:
        return function()
    box: list[Any] = [None, None]
    fault: Exception | None = None
    if is_first():
        try:
            box[0] = function()
        except Exception as error:
            fault, box[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(box, src=0)
    if fault is not None:
        raise fault
    if box[1] is not None:
        raise RuntimeError(f"the first process failed: {box[1]}")
    return box[0]  # type: ignore[no-any-return]


def gathered(items: Sequence[T]) -> list[T]:
    """The items of every process, in the order of the processes; every process must call it."""
    parts: list[Any] = [list(items)]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def spread(function: Callable[[list[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
    """Applies a function that maps a list to a list of the same length, each process to its share.

    Every process must call it with the same items. A share may be empty; `function` is called nevertheless, since it
    may take part in collective work.

    Returns:
        The results of all items in their order, in every process.
    """
    processes = world_size()
    if processes == 1:
        return list(function(list(items)))
    parts: list[Any] = [None] * processes
    dist.all_gather_object(parts, list(function(list(items[rank() :: processes]))))
    return [parts[index % processes][index // processes] for index in range(len(items))]
