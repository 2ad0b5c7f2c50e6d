"""What the sections of `benchmarks.gpu` share: the device, sizes, one random model, timing, and the form of results."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common import random_model, timed
from slmreason.records import Example
from slmreason.student import Lora, Student
from slmreason.student import logprobs as head
from slmreason.student.packing import PackedBatch, collate

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""bfloat16 products a second by NVIDIA's data sheets (SXM, dense), by a part of the device's name."""
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Sizes:
    """How large the sections work."""

    shape: str
    """Of the random model, a key of `benchmarks.common.SHAPES`."""
    vocabulary: int
    square: int
    """Side of the matrices of the large product."""
    copied: int
    """Bytes of the copy."""
    heads: int
    rows: int
    """Of the attention that is tried."""
    length: int
    """Tokens of its rows, about."""
    problems: int
    """Prompts or examples of the embedded students."""
    completion: int
    """New tokens of the embedded students."""
    train_steps: int
    decode_rows: tuple[int, ...]
    decode_steps: tuple[int, int]
    """A short and a long decoding, whose difference is timed."""
    lora: int
    """Rank of the random model's adapters."""
    grpo_prompts: int
    grpo_tokens: int
    grpo_steps: int
    """Timed; one more comes first. The same of `sft_steps`."""
    sft_tokens: int
    sft_steps: int
    budgets: tuple[int, ...]
    """Tokens of a micro-batch whose memory is measured."""
    head_tokens: int
    chunk_powers: tuple[int, ...]


FULL = Sizes(
    shape="0.5B", vocabulary=151_936, square=8192, copied=1 << 30, heads=14, rows=12, length=1200, problems=32,
    completion=64, train_steps=20, decode_rows=(128, 512, 1024), decode_steps=(16, 48), lora=32, grpo_prompts=16,
    grpo_tokens=128, grpo_steps=3, sft_tokens=16_384, sft_steps=8, budgets=(8192, 16_384), head_tokens=8192,
    chunk_powers=(24, 25, 26, 27, 28),
)  # fmt: skip
TOY = Sizes(
    shape="0.8M", vocabulary=1024, square=256, copied=1 << 20, heads=4, rows=2, length=32, problems=4, completion=8,
    train_steps=4, decode_rows=(8, 16), decode_steps=(2, 6), lora=4, grpo_prompts=2, grpo_tokens=8, grpo_steps=2,
    sft_tokens=512, sft_steps=2, budgets=(256, 512), head_tokens=64, chunk_powers=(12, 14),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a section found."""

    figure: str
    """In a few words, for the table."""
    passed: bool | None
    """None where there is nothing to pass."""
    figures: dict[str, Any] = field(default_factory=dict)


class Skip(Exception):
    """A section cannot be run here; the message says why."""


class Lab:
    """One device, and what the sections need on it."""

    def __init__(self, device: str, scratch: Path) -> None:
        """
        Args:
            device: cuda or cpu. On a CPU everything is of toy size.
            scratch: a folder for the random model and for checkpoints.
        """
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.sizes = FULL if self.cuda else TOY
        self.scratch = scratch

    @cached_property
    def model(self) -> str:
        """Folder of the random model, written when it is first asked for."""
        sizes = self.sizes
        return random_model(
            self.scratch / "model", sizes.shape, sizes.vocabulary, dtype=torch.bfloat16, device=self.device.type
        )

    def large(self, lora: bool, kind: type[Student] = Student, attention: str = "sdpa") -> Student:
        """A student from the random model, in bfloat16 on the device; float32 adapters that add something."""
        adapters = Lora(r=self.sizes.lora, alpha=2 * self.sizes.lora) if lora else None
        student = kind(self.model, lora=adapters, dtype="bfloat16", instruction="", attn_implementation=attention)
        return placed(student, self.device, torch.bfloat16)

    def small(
        self, family: str = "qwen2", lora: bool = False, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
    ) -> Student:
        """An embedded student on the device; float32 adapters that add something."""
        adapters = Lora(r=8, alpha=16) if lora else None
        student = Student(f"embedded:{family}", lora=adapters, instruction="", attn_implementation=attention)
        return placed(student, self.device, dtype)

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call, until the device is done with it."""
        if not self.cuda:
            return timed(function)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def seconds(self, function: Callable[[], object], repeats: int = 5, warm_up: int = 2) -> float:
        """The median of several calls, after some that are not counted."""
        for _ in range(warm_up):
            function()
        return statistics.median(self.once(function) for _ in range(repeats))

    @cached_property
    def product_rate(self) -> float:
        """Operations a second of one large product in bfloat16."""
        side = self.sizes.square
        left, right = (self.drawn(side, side) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: left @ right, repeats=10)

    @property
    def peak_flops(self) -> float | None:
        """By the data sheet; None for a device that is not known here."""
        name = torch.cuda.get_device_name() if self.cuda else ""
        return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)

    def drawn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers on the device: zeros would multiply faster than any weights do."""
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)


def placed(student: Student, device: torch.device, dtype: torch.dtype) -> Student:
    """A student on a device in a precision. Adapters start at zero, and gradients with them: they get numbers."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "lora_" in name:  # both matrices, so that they are the same wherever the student is made anew
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    student.to(dtype)
    student.to(device)
    return student


def micro_batch(student: Student, tokens: int, length: int, packed: bool = False) -> PackedBatch:
    """Sequences of one length and about so many tokens in all, two thirds of each a target, on the student's device.

    Args:
        packed: four sequences a row or so, as examples of different lengths would lie; else as costs least.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = student.base_model.config.vocab_size
    count = max(1, tokens // length)
    ids = torch.randint(10, vocabulary - 10, (count, length), generator=generator).tolist()
    cut = length // 3
    examples = [Example(tuple(row[:cut]), tuple(row[cut:]), f"p{i}", "teacher") for i, row in enumerate(ids)]
    hidden_size = student.hidden_size if not packed else 64 * length  # which makes long rows cheap
    return collate(examples, student.pad_token_id, hidden_size=hidden_size).to(student.device)


def pass_through(student: Student, batch: PackedBatch) -> None:
    """Forward and backward; gradients add up."""
    (-student.score(batch).log_probs.mean()).backward()


def worst(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference, wherever the two lie; infinite where there is NaN, which no `max` would keep."""
    return sound(float((ours.detach().cpu().float() - theirs.detach().cpu().float()).abs().max()))


def sound(value: float) -> float:
    """The number, or infinity in place of NaN."""
    return float("inf") if value != value else value


def empty(lab: Lab) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if lab.cuda:
        torch.cuda.empty_cache()


@contextmanager
def head_chunks(elements: int) -> Iterator[None]:
    """Within it the head holds so many logits at once, on any device."""
    kept = head.CHUNK_ELEMENTS, head.CHUNK_ELEMENTS_ELSEWHERE
    try:
        head.CHUNK_ELEMENTS = head.CHUNK_ELEMENTS_ELSEWHERE = elements
        yield
    finally:
        head.CHUNK_ELEMENTS, head.CHUNK_ELEMENTS_ELSEWHERE = kept


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Within it float32 products have that precision: highest (float32) or high (TF32 on a GPU)."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)
