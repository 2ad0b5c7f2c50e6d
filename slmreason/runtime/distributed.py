"""Several training processes of one run: who does which share of the work, and how all come to know the same.

Objects travel over gloo, in a group of their own. While one process asks a teacher for an hour, the others wait for
what it brings; the processes' first group, which is NCCL's on GPUs, would give up after half an hour.

Each process holds the same student, ledger and strata. Sampling is shared out and its results are gathered, so every
rollout is made once and every process knows all of them; files have one writer, the first process. Without several
processes each function here is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=7)
"""How long a process waits for the others' objects. One that has died is noticed at once, by its closed connection."""
_objects: dist.ProcessGroup | None = None


def open_objects() -> None:
    """Makes the group in which objects travel; every process calls it once the first group is there."""
    global _objects
    if world_size() > 1:
        _objects = dist.new_group(backend="gloo", timeout=PATIENCE)


def close() -> None:
    """Ends all groups of processes."""
    global _objects
    _objects = None
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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
        dist.barrier(group=_objects)


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
    dist.broadcast_object_list(box, src=0, group=_objects)
    if fault is not None:
        raise fault
    if box[1] is not None:
        raise RuntimeError(f"the first process failed: {box[1]}")
    return box[0]  # type: ignore[no-any-return]


def gather(items: Sequence[T]) -> list[T]:
    """The items of every process, in the order of the processes; every process must call it."""
    parts: list[Any] = [list(items)]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, list(items), group=_objects)
    return [item for part in parts for item in part]


def map_over_processes(function: Callable[[list[T]], Sequence[R]], items: Sequence[T]) -> list[R]:
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
    dist.all_gather_object(parts, list(function(list(items[rank() :: processes]))), group=_objects)
    return [parts[index % processes][index // processes] for index in range(len(items))]
