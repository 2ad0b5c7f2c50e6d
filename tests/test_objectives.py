"""The mathematics against independent references."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from slmreason.objectives import (
    cross_entropy,
    group_advantages,
    kl_penalty,
    policy_loss,
    rank_surprisal,
    token_weights,
    truncated_importance,
)
from tests import reference

LENGTHS = [3, 1, 5, 2]
ADVANTAGES = [1.2, -0.7, 0.4, -0.9]
KINDS = ["grpo", "dr_grpo", "dapo", "gspo"]


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
    return policy_loss(new, old, advantages, weights, lengths, kind, 0.2, 0.28)[0]  # type: ignore[arg-type]


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
            bumped.append(reference.loss(kind, ragged(moved), ragged(old), ADVANTAGES, 0.2, 0.28, 7))
        theirs = (bumped[0] - bumped[1]) / (2 * step)
        assert new.grad is not None
        assert new.grad[position].item() == pytest.approx(theirs, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_policy_loss_passes_gradcheck(kind: str) -> None:
    new, old, advantages, lengths = flat_inputs(seed=5, spread=0.05)
    if kind == "gspo":
        pytest.skip("its per-token gradient is by design not the gradient of its value (GSPO-token, eq. 14)")
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


@pytest.mark.parametrize("scaled", [True, False])
def test_group_advantages_equal_plain_python(scaled: bool) -> None:
    rewards = [[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.1, 0.1, 0.0], [1.0] * 5]
    mine = group_advantages(torch.tensor(rewards), "group" if scaled else "none")
    theirs = torch.tensor([reference.advantages(row, scaled) for row in rewards])
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (mine[2] == 0).all()


def test_dapo_and_grpo_weights_sum_to_one_over_the_global_batch() -> None:
    lengths = torch.tensor(LENGTHS)
    for kind in ("grpo", "dapo", "gspo"):
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


def test_rank_surprisal_by_hand() -> None:
    # Ranks 1, 3 and 250 (capped at 100); surprisals 0.5, 1.5 and 6: ratio 104 / 8, mean 8 / 3.
    ratio, mean = rank_surprisal(torch.tensor([1, 3, 250]), torch.tensor([-0.5, -1.5, -6.0]))
    assert (ratio, mean) == (pytest.approx(13.0), pytest.approx(8 / 3))
    assert rank_surprisal(torch.tensor([1]), torch.tensor([0.0]))[0] == float("inf")
