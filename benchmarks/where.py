"""Where the time of a GRPO step goes, and how far it is from what the arithmetic alone would take on this machine.

    python -m benchmarks.where --shape 10M --tokens 64 --out benchmarks/results/where.json

The floor counts two operations for each weight and token of a forward pass and four for each of a backward pass, at the
rate that one large matrix product reaches here; attention, norms, sampling, Python and the optimizer are on top of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Stopwatch, counted_tokens, model_folder, quiet, save
from benchmarks.grpo import Ours, Setting
from slmreason.modules.grpo import GRPOModule
from slmreason.rollout import lean
from slmreason.rollout import transformers as hf
from slmreason.student import Student

PARTS: dict[str, tuple[Any, str]] = {
    "prefill": (hf, "prefill"),
    "decode": (lean.LeanSteps, "step"),
    "drop finished rows": (lean.LeanSteps, "keep"),
    "sample": (hf, "sample"),
    "random numbers": (hf, "uniforms"),
    "forward": (Student, "score"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "plan and pack": (GRPOModule, "policy_batches"),
}


def timed_parts() -> tuple[dict[str, float], Callable[[], None]]:
    """(seconds of each part from now on, what ends the counting)."""
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    plain = {part: getattr(owner, name) for part, (owner, name) in PARTS.items()}

    def wrapped(part: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return plain[part](*args, **options)
            finally:
                seconds[part] += time.perf_counter() - began

        return call

    for part, (owner, name) in PARTS.items():
        setattr(owner, name, wrapped(part))

    def end() -> None:
        for part, (owner, name) in PARTS.items():
            setattr(owner, name, plain[part])

    return seconds, end


def flops_per_second() -> float:
    """What one large float32 matrix product reaches."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = min(_seconds(lambda: left @ right) for _ in range(20))
    return float(2 * 1024**3 / best)


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="0.8M")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(options.shape, Path(scratch))
        ours = Ours(folder, Setting(options.tokens, False, options.steps), Stopwatch)
        ours()
        seconds, end = timed_parts()
        with counted_tokens() as counts:
            whole = sum(ours()) * options.steps / (options.steps - 1)
        end()
        weights = sum(p.numel() for p in ours.student.parameters())
    floor = weights * (2 * counts["decoded"] + 6 * counts["trained"]) / flops_per_second()
    table = {
        part: round(value / options.steps, 4) for part, value in sorted(seconds.items(), key=lambda item: -item[1])
    }
    table["the rest"] = round((whole - sum(seconds.values())) / options.steps, 4)
    save(options.out, [{
        "model": options.shape, "completion tokens": options.tokens, "seconds a step": round(whole / options.steps, 4),
        "parts": table, "arithmetic floor": round(floor / options.steps, 4), "of the floor": round(whole / floor, 2),
        "tokens decoded": counts["decoded"] // options.steps, "tokens trained": counts["trained"] // options.steps,
    }])  # fmt: skip


if __name__ == "__main__":
    main()
