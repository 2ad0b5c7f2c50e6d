"""Log-probabilities without the logits of a whole vocabulary: the chunked path against the plain one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.common import peak_bytes
from slmreason import head
from slmreason.head import token_scores


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With every logit, in float64."""
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    log_probs = logits.log_softmax(-1)
    chosen = log_probs.gather(1, targets[:, None]).squeeze(1)
    ranks = (log_probs > chosen[:, None]).sum(-1) + 1
    return chosen, -(log_probs.exp() * log_probs).sum(-1), ranks


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 97 * 5, 97 * 1000])
def test_scores_and_gradients_equal_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, frozen: bool, temperature: float, chunk: int
) -> None:
    """One token a chunk, five (which does not divide 23), and all at once."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight = torch.randn(97, 16).mul_(0.3).requires_grad_(not frozen)
    bias = torch.randn(97, requires_grad=not frozen) if with_bias else None
    targets = torch.randint(97, (23,))
    upstream = torch.randn(23)
    log_probs, entropy, ranks = token_scores(hidden, weight, bias, targets, temperature, True, True)
    (log_probs * upstream).sum().backward()
    double = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight, bias)
    ]
    expected = plain(double[0], double[1], double[2], targets, temperature)  # type: ignore[arg-type]
    (expected[0] * upstream.double()).sum().backward()
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert entropy is not None
    assert ranks is not None
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(ranks, expected[2])
    assert not entropy.requires_grad
    for ours, theirs in zip((hidden, weight, bias), double, strict=True):
        if ours is not None and ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 11 * 3)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(11, (7,))
    total = lambda h, w: token_scores(h, w, None, targets, 0.9)[0].sum()  # noqa: E731
    assert torch.autograd.gradcheck(total, (hidden, weight), eps=1e-2, atol=1e-2, rtol=1e-2)  # float32 inside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_float32(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16), torch.randn(97, 16)
    targets = torch.randint(97, (20,))
    results = []
    for kind in (torch.float32, dtype):
        h, w = (t.to(kind).clone().requires_grad_() for t in (hidden, weight))
        log_probs = token_scores(h, w, None, targets)[0]
        assert log_probs.dtype == torch.float32
        log_probs.sum().backward()
        assert h.grad is not None
        assert w.grad is not None
        assert h.grad.dtype == w.grad.dtype == kind
        results.append([log_probs.detach(), h.grad.float(), w.grad.float()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.03


def test_a_large_vocabulary_never_has_all_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 tokens x 151,936: the logits alone would be 311 MB, and as much again in their gradient."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 1 << 22)
    hidden = torch.randn(512, 8, requires_grad=True)
    weight = torch.randn(151_936, 8, requires_grad=True)
    targets = torch.randint(151_936, (512,))
    whole = peak_bytes(lambda: plain(hidden, weight, None, targets, 1.0)[0].sum().backward())
    ours = peak_bytes(lambda: token_scores(hidden, weight, None, targets)[0].sum().backward())
    assert whole > 600e6
    assert ours < 80e6


def test_no_token_at_all_is_no_fault() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    log_probs, _, _ = token_scores(hidden, weight, None, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
