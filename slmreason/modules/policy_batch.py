"""What one micro-batch of GRPO holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slmreason.student.packing import PackedBatch


@dataclass
class PolicyBatch:
    """A packed micro-batch of completions with what the policy loss needs, flat over its N completion tokens."""

    packed: PackedBatch
    advantages: Tensor
    """[N], float32."""
    weights: Tensor
    """[N], float32; sums to at most 1 over the whole optimizer step."""
    sampler_log_probs: Tensor
    """[N], float32; of the whole distribution at the sampling temperature, as `old_log_probs` are."""
    old_log_probs: Tensor | None = None
    """[N], float32; None until the first forward pass on this batch."""
    reference_log_probs: Tensor | None = None
    """[N], float32; None until asked for, and without a KL penalty."""
