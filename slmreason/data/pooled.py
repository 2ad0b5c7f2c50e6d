"""All rollouts of each problem, added up as they come: those of older policies weigh less.

What a problem showed when it was first sampled is kept apart. Later rollouts are chosen by what is known: GRPO draws
what is solved now and then, over and over, and a pool would seem to be made of such problems. The first ones are not.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from slmreason.data.posterior import Array, Counts, weight
from slmreason.records import Evidence


class Pooled:
    """Weighted counts of each problem: constant time for each piece of evidence, a few numbers for each problem."""

    def __init__(self, half_life: float) -> None:
        """
        Args:
            half_life: policy versions after which a rollout counts half.
        """
        self.half_life = half_life
        self.newest_version = 0
        """Of all policies that anything was sampled from."""
        self._row: dict[str, int] = {}
        self._right, self._wrong, self._squares = array("d"), array("d"), array("d")
        self._version = array("q")
        """The policy version that a problem's counts are weighted for: the newest that it was sampled from."""
        self._solved = array("b")
        """Whether a problem's newest evidence has a right rollout."""
        self._first_right, self._first_wrong, self._first_version = array("q"), array("q"), array("q")
        """Of a problem's first evidence."""
        self._newest_first = 0
        """The newest version that any problem was first sampled from."""

    def add(self, evidence: Evidence) -> None:
        """Counts what rollouts of one policy showed; it may be older than what is there."""
        row = self._row.setdefault(evidence.problem_id, len(self._version))
        wrong = evidence.attempts - evidence.successes
        if row == len(self._version):
            for column in (self._right, self._wrong, self._squares):
                column.append(0.0)
            self._version.append(evidence.policy_version)
            self._solved.append(0)
            self._first_right.append(evidence.successes)
            self._first_wrong.append(wrong)
            self._first_version.append(evidence.policy_version)
            self._newest_first = max(self._newest_first, evidence.policy_version)
        self._solved[row] = evidence.successes > 0
        self.newest_version = max(self.newest_version, evidence.policy_version)
        moved = evidence.policy_version - self._version[row]
        old, new = 1.0, 1.0
        if moved > 0:
            self._version[row] = evidence.policy_version
            old = weight(moved, self.half_life)
        elif moved < 0:
            new = weight(-moved, self.half_life)
        self._right[row] = old * self._right[row] + new * evidence.successes
        self._wrong[row] = old * self._wrong[row] + new * wrong
        self._squares[row] = old**2 * self._squares[row] + new**2 * evidence.attempts

    def rows(self, problem_ids: Sequence[str]) -> NDArray[np.int64]:
        """Where these problems stand here; -1 where one was never sampled. Finding them takes longer than the rest."""
        return np.fromiter(map(self._row.get, problem_ids, repeat(-1)), np.int64, len(problem_ids))

    def solved_in(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the newest evidence of the problems in these rows has a right rollout."""
        return self._of(self._solved, rows) > 0

    def counts(self, problem_ids: Sequence[str]) -> Counts:
        """Counts of these problems, weighted for the newest policy; zeros where a problem was never sampled."""
        return self.counts_in(self.rows(problem_ids))

    def counts_in(self, rows: NDArray[np.int64]) -> Counts:
        """The same of the problems in these rows."""
        fade = self._fade(self._version, rows, self.newest_version)
        right, wrong = fade * self._of(self._right, rows), fade * self._of(self._wrong, rows)
        return Counts(right, wrong, fade**2 * self._of(self._squares, rows))

    def first_in(self, rows: NDArray[np.int64]) -> Counts:
        """What each of the problems in these rows showed when it was first sampled.

        Weighted for the newest policy that any was first sampled from: where all were sampled at the start, all count
        whole, however long ago that was.
        """
        fade = self._fade(self._first_version, rows, self._newest_first)
        right, wrong = self._of(self._first_right, rows), self._of(self._first_wrong, rows)
        return Counts(fade * right, fade * wrong, fade**2 * (right + wrong))

    def _fade(self, version: array[int], rows: NDArray[np.int64], newest: int) -> Array:
        """What a rollout of these versions counts for the newest one."""
        fade: Array = 0.5 ** ((newest - self._of(version, rows)) / self.half_life)
        return fade

    def _of(self, column: array[float] | array[int], rows: NDArray[np.int64]) -> Array:
        """The values of a column in these rows, zero where a row is -1. The array may grow again afterwards."""
        values = np.append(np.frombuffer(column, dtype=column.typecode), 0).astype(np.float64)
        found: Array = values[rows]
        return found
