"""Pure tensor functions: cross entropy, group advantages, policy losses, KL and learnability.

Everything works on the flat list of target tokens of a packed micro-batch, shape [N], so padding and packing cannot
enter the mathematics. Losses are sums over tokens times a weight; the weights carry the normalisation over the *global*
batch, so micro-batches and ranks may be cut anywhere and the sum of their gradients stays the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "gspo"]
AdvantageScale = Literal["group", "none"]


def cross_entropy(log_probs: Tensor, global_target_tokens: int) -> Tensor:
    """Masked cross entropy of one micro-batch, normalised by the target tokens of the global batch.

    Args:
        log_probs: log p(target_t | before t) of the target tokens only. [N], float.
        global_target_tokens: target tokens of all micro-batches and ranks that share the optimizer step.

    Returns:
        Scalar. Summed over the micro-batches it equals transformers' `ForCausalLMLoss` with `num_items_in_batch`.
    """
    return -log_probs.sum() / global_target_tokens


def group_advantages(rewards: Tensor, scale: AdvantageScale = "group", epsilon: float = 1e-4) -> Tensor:
    """Advantage of each rollout within its group.

    Args:
        rewards: [groups, group_size], float.
        scale: `group` divides by the group's sample standard deviation plus epsilon (GRPO, arXiv 2402.03300, eq. 3;
            TRL `scale_rewards="group"`); `none` only subtracts the mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [groups, group_size]; zero for a group without reward variance.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    return centred / (rewards.std(dim=1, keepdim=True) + epsilon)


def token_weights(
    loss: PolicyLoss, completion_lengths: Tensor, global_sequences: int, global_tokens: int, max_completion_tokens: int
) -> Tensor:
    """The weight of each token of each completion in the policy loss, summing to one over the global batch (or less).

    | loss | weight of a token of completion i |
    |---|---|
    | grpo, gspo | 1 / (sequences * length_i): mean over tokens, then sequences (2402.03300 eq. 3; 2507.18071 eq. 5) |
    | dapo | 1 / tokens: one mean over all tokens (2503.14476 eq. 8) |
    | dr_grpo | 1 / (sequences * max_completion_tokens): no length bias (2503.20783) |

    Args:
        completion_lengths: target tokens of each completion in the micro-batch. [S], int64.

    Returns:
        [N] float32 where N = completion_lengths.sum(), in the order of the completions.
    """
    if loss == "dapo":
        per_sequence = torch.full_like(completion_lengths, 1.0 / global_tokens, dtype=torch.float32)
    elif loss == "dr_grpo":
        share = 1.0 / (global_sequences * max_completion_tokens)
        per_sequence = torch.full_like(completion_lengths, share, dtype=torch.float32)
    else:
        per_sequence = 1.0 / (global_sequences * completion_lengths.to(torch.float32))
    return per_sequence.repeat_interleave(completion_lengths)


def log_ratio_per_sequence(log_ratio: Tensor, completion_lengths: Tensor) -> Tensor:
    """GSPO's sequence-level log ratio for each token: value `mean_t(log_ratio)`, gradient of the token alone.

    GSPO, arXiv 2507.18071, eq. 14 (GSPO-token), which equals eq. 5 when all tokens of a completion share one advantage.

    Args:
        log_ratio: [N]. completion_lengths: [S], summing to N.

    Returns:
        [N], whose value is constant within a completion.
    """
    sequence = torch.arange(len(completion_lengths), device=log_ratio.device).repeat_interleave(completion_lengths)
    sums = torch.zeros(len(completion_lengths), device=log_ratio.device, dtype=log_ratio.dtype)
    means = sums.index_add(0, sequence, log_ratio.detach()) / completion_lengths
    return means[sequence] + log_ratio - log_ratio.detach()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    completion_lengths: Tensor,
    loss: PolicyLoss = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss of one micro-batch (PPO's surrogate with asymmetric clipping).

    `-sum_t w_t * min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)` with `r_t = exp(log_probs - old_log_probs)`;
    the four losses differ in the weights (`token_weights`) and, for GSPO, in a ratio shared by the sequence.

    Args:
        log_probs, old_log_probs, advantages, weights: [N], float.
        completion_lengths: [S], int64, summing to N.
        clip_low, clip_high: TRL calls them `epsilon` and `epsilon_high`.
        importance_weights: [N] truncated sampler correction (`truncated_importance`), constant.

    Returns:
        (loss, clipped): a scalar, and a boolean [N] that is true where the clip removes the gradient.
    """
    log_ratio = log_probs - old_log_probs
    if loss == "gspo":
        log_ratio = log_ratio_per_sequence(log_ratio, completion_lengths)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    surrogate = torch.minimum(unclipped, bounded)
    if importance_weights is not None:
        surrogate = surrogate * importance_weights
    return -(weights * surrogate).sum(), bounded.detach() < unclipped.detach()


def truncated_importance(old_log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """`min(exp(old - sampler), cap)` per token, without gradient: corrects for an engine whose numbers differ.

    Both are of the whole distribution at one temperature; what a nucleus cuts off enters neither.

    Source: truncated importance sampling (Ionides 2008), as TRL's `vllm_importance_sampling_correction`. [N] -> [N].
    """
    return (old_log_probs - sampler_log_probs).detach().exp().clamp(max=cap)


def kl_penalty(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference): `exp(d) - d - 1` with `d = reference - policy`; never negative.

    Schulman's k3 estimator, as in GRPO (arXiv 2402.03300, eq. 4). [N], [N] -> [N].
    """
    delta = reference_log_probs - log_probs
    return delta.exp() - delta - 1


def rank_surprisal(ranks: Tensor, log_probs: Tensor, max_rank: int = 100) -> tuple[float, float]:
    """Rank-surprisal ratio and mean negative log-likelihood of one trace (arXiv 2601.14249).

    Args:
        ranks: rank of each target token among the vocabulary under the student, 1 = most likely. [T], int64.
        log_probs: log p of each target token. [T], float.

    Returns:
        (`sum(min(rank, max_rank)) / sum(-log p)`, mean(-log p)); lower ratio is more learnable. A trace that the
        student already writes with certainty has no surprisal left, hence an infinite ratio.
    """
    surprisal = float(-log_probs.double().sum())
    capped = float(ranks.clamp(max=max_rank).sum())
    ratio = capped / surprisal if surprisal > 0 else float("inf")
    return ratio, surprisal / max(1, len(log_probs))
