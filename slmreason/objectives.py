"""Pure tensor functions: supervised losses, group advantages, policy losses, KL, entropy and learnability.

Everything works on the flat list of target tokens of a packed micro-batch, shape [N], so padding and packing cannot
enter the mathematics. Losses are sums over tokens times a weight; the weights carry the normalisation over the *global*
batch, so micro-batches and ranks may be cut anywhere and the sum of their gradients stays the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo"]
AdvantageScale = Literal["group", "none", "batch", "maxrl", "rloo"]
SupervisedLoss = Literal["nll", "dft", "psft"]
MismatchMask = Literal["token", "sequence"]


def cross_entropy(log_probs: Tensor, global_target_tokens: int) -> Tensor:
    """Masked cross entropy of one micro-batch, normalised by the target tokens of the global batch.

    Args:
        log_probs: log p(target_t | before t) of the target tokens only. [N], float.
        global_target_tokens: target tokens of all micro-batches and ranks that share the optimizer step.

    Returns:
        Scalar. Summed over the micro-batches it equals transformers' `ForCausalLMLoss` with `num_items_in_batch`.
    """
    return -log_probs.sum() / global_target_tokens


def supervised_loss(
    log_probs: Tensor,
    global_target_tokens: int,
    loss: SupervisedLoss = "nll",
    old_log_probs: Tensor | None = None,
    clip_high: float = 0.28,
) -> Tensor:
    """Loss of one micro-batch of given targets, normalised by the target tokens of the global batch.

    | loss | of a target token of probability p |
    |---|---|
    | nll | `-log p`: `cross_entropy` |
    | dft | `-sg(p) log p`, sg without gradient: unlikely tokens weigh little (2508.05629; TRL `loss_type="dft"`) |
    | psft | `-min(r, clip(r, 1 - clip_low, 1 + clip_high))` with `r = p / p_old` (2508.17784) |

    PSFT is the policy loss with an advantage of 1 for every token; the lower bound never matters then.

    Args:
        log_probs: log p of the target tokens only. [N], float.
        old_log_probs: the same under the policy that psft stays near. [N]; None: the present one, so that every r is 1.
    """
    if loss == "nll":
        return cross_entropy(log_probs, global_target_tokens)
    if loss == "dft":
        return cross_entropy(log_probs.detach().exp() * log_probs, global_target_tokens)
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    ones = torch.ones_like(old)
    lengths = torch.tensor([len(old)], device=old.device)
    return policy_loss(log_probs, old, ones, ones / global_target_tokens, lengths, "dapo", clip_high=clip_high)[0]


def trace_loss(log_probs: Tensor, weights: Tensor, by_uncertainty: bool = False) -> Tensor:
    """Loss of one micro-batch of given targets beside a policy loss: `-sum_t w_t phi_t log p_t`.

    Args:
        log_probs: log p of the target tokens only. [N], float.
        weights: which carry the normalisation over the whole optimizer step. [N], float.
        by_uncertainty: `phi_t = p_t (1 - p_t)`, without gradient, so that tokens weigh most that are neither known nor
            out of reach (CHORD, 2508.11408; ms-swift `chord_enable_phi_function`); otherwise 1.
    """
    if by_uncertainty:
        p = log_probs.detach().exp()
        weights = weights * p * (1 - p)
    return -(weights * log_probs).sum()


def overlong_penalty(completion_lengths: Tensor, max_completion_tokens: int, cache: int) -> Tensor:
    """What is added to a reward for length: 0 up to `cache` tokens before the limit, then falling linearly to -1 at it.

    DAPO, arXiv 2503.14476, eq. 13; TRL `get_soft_overlong_punishment`. [S], float -> [S], float.
    """
    beyond = completion_lengths - (max_completion_tokens - cache)
    return -(beyond / cache).clamp(min=0, max=1)


def group_advantages(
    rewards: Tensor, scale: AdvantageScale = "group", epsilon: float = 1e-4, step_rewards: Tensor | None = None
) -> Tensor:
    """Advantage of each rollout within its group: its reward above the group's mean, scaled.

    | scale | divides by |
    |---|---|
    | group | the group's standard deviation plus epsilon (GRPO, 2402.03300, eq. 3; TRL `scale_rewards="group"`) |
    | none | nothing (Dr. GRPO, 2503.20783; TRL `scale_rewards="none"`) |
    | batch | that deviation of all rewards of the optimizer step (2508.08221; TRL `scale_rewards="batch"`) |
    | maxrl | the group's mean reward: the rarer a right answer, the more it weighs (MaxRL, 2602.02710) |
    | rloo | (G - 1) / G, which makes the mean that of the *other* rollouts (RLOO, 2402.14740; TRL `RLOOTrainer`) |

    Args:
        rewards: [groups, group_size], float.
        step_rewards: for `batch`, the rewards of all rollouts of the optimizer step, in any shape; None: `rewards`.
            Standard deviations are of a sample, with n - 1.

    Returns:
        [groups, group_size]; zero for a group without reward variance.

    Raises:
        ValueError: `maxrl` and a reward below 0, which could make the mean negative and so turn every sign.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "none":
        return centred
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    if scale == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale == "maxrl":
        if (rewards < 0).any():
            raise ValueError(f"grpo.advantage_scale: maxrl needs rewards of at least 0, got {float(rewards.min()):g}")
        mean = rewards.mean(dim=1, keepdim=True)
        return centred / torch.where(mean > 0, mean, torch.ones_like(mean))
    if scale == "batch":
        deviation = (rewards if step_rewards is None else step_rewards).std()
    else:
        deviation = rewards.std(dim=1, keepdim=True)
    return centred / (deviation + epsilon)


def token_weights(
    loss: PolicyLoss, completion_lengths: Tensor, global_sequences: int, global_tokens: int, max_completion_tokens: int
) -> Tensor:
    """The weight of each token of each completion in the policy loss, summing to one over the global batch (or less).

    | loss | weight of a token of completion i |
    |---|---|
    | grpo, gspo | 1 / (sequences * length_i): mean over tokens, then sequences (2402.03300 eq. 3; 2507.18071 eq. 5) |
    | sapo, gmpo | the same (2511.20347; 2507.20673) |
    | dapo, cispo | 1 / tokens: one mean over all tokens (2503.14476 eq. 8; 2506.13585) |
    | dr_grpo | 1 / (sequences * max_completion_tokens): no length bias (2503.20783) |

    Args:
        completion_lengths: target tokens of each completion in the micro-batch. [S], int64.

    Returns:
        [N] float32 where N = completion_lengths.sum(), in the order of the completions.
    """
    if loss in ("dapo", "cispo"):
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
    means = _sums_per_sequence(log_ratio.detach(), completion_lengths) / completion_lengths
    return means.repeat_interleave(completion_lengths) + log_ratio - log_ratio.detach()


def _sums_per_sequence(values: Tensor, completion_lengths: Tensor) -> Tensor:
    """[N], [S] -> [S]"""
    sequence = torch.arange(len(completion_lengths), device=values.device).repeat_interleave(completion_lengths)
    sums = torch.zeros(len(completion_lengths), device=values.device, dtype=values.dtype)
    return sums.index_add(0, sequence, values)


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
    cispo_cap: float = 5.0,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
) -> tuple[Tensor, Tensor]:
    """Policy-gradient loss of one micro-batch: `-sum_t w_t c_t s_t`, with the weights w of `token_weights`.

    The surrogate `s_t` of a token, with `r_t = exp(log_probs - old_log_probs)` and sg for a value without gradient:

    | loss | s_t |
    |---|---|
    | grpo, dr_grpo, dapo | `min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)`, PPO's with asymmetric clipping |
    | gspo | the same, with a ratio shared by the sequence (`log_ratio_per_sequence`) |
    | gmpo | `g A_t`, g the geometric mean of the sequence's clipped ratios (2507.20673; TRL `GMPOTrainer`) |
    | cispo | `sg(min(r_t, cispo_cap)) A_t log_probs`: each token keeps its gradient (2506.13585) |
    | sapo | `4 / T sigmoid(T (r_t - 1)) A_t`, T by the sign of A_t (2511.20347) |

    GMPO clips in log space and on one side: above at `exp(clip_high)` where A_t > 0, else below at `exp(-clip_low)`.

    Args:
        log_probs, old_log_probs, advantages, weights: [N], float.
        completion_lengths: [S], int64, summing to N.
        clip_low, clip_high: TRL calls them `epsilon` and `epsilon_high`.
        importance_weights: c_t, [N], constant: `truncated_importance` or `masked_importance`; None: all 1.
        cispo_cap: TRL calls it `epsilon_high` too.
        sapo_temperatures: T where A_t > 0, and elsewhere; TRL's `sapo_temperature_pos` and `sapo_temperature_neg`.

    Returns:
        (loss, clipped): a scalar, and a boolean [N] that is true where the clip removes the gradient (cispo: where the
        cap holds the ratio; sapo: nowhere).
    """
    log_ratio = log_probs - old_log_probs
    if loss == "cispo":
        ratio = log_ratio.detach().exp()
        surrogate = ratio.clamp(max=cispo_cap) * advantages * log_probs
        clipped = ratio > cispo_cap
    elif loss == "sapo":
        above, below = (torch.full_like(advantages, temperature) for temperature in sapo_temperatures)
        temperature = torch.where(advantages > 0, above, below)
        surrogate = torch.sigmoid(temperature * (log_ratio.exp() - 1)) * 4 / temperature * advantages
        clipped = torch.zeros_like(advantages, dtype=torch.bool)
    elif loss == "gmpo":
        bounded = torch.where(advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
        surrogate = log_ratio_per_sequence(bounded, completion_lengths).exp() * advantages
        clipped = bounded.detach() != log_ratio.detach()
    else:
        if loss == "gspo":
            log_ratio = log_ratio_per_sequence(log_ratio, completion_lengths)
        ratio = log_ratio.exp()
        unclipped = ratio * advantages
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
        surrogate = torch.minimum(unclipped, bounded)
        clipped = bounded.detach() < unclipped.detach()
    if importance_weights is not None:
        surrogate = surrogate * importance_weights
    return -(weights * surrogate).sum(), clipped


def truncated_importance(old_log_probs: Tensor, sampler_log_probs: Tensor, cap: float) -> Tensor:
    """`min(exp(old - sampler), cap)` per token, without gradient: corrects for an engine whose numbers differ.

    Both are of the whole distribution at one temperature; what a nucleus cuts off enters neither.

    Source: truncated importance sampling (Ionides 2008), as TRL's `vllm_importance_sampling_correction`. [N] -> [N].
    """
    return (old_log_probs - sampler_log_probs).detach().exp().clamp(max=cap)


def masked_importance(
    old_log_probs: Tensor, sampler_log_probs: Tensor, completion_lengths: Tensor, level: MismatchMask, threshold: float
) -> Tensor:
    """`exp(old - sampler)`, and 0 where it is above the threshold: what the sampler drew against the trainer's odds.

    Source: TRL's `vllm_importance_sampling_mode`, `token_mask` and `sequence_mask`, with `..._clip_max` as threshold.

    Args:
        old_log_probs, sampler_log_probs: [N]; of the whole distribution at one temperature.
        completion_lengths: [S], int64, summing to N.
        level: `sequence` gives each token of a completion the product of the completion's ratios.

    Returns:
        [N], without gradient.
    """
    log_ratio = (old_log_probs - sampler_log_probs).detach()
    if level == "sequence":
        log_ratio = _sums_per_sequence(log_ratio, completion_lengths).repeat_interleave(completion_lengths)
    ratio = log_ratio.exp()
    return torch.where(ratio > threshold, torch.zeros_like(ratio), ratio)


def entropy_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, entropy: Tensor, importance_weights: Tensor | None = None
) -> Tensor:
    """Per-token entropy H, whose gradient is estimated from the token drawn: it needs no gradient of all logits.

    `grad H = E_a[-(log p(a) + H) grad log p(a)]` for tokens `a` drawn from p, since `E_a[grad log p(a)] = 0`; one drawn
    from an older policy weighs `p / p_old`. The value is TRL's (`entropy_coef`), which has the exact gradient instead.

    Args:
        log_probs, old_log_probs: of the tokens drawn. [N].
        entropy: in nats, of the distributions that they were drawn from, at the same temperature. [N], constant.
        importance_weights: as `policy_loss` has it.

    Returns:
        [N], in nats.
    """
    fixed = log_probs.detach()
    score = -(fixed + entropy) * (fixed - old_log_probs).exp()
    if importance_weights is not None:
        score = score * importance_weights
    return entropy + score * (log_probs - fixed)


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
