"""From graded rollouts to the tensors of the policy loss.

Groups become samples, samples with the same prompt become bundles (`student.bundles`), `layout` gives each process
its micro-batches of bundles, and `fill` makes tensors of one. The loss is normalised over all samples of the optimizer
step, so how they are laid out does not enter it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slmreason.modules.settings import GRPOSettings
from slmreason.objectives import (
    group_advantages,
    masked_importance,
    overlong_penalty,
    token_weights,
    truncated_importance,
)
from slmreason.records import RolloutGroup
from slmreason.runtime.distributed import rank, world_size
from slmreason.student import Student
from slmreason.student.bundles import Bundle, S, alone, bundle
from slmreason.student.packing import PackedBatch, collate_bundles, plan_batches, without_targets


@dataclass(frozen=True)
class Sample:
    """A completion that is trained on."""

    problem_id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_log_probs: tuple[float, ...]
    """One for each token of the completion: see `Rollout`."""
    advantage: float

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The completion, as packing calls it."""
        return self.completion_ids


@dataclass(frozen=True)
class StepSize:
    """What the loss of an optimizer step is normalised over: all its micro-batches, in all processes."""

    samples: int
    tokens: int
    """Of their completions."""


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
    scale: Tensor | None = None
    """What its loss, with penalty and bonus, is multiplied by. [], float32; None for 1."""


def policy_batches(
    groups: Sequence[RolloutGroup], student: Student, settings: GRPOSettings, token_budget: int
) -> list[PolicyBatch]:
    """Micro-batches of this process's share of the completions that are trained on.

    Every process has the same groups and gets the same number of micro-batches: none where no group is informative.
    """
    samples = samples_of(groups, settings)
    step = StepSize(len(samples), sum(len(sample.completion_ids) for sample in samples))
    if student.shares_prompts:
        bundles = bundle(samples, student.hidden_size, student.device.type)
    else:
        bundles = alone(samples)
    mine = layout(bundles, token_budget, world_size())[rank()]
    return [fill(members, step, student, settings) for members in mine]


def samples_of(groups: Sequence[RolloutGroup], settings: GRPOSettings) -> list[Sample]:
    """The completions of the informative groups, without truncated ones where these are masked."""
    samples: list[Sample] = []
    rewards_of = [rewards_of_advantages(group, settings) for group in groups]
    step_rewards = torch.cat(rewards_of) if rewards_of else None
    for group, rewards in zip(groups, rewards_of, strict=True):
        if not group.informative:
            continue
        [scaled] = group_advantages(rewards[None], settings.advantage_scale, step_rewards=step_rewards)
        advantages = scaled.tolist()
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            if settings.mask_truncated and rollout.truncated:
                continue
            sample = Sample(
                problem_id=group.problem.id,
                prompt_ids=rollout.prompt_ids,
                completion_ids=rollout.completion_ids,
                sampler_log_probs=rollout.sampler_log_probs,
                advantage=advantage,
            )
            samples.append(sample)
    return samples


def rewards_of_advantages(group: RolloutGroup, settings: GRPOSettings) -> Tensor:
    """The rewards that a group's advantages are made of: the verifier's, less what length costs. [G], float32."""
    rewards = _float32([rollout.reward for rollout in group.rollouts])
    if settings.overlong_cache is None:
        return rewards
    lengths = _float32([len(rollout.completion_ids) for rollout in group.rollouts])
    return rewards + overlong_penalty(lengths, settings.max_completion_tokens, settings.overlong_cache)


def layout(bundles: Sequence[Bundle[S]], token_budget: int, processes: int) -> list[list[list[Bundle[S]]]]:
    """Which bundles go in which micro-batch of which process.

    The processes take the bundles in turn. Each owes as many forward and backward passes as the busiest has, so the
    others' last micro-batches may be empty.

    Args:
        token_budget: tokens of a micro-batch; a longer bundle has one for itself.

    Returns:
        For each process its micro-batches, the same number for all.
    """
    shares = [bundles[process::processes] for process in range(processes)]
    laid_out = [_within_budget(share, token_budget) for share in shares]
    most = max(len(batches) for batches in laid_out)
    for batches in laid_out:
        batches += [[] for _ in range(most - len(batches))]
    return laid_out


def _within_budget(bundles: Sequence[Bundle[S]], token_budget: int) -> list[list[Bundle[S]]]:
    """Micro-batches of bundles, in order."""
    lengths = [members.num_tokens for members in bundles]
    return [[bundles[index] for index in batch] for batch in plan_batches(lengths, token_budget)]


def fill(bundles: Sequence[Bundle[Sample]], step: StepSize, student: Student, settings: GRPOSettings) -> PolicyBatch:
    """The tensors of one micro-batch, on the student's device; of zero loss and gradient where it is empty."""
    device = student.device
    if not bundles:
        nothing = _float32([], device)
        packed = without_targets(student.pad_token_id, step.tokens).to(device)
        return PolicyBatch(packed, nothing, nothing, nothing)
    packed = collate_bundles(
        bundles,
        student.pad_token_id,
        global_target_tokens=step.tokens,
        hidden_size=student.hidden_size,
        device_type=device.type,
    ).to(device)
    samples = [sample for members in bundles for sample in members.members]
    in_order = [samples[index] for index in packed.order]
    lengths = packed.target_lengths
    return PolicyBatch(
        packed,
        advantages=_float32([sample.advantage for sample in in_order], device).repeat_interleave(lengths),
        weights=token_weights(settings.loss, lengths, step.samples, step.tokens, settings.max_completion_tokens),
        sampler_log_probs=_float32([p for sample in in_order for p in sample.sampler_log_probs], device),
    )


def sampler_correction(batch: PolicyBatch, settings: GRPOSettings) -> Tensor:
    """The importance weight of each token for a sampler whose log-probs are not the trainer's. [N], constant.

    Args:
        batch: whose `old_log_probs` are there.
    """
    assert batch.old_log_probs is not None
    if settings.mask_mismatch is None:
        return truncated_importance(batch.old_log_probs, batch.sampler_log_probs, settings.importance_cap)
    return masked_importance(
        batch.old_log_probs,
        batch.sampler_log_probs,
        batch.packed.target_lengths,
        level=settings.mask_mismatch,
        threshold=settings.mask_mismatch_above,
    )


def _float32(values: Any, device: torch.device | None = None) -> Tensor:
    """A float32 tensor whatever the default dtype is: Lightning's `bf16-true` makes that bfloat16 within a step."""
    return torch.tensor(values, dtype=torch.float32, device=device)
