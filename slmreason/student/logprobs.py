"""From hidden states to log-probabilities of given tokens, without the logits of a whole vocabulary at once.

A vocabulary of 150,000 makes logits the largest tensor of a step by far: 8,192 tokens take 5 GB in float32, and their
gradient as much again. Here they are made a chunk of tokens at a time and dropped; the backward pass makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 24
"""Logits that are held at once on a CPU, over all tokens of a chunk: 64 MiB in float32."""
CHUNK_ELEMENTS_ELSEWHERE = 1 << 26
"""The same on a GPU, whose kernels want larger chunks: 256 MiB in float32, and up to four times as much in all."""


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_ranks: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log softmax(hidden W^T + b)[target] of each token, in float32, with the gradient for hidden, W and b.

    Under autocast the products are in its dtype, in the backward pass as in the forward pass.

    Args:
        hidden: [N, hidden]
        weight: [vocab, hidden]
        targets: [N], int64.
        temperature: logits are divided by it.

    Returns:
        (log-probs [N], entropy in nats [N], ranks [N] with 1 for the most likely token); the latter two carry no
        gradient and are None when not asked for.
    """
    dtype = compute_dtype(weight)
    if hidden.shape[0] * weight.shape[0] <= chunk_elements(weight) and not _has_wide_products(
        weight.device.type, dtype
    ):
        logits = functional.linear(hidden, weight, bias)
        return scores_of_logits(logits, targets, temperature, with_entropy, with_ranks)
    log_probs, *others = _ChunkedScores.apply(
        hidden, weight, bias, targets, temperature, with_entropy, with_ranks, dtype
    )
    entropy = others.pop(0) if with_entropy else None
    return log_probs, entropy, others.pop(0) if with_ranks else None


def scores_of_logits(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool, with_ranks: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`token_scores` of logits that are all there. [N, vocab] -> [N] each."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    every = logits.log_softmax(dim=-1)  # one kernel forward and one backward, where logsumexp takes four and three
    log_probs = every.gather(1, targets[:, None]).squeeze(1)
    entropy = ranks = None
    with torch.no_grad():
        if with_entropy:
            entropy = every.exp().mul_(every).sum(dim=-1).neg_()
        if with_ranks:
            ranks = (every > log_probs[:, None]).sum(dim=-1) + 1
    return log_probs, entropy, ranks


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of products with a weight: autocast's within it, else the weight's own."""
    device = weight.device.type
    if weight.dtype.is_floating_point and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden W^T + b in float32; of half precision on a GPU not rounded in between. [N, hidden] -> [N, vocab]

    Args:
        hidden, weight, bias: of one dtype.
    """
    if not _has_wide_products(weight.device.type, weight.dtype):
        return functional.linear(hidden, weight, bias).float()
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # type: ignore[call-overload]
    return logits if bias is None else logits.add_(bias)  # type: ignore[no-any-return]


class _ChunkedScores(torch.autograd.Function):
    """`token_scores` a chunk of tokens at a time, forward and backward.

    With a frozen head the gradient for the hidden states is made in the forward pass, which saves a projection. What
    is cast is cast once a pass, and autocast is off within: it would cast the whole weight for each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        with_entropy: bool, with_ranks: bool, dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        at_once = needs_hidden and not (needs_weight or needs_bias)
        parts: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        with torch.autocast(weight.device.type, enabled=False):
            narrow = _cast(dtype, hidden, weight, bias)
            for rows in _chunks(hidden, weight):
                every = _tempered(narrow, rows, temperature).log_softmax(dim=-1)
                log_probs = every.gather(1, targets[rows, None])
                found = [log_probs.squeeze(1)]
                ranks = (every > log_probs).sum(dim=-1) + 1 if with_ranks else None
                if with_entropy:
                    shares = every.exp()
                    found.append(torch.linalg.vecdot(shares, every).neg_())
                elif at_once:
                    shares = every.exp_()
                if ranks is not None:
                    found.append(ranks)
                parts.append(tuple(found))
                if at_once:
                    slopes.append(_falls(shares, targets[rows]).to(dtype) @ narrow[1])
            found_all = tuple(torch.cat(column) for column in zip(*parts, strict=True))
            ctx.temperature, ctx.dtype, ctx.has_bias, ctx.at_once = temperature, dtype, bias is not None, at_once
            if at_once:
                ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype).div_(-temperature))
            else:
                ctx.save_for_backward(hidden, weight, targets, *([bias] if bias is not None else []))
        ctx.mark_non_differentiable(*found_all[1:])
        return found_all

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None].to(slopes.dtype), *[None] * 7)
        hidden, weight, targets, *rest = ctx.saved_tensors
        bias = rest[0] if ctx.has_bias else None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.empty_like(hidden) if needs_hidden else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        with torch.autocast(weight.device.type, enabled=False):
            narrow = _cast(ctx.dtype, hidden, weight, bias)
            scale = grad.float().div(-ctx.temperature)[:, None]
            for rows in _chunks(hidden, weight):
                falls = _falls(_tempered(narrow, rows, ctx.temperature).softmax(dim=-1), targets[rows])
                if for_bias is not None:
                    for_bias.addmv_(falls.t(), scale[rows, 0])
                falls = falls.to(ctx.dtype)
                if for_hidden is not None:
                    for_hidden[rows] = ((falls @ narrow[1]).float() * scale[rows]).to(hidden.dtype)
                if for_weight is not None:
                    # The scale goes to the small factor: no pass over the large one.
                    _add_product(for_weight, falls.t(), (hidden[rows].float() * scale[rows]).to(ctx.dtype))
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
            *[None] * 5,
        )


Narrow = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, weight and bias in the dtype of the products."""


def _cast(dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Narrow:
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _tempered(narrow: Narrow, rows: slice, temperature: float) -> Tensor:
    """Logits of some tokens divided by the temperature, float32. [n, vocab]"""
    hidden, weight, bias = narrow
    logits = logits_of(hidden[rows], weight, bias)
    return logits if temperature == 1 else logits.div_(temperature)


def _falls(shares: Tensor, targets: Tensor) -> Tensor:
    """-d log-prob / d tempered logit, in the place of the probabilities. [n, vocab]"""
    shares[torch.arange(len(targets), device=targets.device), targets] -= 1
    return shares


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, for a float32 total."""
    if _has_wide_products(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    else:  # on a CPU faster in float32: half precision first puts the transposed factor in another order
        total.addmm_(left.float(), right.float())


@cache
def _has_wide_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of half precision can be given in float32: on CUDA, from torch 2.11 on."""
    if device_type != "cuda" or dtype == torch.float32:
        return False
    ones = torch.ones(16, 16, device=device_type, dtype=dtype)
    total = torch.ones(16, 16, device=device_type)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
        torch.mm(ones, ones, out_dtype=torch.float32)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17).all())


def chunk_elements(weight: Tensor) -> int:
    """Logits that are made at a time on the device of the vocabulary projection's weight."""
    return CHUNK_ELEMENTS if weight.device.type == "cpu" else CHUNK_ELEMENTS_ELSEWHERE


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, chunk_elements(weight) // weight.shape[0])
    return (slice(start, start + size) for start in range(0, len(hidden), size))
