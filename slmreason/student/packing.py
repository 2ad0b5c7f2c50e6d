"""Examples to tensors: which examples share a micro-batch, and how they lie in its rows.

A micro-batch holds up to a budget of tokens. Its examples share rows of about the same length, told apart by position
ids that start again at 0; transformers builds the block mask from those. So almost no padding is computed, and
attention stays within an example.

Sequences with the same prompt can lie in a bundle (`student.bundles`): the prompt once, then each target, which attends
to the prompt and to itself. `student.rows` says how many rows there are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slmreason.records import Problem
from slmreason.student.bundles import Bundle, Packable, S, alone
from slmreason.student.rows import longest_row, pack_rows

FALLBACK_HIDDEN_SIZE = 1024
"""Fallback hidden size, that of a 0.5B model: for callers without a student, and students that do not say theirs."""


@dataclass  # not frozen: Lightning's precision plugins rebuild a batch field by field
class PackedBatch:
    """A micro-batch of `S` sequences in `R` rows of `L` tokens, with `N` target tokens in all."""

    input_ids: Tensor
    """[R, L], int64."""
    position_ids: Tensor
    """[R, L], int64; starts again at 0 with each sequence, and with the padding at a row's end."""
    target_index: Tensor
    """Where the target tokens lie in the rows, read one after another. [N], int64."""
    context_index: Tensor
    """The position that predicts each of them: the one before, or the end of a shared prompt. [N], int64."""
    order: tuple[int, ...]
    """The index of each sequence, in the row-major order of the target tokens, among those that were collated, read
    one bundle after another. [S]"""
    target_lengths: Tensor
    """Target tokens of each sequence, in that order. [S], int64; sums to N."""
    global_target_tokens: int
    """Target tokens of the whole optimizer step (all micro-batches, all ranks) that this micro-batch belongs to."""
    window: int = 1
    """Micro-batches a rank accumulates in that step."""
    num_tokens: int = 0
    """Tokens of all sequences, shared prompts once, padding not."""
    blocks: Tensor | None = None
    """[R, L, 2], int64: the number of each token's bundle in its row, and of its target in that bundle (0 in the
    prompt). None where no bundle has several targets: then position ids tell sequences apart."""

    @property
    def target_ids(self) -> Tensor:
        """[N], int64."""
        return self.input_ids.flatten()[self.target_index]

    @property
    def attention_mask(self) -> Tensor | None:
        """[R, 1, L, L], bool: a token sees its bundle's prompt and its own target, up to itself. None: see `blocks`."""
        if self.blocks is None:
            return None
        bundle, target = self.blocks.unbind(-1)
        mask = bundle[:, :, None] == bundle[:, None, :]
        mask &= (target[:, None, :] == 0) | (target[:, None, :] == target[:, :, None])
        return mask.tril_()[:, None]

    @property
    def num_target_tokens(self) -> int:
        return int(self.target_lengths.sum())

    def one_a_row(self) -> PackedBatch:
        """The same sequences in the same order, each from the start of a row of its own, with its prompt.

        A row's end is filled with its last token, for models that must not see it and do not.
        """
        if not self.order:
            return self
        lengths = self.target_lengths
        firsts = lengths.cumsum(0) - lengths
        prompt_ends = self.context_index[firsts]
        prompts = self.position_ids.flatten()[prompt_ends] + 1
        whole = prompts + lengths
        places = torch.arange(int(whole.max()), device=whole.device).minimum(whole[:, None] - 1)  # [S, L]
        of_target = (firsts[:, None] + places - prompts[:, None]).clamp(min=0)
        of_prompt = prompt_ends[:, None] - prompts[:, None] + 1 + places
        source = torch.where(places < prompts[:, None], of_prompt, self.target_index[of_target])
        rows, width = source.shape
        row_of = torch.arange(rows, device=whole.device).repeat_interleave(lengths)
        step = torch.arange(len(row_of), device=whole.device) - firsts[row_of]
        target_index = row_of * width + prompts[row_of] + step
        return replace(
            self,
            input_ids=self.input_ids.flatten()[source],
            position_ids=torch.arange(width, device=whole.device).expand(rows, width),
            target_index=target_index,
            context_index=target_index - 1,
            blocks=None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


class PromptBatch:
    """The problems of one GRPO step. A class of its own, since Lightning's precision plugins take apart any list."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)


def collate(
    examples: Sequence[Packable],
    pad_token_id: int,
    global_target_tokens: int = 0,
    window: int = 1,
    *,
    hidden_size: int = FALLBACK_HIDDEN_SIZE,
    device_type: str = "cpu",
) -> PackedBatch:
    """`collate_bundles` of examples of which each has its prompt for itself."""
    return collate_bundles(
        alone(examples),
        pad_token_id,
        global_target_tokens,
        window,
        hidden_size=hidden_size,
        device_type=device_type,
    )


def collate_bundles(
    bundles: Sequence[Bundle[S]],
    pad_token_id: int,
    global_target_tokens: int = 0,
    window: int = 1,
    *,
    hidden_size: int = FALLBACK_HIDDEN_SIZE,
    device_type: str = "cpu",
) -> PackedBatch:
    """Packs bundles into rows (`pack_rows`).

    Args:
        global_target_tokens: see `PackedBatch`; 0 takes the target tokens of these bundles alone.
        hidden_size, device_type: of the student; they say how long rows may be.

    Raises:
        ValueError: there is no bundle, or a sequence has an empty prompt (its first token would have no context).
    """
    if not bundles:
        raise ValueError("a batch needs at least one example")
    for sequence in (member for bundle in bundles for member in bundle.members):
        if not sequence.prompt_ids or not sequence.target_ids:
            raise ValueError(f"example of problem {sequence.problem_id}: empty prompt or target")
    lengths = [bundle.num_tokens for bundle in bundles]
    plan = pack_rows(lengths, hidden_size, device_type)
    rows = _Rows(len(plan), longest_row(plan, lengths), pad_token_id)
    firsts = list(accumulate((len(bundle.members) for bundle in bundles), initial=0))
    order: list[int] = []
    for row, chosen in enumerate(plan):
        start = 0
        for number, which in enumerate(chosen, start=1):
            start = rows.lay(bundles[which], row=row, start=start, number=number)
            order += range(firsts[which], firsts[which + 1])
        rows.close(row, start)
    target_lengths = torch.tensor([len(targets) for targets in rows.target_index])
    return PackedBatch(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        target_index=torch.cat(rows.target_index),
        context_index=torch.cat(rows.context_index),
        order=tuple(order),
        target_lengths=target_lengths,
        global_target_tokens=global_target_tokens or int(target_lengths.sum()),
        window=window,
        num_tokens=sum(lengths),
        blocks=rows.blocks if any(len(bundle.members) > 1 for bundle in bundles) else None,
    )


class _Rows:
    """The tensors of a batch while bundles are laid into its rows."""

    def __init__(self, count: int, length: int, pad_token_id: int) -> None:
        self.length = length
        self.input_ids = torch.full((count, length), pad_token_id, dtype=torch.int64)
        self.position_ids = torch.zeros((count, length), dtype=torch.int64)
        self.blocks = torch.zeros((count, length, 2), dtype=torch.int64)
        self.target_index: list[Tensor] = []
        """A tensor for each target, as is `context_index`."""
        self.context_index: list[Tensor] = []

    def lay(self, bundle: Bundle[S], row: int, start: int, number: int) -> int:
        """Writes a bundle, the `number`th of its row, from column `start` on; gives the column after it."""
        prompt = bundle.prompt_ids
        middle = start + len(prompt)
        self.input_ids[row, start:middle] = torch.tensor(prompt)
        self.position_ids[row, start:middle] = torch.arange(len(prompt))
        row_start = row * self.length
        prompt_end = torch.tensor([row_start + middle - 1])
        end = middle
        for branch, member in enumerate(bundle.members, start=1):
            ids = member.target_ids
            begin, end = end, end + len(ids)
            self.input_ids[row, begin:end] = torch.tensor(ids)
            self.position_ids[row, begin:end] = torch.arange(len(prompt), len(prompt) + len(ids))
            self.blocks[row, begin:end, 1] = branch
            places = torch.arange(row_start + begin, row_start + end)
            self.target_index.append(places)
            self.context_index.append(torch.cat([prompt_end, places[:-1]]))
        self.blocks[row, start:end, 0] = number
        return end

    def close(self, row: int, end: int) -> None:
        """Numbers the padding from column `end` on."""
        self.position_ids[row, end:] = torch.arange(self.length - end)


def without_targets(pad_token_id: int, global_target_tokens: int, window: int = 1) -> PackedBatch:
    """A batch of zero loss and zero gradient, for a process that has none left while others of its step do.

    Sharded and replicated training need the same forward and backward passes from every process.
    """
    row = torch.full((1, 2), pad_token_id, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(row, torch.arange(2)[None], none, none, (), none, global_target_tokens, window)


def plan_batches(
    lengths: Sequence[int], token_budget: int, max_examples: int | None = None, rng: random.Random | None = None
) -> list[list[int]]:
    """Cuts a (shuffled) list of sequences into micro-batches.

    A micro-batch closes before it would pass `token_budget` tokens or `max_examples` sequences. A sequence longer
    than the budget stands alone. With `rng` the order is shuffled first; every index stands exactly once.
    """
    order = list(range(len(lengths)))
    if rng is not None:
        rng.shuffle(order)
    batches: list[list[int]] = []
    tokens = 0
    for index in order:
        full = not batches or tokens + lengths[index] > token_budget
        if full or (max_examples is not None and len(batches[-1]) >= max_examples):
            batches.append([])
            tokens = 0
        batches[-1].append(index)
        tokens += lengths[index]
    return batches
