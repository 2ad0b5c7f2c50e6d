"""One decoding step after another for rows of one batch: by transformers' own forward, or by a leaner one of ours.

At small sizes a step is Python and a growing cache more than arithmetic. `LeanSteps` calls a decoder's own projections
in the order of its layers, for the model types whose layers are known to hold nothing else, with a cache that is
allocated once and written in place. What it computes is what transformers computes.
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

from slmreason.rollout.projections import Projections, plain
from slmreason.student import Student

FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, and not on how long the sequence has become."""


def prefill(
    student: Student,
    prompts: Sequence[Sequence[int]],
    copies: int,
    max_new_tokens: int,
    projections: Projections | None = None,
) -> tuple[PlainSteps | LeanSteps, Tensor]:
    """Reads prompts and gives what continues them, with the logits of the first new token.

    Args:
        copies: rows for each prompt; it is read once.
        projections: the decoder's products, for the lean steps; those of its modules when not given.

    Returns:
        (steps, logits [len(prompts) * copies, vocab])
    """
    network, device = student.network, student.device
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), student.pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        attention_mask[row, longest - len(prompt) :] = 1
    cache, keyword = DynamicCache(config=network.config), _cache_keyword(student)
    with _contiguous(network.get_output_embeddings()):
        output = network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **{keyword: cache},
        )
    logits = output.logits[:, -1].repeat_interleave(copies, dim=0)
    mask = attention_mask.repeat_interleave(copies, dim=0)
    if is_lean(student):
        projections = projections or plain(student.base_model)
        return LeanSteps(student.base_model, projections, cache, mask, copies, max_new_tokens), logits
    return PlainSteps(network, cache, mask, copies, keyword), logits


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
    return student.shares_prompts and rope in FIXED_ROPE and config.hidden_act == "silu"


class PlainSteps:
    """transformers' forward with its growing cache."""

    def __init__(
        self, network: nn.Module, cache: DynamicCache, attention_mask: Tensor, copies: int, keyword: str
    ) -> None:
        """
        Args:
            keyword: of the network's forward that takes the cache.
        """
        cache.batch_repeat_interleave(copies)
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
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]


class LeanSteps:
    """The same numbers with a tenth of the Python, for decoders of Llama's shape."""

    def __init__(
        self,
        model: Any,
        projections: Projections,
        cache: DynamicCache,
        attention_mask: Tensor,
        copies: int,
        max_new_tokens: int,
    ) -> None:
        """
        Args:
            model: the causal language model itself, without peft's wrapper.
            projections: its products.
            cache: of the prompts, one row each.
            attention_mask: [rows, prompt tokens], int64.
        """
        self._decoder, self._projections = model.model, projections
        rows, self._length = attention_mask.shape
        room = self._length + max_new_tokens
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        for keys, values, *_ in cache:
            for kept, prompt in ((self._keys, keys), (self._values, values)):
                whole = prompt.new_empty(rows, prompt.shape[1], room, prompt.shape[3])
                whole[:, :, : self._length] = prompt.repeat_interleave(copies, dim=0)
                kept.append(whole)
        self._positions = attention_mask.sum(-1)
        places = torch.arange(int(self._positions.max()) + max_new_tokens, device=attention_mask.device)
        self._cos, self._sin = (table[0] for table in self._decoder.rotary_emb(self._keys[0][:1, 0], places[None]))
        half = self._sin.shape[-1] // 2
        self._sin = torch.cat([-self._sin[:, :half], self._sin[:, half:]], dim=-1)
        self._mask: Tensor | None = None
        if not attention_mask.all():
            # Added to the scores: sdpa would turn a boolean mask into this one again in each layer.
            self._mask = self._keys[0].new_zeros(rows, 1, 1, room)
            self._mask[:, 0, 0, : self._length].masked_fill_(attention_mask == 0, float("-inf"))

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in each row. [rows] -> [rows, vocab]"""
        cos, sin = self._cos[self._positions, None], self._sin[self._positions, None]
        seen = None if self._mask is None else self._mask[..., : self._length + 1]
        hidden = self._decoder.embed_tokens(tokens)
        for index, layer in enumerate(self._decoder.layers):
            hidden = hidden + self._attend(index, layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, seen)
            products = self._projections.layers[index]
            gate, up = products.gate_up(_norm(layer.post_attention_layernorm, hidden))
            hidden = hidden + products.down(functional.silu(gate) * up)
        self._length += 1
        self._positions += 1
        return self._projections.head(_norm(self._decoder.norm, hidden))

    def _attend(
        self, index: int, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None
    ) -> Tensor:
        rows, size = len(hidden), attention.head_dim
        products = self._projections.layers[index]
        query, key, value = (part.reshape(rows, -1, size) for part in products.qkv(hidden))
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        keys, values = self._keys[index], self._values[index]
        turned = _rotate(torch.cat([query, key], dim=1), cos, sin)
        keys[:, :, self._length] = turned[:, query.shape[1] :]
        values[:, :, self._length] = value
        # The queries of the heads that share keys stand where a sequence's would: no key is repeated.
        grouped = turned[:, : query.shape[1]].unflatten(1, (keys.shape[1], -1))
        upto = self._length + 1
        found = _attention(grouped, keys[:, :, :upto], values[:, :, :upto], seen, attention.scaling)
        return products.out(found.flatten(1))

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, which stand in that order then.

        Only those that change their place are copied.
        """
        count = len(rows)
        moved = (rows != torch.arange(count, device=rows.device)).nonzero().squeeze(1)
        source = rows[moved]
        for tensors in (self._keys, self._values):
            for index, tensor in enumerate(tensors):
                tensor[moved, :, : self._length] = tensor[source, :, : self._length]
                tensors[index] = tensor[:count]
        self._positions = self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]


def _attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of the few queries that share keys; on a CPU by plain products, in half of the time of sdpa's kernel.

    That kernel rounds half precision only at its end, so there it is taken; under autocast the values alone are half.

    Args:
        query: [rows, key heads, queries, size]
        keys: [rows, key heads, tokens, size], as `values`
        mask: is added to the scores. [rows, 1, 1, tokens]
    """
    if query.device.type != "cpu" or values.dtype != torch.float32:
        return functional.scaled_dot_product_attention(query, keys, values, mask, scale=scale)
    scores = (query @ keys.mT).mul_(scale)
    if mask is not None:
        scores += mask
    return scores.softmax(-1) @ values


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding as transformers has it: the halves of a head are the two coordinates. [rows, heads, size]

    Args:
        sin: its first half with the other sign, so that the halves need only change places.
    """
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin
