"""One token for each row from its logits, by the inverse of the cumulative distribution: one uniform number a token.

A large vocabulary is summed in blocks first: a row's number says which block, what is left of it which token in there.
So the pass over the whole vocabulary is a float32 one, and only sums of blocks and one block a row are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slmreason.rollout.engine import Sampling, prompt_seed, stable_seed

WHOLE = 16_384
"""Vocabularies up to this size are summed in one piece."""
BLOCK = 512
"""Tokens that are summed together first in larger ones."""
ROWS_ON_CPU = 4
"""Rows of a large vocabulary that a processor takes at a time: so few stay in its cache."""
LIKELIEST = 1024
"""Among these many tokens a nucleus is looked for before the whole vocabulary is sorted."""


def uniforms(sampling: Sampling, prompt: Sequence[int], first: int, copies: int) -> Tensor:
    """The uniform numbers of a prompt's completions from the `first` on. [copies, max_new_tokens], float64.

    They are the same in any batch, on any device, in any process. Each completion has a generator of its own, so the
    global RNG is neither read nor moved. Greedy decoding draws nothing.
    """
    numbers = torch.zeros((copies, sampling.max_new_tokens), dtype=torch.float64)
    if sampling.temperature > 0:
        seed = prompt_seed(sampling, prompt)
        for copy in range(copies):
            generator = torch.Generator().manual_seed(stable_seed(seed, first + copy))
            torch.rand(sampling.max_new_tokens, generator=generator, out=numbers[copy])
    return numbers


def sample(logits: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row and its log-prob under the whole distribution. [B, V] -> [B], [B].

    A nucleus says which tokens can be drawn; log-probs are not normalised to it, since the trainer scores the whole
    distribution and the two are compared. Greedy decoding (temperature 0) reports log-probs at temperature 1.

    A row with a logit that is NaN or infinite gets some token of the vocabulary, and a log-prob that is not finite:
    that is for the caller to see.

    Args:
        logits: are left as they are. Any floating dtype.
        draws: a uniform number from [0, 1) for each row. [B], float64 where the device has it.
    """
    if logits.shape[-1] > WHOLE:
        rows = ROWS_ON_CPU if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(rows), draws.split(rows), strict=True)
        found = [_sample_by_blocks(_tempered(some, sampling), sampling, theirs) for some, theirs in parts]
        tokens, chosen = (torch.cat(column) for column in zip(*found, strict=True))
        return tokens, chosen
    log_probs = _tempered(logits, sampling).log_softmax(-1)
    if sampling.temperature == 0:
        token = log_probs.argmax(-1)
    else:
        drawn_from = _nucleus(log_probs, sampling.top_p) if sampling.top_p < 1 else log_probs
        # torch.multinomial would draw a number for each entry.
        cumulative = drawn_from.exp().cumsum(-1, dtype=draws.dtype)
        token = _find(cumulative, draws[:, None] * cumulative[:, -1:]).squeeze(1)
    return token, log_probs.gather(1, token[:, None]).squeeze(1)


def _tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    scores = logits.float()
    return scores if sampling.temperature in (0, 1) else scores / sampling.temperature


def _sample_by_blocks(scores: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` from tempered logits of a large vocabulary. [B, V], float32."""
    if sampling.temperature == 0:
        top, token = scores.max(-1)
        return token, -(scores - top[:, None]).exp_().sum(-1).log()
    top = scores.amax(-1, keepdim=True)
    if sampling.top_p < 1:
        whole = scores.log_softmax(-1)
        scores = _nucleus(whole, sampling.top_p)
        top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()  # not normalised: what they sum to is known only then
    sums = _block_sums(weights).to(draws.dtype)
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    point = draws[:, None] * total
    block = _find(cumulative, point)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    share = (point - before) / sums.gather(1, block)  # of the block that lies before the point
    share = share.clamp(0, 1 - torch.finfo(share.dtype).eps / 2)  # what rounding left outside [0, 1)
    place = block * BLOCK + torch.arange(BLOCK, device=scores.device)
    inside = weights.gather(1, place.clamp(max=scores.shape[-1] - 1)).masked_fill_(place >= scores.shape[-1], 0)
    within = inside.cumsum(-1, dtype=draws.dtype)
    token = block * BLOCK + _find(within, share * within[:, -1:])
    token = token.clamp_(max=scores.shape[-1] - 1)
    if sampling.top_p < 1:
        log_prob = whole.gather(1, token)
    else:
        log_prob = scores.gather(1, token) - top - total.log().to(scores.dtype)
    return token.squeeze(1), log_prob.squeeze(1)


def _block_sums(weights: Tensor) -> Tensor:
    """Sums over consecutive `BLOCK` entries of a row, the last of what is left. [B, V] -> [B, ceil(V / BLOCK)]"""
    full = weights.shape[-1] // BLOCK * BLOCK
    sums = weights[:, :full].unflatten(1, (-1, BLOCK)).sum(-1)
    if full == weights.shape[-1]:
        return sums
    return torch.cat([sums, weights[:, full:].sum(-1, keepdim=True)], dim=1)


def _find(cumulative: Tensor, point: Tensor) -> Tensor:
    """The first place whose cumulative sum is above the point; the last where NaN hides it. [B, n], [B, 1] -> [B, 1]"""
    return torch.searchsorted(cumulative, point, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Renormalised to the smallest set of tokens whose probability reaches `top_p`. [B, V] -> [B, V]."""
    ordered, index = _likeliest(log_probs, top_p)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    kept = torch.full_like(log_probs, float("-inf"))
    return kept.scatter_(1, index, ordered).log_softmax(-1)


def _likeliest(log_probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(log-probs in falling order, their tokens): of a large vocabulary as few as every row's nucleus needs."""
    if log_probs.shape[-1] > WHOLE:
        ordered, index = log_probs.topk(LIKELIEST, dim=-1)
        if bool((ordered.exp().sum(-1) >= top_p + 1e-4).all()):  # a margin for what such sums round
            return ordered, index
    return log_probs.sort(dim=-1, descending=True)
