"""What a dataloader yields: micro-batches that were planned beforehand, so that a fit can go on in its middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from slmreason.records import Example, Place, Problem
from slmreason.runtime.distributed import rank, world_size
from slmreason.student import Student
from slmreason.student.packing import (
    FALLBACK_HIDDEN_SIZE,
    PackedBatch,
    PromptBatch,
    collate,
    plan_batches,
    without_targets,
)

if TYPE_CHECKING:
    from slmreason.data.datamodule import ReasoningDataModule


class PlannedLoader(DataLoader[Any]):
    """Batches that were planned beforehand, from the `start`-th on: a fit that goes on has had those before it."""

    def __init__(self, batches: Sequence[Any], start: int, num_workers: int, pin_memory: bool) -> None:
        super().__init__(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # an iterator draws a seed for its workers: not from the global generator
        )

    def __len__(self) -> int:
        """Batches of the whole epoch: what Lightning counts against."""
        return len(self.dataset)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning's loop knows the place. Having this method tells it that we can go on from there."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: see `state_dict`."""


class PromptBatches(Sequence[PromptBatch]):
    """Problems in their order, some at a time: the same in every process, each of which samples its share of a batch.

    Not a DataLoader, whose batches Lightning would deal out to the processes.
    """

    def __init__(self, problems: Sequence[Problem], per_batch: int) -> None:
        self.problems, self.per_batch = problems, per_batch

    def __len__(self) -> int:
        return -(-len(self.problems) // self.per_batch)

    def __getitem__(self, index: int) -> PromptBatch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return PromptBatch(self.problems[index * self.per_batch : (index + 1) * self.per_batch])


class PackedDataset(Sequence[PackedBatch]):
    """Micro-batches of supervised examples, planned at once for all processes and collated when asked for.

    An optimizer step is a window of `accumulate` micro-batches in each process. The plan knows how many target tokens a
    window has in all, and every micro-batch carries that number: two processes, or two accumulated micro-batches, then
    give the same gradient as one large batch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: list[list[int]],
        accumulate: int,
        pad_token_id: int,
        rank: int = 0,
        world_size: int = 1,
        hidden_size: int = FALLBACK_HIDDEN_SIZE,
        device_type: str = "cpu",
    ) -> None:
        self.hidden_size, self.device_type = hidden_size, device_type
        self.examples, self.plan, self.accumulate, self.pad_token_id = examples, plan, accumulate, pad_token_id
        self.rank, self.world_size = rank, world_size
        tokens = [sum(len(examples[i].target_ids) for i in batch) for batch in plan]
        window = accumulate * world_size
        self.step_tokens = [sum(tokens[start : start + window]) for start in range(0, len(plan), window)]

    def __len__(self) -> int:
        return -(-len(self.plan) // self.world_size)

    def __getitem__(self, index: int) -> PackedBatch:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self.step_tokens[index // self.accumulate]
        planned = index * self.world_size + self.rank
        if planned >= len(self.plan):
            return without_targets(self.pad_token_id, tokens, self.accumulate)
        chosen = [self.examples[i] for i in self.plan[planned]]
        return collate(
            chosen,
            self.pad_token_id,
            tokens,
            self.accumulate,
            hidden_size=self.hidden_size,
            device_type=self.device_type,
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self[index] for index in range(len(self)))


def packed_batches(
    examples: Sequence[Example], data: ReasoningDataModule, epoch: int, accumulate: int, student: Student, place: Place
) -> PackedDataset:
    """Shuffles and cuts the examples of one epoch into micro-batches of the token budget."""
    rng = data.rng("shuffle", place.round, place.stage, epoch)
    plan = plan_batches([len(example) for example in examples], data.token_budget, data.batch_size, rng)
    return PackedDataset(
        examples, plan, accumulate, student.pad_token_id, rank(), world_size(), student.hidden_size, student.device.type
    )
