"""Decoding steps for decoders of Llama's shape, leaner than transformers' forward.

At small sizes a step is Python and a growing cache more than arithmetic. These call a decoder's own projections in the
order of its layers, for the model types whose layers are known to hold nothing else, with a cache that is allocated
once and written in place. What they compute is what transformers computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from slmreason.rollout.projections import Projections

LENGTHS = 256
"""Recorded steps attend to a multiple of this many places of the cache."""
ROW_BUCKETS = 8
"""Recorded steps are for a multiple of this share of the rows."""


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
        room = self._room(max_new_tokens)
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

    def _room(self, max_new_tokens: int) -> int:
        return self._length + max_new_tokens  # type: ignore[no-any-return]

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in each row. [rows] -> [rows, vocab]"""
        seen = None if self._mask is None else self._mask[..., : self._length + 1]
        logits = self._forward(tokens, self._positions, seen)
        self._length += 1
        self._positions += 1
        return logits

    def _forward(self, tokens: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        hidden = self._decoder.embed_tokens(tokens)
        for index, layer in enumerate(self._decoder.layers):
            hidden = hidden + self._attend(index, layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin, seen)
            products = self._projections.layers[index]
            hidden = hidden + products.down(products.gated(_norm(layer.post_attention_layernorm, hidden)))
        return self._projections.head(_norm(self._decoder.norm, hidden))

    def _attend(
        self, index: int, attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, seen: Tensor | None
    ) -> Tensor:
        rows, size = len(hidden), attention.head_dim
        products = self._projections.layers[index]
        query, key, value = (part.reshape(rows, -1, size) for part in products.qkv(hidden))
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        turned = _rotate(torch.cat([query, key], dim=1), cos, sin)
        keys, values = self._remember(index, turned[:, query.shape[1] :], value)
        # The queries of the heads that share keys stand where a sequence's would: no key is repeated.
        grouped = turned[:, : query.shape[1]].unflatten(1, (keys.shape[1], -1))
        found = _attention(grouped, keys, values, seen, attention.scaling)
        return products.out(found.flatten(1))

    def _remember(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a layer's newest keys and values, [rows, heads, size], into its cache; gives what may be attended to."""
        keys, values = self._keys[index], self._values[index]
        keys[:, :, self._length] = key
        values[:, :, self._length] = value
        return keys[:, :, : self._length + 1], values[:, :, : self._length + 1]

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


class StaticSteps(LeanSteps):
    """The same over tensors that stay where they are, so that a GPU records a step once and replays it.

    A recording is for a number of rows and of places in the cache, both rounded up: what is beyond is computed too, and
    masked. The first step of each runs as it is, which readies what its kernels need; the second is recorded.
    """

    def __init__(
        self,
        model: Any,
        projections: Projections,
        cache: DynamicCache,
        attention_mask: Tensor,
        copies: int,
        max_new_tokens: int,
    ) -> None:
        super().__init__(model, projections, cache, attention_mask, copies, max_new_tokens)
        rows, device = len(attention_mask), attention_mask.device
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._place = torch.tensor([self._length], device=device)
        # Of the whole cache: what has not been written yet is masked as padding is.
        mask = self._keys[0].new_full((rows, 1, 1, self._keys[0].shape[2]), float("-inf"))
        mask[:, 0, 0, : self._length].masked_fill_(attention_mask != 0, 0.0)
        self._static_mask = mask
        for tensor in (*self._keys, *self._values):  # masked, but NaN would come through any mask
            tensor[:, :, self._length :] = 0
        self._window = (rows, 0)
        self._recorded: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self._seen_once: set[tuple[int, int]] = set()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def _room(self, max_new_tokens: int) -> int:
        return _rounded(self._length + max_new_tokens, LENGTHS)

    def step(self, tokens: Tensor) -> Tensor:
        """The logits after one more token in each row, good until the next step. [rows] -> [rows, vocab]"""
        self._tokens[: len(tokens)].copy_(tokens)
        rows = min(len(self._tokens), _rounded(len(tokens), -(-len(self._tokens) // ROW_BUCKETS)))
        window = (rows, _rounded(self._length + 1, LENGTHS))
        self._length += 1
        return self._run(window)[: len(tokens)]

    def _run(self, window: tuple[int, int]) -> Tensor:
        if self._pool is None or window not in self._seen_once:
            self._seen_once.add(window)
            return self._static_step(window)
        if window not in self._recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._static_step(window)
            self._recorded[window] = graph, logits
        graph, logits = self._recorded[window]
        graph.replay()
        return logits

    def _static_step(self, window: tuple[int, int]) -> Tensor:
        """One step of the first rows, from and to tensors that stay where they are: nothing here asks the host."""
        self._window = window
        rows, upto = window
        self._static_mask.index_fill_(3, self._place, 0.0)
        logits = self._forward(self._tokens[:rows], self._positions[:rows], self._static_mask[:rows, ..., :upto])
        self._place += 1
        self._positions += 1
        return logits

    def _remember(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        rows, upto = self._window
        keys, values = self._keys[index][:rows], self._values[index][:rows]
        keys.index_copy_(2, self._place, key[:, :, None].to(keys.dtype))
        values.index_copy_(2, self._place, value[:, :, None].to(values.dtype))
        return keys[:, :, :upto], values[:, :, :upto]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, which stand in that order then, in the places of the first."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        source = rows[moved]
        for tensor in (*self._keys, *self._values):
            tensor[moved, :, : self._length] = tensor[source, :, : self._length]
        for tensor in (self._positions, self._static_mask):
            tensor[moved] = tensor[source]


def _rounded(number: int, unit: int) -> int:
    """Up to a multiple of `unit`."""
    return -(-number // unit) * unit


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
