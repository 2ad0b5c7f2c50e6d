"""The model is tried before it is trained: what differs is not used, and nothing of the model changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slmreason.rollout.decoding import Decoding, decoding_of
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student, selfcheck
from slmreason.student.layout import checking, layout_of
from slmreason.student.packing import collate
from tests.causal_types import make_model
from tests.student.test_student import examples_for


@pytest.mark.parametrize(
    ("model", "dtype", "checked_in"),
    [
        ("qwen2", "float32", torch.float32),
        ("qwen2", "bfloat16", torch.bfloat16),  # the tests know this type, so seconds are saved
        ("gemma", "bfloat16", torch.float32),  # widened, so that small faults show
    ],
)
def test_a_check_leaves_weights_mode_and_random_numbers_as_they_were(
    model: str, dtype: str, checked_in: torch.dtype, tmp_path: Path
) -> None:
    name = "embedded:qwen2" if model == "qwen2" else str(make_model(tmp_path, model))
    student = Student(name, instruction="", dtype=dtype)  # type: ignore[arg-type]
    student.train()
    before = [(p.data_ptr(), p.dtype, p.clone()) for p in student.parameters()]
    state, precision = torch.get_rng_state(), torch.get_float32_matmul_precision()
    with checking(student) as check:
        assert check.dtype == checked_in
        assert layout_of(student).way.packed
        assert decoding_of(student) == Decoding("lean" if model == "qwen2" else "steps")
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_float32_matmul_precision() == precision
    for parameter, (place, kind, values) in zip(student.parameters(), before, strict=True):
        assert (parameter.data_ptr(), parameter.dtype) == (place, kind)
        assert torch.equal(parameter, values)


def test_what_was_found_is_not_looked_for_again(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    assert student.shares_prompts
    HFEngine().check(student)
    monkeypatch.setattr(selfcheck, "plain_log_probs", None)
    assert student.shares_prompts
    HFEngine().check(student)


def test_a_model_that_cannot_be_packed_gets_a_row_a_sequence_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = Student(str(make_model(tmp_path, "opt")), instruction="")
    batch = collate(examples_for(student), student.pad_token_id, hidden_size=4096)
    with caplog.at_level("WARNING", "slmreason"):
        together = student.score(batch)
        student.score(batch)
    assert caplog.text.count("each sequence gets a row of its own") == 1
    assert "opt (OPTForCausalLM)" in caplog.text
    alone = [student.score(collate([example], student.pad_token_id)).log_probs for example in examples_for(student)]
    torch.testing.assert_close(together.log_probs, torch.cat([alone[i] for i in batch.order]), rtol=1e-5, atol=1e-5)


def test_a_model_that_sees_what_comes_is_refused_with_its_type_and_the_difference(tmp_path: Path) -> None:
    student = Student(str(make_model(tmp_path, "bert")), instruction="")
    with pytest.raises(ValueError, match=r"student.model: bert \(BertLMHeadModel\) cannot be trained .* nats off"):
        student.score(collate(examples_for(student), student.pad_token_id))
