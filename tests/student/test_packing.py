"""Packing loses nothing and mixes nothing."""

from __future__ import annotations

import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmreason.records import Example
from slmreason.student import packing as batching
from slmreason.student.packing import bundle, bundle_length, collate, pack_rows, plan_batches, row_cost


def example(prompt: int, target: int, start: int = 10) -> Example:
    return Example(tuple(range(start, start + prompt)), tuple(range(start + 100, start + 100 + target)), "p", "teacher")


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.sampled_from([64, 896, 4096]))
def test_pack_rows_keeps_each_sequence_once_and_costs_no_more_than_the_plain_ways(lengths: list[int], h: int) -> None:
    rows = pack_rows(lengths, h)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    cost = row_cost(len(rows), max(sum(lengths[index] for index in row) for row in rows), h)
    assert cost <= row_cost(len(lengths), max(lengths), h)  # each alone, padded
    assert cost <= row_cost(1, sum(lengths), h)  # all in one row


def plain_pack_rows(lengths: list[int], hidden_size: int, device_type: str) -> list[list[int]]:
    """Every number of rows tried in turn; the first of the cheapest."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ways = []
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        sums = [0] * count
        for index in order:
            row = min(range(count), key=lambda row: (sums[row], row))
            rows[row].append(index)
            sums[row] += lengths[index]
        ways.append((row_cost(count, max(sums), hidden_size, device_type), count, rows))
    return min(ways)[2]


@given(
    st.lists(st.integers(1, 400) | st.sampled_from([3, 7]), min_size=1, max_size=40),
    st.sampled_from([16, 128, 896]),
    st.sampled_from(["cpu", "cuda"]),
)
def test_pack_rows_gives_what_trying_every_number_of_rows_gives(lengths: list[int], h: int, device_type: str) -> None:
    assert pack_rows(lengths, h, device_type) == plain_pack_rows(lengths, h, device_type)


def test_a_gpu_has_shorter_rows() -> None:
    lengths = [397, 350, 310, 300, 290, 260, 200, 176] * 4
    assert len(pack_rows(lengths, 896, "cuda")) > len(pack_rows(lengths, 896, "cpu"))
    assert row_cost(3, 100, 896, "cuda") - row_cost(3, 100, 896, "cpu") == 3 * 100 * 6 * 100
    assert collate([example(2, 300)] * 8, 0, device_type="cuda").input_ids.shape == (8, 302)


def test_wide_models_have_long_rows_with_little_padding() -> None:
    lengths = [397, 350, 310, 300, 290, 260, 200, 176]
    shape = lambda h: (len(rows := pack_rows(lengths, h)), max(sum(lengths[i] for i in row) for row in rows))  # noqa: E731
    assert shape(16)[0] == 7
    assert shape(896) == (4, 590)  # 3 % padding; each alone would have 28 %


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(1, 400), st.integers(1, 9))
def test_plan_batches_keeps_the_budget(lengths: list[int], budget: int, most: int) -> None:
    plan = plan_batches(lengths, budget, most, random.Random(0))
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len(batch) <= most
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget


def test_collate_by_hand() -> None:
    batch = collate([example(2, 1), example(2, 3, 50), example(1, 1, 70)], pad_token_id=0)
    # The longest has 5 tokens; 3 + 2 fill the second row, so nothing is padded.
    assert batch.input_ids.tolist() == [[50, 51, 150, 151, 152], [10, 11, 110, 70, 170]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]
    assert batch.target_ids.tolist() == [150, 151, 152, 110, 170]
    assert batch.order == (1, 0, 2)
    assert batch.target_lengths.tolist() == [3, 1, 1]
    assert batch.global_target_tokens == batch.num_target_tokens == 5


def test_collate_refuses_an_empty_prompt_and_names_the_problem() -> None:
    with pytest.raises(ValueError, match="problem p7"):
        collate([Example((), (1,), "p7", "teacher")], 0)


def test_a_batch_moves_whole() -> None:
    batch = collate([example(2, 2)], 0).to("meta")
    assert batch.input_ids.device == batch.target_lengths.device == torch.device("meta")


def test_a_bundle_by_hand() -> None:
    """Prompt 10 11 with targets 110 and 110 111; the first token of each target is predicted from the prompt's end."""
    batch = collate([example(2, 1), example(2, 2), example(1, 1, 70)], 0, bundles=[[0, 1], [2]])
    assert batch.input_ids.tolist() == [[10, 11, 110, 110, 111, 70, 170]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1]]
    assert batch.target_index.tolist() == [2, 3, 4, 6]
    assert batch.context_index.tolist() == [1, 1, 3, 5]
    assert batch.order == (0, 1, 2)
    assert batch.attention_mask is not None
    assert batch.attention_mask[:, 0].int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0],
            [1, 1, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1, 1],
        ]
    ]
    assert collate([example(2, 1), example(2, 2)], 0).attention_mask is None


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=12))
def test_bundles_hold_each_example_once_and_one_prompt(groups: list[tuple[int, int, int]]) -> None:
    examples = [
        example(prompt, target, 1000 * number)
        for number, (prompt, count, target) in enumerate(groups)
        for _ in range(count)
    ]
    bundles = bundle(examples, 64)
    assert [index for members in bundles for index in members] == list(range(len(examples)))
    for members in bundles:
        assert len({examples[index].prompt_ids for index in members}) == 1
        assert bundle_length(examples, members) <= sum(len(examples[index]) for index in members)


def many(groups: int, seed: int) -> list[Example]:
    """Groups of 8 with a prompt of 100 tokens and targets of 100 to 300."""
    rng = random.Random(seed)
    return [example(100, rng.randint(100, 300), 1000 * group) for group in range(groups) for _ in range(8)]


@pytest.mark.parametrize("groups", [255, 400])
def test_very_many_examples_are_bundled_by_some_of_them_as_by_all(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = many(groups, seed=groups)
    ours = bundle(examples, 896)
    monkeypatch.setattr(batching, "LOOKED_AT", 1 << 30)
    assert ours == bundle(examples, 896)


@pytest.mark.timing
def test_4096_groups_are_bundled_within_a_second() -> None:
    examples = many(4096, seed=0)
    began = time.perf_counter()
    bundle(examples, 896)
    assert time.perf_counter() - began < 1


def test_short_targets_share_a_long_prompt_and_long_ones_do_not() -> None:
    sizes = lambda prompt, target: [len(b) for b in bundle([example(prompt, target)] * 8, 896)]  # noqa: E731
    assert sizes(200, 20) == [8]
    assert sizes(100, 250) == [2] * 4
    assert sizes(20, 1000) == [1] * 8
    assert bundle([], 64) == []
