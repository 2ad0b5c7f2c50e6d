"""Bundles hold every sequence once, in order, and share what is worth sharing."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmreason.records import Example
from slmreason.student import bundles
from slmreason.student.bundles import alone, bundle
from tests.student.test_packing import example


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=12))
def test_bundles_hold_each_example_once_and_one_prompt(groups: list[tuple[int, int, int]]) -> None:
    examples = [
        example(prompt, target, 1000 * number)
        for number, (prompt, count, target) in enumerate(groups)
        for _ in range(count)
    ]
    made = bundle(examples, 64)
    assert [member for one in made for member in one.members] == examples
    for one in made:
        assert {member.prompt_ids for member in one.members} == {one.prompt_ids}
        assert one.num_tokens <= sum(len(member) for member in one.members)


def many(groups: int, seed: int) -> list[Example]:
    """Groups of 8 with a prompt of 100 tokens and targets of 100 to 300."""
    rng = random.Random(seed)
    return [example(100, rng.randint(100, 300), 1000 * group) for group in range(groups) for _ in range(8)]


@pytest.mark.parametrize("groups", [255, 400])
def test_very_many_examples_are_bundled_by_some_of_them_as_by_all(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = many(groups, seed=groups)
    ours = bundle(examples, 896)
    monkeypatch.setattr(bundles, "LOOKED_AT", 1 << 30)
    assert ours == bundle(examples, 896)


@pytest.mark.timing
def test_4096_groups_are_bundled_within_a_second() -> None:
    examples = many(4096, seed=0)
    began = time.perf_counter()
    bundle(examples, 896)
    assert time.perf_counter() - began < 1


def test_short_targets_share_a_long_prompt_and_long_ones_do_not() -> None:
    sizes = lambda prompt, target: [len(b.members) for b in bundle([example(prompt, target)] * 8, 896)]  # noqa: E731
    assert sizes(200, 20) == [8]
    assert sizes(100, 250) == [2] * 4
    assert sizes(20, 1000) == [1] * 8
    assert bundle([], 64) == []


def test_a_bundle_counts_its_prompt_once() -> None:
    pair = [example(5, 3), example(5, 4)]
    assert bundle(pair, 896)[0].num_tokens == 5 + 3 + 4
    assert [one.num_tokens for one in alone(pair)] == [5 + 3, 5 + 4]
