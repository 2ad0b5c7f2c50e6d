"""From traces that a step has an SFT loss on to the tensors of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slmreason.modules.policy_batch import layout
from slmreason.modules.rescue.base import WeighedTrace
from slmreason.runtime.distributed import rank, world_size
from slmreason.student import Student
from slmreason.student.bundles import Bundle, alone
from slmreason.student.packing import PackedBatch, collate_bundles, without_targets


@dataclass
class TraceBatch:
    """A packed micro-batch of traces, flat over its N target tokens."""

    packed: PackedBatch
    weights: Tensor
    """Of each token in the loss of the step. [N], float32."""


def trace_batches(traces: Sequence[WeighedTrace], student: Student, token_budget: int) -> list[TraceBatch]:
    """Micro-batches of this process's share of the traces.

    Every process has the same traces and gets the same number of micro-batches, of which the last may be empty.
    """
    tokens = sum(len(trace.target_ids) for trace in traces)
    mine = layout(alone(traces), token_budget, world_size())[rank()]
    return [_fill(members, tokens, student) for members in mine]


def _fill(bundles: Sequence[Bundle[WeighedTrace]], tokens: int, student: Student) -> TraceBatch:
    """The tensors of one micro-batch, on the student's device.

    Args:
        tokens: target tokens of all traces of the step.
    """
    device = student.device
    if not bundles:
        packed = without_targets(student.pad_token_id, tokens).to(device)
        return TraceBatch(packed, torch.zeros(0, dtype=torch.float32, device=device))
    packed = collate_bundles(
        bundles,
        student.pad_token_id,
        global_target_tokens=tokens,
        hidden_size=student.hidden_size,
        device_type=device.type,
    ).to(device)
    traces = [trace for members in bundles for trace in members.members]
    weights = torch.tensor([traces[index].weight for index in packed.order], dtype=torch.float32, device=device)
    return TraceBatch(packed, weights.repeat_interleave(packed.target_lengths))
