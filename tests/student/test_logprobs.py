"""Log-probabilities without the logits of a whole vocabulary: the chunked path against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import peak_bytes
from slmreason.student import logprobs as head
from slmreason.student.logprobs import token_scores


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


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("autocast", [False, True])
def test_under_autocast_the_chunks_are_as_autograd_has_it(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, temperature: float, autocast: bool
) -> None:
    """bf16-mixed has float32 weights and bfloat16 products, in both passes; the backward pass runs outside of it."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 5)
    torch.manual_seed(0)
    hidden, targets, upstream = torch.randn(23, 16), torch.randint(97, (23,)), torch.randn(23)
    weight, bias = torch.randn(97, 16), torch.randn(97)
    sides = []
    for ours in (True, False):
        h, w, b = (t.clone().requires_grad_(t is hidden or not frozen) for t in (hidden, weight, bias))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if ours:
                log_probs = token_scores(h, w, b, targets, temperature)[0]
            else:
                logits = torch.nn.functional.linear(h, w, b).float() / temperature
                log_probs = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        (log_probs * upstream).sum().backward()
        sides.append([log_probs.detach(), *(t.grad for t in (h, w, b) if t.requires_grad)])
    for mine, theirs in zip(*sides, strict=True):
        assert mine.dtype == theirs.dtype == torch.float32
        assert (mine - theirs).norm() / theirs.norm() < (0.01 if autocast else 1e-5)
    torch.testing.assert_close(sides[0][0], sides[1][0], rtol=1e-5, atol=1e-5)


def test_under_autocast_forward_and_backward_agree_on_the_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a token's gradient sums to 0 over the vocabulary, however coarse the logits are."""
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 5)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(1, 16), 3 * torch.randn(97, 16), torch.zeros(97, requires_grad=True)
    for token in range(20):
        bias.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            log_prob = token_scores((hidden + token).repeat(9, 1), weight, bias, torch.full((9,), token))[0]
        log_prob.sum().backward()
        assert bias.grad is not None
        assert abs(float(bias.grad.sum())) < 1e-4


class Casts(TorchDispatchMode):
    """Counts conversions to another dtype of tensors of a shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.found = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_the_weight_is_cast_once_a_pass(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 5)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(97, 16, requires_grad=not frozen)
    with Casts(weight.shape) as casts:
        with torch.autocast("cpu", torch.bfloat16):
            log_probs = token_scores(hidden, weight, None, torch.randint(97, (23,)))[0]
        assert casts.found == 1
        log_probs.sum().backward()
    assert casts.found == (1 if frozen else 2)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_score_that_was_not_asked_for_is_computed(
    monkeypatch: pytest.MonkeyPatch, frozen: bool, with_entropy: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 97 * 5)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(97, 16, requires_grad=not frozen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        token_scores(hidden, weight, None, torch.randint(97, (23,)), 1.0, with_entropy)
    names = {event.key for event in profiler.key_averages()}
    assert ("aten::linalg_vecdot" in names) == with_entropy
    assert not names & {"aten::gt", "aten::div", "aten::sort"}  # ranks, and the temperature 1
    assert ("aten::exp_" in names or "aten::exp" in names) == (frozen or with_entropy)


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
