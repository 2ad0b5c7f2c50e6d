"""Examples to tensors: which examples share a micro-batch, and how they lie in its rows.

A micro-batch holds up to a budget of tokens. Its examples share rows of about the same length, told apart by position
ids that start again at 0; transformers builds the block mask from those. So almost no padding is computed, and
attention stays within an example.

Examples with the same prompt can lie in a bundle: the prompt once, then each target, which attends to the prompt and to
itself. A group of rollouts then costs its prompt once, forward and backward.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from slmreason.records import Example, Problem

HIDDEN_SIZE = 1024
"""Of a student that is not known: that of half a billion parameters."""
LOOKED_AT = 1024
"""Examples by which `bundle` chooses, where there are twice as many or more."""


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
    """The index, in the list that was collated, of each sequence in the row-major order of the target tokens. [S]"""
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


def pack_rows(lengths: Sequence[int], hidden_size: int, device_type: str = "cpu") -> list[list[int]]:
    """Sequences in as many rows, all as long as the longest, as cost least.

    A layer does about 12 h^2 multiplications a token and 2 h for each pair of a query and a key, masked or not. The
    latter run at about half the rate on a CPU and at an eighth on a GPU: so R rows of length L cost in proportion to
    R L (6 h + 2 L) and R L (6 h + 8 L). Few rows waste time on masked pairs, many on padding. Sequences go to the
    shortest row so far, the longest first.

    Returns:
        The indices of the sequences in each row; every index stands once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ordered = [lengths[i] for i in order]
    so_far = list(accumulate(ordered, initial=0))
    counts = range(1, len(lengths) + 1)
    floors = [row_cost(count, _shortest(so_far, count), hidden_size, device_type) for count in counts]
    best, least = 1, math.inf
    for floor, count in sorted(zip(floors, counts, strict=True)):
        if floor > least:
            break
        cost = row_cost(count, _longest(ordered, count), hidden_size, device_type)
        if cost < least or (cost == least and count < best):
            best, least = count, cost
    rows: list[list[int]] = [[] for _ in range(best)]
    heap = [(0, row) for row in range(best)]
    for index in order:
        length, row = heapq.heappop(heap)
        rows[row].append(index)
        heapq.heappush(heap, (length + lengths[index], row))
    return rows


def _shortest(so_far: Sequence[int], count: int) -> int:
    """No way to lay sequences in `count` rows has a longest row below this.

    It is at least the mean; and of the first k times `count` + 1 sequences, k + 1 share a row.

    Args:
        so_far: summed lengths of the first 0, 1, 2, ... sequences, the longest first.
    """
    shared = (so_far[k * count + 1] - so_far[k * count - k] for k in range(len(so_far) // count + 1)
              if k * count + 1 < len(so_far))  # fmt: skip
    return max(math.ceil(so_far[-1] / count), *shared)


def _longest(ordered: Sequence[int], count: int) -> int:
    """The longest row when each sequence goes to the shortest so far."""
    heap = [0] * count
    for length in ordered:
        heapq.heapreplace(heap, heap[0] + length)
    return max(heap)


def row_cost(rows: int, length: int, hidden_size: int, device_type: str = "cpu") -> int:
    """What a layer takes for rows of a length, in a unit of its own: see `pack_rows`."""
    return rows * length * (6 * hidden_size + (2 if device_type == "cpu" else 8) * length)


def bundle(examples: Sequence[Example], hidden_size: int, device_type: str = "cpu") -> list[list[int]]:
    """Which examples share their prompt with the one before, each such run cut into as many bundles as cost least.

    Masked pairs are computed too: short targets share a prompt, long ones are better off alone. Of very many examples
    every so-manieth run says what costs least.

    Returns:
        The indices of the examples in each bundle, in order; every index stands once.
    """
    runs = [list(run) for _, run in groupby(range(len(examples)), key=lambda index: examples[index].prompt_ids)]
    most = max(map(len, runs), default=1)
    looked_at = runs[:: max(1, len(examples) // LOOKED_AT)]

    def cost(pieces: int) -> int:
        bundles = [part for run in looked_at for part in _cut(run, pieces)]
        lengths = [bundle_length(examples, members) for members in bundles]
        rows = pack_rows(lengths, hidden_size, device_type)
        return row_cost(len(rows), max(sum(lengths[i] for i in row) for row in rows), hidden_size, device_type)

    powers = [1 << power for power in range(most.bit_length())]
    pieces = min(dict.fromkeys([*powers, most]), key=cost) if examples else 1
    return [part for run in runs for part in _cut(run, pieces)]


def _cut(run: list[int], pieces: int) -> list[list[int]]:
    """A list in pieces of the same size, but for the last."""
    size = math.ceil(len(run) / pieces)
    return [run[start : start + size] for start in range(0, len(run), size)]


def bundle_length(examples: Sequence[Example], members: Sequence[int]) -> int:
    """Tokens of a bundle: the prompt and each target."""
    return len(examples[members[0]].prompt_ids) + sum(len(examples[i].target_ids) for i in members)


def collate(
    examples: Sequence[Example],
    pad_token_id: int,
    global_target_tokens: int = 0,
    window: int = 1,
    bundles: Sequence[Sequence[int]] | None = None,
    hidden_size: int = HIDDEN_SIZE,
    device_type: str = "cpu",
) -> PackedBatch:
    """Packs examples into rows (`pack_rows`).

    Args:
        global_target_tokens: see `PackedBatch`; 0 takes the target tokens of these examples alone.
        bundles: the examples that share a prompt (`bundle`); each alone when not given.
        hidden_size, device_type: of the student; they say how long rows may be.

    Raises:
        ValueError: there is no example, or one has an empty prompt (its first token would have no context).
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    for example in examples:
        if not example.prompt_ids or not example.target_ids:
            raise ValueError(f"example of problem {example.problem_id}: empty prompt or target")
    bundles = bundles or [[index] for index in range(len(examples))]
    lengths = [bundle_length(examples, members) for members in bundles]
    rows = pack_rows(lengths, hidden_size, device_type)
    shape = (len(rows), max(sum(lengths[i] for i in row) for row in rows))
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    blocks = torch.zeros((*shape, 2), dtype=torch.int64)
    targets: list[Tensor] = []
    contexts: list[Tensor] = []
    for row, row_bundles in enumerate(rows):
        start = 0
        for number, which in enumerate(row_bundles, start=1):
            prompt = examples[bundles[which][0]].prompt_ids
            middle = start + len(prompt)
            input_ids[row, start:middle] = torch.tensor(prompt)
            position_ids[row, start:middle] = torch.arange(len(prompt))
            blocks[row, start : start + lengths[which], 0] = number
            last = row * shape[1] + middle - 1
            start = middle
            for branch, index in enumerate(bundles[which], start=1):
                ids = examples[index].target_ids
                end = start + len(ids)
                input_ids[row, start:end] = torch.tensor(ids)
                position_ids[row, start:end] = torch.arange(len(prompt), len(prompt) + len(ids))
                blocks[row, start:end, 1] = branch
                flat = torch.arange(row * shape[1] + start, row * shape[1] + end)
                targets.append(flat)
                contexts.append(torch.cat([torch.tensor([last]), flat[:-1]]))
                start = end
        position_ids[row, start:] = torch.arange(shape[1] - start)
    order = tuple(index for row_bundles in rows for which in row_bundles for index in bundles[which])
    target_lengths = torch.tensor([len(examples[index].target_ids) for index in order])
    return PackedBatch(
        input_ids,
        position_ids,
        torch.cat(targets),
        torch.cat(contexts),
        order,
        target_lengths,
        global_target_tokens or int(target_lengths.sum()),
        window,
        sum(lengths),
        blocks if any(len(members) > 1 for members in bundles) else None,
    )


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
