"""Log-probabilities of a batch's target tokens from a network, in one of several ways.

An architecture decides which of them are right: whether a row may hold several sequences, and whether what its output
embedding gives are the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slmreason.student.attention import VARLEN, packing_arguments
from slmreason.student.logprobs import scores_of_logits, token_scores
from slmreason.student.packing import PackedBatch

AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")
"""Settings by which a model changes its logits after the projection (Gemma, Granite, Cohere)."""
Head = Literal["scores", "projection", "logits"]


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of the target tokens, flat over the micro-batch."""

    log_probs: Tensor
    """[N], float32."""
    entropy: Tensor | None = None
    """[N], float32, in nats; no gradient."""
    ranks: Tensor | None = None
    """[N], int64; 1 = the most likely token; no gradient."""


@dataclass(frozen=True)
class Way:
    """How a batch is scored."""

    packed: bool = True
    """Rows may hold several sequences, told apart by position ids or by a mask; else each has a row of its own."""
    head: Head = "scores"
    """What the vocabulary projection gives: the targets' `scores`, chunk by chunk; the logits of the targets'
    positions alone (`projection`), which the model may scale or cap; or the `logits` of all positions."""

    def __str__(self) -> str:
        rows = "several sequences a row" if self.packed else "one sequence a row"
        return rows if self.head == "scores" else f"{rows}, {self.head} of the model's own"


def ways(network: Any) -> list[Way]:
    """The ways that a network may be scored in, the fastest first."""
    heads: list[Head] = ["scores", "projection", "logits"] if has_plain_head(network) else ["projection", "logits"]
    return [Way(packed, head) for packed in (True, False) for head in heads]


def has_plain_head(network: Any) -> bool:
    """Whether logits are the head's output as it is: a plain projection that nothing scales or caps."""
    config = network.config.get_text_config()
    scaled = any(getattr(config, key, None) not in (None, 1, 1.0) for key in AFTER_HEAD)
    return type(network.get_output_embeddings()) is nn.Linear and not scaled


def score_batch(
    network: Any,
    batch: PackedBatch,
    way: Way,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_ranks: bool = False,
) -> TokenScores:
    """Log-probabilities of the target tokens of a micro-batch, with the gradient if grad mode is on.

    Args:
        network: A causal language model of transformers, or peft's around one.
        temperature: logits are divided by it, as the sampler's were.

    Returns:
        TokenScores over the N target tokens, in the batch's row-major order.
    """
    wanted = (temperature, with_entropy, with_ranks)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    if not way.packed:
        batch = batch.one_a_row()
        inputs = {"input_ids": batch.input_ids}  # causal: what fills a row's end is not seen before it
    elif network.config._attn_implementation.startswith("flash"):
        # transformers tells sequences apart by their positions in a single row only; padding is a sequence too.
        inputs |= {key: inputs[key].reshape(1, -1) for key in ("input_ids", "position_ids")}  # type: ignore[union-attr]
    elif network.config._attn_implementation == VARLEN:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        inputs |= packing_arguments(batch.position_ids)
    if way.head == "logits":
        logits = network(**inputs, use_cache=False).logits.flatten(0, 1)[batch.context_index]
        return TokenScores(*scores_of_logits(logits, batch.target_ids, *wanted))
    head = network.get_output_embeddings()
    if way.head == "projection":
        with _project_only(head, batch):
            logits = network(**inputs, use_cache=False).logits[0]
        return TokenScores(*scores_of_logits(logits, batch.target_ids, *wanted))
    with _scoring(head, batch, *wanted):
        columns = list(network(**inputs, use_cache=False).logits.unbind(-1))
    log_probs, others = columns[0], [column.detach() for column in columns[1:]]
    entropy = others.pop(0) if with_entropy else None
    return TokenScores(log_probs, entropy, others.pop(0).long() if with_ranks else None)


@contextmanager
def _project_only(head: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Makes the vocabulary projection see only the hidden states that predict a target: [R, L, h] -> [1, N, h].

    A hook on the output embedding, so it serves every architecture, with adapters and logit scaling or capping.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[batch.context_index][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scoring(
    head: nn.Linear, batch: PackedBatch, temperature: float, with_entropy: bool, with_ranks: bool
) -> Iterator[None]:
    """Makes the vocabulary projection give scores of the targets in the place of logits: [R, L, h] -> [N, 1 to 3].

    Within its forward, so that whatever a strategy does around that (gathering shards, say) is done.
    """
    targets = batch.target_ids

    def scores(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, 1)[batch.context_index]
        columns = token_scores(chosen, head.weight, head.bias, targets, temperature, with_entropy, with_ranks)
        return torch.stack([column.float() for column in columns if column is not None], dim=-1)

    head.forward = scores  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward
