"""What a training step of the random half a billion costs: memory, the head, the optimizer, and where the time goes."""

from __future__ import annotations

import gc
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import peak_bytes
from benchmarks.gpu_sections.lab import Lab, Outcome, head_chunks, micro_batch, pass_through
from slmreason.curriculum.memory import estimate, shape_of
from slmreason.student import Student
from slmreason.student.attention import VARLEN
from slmreason.student.layout import layout_of
from slmreason.student.logprobs import token_scores
from slmreason.student.optimizer import make_adamw
from slmreason.student.packing import PackedBatch

LENGTH = 256
"""Tokens of a sequence."""
OFF = 0.4
"""Share by which an estimate of memory may be off."""
COSINE = 0.99
"""Of two gradients in bfloat16 that are the same but for rounding."""
MIB = 2**20
KINDS = (
    ("attention", r"flash|fmha|attention|sdp|cudnn"),
    ("products", r"gemm|nvjet|cutlass|xmma|cublas|splitk|aten::(mm|addmm|bmm|matmul|linear)"),
    ("softmax, norms and sums", r"softmax|reduce|norm|sum|mean|logsumexp"),
    ("looking up", r"index|gather|scatter|embedding|cumsum|scan|sort"),
    ("copies", r"copy|memcpy|memset|cat|fill|aten::(clone|contiguous|zero_|to)"),
    ("elementwise", r"elementwise|vectorized|aten::(mul|add|sub|div|exp|neg|silu|pow|rsqrt|cos|sin)"),
)
"""Kinds of kernels by their names; the first that fits."""


def memory(lab: Lab) -> Outcome:
    """Peaks of a step by tokens of a micro-batch, beside the estimate that a run prints at its start."""
    figures: dict[str, Any] = {}
    ratios = []
    for lora in (True, False):
        student = lab.large(lora)
        student.train()
        shape = shape_of(student, "bf16-true")
        warm = micro_batch(student, 2 * LENGTH, min(LENGTH, lab.sizes.budgets[0] // 2))
        pass_through(student, warm)
        optimizer = make_adamw(student.trained.parameters(), 1e-5, 0.0)
        optimizer.step()  # from here on weights, gradients, moments and copies are there
        held = bytes_held(student, optimizer)
        for budget in lab.sizes.budgets:
            batch = micro_batch(student, budget, min(LENGTH, budget // 2))
            measured = held + peak_bytes(lambda student=student, batch=batch: pass_through(student, batch))  # type: ignore[misc]
            expected = estimate(shape, batch.input_ids.numel(), row_length(batch)).in_training
            ratios.append(expected / measured)
            figures[f"{'lora' if lora else 'full'} {budget}"] = {
                "measured_mib": measured / MIB, "estimated_mib": expected / MIB, "row_length": row_length(batch),
            }  # fmt: skip
        del student, optimizer, warm, batch
        gc.collect()
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    largest = max(row["measured_mib"] for row in figures.values())
    passed = all(abs(ratio - 1) < OFF for ratio in ratios)
    return Outcome(f"up to {largest:,.0f} MiB, estimate {worst:.2f} of it", passed, figures)


def bytes_held(student: Student, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients, moments and copies."""
    held: list[Tensor] = [*student.network.parameters()]
    held += [p.grad for p in student.trained.parameters() if p.grad is not None]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    return sum(tensor.nbytes for tensor in held)


def row_length(batch: PackedBatch) -> int:
    """Length of rows that several sequences share; 0 where each row has one."""
    rows, length = batch.input_ids.shape
    return int(length) if len(batch.order) > rows else 0


def head_cost(lab: Lab) -> Outcome:
    """Milliseconds and memory of the head, forward and backward, by the logits that are held at once."""
    tokens, vocabulary = lab.sizes.head_tokens, lab.sizes.vocabulary
    hidden, weight = lab.drawn(tokens, 896), 0.02 * lab.drawn(vocabulary, 896)
    targets = torch.randint(0, vocabulary, (tokens,), device=lab.device)
    slope = lab.drawn(tokens, dtype=torch.float32)
    figures: dict[str, Any] = {}
    for trained in (False, True):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)

        def both(pair: tuple[Tensor, Tensor] = inputs) -> None:
            log_probs, _, _ = token_scores(*pair, None, targets)
            log_probs.backward(slope)
            pair[0].grad = pair[1].grad = None

        for power in lab.sizes.chunk_powers:
            with head_chunks(1 << power):
                seconds = lab.seconds(both, repeats=3, warm_up=1)
                figures[f"{'trained' if trained else 'frozen'} 2^{power}"] = {
                    "ms": 1e3 * seconds, "peak_mib": peak_bytes(both) / MIB,
                }  # fmt: skip
    best = {side: min((name for name in figures if name.startswith(side)), key=lambda name: figures[name]["ms"])
            for side in ("frozen", "trained")}  # fmt: skip
    return Outcome(", ".join(f"{name} {figures[name]['ms']:.3g} ms" for name in best.values()), None, figures)


def adamw(lab: Lab) -> Outcome:
    """Milliseconds of an update of all weights: foreach and fused, with float32 copies, and PyTorch's own without."""
    student = lab.large(lora=False)
    parameters = student.trained.parameters()
    for parameter in parameters:
        parameter.grad = 1e-3 * lab.drawn(*parameter.shape, dtype=parameter.dtype)
    figures: dict[str, Any] = {}
    for name in ("foreach", "fused", "fused without copies"):
        if name == "fused without copies":
            optimizer = torch.optim.AdamW(parameters, 1e-6, weight_decay=0.0, fused=True)
        else:
            optimizer = make_adamw(parameters, 1e-6, 0.0, fused=name == "fused")
            for group in optimizer.param_groups:
                group["foreach"] = name == "foreach"
        figures[name] = 1e3 * lab.seconds(optimizer.step, repeats=5)
        del optimizer
        gc.collect()
    finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
    figure = ", ".join(f"{name} {ms:.3g} ms" for name, ms in figures.items())
    return Outcome(figure, finite, figures)


def kernels(lab: Lab) -> Outcome:
    """Where the time of a micro-batch goes, forward and backward, by kind of kernel."""
    figures: dict[str, Any] = {}
    for lora in (True, False):
        student = lab.large(lora)
        student.train()
        batch = micro_batch(student, lab.sizes.budgets[0], min(LENGTH, lab.sizes.budgets[0] // 2))
        pass_through(student, batch)
        wall = lab.seconds(lambda student=student, batch=batch: pass_through(student, batch), 3, 1)  # type: ignore[misc]
        figures["lora" if lora else "full"] = {"wall_ms": 1e3 * wall, **by_kind(lab, student, batch)}
        del student, batch
        gc.collect()
    shares: dict[str, float] = figures["lora"]["ms"]
    total = sum(shares.values()) or 1.0
    top = sorted(shares, key=lambda kind: -shares[kind])[:3]
    figure = ", ".join(f"{kind} {shares[kind] / total:.0%}" for kind in top)
    return Outcome(f"{figures['lora']['wall_ms']:.3g} ms: {figure}", None, figures)


def by_kind(lab: Lab, student: Student, batch: PackedBatch) -> dict[str, Any]:
    """Milliseconds and calls of the kernels (on a CPU of the operations) of one pass, by kind, and the ten longest."""
    device = "CUDA" if lab.cuda else "CPU"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if lab.cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        pass_through(student, batch)
        if lab.cuda:
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    longest: list[tuple[float, str]] = []
    for event in found.key_averages():
        if event.device_type.name != device:
            continue
        spent = (event.self_device_time_total if lab.cuda else event.self_cpu_time_total) / 1e3
        kind = next((name for name, pattern in KINDS if re.search(pattern, event.key, re.IGNORECASE)), "other")
        times[kind] += spent
        calls[kind] += event.count
        longest.append((spent, event.key[:120]))
    top = [{"kernel": name, "ms": spent} for spent, name in sorted(longest, reverse=True)[:10]]
    return {"ms": dict(times), "calls": dict(calls), "longest": top}


def varlen(lab: Lab) -> Outcome:
    """Packed rows with a mask and, by `varlen`, without: milliseconds and memory of forward and backward pass."""
    figures: dict[str, Any] = {}
    gradients: list[Tensor] = []
    for attention in ("sdpa", VARLEN):
        student = lab.large(lora=True, attention=attention)
        student.train()
        assert layout_of(student).way.packed
        batch = micro_batch(student, lab.sizes.budgets[-1], min(LENGTH, lab.sizes.budgets[-1] // 4), packed=True)
        pass_through(student, batch)
        gradients.append(torch.cat([p.grad.flatten() for p in student.trained.parameters() if p.grad is not None]))

        def both(student: Student = student, batch: PackedBatch = batch) -> None:
            pass_through(student, batch)

        figures[attention] = {"ms": 1e3 * lab.seconds(both, 3, 1), "peak_mib": peak_bytes(both) / MIB}
        del student, batch, both
        gc.collect()
    masked, plain = (gradient.double() for gradient in gradients)
    figures["gradient_cosine"] = cosine = float(masked @ plain / (masked.norm() * plain.norm()))
    figure = f"{figures[VARLEN]['ms']:.3g} ms, with a mask {figures['sdpa']['ms']:.3g} ms"
    return Outcome(figure, cosine > COSINE, figures)
