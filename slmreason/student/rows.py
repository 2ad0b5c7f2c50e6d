"""How many rows sequences of some lengths take, and which lie in which: arithmetic on lengths alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate


def pack_rows(lengths: Sequence[int], hidden_size: int, device_type: str = "cpu") -> list[list[int]]:
    """Sequences in as many rows, all as long as the longest, as cost least.

    A layer does about 12 h^2 multiplications a token and 2 h for each pair of a query and a key, masked or not. The
    latter run at about half the rate on a CPU and at an eighth on a GPU: so R rows of length L cost in proportion to
    R L (6 h + 2 L) and R L (6 h + 8 L). Few rows waste time on masked pairs, many on padding. Sequences go to the
    shortest row so far, the longest first.

    Returns:
        The indices of the sequences in each row; every index stands once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ordered = [lengths[i] for i in order]
    so_far = list(accumulate(ordered, initial=0))
    counts = range(1, len(lengths) + 1)
    floors = [row_cost(count, _shortest(so_far, count), hidden_size, device_type) for count in counts]
    best, least = 1, math.inf
    for floor, count in sorted(zip(floors, counts, strict=True)):
        if floor > least:
            break
        cost = row_cost(count, _longest(ordered, count), hidden_size, device_type)
        if cost < least or (cost == least and count < best):
            best, least = count, cost
    rows: list[list[int]] = [[] for _ in range(best)]
    heap = [(0, row) for row in range(best)]
    for index in order:
        length, row = heapq.heappop(heap)
        rows[row].append(index)
        heapq.heappush(heap, (length + lengths[index], row))
    return rows


def _shortest(so_far: Sequence[int], count: int) -> int:
    """No way to lay sequences in `count` rows has a longest row below this.

    It is at least the mean; and of the first k times `count` + 1 sequences, k + 1 share a row.

    Args:
        so_far: summed lengths of the first 0, 1, 2, ... sequences, the longest first.
    """
    shared = (so_far[k * count + 1] - so_far[k * count - k] for k in range(len(so_far) // count + 1)
              if k * count + 1 < len(so_far))  # fmt: skip
    return max(math.ceil(so_far[-1] / count), *shared)


def _longest(ordered: Sequence[int], count: int) -> int:
    """The longest row when each sequence goes to the shortest so far."""
    heap = [0] * count
    for length in ordered:
        heapq.heapreplace(heap, heap[0] + length)
    return max(heap)


def row_cost(rows: int, length: int, hidden_size: int, device_type: str = "cpu") -> int:
    """What a layer takes for rows of a length, in a unit of its own: see `pack_rows`."""
    return rows * length * (6 * hidden_size + (2 if device_type == "cpu" else 8) * length)


def longest_row(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Tokens of the longest row.

    Args:
        rows: the indices of the sequences in each, as `pack_rows` gives them.
    """
    return max(sum(lengths[index] for index in row) for row in rows)
