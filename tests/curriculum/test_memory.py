"""The estimate of a step's memory against what PyTorch allocates in one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from benchmarks.common import peak_bytes
from slmreason.cli import main
from slmreason.curriculum.memory import GIB, ROOM, Memory, Shape, estimate, largest_budget, layer_bytes, shape_of
from slmreason.records import Example
from slmreason.student import Lora, Student
from slmreason.student.optimizer import make_adamw
from slmreason.student.packing import PackedBatch, collate
from tests.runs import SMALL

QWEN_HALF_B = Shape(
    layers=24, hidden=896, queries=896, keys=128, mlp=4864, vocabulary=151_936, weight_bytes=988_000_000,
    trained=17_600_000, trained_bytes=70_400_000, optimizer_bytes=140_800_000, adapter_width=24 * 7 * 32, width=2,
    mixed=False, checkpointing=False, plain_head=True, trains_head=False,
)  # fmt: skip


def micro_batch(student: Student, sequences: int, length: int) -> PackedBatch:
    """Sequences of the same length, two thirds of each a target."""
    draw = random.Random(0)
    vocabulary = student.base_model.config.vocab_size
    ids = [[draw.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(sequences)]
    cut = length // 3
    examples = [Example(tuple(row[:cut]), tuple(row[cut:]), f"p{i}", "teacher") for i, row in enumerate(ids)]
    return collate(examples, student.pad_token_id, hidden_size=student.hidden_size)


@pytest.mark.parametrize(
    ("model", "lora", "precision", "checkpointing", "sequences", "length"),
    [
        ("embedded:qwen2", None, "32-true", False, 16, 128),
        ("embedded:qwen2", Lora(r=32), "bf16-true", False, 16, 128),
        ("embedded:llama", None, "bf16-mixed", False, 16, 128),
        ("embedded:llama", Lora(r=8), "bf16-mixed", False, 32, 96),
        ("embedded:qwen2", None, "bf16-true", True, 32, 256),
    ],
)
def test_the_estimate_is_within_a_fifth_of_the_peak(
    model: str, lora: Lora | None, precision: str, checkpointing: bool, sequences: int, length: int
) -> None:
    student = Student(model, lora=lora, instruction="", gradient_checkpointing=checkpointing)
    if precision == "bf16-true":
        student.to(torch.bfloat16)
    expected, measured = expected_and_measured(student, precision, micro_batch(student, sequences, length))
    assert expected == pytest.approx(measured, rel=0.2)


def expected_and_measured(student: Student, precision: str, batch: PackedBatch) -> tuple[float, float]:
    """Bytes of a training step: by the estimate, and as PyTorch allocates them."""
    student.train()
    optimizer = make_adamw(student.trained.parameters(), 1e-5, 0.0)

    def pass_through() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("mixed")):
            loss = -student.score(batch).log_probs.mean()
        loss.backward()

    pass_through()
    optimizer.step()  # from here on weights, gradients, moments and copies are there
    there = [*student.network.parameters(), *(p.grad for p in student.trained.parameters() if p.grad is not None)]
    there += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    measured = sum(tensor.nbytes for tensor in there) + peak_bytes(pass_through)
    return estimate(shape_of(student, precision), batch.input_ids.numel()).in_training, measured


def test_the_optimizer_counts_moments_and_copies(student: Student) -> None:
    numbers = sum(p.numel() for p in student.parameters())
    assert shape_of(student).optimizer_bytes == 8 * numbers
    student.to(torch.bfloat16)
    assert shape_of(student, "bf16-true").optimizer_bytes == 12 * numbers


def test_a_layer_of_qwen_keeps_what_was_measured_of_it() -> None:
    """54 kB a token in bfloat16 and 64 kB under autocast, measured of the real model with adapters of rank 32."""
    mixed = Shape(**{**vars(QWEN_HALF_B), "mixed": True})
    assert layer_bytes(QWEN_HALF_B) == pytest.approx(54_000, rel=0.05)
    assert layer_bytes(mixed) == pytest.approx(64_000, rel=0.05)


def test_shards_and_a_reference_change_what_they_should() -> None:
    one, four = estimate(QWEN_HALF_B, 1000), estimate(QWEN_HALF_B, 1000, shards=4)
    assert four.optimizer == one.optimizer / 4
    assert four.activations == one.activations
    assert one.weights / 4 < four.weights < one.weights
    with_reference = estimate(QWEN_HALF_B, 1000, reference=True)
    assert with_reference.in_training - one.in_training == QWEN_HALF_B.weight_bytes


def test_the_budget_that_is_recommended_fits_and_a_larger_one_does_not() -> None:
    def need(tokens: int) -> Memory:
        return estimate(QWEN_HALF_B, tokens, row_length=1024)

    budget = largest_budget(need, 16_384, 16 * GIB)
    assert 4000 < budget < 16_384
    assert need(budget).in_training <= ROOM * 16 * GIB < need(budget + 100).in_training
    assert largest_budget(need, 16_384, 0.1 * GIB) == 0


def test_a_run_says_what_it_needs_and_warns_when_the_device_has_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("slmreason.curriculum.memory.device_bytes", lambda device: 0.15 * GIB)
    run = ["fit", *SMALL, "--curriculum.stages=[]", "--benchmarks=[]", f"--run_dir={tmp_path / 'run'}"]
    assert main([*run, "--data.token_budget=8000", "--trainer.devices=1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "activations of 8000 tokens" in shown
    assert "training may not fit: lower data.token_budget to" in shown
    assert "or set student.gradient_checkpointing true" in shown
