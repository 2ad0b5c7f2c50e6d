"""Whether a model's numbers come out right the way they are computed here, tried on the model itself.

Packing several sequences into a row, sharing a prompt and decoding from a cache are shortcuts: each is right for most
architectures and silently wrong for some. So a few short sequences are scored by each shortcut and by one plain forward
pass of transformers for each sequence, and compared. What differs is not used; what cannot be had right is refused.
"""

from __future__ import annotations

import logging
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
SHORT_WINDOW = 5
"""What they are during the check, so that its short sequences reach past them."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Nats by which the mean of a sequence's differences may be off: rounding stays far below, a fault lies far above."""


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


def examples(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Example]:
    """Four short sequences, in pairs with one prompt; each repeats tokens of the others, so that to see one shows.

    Args:
        vocabulary: ids that the model knows.
    """
    ids = [i for i in tokenizer(TEXT, add_special_tokens=False)["input_ids"] if i < vocabulary]
    if len(set(ids)) < 8:  # a tokenizer that does not know these letters
        ids = [(7 + 13 * k) % vocabulary for k in range(16)]
    ids = ids * (1 + 16 // len(ids))
    parts = [(ids[:6], ids[6:14]), (ids[:6], ids[8:14]), (ids[2:6], ids[6:11]), (ids[2:6], ids[9:13])]
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
        (that way, or None; those that were tried before it and were off).
    """
    off: list[Trial[W]] = []
    for way in ways:
        try:
            trial = Trial(way, gap(score(way), theirs))
        except Exception as error:  # whatever an architecture does with what it was not made for
            first_line = (str(error).splitlines() or [""])[0][:160]
            trial = Trial(way, float("inf"), f"{type(error).__name__}: {first_line}".rstrip(": "))
        if trial.gap <= tolerance(dtype):
            return way, off
        off.append(trial)
    return None, off


def tolerance(dtype: torch.dtype) -> float:
    """See `TOLERANCE`. Products in TF32 or bfloat16 round as half precision does."""
    rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return TOLERANCE.get(torch.float16 if rounded else dtype, TOLERANCE[torch.float32])


@contextmanager
def checking(network: PreTrainedModel) -> Iterator[None]:
    """Within it: no gradient, the weights' own precision, and windows that short sequences reach past."""
    device = next(network.parameters()).device.type
    with torch.no_grad(), torch.autocast(device, enabled=False), short_windows(network):
        yield


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
