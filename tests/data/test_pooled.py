"""All rollouts of a problem, added up: older policies weigh less."""

from __future__ import annotations

import random

import numpy as np
import pytest

from slmreason.data.ledger import Ledger
from slmreason.data.pooled import Pooled
from slmreason.records import Evidence, Place, Problem

PLACE = Place(1, "grpo", 0)


def test_a_rollout_of_an_older_policy_counts_less() -> None:
    pooled = Pooled(half_life=10)
    pooled.add(Evidence("a", 8, 2, policy_version=0))
    pooled.add(Evidence("a", 4, 4, policy_version=10))
    counts = pooled.counts(["a"])
    assert (counts.right[0], counts.wrong[0], counts.squares[0]) == (2 / 2 + 4, 6 / 2, 8 / 4 + 4)


def test_what_was_not_sampled_again_fades_with_the_policy_of_the_others() -> None:
    pooled = Pooled(half_life=10)
    pooled.add(Evidence("a", 8, 2, policy_version=0))
    pooled.add(Evidence("b", 8, 8, policy_version=20))
    assert pooled.counts(["a", "b"]).total.tolist() == [2, 8]


def test_the_order_in_which_evidence_comes_does_not_matter() -> None:
    rng = random.Random(0)
    shown = [Evidence(rng.choice("abc"), 8, rng.randint(0, 8), policy_version=rng.randint(0, 40)) for _ in range(50)]
    one, other = Pooled(half_life=7), Pooled(half_life=7)
    for evidence in shown:
        one.add(evidence)
    for evidence in reversed(shown):
        other.add(evidence)
    for ours, theirs in zip(vars(one.counts("abc")).values(), vars(other.counts("abc")).values(), strict=True):
        np.testing.assert_allclose(ours, theirs)


def test_a_problem_that_was_never_sampled_has_no_counts() -> None:
    pooled = Pooled(half_life=10)
    assert pooled.counts(["a"]).total.tolist() == [0]
    pooled.add(Evidence("a", 8, 2, policy_version=3))
    assert pooled.counts(["new", "a"]).total.tolist() == [0, 8]


@pytest.mark.parametrize(("half_life", "right", "wrong"), [(None, 4, 0), (10.0, 5, 3)])
def test_a_ledger_without_a_half_life_counts_the_newest_evidence_alone(
    half_life: float | None, right: float, wrong: float
) -> None:
    ledger = Ledger(None, half_life)
    ledger.take([Evidence("a", 8, 2, 0), Evidence("a", 4, 4, 10)], PLACE)
    counts = ledger.counts([Problem("a", "q", "a"), Problem("new", "q", "a")])
    assert (counts.right.tolist(), counts.wrong.tolist()) == ([right, 0], [wrong, 0])


def test_first_measurements_are_kept_apart_and_fade_by_newer_first_ones_alone() -> None:
    pooled = Pooled(half_life=10)
    pooled.add(Evidence("a", 8, 2, policy_version=0))
    pooled.add(Evidence("a", 8, 5, policy_version=5000))
    first = pooled.first_in(pooled.rows(["a", "new"]))
    assert (first.right.tolist(), first.wrong.tolist(), first.squares.tolist()) == ([2, 0], [6, 0], [8, 0])
    pooled.add(Evidence("b", 4, 1, policy_version=10))
    first = pooled.first_in(pooled.rows(["a", "b"]))
    assert (first.right.tolist(), first.wrong.tolist(), first.squares.tolist()) == ([1, 1], [3, 3], [2, 4])
