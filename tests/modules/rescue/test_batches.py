"""Micro-batches of traces: each once, with its weight, over all processes."""

from __future__ import annotations

from collections import Counter

import pytest

from slmreason.modules.rescue.base import WeighedTrace
from slmreason.modules.rescue.batches import TraceBatch, trace_batches
from slmreason.records import Example
from slmreason.student import Student


def made(*lengths: int) -> list[WeighedTrace]:
    """Traces of these lengths; that of length n weighs n / 100."""
    return [WeighedTrace(Example((3, 4), tuple(range(10, 10 + n)), f"p{n}", "rescue"), n / 100) for n in lengths]


def shown(batches: list[TraceBatch]) -> Counter[tuple[int, float]]:
    """(length, weight of a token) of each trace."""
    found: Counter[tuple[int, float]] = Counter()
    for batch in batches:
        lengths = batch.packed.target_lengths.tolist()
        for length, weights in zip(lengths, batch.weights.split(lengths), strict=True):
            found[length, round(float(weights[0]), 6)] += 1
            assert (weights == weights[0]).all()
    return found


@pytest.mark.parametrize("token_budget", [8, 1000])
def test_each_trace_lies_in_one_micro_batch_with_its_weight(student: Student, token_budget: int) -> None:
    batches = trace_batches(made(5, 1, 3), student, token_budget)
    assert shown(batches) == {(5, 0.05): 1, (1, 0.01): 1, (3, 0.03): 1}
    assert {batch.packed.global_target_tokens for batch in batches} == {9}
    assert (len(batches) == 1) == (token_budget == 1000)


def test_no_trace_is_no_micro_batch(student: Student) -> None:
    assert trace_batches([], student, 100) == []


def test_processes_share_the_traces_and_have_as_many_micro_batches(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmreason.modules.rescue.batches.world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr("slmreason.modules.rescue.batches.rank", lambda rank=rank: rank)
        shares.append(trace_batches(made(5, 1, 3), student, 6))
    assert [len(share) for share in shares] == [2, 2]
    assert shares[1][1].packed.num_target_tokens == 0
    assert len(shares[1][1].weights) == 0
    assert shown(shares[0]) + shown(shares[1]) == {(5, 0.05): 1, (1, 0.01): 1, (3, 0.03): 1}
