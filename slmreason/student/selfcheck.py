"""Whether a model's numbers come out right the way they are computed here, tried on the model itself.

Packing several sequences into a row, sharing a prompt and decoding from a cache are shortcuts: each is right for most
architectures and silently wrong for some. So a few short sequences are scored by each shortcut and by one plain forward
pass of transformers for each sequence, and compared. What differs is not used; what cannot be had right is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmreason.records import Example

log = logging.getLogger(__name__)
W = TypeVar("W")
TEXT = """\
Tom has 3 boxes with 12 pens in each box. He gives 7 pens to his friend Ann. How many pens are left? \
3 * 12 = 36 and 36 - 7 = 29, so Tom has 29 pens left."""
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
"""Settings by which a layer sees only so many tokens back."""
SHORT_WINDOW = 4
"""What they are during the check, so that its short sequences reach past them."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Nats by which the mean of a sequence's differences may be off: rounding stays far below, a fault lies above. Half
precision hides small faults, so it is widened for the check, where there is room and the type is not well known."""


@dataclass(frozen=True)
class Trial(Generic[W]):
    """One way of computing, and how far its numbers were off."""

    way: W
    gap: float
    """The largest over the sequences of the mean absolute difference of their log-probs, in nats; infinite when the
    way failed."""
    fault: str = ""
    """Why it failed."""

    def __str__(self) -> str:
        return f"{self.way}: {self.fault or f'{self.gap:.2g} nats off'}"


@dataclass(frozen=True)
class Check:
    """What ways of computing are compared on."""

    examples: list[Example]
    """Short sequences, of which the first two have one prompt."""
    log_probs: list[Tensor]
    """Of each one's targets, by one forward pass of transformers over the sequence alone. [target] each, float32."""
    dtype: torch.dtype
    """What they were computed in."""


def examples(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Example]:
    """Three short sequences, two with one prompt; each repeats tokens of the others, so that to see one shows.

    Args:
        vocabulary: ids that the model knows.
    """
    ids = [i for i in tokenizer(TEXT, add_special_tokens=False)["input_ids"] if i < vocabulary]
    if len(set(ids)) < 8:  # a tokenizer that does not know these letters
        ids = [(7 + 13 * k) % vocabulary for k in range(12)]
    ids = ids * (1 + 12 // len(ids))
    parts = [(ids[:5], ids[5:12]), (ids[:5], ids[8:12]), (ids[4:7], ids[7:11])]
    return [Example(tuple(prompt), tuple(target), "", "rollout") for prompt, target in parts]


def plain_log_probs(network: nn.Module, example: Example) -> Tensor:
    """The reference: one forward pass of transformers over the sequence alone, without a cache. [target], float32."""
    device = next(network.parameters()).device
    ids = torch.tensor([(*example.prompt_ids, *example.target_ids)], device=device)
    logits = network(input_ids=ids, use_cache=False).logits[0, len(example.prompt_ids) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(example.prompt_ids) :, None]).squeeze(1)


def gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """See `Trial.gap`. Where neither is finite they agree."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        both = mine.isfinite() | other.isfinite()
        difference = (mine - other).abs()[both]
        if len(difference):
            mean = float(difference.mean())
            worst = max(worst, mean if mean == mean else float("inf"))
    return worst


def first_right(
    ways: Sequence[W], score: Callable[[W], Sequence[Tensor]], theirs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[W | None, list[Trial[W]]]:
    """Tries one way after another until one gives the right log-probs.

    Returns:
        (that way, or None; those that were tried before it and were off). Where the reference itself is not finite,
        the weights are broken and say nothing of the ways: the first one is taken.
    """
    if not all(bool(log_probs.isfinite().all()) for log_probs in theirs):
        log.warning(
            "student.model: log-probs of a plain forward pass are not finite, so nothing can be compared with them"
        )
        return ways[0], []
    off: list[Trial[W]] = []
    for way in ways:
        try:
            trial = Trial(way, gap(score(way), theirs))
        except Exception as error:  # whatever an architecture does with what it was not made for
            trial = Trial(way, float("inf"), fault_of(error))
        if trial.gap <= TOLERANCE.get(dtype, TOLERANCE[torch.float32]):
            return way, off
        off.append(trial)
    return None, off


def fault_of(error: Exception) -> str:
    """An error of a library in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}".rstrip(": ")


@contextmanager
def exactly(network: PreTrainedModel, widen: bool = True) -> Iterator[torch.dtype]:
    """Within it: no gradient, products in full precision, windows that short sequences reach past.

    Args:
        widen: half precision to float32, where memory has room for it. The weights are put back as they were.

    Yields:
        The precision that log-probs are computed in.
    """
    device, precision = next(network.parameters()).device.type, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False), short_windows(network):
            if widen and network.dtype in (torch.float16, torch.bfloat16) and has_room(network):
                with in_float32(network):
                    yield torch.float32
            else:
                yield network.dtype
    finally:
        torch.set_float32_matmul_precision(precision)


def has_room(network: nn.Module) -> bool:
    """Whether the device has the memory for a second copy of the weights, in float32."""
    needed = 4 * sum(parameter.numel() for parameter in network.parameters())
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] > 1.25 * needed
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 2 * needed


@contextmanager
def in_float32(network: nn.Module) -> Iterator[None]:
    """Within it the weights are float32; afterwards they are the very tensors that they were."""
    kept = [
        (t, t.data) for t in (*network.parameters(), *network.buffers()) if t.dtype in (torch.float16, torch.bfloat16)
    ]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def short_windows(network: PreTrainedModel) -> Iterator[None]:
    """Within it every attention window is `SHORT_WINDOW`, in the config and in the layers that keep it."""
    config = network.config
    holders: list[Any] = [config, *config_parts(config), *network.modules()]
    changed: list[tuple[Any, str, int]] = []
    for holder in {id(holder): holder for holder in holders}.values():
        for name in WINDOWS:
            window = vars(holder).get(name)
            if isinstance(window, int) and not isinstance(window, bool) and window > SHORT_WINDOW:
                changed.append((holder, name, window))
    try:
        for holder, name, _ in changed:
            setattr(holder, name, SHORT_WINDOW)
        yield
    finally:
        for holder, name, window in changed:
            setattr(holder, name, window)


def config_parts(config: Any) -> list[Any]:
    """The configs within a config, of text, vision and so on."""
    return [part for name in (config.sub_configs or {}) if (part := getattr(config, name, None)) is not None]
