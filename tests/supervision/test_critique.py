"""Critiques: which of them a stage trains on."""

from __future__ import annotations

from slmreason.records import Example
from slmreason.supervision.critique import capped


def test_a_cap_takes_from_every_problem_in_turn() -> None:
    examples = [Example((1,), (2,), f"p{i % 3}", kind) for kind in ("repair", "diagnosis") for i in range(9)]
    kept = capped(examples, 4)
    for kind in ("repair", "diagnosis"):
        mine = [example.problem_id for example in kept if example.origin == kind]
        assert sorted(mine) == ["p0", "p0", "p1", "p2"]
    assert capped(examples, None) == examples
