"""The mathematics against independent references."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from slmreason.objectives import (
    cross_entropy,
    entropy_surrogate,
    group_advantages,
    kl_penalty,
    masked_importance,
    overlong_penalty,
    policy_loss,
    rank_surprisal,
    supervised_loss,
    token_weights,
    trace_loss,
    truncated_importance,
)
from tests import reference

LENGTHS = [3, 1, 5, 2]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
KINDS = ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "gmpo"]
SCALES = ["group", "none", "batch", "maxrl", "rloo"]


def ragged(flat: torch.Tensor) -> list[list[float]]:
    return [piece.tolist() for piece in flat.split(LENGTHS)]


def flat_inputs(seed: int = 0, spread: float = 0.4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64) * 2
    new = old + spread * torch.randn(sum(LENGTHS), generator=generator, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(lengths)
    return new, old, advantages, lengths


def ours(
    kind: str, new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    weights = token_weights(kind, lengths, len(LENGTHS), sum(LENGTHS), 7).double()  # type: ignore[arg-type]
    return policy_loss(
        new, old, advantages, weights, lengths, kind, 0.2, 0.28, cispo_cap=1.2, sapo_temperatures=(0.9, 1.3)  # type: ignore[arg-type]
    )[0]  # fmt: skip


def test_cross_entropy_equals_transformers_loss_with_num_items_in_batch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :4] = -100
    labels[2, 5:] = -100
    theirs = ForCausalLMLoss(logits, labels, vocab_size=11, num_items_in_batch=29)
    shifted = labels[:, 1:]
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, shifted.clamp(min=0)[..., None]).squeeze(2)[shifted != -100]
    torch.testing.assert_close(cross_entropy(log_probs, 29), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_equals_plain_python(kind: str) -> None:
    new, old, advantages, lengths = flat_inputs()
    theirs = reference.loss(kind, ragged(new), ragged(old), ADVANTAGES, 0.2, 0.28, 7)
    assert ours(kind, new, old, advantages, lengths).item() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_gradient_equals_finite_differences_of_plain_python(kind: str) -> None:
    new, old, advantages, lengths = flat_inputs(seed=3)
    new.requires_grad_()
    ours(kind, new, old, advantages, lengths).backward()
    step = 1e-6
    for position in range(len(new)):
        bumped = []
        for sign in (1, -1):
            moved = new.detach().clone()
            moved[position] += sign * step
            held = ragged(new.detach())
            bumped.append(reference.loss(kind, ragged(moved), ragged(old), ADVANTAGES, 0.2, 0.28, 7, held))
        theirs = (bumped[0] - bumped[1]) / (2 * step)
        assert new.grad is not None
        assert new.grad[position].item() == pytest.approx(theirs, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_passes_gradcheck(kind: str) -> None:
    new, old, advantages, lengths = flat_inputs(seed=5, spread=0.05)
    if kind == "gspo":
        pytest.skip("its per-token gradient is by design not the gradient of its value (GSPO-token, eq. 14)")
    if kind == "cispo":
        pytest.skip("its gradient stops at the ratio")
    assert torch.autograd.gradcheck(lambda x: ours(kind, x, old, advantages, lengths), new.requires_grad_())


def test_clipping_is_asymmetric() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([1.27, 1.29, 0.79, 0.81], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    lengths = torch.ones(4, dtype=torch.int64)
    loss, clipped = policy_loss(new, old, advantages, torch.ones(4), lengths, "grpo", 0.2, 0.28)
    loss.backward()
    assert clipped.tolist() == [False, True, True, False]
    assert new.grad is not None
    assert (new.grad == 0).tolist() == [False, True, True, False]


def test_ratio_is_exactly_one_on_policy_in_float32() -> None:
    log_probs = torch.randn(1000) - 3
    loss, clipped = policy_loss(
        log_probs, log_probs.detach(), torch.ones(1000), torch.ones(1000), torch.tensor([1000]), "grpo"
    )
    assert loss.item() == -1000.0
    assert not clipped.any()


def test_cispo_pushes_tokens_whose_ratio_is_capped() -> None:
    # d/dx of -min(r, 2) A x with the ratio held: -1 for r = 1, -2 at the cap of 2 for r = 3, +0.5 for r = 0.5, A = -1.
    new = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    one, lengths = torch.ones(3, dtype=torch.float64), torch.tensor([3])
    loss, capped = policy_loss(new, torch.zeros(3), advantages, one, lengths, "cispo", cispo_cap=2.0)
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.0, -2.0, 0.5])
    assert capped.tolist() == [False, True, False]


def test_sapo_has_the_full_gradient_on_policy_and_less_of_it_off_policy() -> None:
    # With s = sigmoid(T (r - 1)) the gradient is -4 s (1 - s) r A: at r = 1, where s = 1/2, it is -A whatever T is. At
    # r = 2 and T = 1, s = 0.7311 and the gradient -4 * 0.1966 * 2 = -1.573, where an unclipped ratio would give -2.
    new = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    one, lengths = torch.ones(3, dtype=torch.float64), torch.tensor([3])
    loss, clipped = policy_loss(new, torch.zeros(3), advantages, one, lengths, "sapo", sapo_temperatures=(1.0, 2.0))
    loss.backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.0, 1.0, -1.5729], abs=1e-4)
    assert not clipped.any()


def test_gmpo_clips_the_outlier_alone() -> None:
    # Log ratios 0.1 and 0.9 of a good completion, clipped above at 0.4: the mean is 0.25, the loss -exp(0.25), and the
    # first token's gradient half of it. The bad completion's -0.9 is clipped below at -0.4, its 0.9 is not clipped.
    new = torch.tensor([0.1, 0.9, -0.9, 0.9], dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    weights, lengths = torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([2, 2])
    loss, clipped = policy_loss(new, torch.zeros(4), advantages, weights, lengths, "gmpo", 0.4, 0.4)
    loss.backward()
    good, bad = math.exp(0.25), math.exp(0.25)
    assert loss.item() == pytest.approx(-good + bad)
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-good / 2, 0.0, 0.0, bad / 2])
    assert clipped.tolist() == [False, True, True, False]


@pytest.mark.parametrize("scale", SCALES)
def test_group_advantages_equal_plain_python(scale: str) -> None:
    rewards = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.1, 0.1, 0.0], [1.0] * 5, [0.0] * 5]
    mine = group_advantages(torch.tensor(rewards), scale)  # type: ignore[arg-type]
    every = [reward for row in rewards for reward in row]
    theirs = torch.tensor([reference.scaled_advantages(row, scale, every) for row in rewards])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (mine[2:] == 0).all()


def test_advantages_by_hand() -> None:
    # One right of four: mean 1/4. MaxRL: (1 - 1/4) / (1/4) = 3 and -1. RLOO: 1 - 0 and 0 - 1/3.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert group_advantages(rewards, "maxrl").tolist() == [[3.0, -1.0, -1.0, -1.0]]
    assert group_advantages(rewards, "rloo")[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    # The step's rewards 1, 0, 0, 0 and 1, 1, 1, 1 have mean 5/8 and sample variance (5 * 9/64 + 3 * 25/64) / 7 = 15/56.
    step = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    scaled = group_advantages(rewards, "batch", epsilon=0, step_rewards=step)
    assert scaled[0].tolist() == pytest.approx([a / math.sqrt(15 / 56) for a in (0.75, -0.25, -0.25, -0.25)])


def test_maxrl_refuses_a_negative_reward() -> None:
    with pytest.raises(ValueError, match=r"^grpo\.advantage_scale: maxrl .* got -0\.5$"):
        group_advantages(torch.tensor([[1.0, -0.5]]), "maxrl")


def test_the_overlong_penalty_equals_plain_python() -> None:
    lengths = [1, 79, 80, 81, 90, 99, 100, 130]
    mine = overlong_penalty(torch.tensor(lengths), max_completion_tokens=100, cache=20)
    assert mine.tolist() == pytest.approx([reference.overlong(length, 100, 20) for length in lengths])
    assert mine[4] == -0.5  # half of the last twenty


def test_token_means_sum_to_one_over_the_global_batch() -> None:
    lengths = torch.tensor(LENGTHS)
    for kind in set(KINDS) - {"dr_grpo"}:
        pieces = [token_weights(kind, part, 4, 11, 7) for part in lengths.split(2)]  # type: ignore[arg-type]
        assert torch.cat(pieces).sum().item() == pytest.approx(1.0)


def test_kl_penalty_equals_plain_python_and_is_never_negative() -> None:
    new, old, *_ = flat_inputs(seed=1)
    mine = kl_penalty(new, old)
    theirs = [reference.k3(n, o) for n, o in zip(new.tolist(), old.tolist(), strict=True)]
    torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.float64))
    assert (mine >= 0).all()
    assert kl_penalty(new, new).abs().max() == 0


def test_truncated_importance_caps_and_has_no_gradient() -> None:
    old = torch.tensor([0.0, 0.0, 0.0]).requires_grad_()
    weights = truncated_importance(old, torch.tensor([0.0, -5.0, 1.0]), cap=2.0)
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)])
    assert not weights.requires_grad


def test_masked_importance_by_hand() -> None:
    # Ratios 2, 1/2, 4 | 4: of tokens those above 3 are masked, of completions (2 * 1/2 * 4 = 4 and 4) both.
    log_ratio, lengths = torch.tensor([2.0, 0.5, 4.0, 4.0]).log().requires_grad_(), torch.tensor([3, 1])
    by_token = masked_importance(log_ratio, torch.zeros(4), lengths, "token", threshold=3.0)
    assert by_token.tolist() == pytest.approx([2.0, 0.5, 0.0, 0.0])
    assert not by_token.requires_grad
    assert masked_importance(log_ratio, torch.zeros(4), lengths, "sequence", threshold=3.0).tolist() == [0.0] * 4
    kept = masked_importance(log_ratio, torch.zeros(4), lengths, "sequence", threshold=5.0)
    assert kept.tolist() == pytest.approx([4.0] * 4)


def test_a_ratio_beyond_all_numbers_is_masked() -> None:
    weights = masked_importance(torch.tensor([0.0, 0.0]), torch.tensor([-90.0, -1e4]), torch.tensor([2]), "token", 3.0)
    assert weights.tolist() == [0.0, 0.0]


def test_the_entropy_gradient_is_right_on_average_over_the_tokens_drawn() -> None:
    """Each token of the vocabulary as often as the old policy draws it, against autograd through the whole softmax."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64).requires_grad_()
    old = torch.randn(7, dtype=torch.float64).log_softmax(0)
    log_probs = logits.log_softmax(0)
    entropy = -(log_probs.exp() * log_probs).sum()
    [theirs] = torch.autograd.grad(entropy, logits, retain_graph=True)
    estimates = entropy_surrogate(log_probs, old, entropy.detach().expand(7))
    assert estimates.tolist() == pytest.approx([entropy.item()] * 7)
    [ours] = torch.autograd.grad((old.exp() * estimates).sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_an_entropy_bonus_pushes_the_unlikely_token_up_and_the_likely_one_down() -> None:
    # p = 0.9 and 0.1: H = 0.3251. -(log p + H) is -0.2197 for the likely one and 1.9775 for the other.
    log_probs = torch.tensor([0.9, 0.1]).log().requires_grad_()
    entropy = torch.full((2,), 0.3251)
    entropy_surrogate(log_probs, log_probs.detach(), entropy).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.2197, 1.9775], abs=1e-4)
    log_probs.grad = None
    entropy_surrogate(log_probs, log_probs.detach(), entropy, torch.tensor([0.0, 2.0])).sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([0.0, 2 * 1.9775], abs=1e-4)


@pytest.mark.parametrize("kind", ["nll", "dft", "psft"])
def test_supervised_losses_and_gradients_equal_plain_python(kind: str) -> None:
    new, old, *_ = flat_inputs(seed=8)
    new.requires_grad_()
    ours = supervised_loss(new, len(new), kind, old, clip_high=0.15)  # type: ignore[arg-type]
    ours.backward()
    held = new.tolist()
    assert ours.item() == pytest.approx(reference.supervised(kind, held, old.tolist(), held, 0.15), rel=1e-6)
    assert new.grad is not None
    for place, value in enumerate(held):
        up, down = ([*held[:place], value + step, *held[place + 1 :]] for step in (1e-6, -1e-6))
        values = [reference.supervised(kind, moved, old.tolist(), held, 0.15) for moved in (up, down)]
        assert new.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("by_uncertainty", [False, True])
def test_the_loss_of_traces_and_its_gradient_equal_plain_python(by_uncertainty: bool) -> None:
    log_probs = torch.tensor([-0.01, -0.7, -3.0, -1e-9], dtype=torch.float64, requires_grad=True)
    weights = [0.4, 0.1, 0.2, 0.3]
    held = log_probs.tolist()
    ours = trace_loss(log_probs, torch.tensor(weights, dtype=torch.float64), by_uncertainty)
    assert ours.item() == pytest.approx(reference.trace_loss(held, weights, held, by_uncertainty), rel=1e-12)
    [gradient] = torch.autograd.grad(ours, log_probs)
    for place, value in enumerate(gradient.tolist()):
        up, down = ([h + shift * (at == place) for at, h in enumerate(held)] for shift in (1e-4, -1e-4))
        values = [reference.trace_loss(moved, weights, held, by_uncertainty) for moved in (up, down)]
        assert value == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6, abs=1e-12)


def test_supervised_gradients_by_hand() -> None:
    # Two tokens of probability 0.5 and 0.1. dft: -p / 2 each. psft with old probabilities 0.45 and 0.05: r = 1.11 is
    # within the bound and pulls with -r / 2, r = 2 is beyond 1.28 and pulls no more.
    log_probs = torch.tensor([0.5, 0.1], dtype=torch.float64).log().requires_grad_()
    supervised_loss(log_probs, 2, "dft").backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.25, -0.05])
    log_probs.grad = None
    old = torch.tensor([0.45, 0.05], dtype=torch.float64).log()
    supervised_loss(log_probs, 2, "psft", old, clip_high=0.28).backward()
    assert log_probs.grad.tolist() == pytest.approx([-0.5 / 0.45 / 2, 0.0])


def test_psft_at_its_old_policy_has_the_gradient_of_cross_entropy() -> None:
    log_probs = flat_inputs(seed=9)[0].requires_grad_()
    [ours] = torch.autograd.grad(supervised_loss(log_probs, 20, "psft"), log_probs)
    [theirs] = torch.autograd.grad(supervised_loss(log_probs, 20), log_probs)
    torch.testing.assert_close(ours, theirs)


def test_rank_surprisal_by_hand() -> None:
    # Ranks 1, 3 and 250 (capped at 100); surprisals 0.5, 1.5 and 6: ratio 104 / 8, mean 8 / 3.
    ratio, mean = rank_surprisal(torch.tensor([1, 3, 250]), torch.tensor([-0.5, -1.5, -6.0]))
    assert (ratio, mean) == (pytest.approx(13.0), pytest.approx(8 / 3))
    assert rank_surprisal(torch.tensor([1]), torch.tensor([0.0]))[0] == float("inf")
