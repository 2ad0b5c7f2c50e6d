"""Sequences that share a prompt: which of them lie together in a row, behind one copy of it.

A group of rollouts then costs its prompt once, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, Protocol, TypeVar

from slmreason.student.rows import longest_row, pack_rows, row_cost

LOOKED_AT = 1024
"""Sequences by which `bundle` chooses, where there are twice as many or more."""


class Packable(Protocol):
    """A sequence of tokens whose last ones are scored: an `Example`, or a completion of GRPO."""

    @property
    def problem_id(self) -> str: ...

    @property
    def prompt_ids(self) -> tuple[int, ...]: ...

    @property
    def target_ids(self) -> tuple[int, ...]: ...


S = TypeVar("S", bound=Packable)


@dataclass(frozen=True)
class Bundle(Generic[S]):
    """Sequences with the same prompt, which lies in a row once, before the targets of all."""

    members: tuple[S, ...]
    """At least one."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.members[0].prompt_ids

    @property
    def num_tokens(self) -> int:
        """Those of the prompt and of each target."""
        return len(self.prompt_ids) + sum(len(member.target_ids) for member in self.members)


def bundle(sequences: Sequence[S], hidden_size: int, device_type: str = "cpu") -> list[Bundle[S]]:
    """Bundles of those that share their prompt with the one before, each such run cut into as many as cost least.

    Masked pairs are computed too: short targets share a prompt, long ones are better off alone. Of very many sequences
    every n-th run is looked at, about `LOOKED_AT` sequences in all.

    Returns:
        The bundles, with every sequence once, in order.
    """
    if not sequences:
        return []
    runs = [tuple(run) for _, run in groupby(sequences, key=lambda sequence: sequence.prompt_ids)]
    looked_at = runs[:: max(1, len(sequences) // LOOKED_AT)]

    def cost(pieces: int) -> int:
        lengths = [piece.num_tokens for run in looked_at for piece in _cut(run, pieces)]
        rows = pack_rows(lengths, hidden_size, device_type)
        return row_cost(len(rows), longest_row(rows, lengths), hidden_size, device_type)

    most = max(map(len, runs))
    powers = [1 << power for power in range(most.bit_length())]
    pieces = min(dict.fromkeys([*powers, most]), key=cost)
    return [piece for run in runs for piece in _cut(run, pieces)]


def _cut(run: tuple[S, ...], pieces: int) -> list[Bundle[S]]:
    """Bundles of the same size, but for the last."""
    size = math.ceil(len(run) / pieces)
    return [Bundle(run[start : start + size]) for start in range(0, len(run), size)]


def alone(sequences: Sequence[S]) -> list[Bundle[S]]:
    """A bundle for each sequence."""
    return [Bundle((sequence,)) for sequence in sequences]
