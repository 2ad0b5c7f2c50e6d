"""From hidden states to log-probabilities of given tokens, without the logits of a whole vocabulary at once.

A vocabulary of 150,000 makes logits the largest tensor of a step by far: 8,192 tokens take 5 GB in float32, and their
gradient as much again. Here they are made a chunk of tokens at a time and dropped; the backward pass makes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 24
"""Logits that are held at once, over all tokens of a chunk: 64 MiB in float32."""


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

    Args:
        hidden: [N, hidden]
        weight: [vocab, hidden]
        targets: [N], int64.
        temperature: logits are divided by it.

    Returns:
        (log-probs [N], entropy in nats [N], ranks [N] with 1 for the most likely token); the latter two carry no
        gradient and are None when not asked for.
    """
    if hidden.shape[0] * weight.shape[0] <= CHUNK_ELEMENTS:
        logits = functional.linear(hidden, weight, bias)
        return scores_of_logits(logits, targets, temperature, with_entropy, with_ranks)
    log_probs, *others = _ChunkedScores.apply(hidden, weight, bias, targets, temperature, with_entropy, with_ranks)
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


def _scores_of_chunk(
    logits: Tensor, targets: Tensor, with_entropy: bool, with_ranks: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(log-probs, log of the partition sum, entropy, ranks) of a chunk's tempered logits. [N, vocab] -> [N] each."""
    log_z = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    entropy = log_z - ((logits - log_z[:, None]).exp_() * logits).sum(dim=-1) if with_entropy else None
    ranks = (logits > chosen[:, None]).sum(dim=-1) + 1 if with_ranks else None
    return chosen - log_z, log_z, entropy, ranks


class _ChunkedScores(torch.autograd.Function):
    """`token_scores` a chunk of tokens at a time, forward and backward.

    With a frozen head the gradient for the hidden states is made in the forward pass, which saves a projection.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        with_entropy: bool, with_ranks: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        at_once = needs_hidden and not (needs_weight or needs_bias)
        parts: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        log_zs: list[Tensor] = []
        for rows in _chunks(hidden, weight):
            logits = functional.linear(hidden[rows], weight, bias).float().div_(temperature)
            log_probs, log_z, *others = _scores_of_chunk(logits, targets[rows], with_entropy, with_ranks)
            parts.append((log_probs, *(other for other in others if other is not None)))
            log_zs.append(log_z)
            if at_once:
                slopes.append(_slope(logits, log_z, targets[rows], temperature).to(weight.dtype) @ weight)
        found = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.temperature, ctx.has_bias, ctx.at_once = temperature, bias is not None, at_once
        kept = (
            [torch.cat(slopes)]
            if at_once
            else [hidden, weight, targets, torch.cat(log_zs), *([bias] if bias is not None else [])]
        )
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.at_once:
            (slopes,) = ctx.saved_tensors
            return (slopes * grad[:, None].to(slopes.dtype), *[None] * 6)
        hidden, weight, targets, log_z, *rest = ctx.saved_tensors
        bias = rest[0] if ctx.has_bias else None
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        for_hidden = torch.empty_like(hidden) if needs_hidden else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        for rows in _chunks(hidden, weight):
            logits = functional.linear(hidden[rows], weight, bias).float().div_(ctx.temperature)
            slope = _slope(logits, log_z[rows], targets[rows], ctx.temperature).mul_(grad[rows, None])
            narrow = slope.to(weight.dtype)
            if for_hidden is not None:
                for_hidden[rows] = narrow @ weight
            if for_weight is not None:
                for_weight.addmm_(narrow.t().float(), hidden[rows].float()) if weight.dtype != torch.float32 else (
                    for_weight.addmm_(narrow.t(), hidden[rows])
                )
            if for_bias is not None:
                for_bias += slope.sum(0)
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None or bias is None else for_bias.to(bias.dtype),
            *[None] * 4,
        )


def _slope(logits: Tensor, log_z: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """d log-prob / d untempered logit, in the place of the tempered logits. [N, vocab]"""
    slope = logits.sub_(log_z[:, None]).exp_().neg_()
    slope[torch.arange(len(targets), device=targets.device), targets] += 1
    return slope.div_(temperature)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return (slice(start, start + size) for start in range(0, len(hidden), size))
