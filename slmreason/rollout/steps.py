"""One decoding step after another for rows of one batch: by transformers' own forward, or by a leaner one of ours.

Prompts are always read by transformers' forward. `slmreason.rollout.lean` goes on for the model types that it knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from slmreason.rollout.lean import LeanSteps, StaticSteps
from slmreason.rollout.projections import Projections, plain
from slmreason.student import Student
from slmreason.student.attention import VARLEN

READ_AT_ONCE = 65_536
"""Tokens of prompts, padding among them, that one forward pass reads."""
WORTH_A_PASS = 1024
"""A pass that has this many tokens may end where the next prompt would be padded."""
PADDING = 1 / 16
"""It ends before a prompt of which, with its padding, this share would be padding."""
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, and not on how long the sequence has become."""


def prefill(
    student: Student,
    prompts: Sequence[Sequence[int]],
    copies: int,
    max_new_tokens: int,
    lean: bool | None = None,
    projections: Projections | None = None,
    cuda_graphs: bool = False,
) -> tuple[PlainSteps | LeanSteps, Tensor]:
    """Reads prompts and gives what continues them, with the logits of the first new token.

    Args:
        copies: rows for each prompt; it is read once.
        lean: by `LeanSteps`; if not given, where `is_lean` says so.
        projections: the decoder's products, for the lean steps; those of its modules when not given.
        cuda_graphs: steps are recorded and replayed (`StaticSteps`), for a student on a CUDA device that is lean.

    Returns:
        (steps, logits [len(prompts) * copies, vocab])
    """
    network = student.network
    lean = is_lean(student) if lean is None else lean
    input_ids, attention_mask = padded_prompts(student, prompts)
    keyword = _cache_keyword(student)
    caches: list[DynamicCache] = []
    firsts: list[Tensor] = []
    # Caches of other layers than attention cannot be joined: their prompts are read in one pass.
    sizes = passes([len(prompt) for prompt in prompts]) if lean else [len(prompts)]
    with _contiguous(network.get_output_embeddings()):
        for ids, seen in map(_without_padding, input_ids.split(sizes), attention_mask.split(sizes)):
            caches.append(DynamicCache(config=network.config))
            output = network(
                input_ids=ids,
                attention_mask=seen,
                position_ids=(seen.cumsum(-1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
                **{keyword: caches[-1]},
            )
            firsts.append(output.logits[:, -1])
    cache = _joined(caches, input_ids.shape[1])
    logits = torch.cat(firsts).repeat_interleave(copies, dim=0)
    mask = attention_mask.repeat_interleave(copies, dim=0)
    if lean:
        kind = StaticSteps if cuda_graphs else LeanSteps
        projections = projections or plain(student.base_model)
        return kind(student.base_model, projections, cache, mask, copies, max_new_tokens), logits
    return PlainSteps(network, cache, mask, copies, keyword), logits


def padded_prompts(student: Student, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask) of prompts with padding before them. [prompts, longest] each, int64."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), student.pad_token_id, device=student.device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=student.device)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids, attention_mask


def passes(lengths: Sequence[int]) -> list[int]:
    """How many prompts each forward pass reads, of prompts with these lengths in tokens, in their order.

    A pass costs little beside its tokens, and padding costs what tokens cost: prompts that stand longest first are read
    with those of about their length.
    """
    sizes = [0]
    longest = 0
    for length in lengths:
        count = sizes[-1]
        tokens = count * longest
        is_full = (count + 1) * max(longest, length) > READ_AT_ONCE
        pads = tokens >= WORTH_A_PASS and abs(longest - length) >= PADDING * max(longest, length)
        if count and (is_full or pads):
            sizes.append(0)
            longest = 0
        sizes[-1] += 1
        longest = max(longest, length)
    return sizes


def _without_padding(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the places before the longest of their prompts. [prompts, tokens] each"""
    longest = int(attention_mask.sum(-1).max())
    return input_ids[:, -longest:], attention_mask[:, -longest:]


def _joined(caches: list[DynamicCache], tokens: int) -> DynamicCache:
    """One cache of the prompts of several, with padding before those of fewer tokens. They are emptied."""
    first, *others = caches
    if others:
        for index in range(len(first.layers)):
            same: list[Any] = [cache.layers[index] for cache in caches]
            layer = same[0]
            layer.keys = torch.cat([_padded(each.keys, tokens) for each in same])
            layer.values = torch.cat([_padded(each.values, tokens) for each in same])
            for each in same[1:]:
                each.keys = each.values = None
    return first


def _padded(states: Tensor, tokens: int) -> Tensor:
    """Zeros before what is in a cache. [prompts, heads, places, size] -> [prompts, heads, tokens, size]"""
    return functional.pad(states, (0, 0, tokens - states.shape[2], 0))


@contextmanager
def _contiguous(head: nn.Module) -> Iterator[None]:
    """Makes the vocabulary projection see whole rows in place of a slice of longer ones.

    Of a slice and a frozen weight, torch's matmul on a CPU makes a copy of that weight for each row.
    """
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _cache_keyword(student: Student) -> str:
    """What the model's forward calls its cache: renamed in transformers 5.24."""
    return "cache" if "cache" in signature(student.base_model.forward).parameters else "past_key_values"


def is_lean(student: Student) -> bool:
    """Whether `LeanSteps` knows the layers of this student."""
    config = student.base_model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    attends = student.shares_prompts or config._attn_implementation == VARLEN
    return attends and rope in FIXED_ROPE and config.hidden_act == "silu"


class PlainSteps:
    """transformers' forward with its growing cache."""

    def __init__(
        self, network: nn.Module, cache: DynamicCache, attention_mask: Tensor, copies: int, keyword: str
    ) -> None:
        """
        Args:
            keyword: of the network's forward that takes the cache.
        """
        # Reordering repeats and drops rows too, and is there for every kind of layer: recurrent states as well.
        prompts = len(attention_mask) // copies
        rows = torch.arange(prompts, device=attention_mask.device).repeat_interleave(copies)
        cache.reorder_cache(rows)  # type: ignore[arg-type] # int64
        self._network, self._cache, self._mask, self._keyword = network, cache, attention_mask, keyword

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in each row. [rows] -> [rows, vocab]"""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        output = self._network(
            input_ids=tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._mask.sum(-1, keepdim=True) - 1,
            use_cache=True,
            **{self._keyword: self._cache},
        )
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, which stand in that order then."""
        self._cache.reorder_cache(rows)  # type: ignore[arg-type] # int64
        self._mask = self._mask[rows]
