"""Attention of packed sequences without a mask against sdpa with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from slmreason.records import Example
from slmreason.rollout.engine import Sampling
from slmreason.rollout.steps import is_lean
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student
from slmreason.student.attention import packing_arguments
from slmreason.student.packing import PackedBatch, collate, without_targets
from tests.models import make_checkpoint


def packed(student: Student) -> PackedBatch:
    """Nine sequences of 7 to 39 tokens in rows with padding."""
    examples = [Example(tuple(range(5, 5 + 4 * n)), tuple(range(50, 53 + n)), "", "rollout") for n in range(1, 8)]
    batch = collate(examples, student.pad_token_id, hidden_size=16)
    assert batch.input_ids.shape[0] > 1
    assert batch.input_ids.numel() > batch.num_tokens
    return batch


def log_probs_and_gradients(student: Student, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    log_probs = student.score(batch, 0.9).log_probs
    log_probs.sum().backward()
    return log_probs.detach(), [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
@pytest.mark.parametrize("name", ["embedded:qwen2", "embedded:llama"])
def test_scores_and_gradients_are_those_under_a_mask(name: str, lora: Lora | None, checkpointing: bool) -> None:
    torch.manual_seed(0)
    plain = Student(name, instruction="", lora=lora, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    varlen = Student(
        name, instruction="", lora=lora, gradient_checkpointing=checkpointing, attn_implementation="varlen"
    )
    plain.train(), varlen.train()
    batch = packed(plain)
    theirs, expected = log_probs_and_gradients(plain, batch)
    ours, found = log_probs_and_gradients(varlen, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(found) == len(expected) > 0
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_it_builds_no_mask_of_a_row() -> None:
    """A mask of 300 x 300 tokens would be the largest tensor by far."""
    student = Student("embedded:qwen2", instruction="", attn_implementation="varlen")
    example = Example(tuple([5, 6, 7] * 100), (8, 9), "", "rollout")
    batch = collate([example, example], student.pad_token_id, hidden_size=100_000)
    length = batch.input_ids.shape[1]
    assert length > 300
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profiler:
        student.score(batch)
    shapes = [shape for event in profiler.key_averages(group_by_input_shape=True) for shape in event.input_shapes]
    assert list(batch.input_ids.shape) in shapes
    assert not any(shape[-2:] == [length, length] for shape in shapes if isinstance(shape, list))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_samples_as_sdpa_does(temperature: float) -> None:
    varlen = Student("embedded:qwen2", instruction="", attn_implementation="varlen")
    assert is_lean(varlen)
    assert not varlen.shares_prompts
    prompts = [varlen.encode_question(f"{n} + 3 = ?" * n) for n in range(1, 5)]
    sampling = Sampling(24, temperature, seed=1)
    ours = HFEngine().generate(varlen, prompts, 3, sampling)
    theirs = HFEngine().generate(Student("embedded:qwen2", instruction=""), prompts, 3, sampling)
    assert [c.token_ids for group in ours for c in group] == [c.token_ids for group in theirs for c in group]


def test_where_sequences_begin_and_end_by_hand() -> None:
    found = packing_arguments(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 5, 7, 10]
    assert found["max_length_q"] == 3
    student = Student("embedded:qwen2", attn_implementation="varlen")
    assert student.score(without_targets(student.pad_token_id, 1)).log_probs.shape == (0,)


def test_a_model_that_attends_in_another_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attn_implementation: varlen serves llama.* not gemma3_text"):
        Student(str(make_checkpoint(tmp_path / "gemma", "gemma")), attn_implementation="varlen")
