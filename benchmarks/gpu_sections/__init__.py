"""The sections of `benchmarks.gpu`, in the order in which they run: what must be right first, then what is fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu_sections import costs, decoding, machine, numbers, speed, training
from benchmarks.gpu_sections.lab import Lab, Outcome, Skip

TOY_SECONDS = 5.0
"""Estimate of any section at toy size."""


@dataclass(frozen=True)
class Section:
    """One question that only a device can answer."""

    name: str
    run: Callable[[Lab], Outcome]
    seconds: float
    """Estimate for one H100."""
    passes_when: str

    def estimate(self, lab: Lab) -> float:
        """Seconds that it will take."""
        return self.seconds if lab.cuda else TOY_SECONDS


SECTIONS = (
    Section("env", machine.environment, 6, "over 3/4 of 790 TFLOP/s and of 3 TB/s, on an H100 or H200"),
    Section("cudnn", machine.cudnn, 12, "off: finite, a new shape no dearer than an old one"),
    Section("numerics", numbers.numerics, 25, "float32 1e-4; bf16 mean 0.03, gradient cosine 0.999"),
    Section("mask", numbers.mask, 8, "others unchanged; bundles and kernels 1e-4"),
    Section("decode", decoding.decode, 12, "greedy as generate; 95 % of draws as on the CPU; 1e-4"),
    Section("bf16_step", training.bf16_step, 20, "over 95 % moved; infinite gradient skipped"),
    Section("lora", training.lora, 12, "float32 adapters move, base does not; folded 1e-4"),
    Section("fsdp", training.fsdp, 18, "update as without: off by under 2 %, in bf16 20 %"),
    Section("resume", training.resume, 12, "2 + 2 steps = 4: update off by under 2 %"),
    Section("decode_time", speed.decode_time, 35, "faster than generate"),
    Section("grpo_step", speed.grpo_step, 40, "faster than TRL"),
    Section("sft", speed.sft_rate, 30, "faster than TRL"),
    Section("memory", costs.memory, 14, "estimate within 40 % of the peak"),
    Section("head", costs.head_cost, 7, "nothing: figures"),
    Section("adamw", costs.adamw, 7, "finite; figures"),
    Section("profile", costs.kernels, 8, "nothing: figures"),
    Section("varlen", costs.varlen, 8, "gradient cosine 0.99 to that with a mask"),
    Section("graphs", decoding.graphs, 25, "95 % of draws as without"),
)

__all__ = ["SECTIONS", "Lab", "Outcome", "Section", "Skip"]
