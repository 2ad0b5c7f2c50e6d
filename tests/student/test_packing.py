"""Packing loses nothing and mixes nothing."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmreason.records import Example
from slmreason.student.bundles import Bundle
from slmreason.student.packing import collate, collate_bundles, plan_batches


def example(prompt: int, target: int, start: int = 10) -> Example:
    return Example(tuple(range(start, start + prompt)), tuple(range(start + 100, start + 100 + target)), "p", "teacher")


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


def test_the_order_counts_sequences_one_bundle_after_another() -> None:
    short = Bundle((example(2, 1), example(2, 2)))
    long = Bundle((example(2, 20, 50), example(2, 30, 50)))
    batch = collate_bundles([short, long], 0)
    assert batch.order == (2, 3, 0, 1)  # the longest bundle lies in the first row
    assert batch.target_lengths.tolist() == [20, 30, 1, 2]


def test_collate_refuses_an_empty_prompt_and_names_the_problem() -> None:
    with pytest.raises(ValueError, match="problem p7"):
        collate([Example((), (1,), "p7", "teacher")], 0)


def test_rows_are_those_of_the_device() -> None:
    examples = [example(2, length) for length in [395, 348, 308, 298, 288, 258, 198, 174] * 4]
    on_cpu, on_gpu = (
        len(collate(examples, 0, hidden_size=896, device_type=device).input_ids) for device in ("cpu", "cuda")
    )
    assert on_gpu > on_cpu


def test_a_batch_moves_whole() -> None:
    batch = collate([example(2, 2)], 0).to("meta")
    assert batch.input_ids.device == batch.target_lengths.device == torch.device("meta")


def test_a_bundle_by_hand() -> None:
    """Prompt 10 11 with targets 110 and 110 111; the first token of each target is predicted from the prompt's end."""
    bundles = [Bundle((example(2, 1), example(2, 2))), Bundle((example(1, 1, 70),))]
    batch = collate_bundles(bundles, 0)
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
