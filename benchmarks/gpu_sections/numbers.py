"""Whether the numbers are right: against float32 on the CPU, between sequences of a row, and between ways to attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import solutions
from benchmarks.gpu_sections.lab import Lab, Outcome, head_chunks, placed, products_in, sound, worst
from slmreason.records import Example
from slmreason.student import Lora, Student
from slmreason.student.attention import VARLEN
from slmreason.student.bundles import Bundle
from slmreason.student.layout import layout_of
from slmreason.student.logprobs import token_scores
from slmreason.student.packing import PackedBatch, collate, collate_bundles

CPU = torch.device("cpu")
EXACT = 1e-4
"""Nats by which float32 may differ between devices and ways of computing."""
HALF_MEAN, HALF_COSINE = 0.03, 0.999
"""What bfloat16 may differ by: the mean of log-probs, and the gradient's angle to float32's."""


@dataclass(frozen=True)
class Scored:
    """What a student says of a batch."""

    log_probs: Tensor
    entropy: Tensor
    ranks: Tensor
    gradient: Tensor
    """Flat, of everything that is trained."""


def scored(student: Student, batch: PackedBatch) -> Scored:
    scores = student.score(batch.to(student.device), with_entropy=True, with_ranks=True)
    student.zero_grad()
    (-scores.log_probs.mean()).backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in student.trained.parameters() if p.grad is not None])
    assert scores.entropy is not None
    assert scores.ranks is not None
    return Scored(scores.log_probs.detach().cpu(), scores.entropy.cpu(), scores.ranks.cpu(), gradient)


def rounded(family: str, lora: bool, device: torch.device, dtype: torch.dtype) -> Student:
    """An embedded student whose base weights are bfloat16's, so that every precision starts from the same."""
    student = Student(f"embedded:{family}", lora=Lora(r=8, alpha=16) if lora else None, instruction="")
    with torch.no_grad():
        for name, parameter in student.network.named_parameters():
            if "lora_" not in name:
                parameter.copy_(parameter.bfloat16())
    return placed(student, device, dtype)


def compared(ours: Scored, theirs: Scored) -> dict[str, float]:
    """How far a student's numbers are from those of float32 on the CPU."""
    product = float((ours.gradient.double() * theirs.gradient.double()).sum())
    norms = float(ours.gradient.double().norm()), float(theirs.gradient.double().norm())
    return {
        "log_probs_max": worst(ours.log_probs, theirs.log_probs),
        "log_probs_mean": sound(float((ours.log_probs - theirs.log_probs).abs().mean())),
        "entropy_max": worst(ours.entropy, theirs.entropy),
        "same_ranks": float((ours.ranks == theirs.ranks).double().mean()),
        "gradient_cosine": product / (norms[0] * norms[1]),
        "gradient_error": float((ours.gradient - theirs.gradient).norm()) / norms[1],
    }


def numerics(lab: Lab) -> Outcome:
    figures: dict[str, Any] = {}
    passed = True
    means, exact = [0.0], [0.0]
    for family in ("qwen2", "llama"):
        for lora in (False, True):
            reference = rounded(family, lora, CPU, torch.float32)
            batch = collate(solutions(reference, lab.sizes.problems), reference.pad_token_id,
                            hidden_size=reference.hidden_size)  # fmt: skip
            with products_in("highest"):
                expected = scored(reference, batch)
            row: dict[str, dict[str, float]] = {}
            for name, dtype, precision in (
                ("float32", torch.float32, "highest"),
                ("tf32", torch.float32, "high"),
                ("bfloat16", torch.bfloat16, "highest"),
            ):
                with products_in(precision):
                    row[name] = compared(scored(rounded(family, lora, lab.device, dtype), batch), expected)
            figures[f"{family} {'lora' if lora else 'full'}"] = row
            exact += [row["float32"]["log_probs_max"], row["float32"]["entropy_max"]]
            means.append(row["bfloat16"]["log_probs_mean"])
            passed &= row["float32"]["gradient_cosine"] > 1 - EXACT and row["bfloat16"]["gradient_cosine"] > HALF_COSINE
    figures["chunked head"] = chunked = chunked_head(lab)
    passed &= max(exact) < EXACT and max(means) < HALF_MEAN and chunked["log_probs"] < EXACT
    passed &= chunked["gradient_error"] < EXACT
    return Outcome(f"float32 {max(exact):.1g}, bf16 mean {max(means):.2g}", passed, figures)


def chunked_head(lab: Lab) -> dict[str, float]:
    """The head in many chunks beside the head in one, float32: the largest differences."""
    tokens, width, vocabulary = 64, 128, 1000
    hidden = lab.drawn(tokens, width, dtype=torch.float32)
    weight = 0.1 * lab.drawn(vocabulary, width, dtype=torch.float32)
    targets = torch.arange(tokens, device=lab.device) * 7
    found: list[tuple[Tensor, Tensor]] = []
    with products_in("highest"):
        for elements in (1 << 30, 5 * vocabulary):
            inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with head_chunks(elements):
                log_probs, _, _ = token_scores(*inputs, None, targets)
                (log_probs * hidden[:, 0]).sum().backward()
            assert inputs[0].grad is not None
            assert inputs[1].grad is not None
            found.append((log_probs.detach(), torch.cat([inputs[0].grad.flatten(), inputs[1].grad.flatten()])))
    (whole, whole_gradient), (parts, parts_gradient) = found
    return {
        "log_probs": worst(parts, whole),
        "gradient_error": float((parts_gradient - whole_gradient).norm() / whole_gradient.norm()),
    }


def mask(lab: Lab) -> Outcome:
    """One row of several sequences: does one see another, do bundles change anything, do the kernels agree?"""
    student = lab.small()
    with products_in("highest"), torch.no_grad():
        leak, change = leaking(student, lab.sizes.problems)
        bundled = bundling(student, lab.sizes.problems)
    figures: dict[str, Any] = {"leak": leak, "change": change, "bundles": bundled}
    figures["kernels"] = kernels = by_kernel(lab)
    used = [row for kernel, row in kernels.items() if kernel != "cudnn"]  # which is off unless asked for
    apart, half = ([row[name] for row in used if isinstance(row[name], float)]
                   for name in ("float32", "bfloat16"))  # fmt: skip
    passed = leak < 1e-5 and change > 1e-2 and bundled < EXACT and max(apart) < EXACT and max(half) < HALF_MEAN
    return Outcome(f"leak {leak:.1g}, bundles {bundled:.1g}, kernels {max(apart):.1g}", passed, figures)


def one_row(student: Student, examples: Sequence[Example]) -> PackedBatch:
    """All examples in a row, where the layout allows it. Wide layers make rows long."""
    return collate(examples, student.pad_token_id, hidden_size=1 << 30).to(student.device)


def pieces(student: Student, batch: PackedBatch) -> list[Tensor]:
    """Log-probs of each example, in the order of the examples."""
    parts = student.score(batch).log_probs.split(batch.target_lengths.tolist())
    return [part for _, part in sorted(zip(batch.order, parts, strict=True), key=lambda pair: pair[0])]


def leaking(student: Student, count: int) -> tuple[float, float]:
    """(how far the others' log-probs move when the first sequence of the first row changes, how far its own do)"""
    examples = solutions(student, count)
    batch = one_row(student, examples)
    assert len(batch.order) > len(batch.input_ids)
    before = pieces(student, batch)
    first = batch.order[0]  # of its row, which those behind it would see
    old = examples[first]
    examples[first] = Example(old.prompt_ids[::-1], old.target_ids[::-1], old.problem_id, old.origin)
    after = pieces(student, one_row(student, examples))
    moved = [worst(a, b) for a, b in zip(after, before, strict=True)]
    return max(moved[:first] + moved[first + 1 :]), moved[first]


def bundling(student: Student, count: int) -> float:
    """Four targets behind one prompt, beside four sequences that repeat it."""
    examples = solutions(student, count)
    group = [Example(examples[0].prompt_ids, other.target_ids, "p", "rollout") for other in examples[:4]]
    alone = pieces(student, one_row(student, group))
    shared = collate_bundles([Bundle(tuple(group))], student.pad_token_id, hidden_size=student.hidden_size)
    together = pieces(student, shared.to(student.device))
    return max(worst(a, b) for a, b in zip(together, alone, strict=True))


FORCED = {
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "chosen": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""Kernels that sdpa may take; the last are those among which it chooses with cuDNN's off."""


def by_kernel(lab: Lab) -> dict[str, dict[str, Any]]:
    """How far each kernel's log-probs of a packed row are from the plain one's: the largest difference in float32, the
    mean in bfloat16. A kernel that takes no such input says so. `varlen` needs no mask."""
    found: dict[str, dict[str, Any]] = {}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        student = lab.small(dtype=dtype)
        batch = one_row(student, solutions(student, lab.sizes.problems))
        with products_in("highest"):
            plain = forced(student, batch, [SDPBackend.MATH])
            assert isinstance(plain, Tensor), plain
            results = {kernel: forced(student, batch, allowed) for kernel, allowed in FORCED.items()}
            results["varlen"] = forced(lab.small(dtype=dtype, attention=VARLEN), batch, FORCED["chosen"])
        for kernel, result in results.items():
            row = found.setdefault(kernel, {})
            if isinstance(result, str):
                row[name] = result
                continue
            difference = (result - plain).abs()
            row[name] = sound(float(difference.max() if name == "float32" else difference.mean()))
    return found


@torch.no_grad()
def forced(student: Student, batch: PackedBatch, allowed: list[SDPBackend]) -> Tensor | str:
    """Log-probs of a batch by these kernels alone, or why they cannot be had."""
    layout_of(student)  # which is found by trying, with any kernel
    try:
        with sdpa_kernel(allowed):
            return student.score(batch).log_probs
    except (RuntimeError, TypeError, ImportError) as error:
        return f"not taken: {str(error).splitlines()[0][:80]}"
