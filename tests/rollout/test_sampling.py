"""Drawing a token: a large vocabulary by blocks against one float64 sum, and what is not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slmreason.rollout import transformers as hf
from slmreason.rollout.engine import EngineError, Sampling
from slmreason.rollout.transformers import HFEngine, sample, uniforms
from slmreason.student import Student

LARGE = 151_936


def by_one_sum(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes each draw, in float64 throughout."""
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)


def draws_for(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_large_vocabulary_gives_the_tokens_of_one_exact_sum(dtype: torch.dtype, temperature: float) -> None:
    """A draw may fall on another token only where it lies within rounding of the edge between two."""
    torch.manual_seed(0)
    logits = (3 * torch.randn(64, LARGE)).to(dtype)
    draws = draws_for(64)
    token, log_prob = sample(logits, Sampling(1, temperature), draws)
    assert (token != by_one_sum(logits, temperature, draws)).sum() <= 1
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_follows_its_distribution() -> None:
    """Chi-square over 40 tokens in four blocks, the last block among them, with 20,000 draws."""
    probabilities = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.05
    probabilities /= probabilities.sum()
    places = torch.cat([start + 7 * torch.arange(10) for start in (0, 500, 80_000, LARGE - 64)])
    logits = torch.full((1, LARGE), float("-inf"))
    logits[0, places] = probabilities.log().float()
    count = 20_000
    draws, tokens = draws_for(count), []
    for part in draws.split(100):
        tokens.append(sample(logits.expand(len(part), -1), Sampling(1), part)[0])
    found = torch.bincount(torch.cat(tokens), minlength=LARGE)
    assert found.sum() == found[places].sum() == count
    chi_square = float(((found[places] - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert chi_square < 72.1  # 39 degrees of freedom: passed by chance once in a thousand


def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_token_that_can_be() -> None:
    logits = torch.full((2, LARGE), float("-inf"))
    logits[:, [700, 90_000, LARGE - 2]] = torch.tensor([0.0, 1.0, -3.0])
    token, log_prob = sample(logits, Sampling(1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert token.tolist() == [700, LARGE - 2]
    assert log_prob.isfinite().all()


def test_what_a_row_draws_depends_on_the_row_alone() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(9, LARGE), draws_for(9)
    token, log_prob = sample(logits, Sampling(1, 0.8), draws)
    for row in (0, 4, 8):
        alone = sample(logits[row : row + 1], Sampling(1, 0.8), draws[row : row + 1])
        assert (int(alone[0]), float(alone[1])) == (int(token[row]), float(log_prob[row]))


def test_greedy_over_a_large_vocabulary_takes_the_first_of_the_likeliest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, LARGE)
    logits[2, [40, 100_000]] = 9.0
    before = logits.clone()
    token, log_prob = sample(logits, Sampling(1, 0.0), draws_for(5))
    assert torch.equal(logits, before)
    assert torch.equal(token, logits.argmax(-1))
    assert token[2] == 40
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("spread", [0.1, 4.0])  # a nucleus of most tokens, which is sorted whole; and of a few
def test_the_nucleus_of_a_large_vocabulary_is_a_plain_sorts_and_log_probs_are_of_the_whole(
    spread: float,
) -> None:
    torch.manual_seed(0)
    logits, draws = spread * torch.randn(8, LARGE), draws_for(8)
    token, log_prob = sample(logits, Sampling(1, top_p=0.6), draws)
    for row in range(8):
        ordered, index = logits[row].double().softmax(-1).sort(descending=True)
        size = int((ordered.cumsum(-1) < 0.6).sum()) + 1
        place = (index[:size] == token[row]).nonzero()
        assert len(place) == 1
        expected = ordered[:size][place[0, 0]]
        assert float(log_prob[row].exp()) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("vocabulary", [50, LARGE])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gets_a_token_of_the_vocabulary_and_shows(
    vocabulary: int, temperature: float, bad: float
) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, 7] = bad
    token, log_prob = sample(logits, Sampling(1, temperature), torch.tensor([0.3, 0.999, 0.5], dtype=torch.float64))
    assert ((token >= 0) & (token < vocabulary)).all()
    assert log_prob.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_whose_weights_are_nan_is_refused_in_words(temperature: float) -> None:
    student = Student("embedded:qwen2", instruction="")
    with torch.no_grad():
        student.base_model.model.norm.weight[0] = float("nan")
    prompts = [student.encode_question("2 + 3 = ?")] * 2
    with pytest.raises(EngineError, match="NaN or infinite in 6 of 6 completions.*learning rate"):
        HFEngine().generate(student, prompts, 3, Sampling(8, temperature))


@pytest.mark.parametrize("every", [3, 8, 100])
def test_looking_seldom_who_has_finished_changes_nothing(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student("embedded:qwen2", instruction="")
    prompts = [student.encode_question(f"{n} + 3 = ?") for n in range(5)]
    usual = HFEngine().generate(student, prompts, 4, Sampling(40, seed=2))
    assert len({len(completion.token_ids) for group in usual for completion in group}) > 3
    monkeypatch.setattr(hf, "LOOK_EVERY", {"cpu": every})
    seldom = HFEngine().generate(student, prompts, 4, Sampling(40, seed=2))
    for ours, theirs in zip(sum(seldom, []), sum(usual, []), strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


def test_a_completions_numbers_are_its_own() -> None:
    settings = Sampling(6, seed=3)
    together = uniforms(settings, (1, 2, 3), 0, 4)
    assert torch.equal(together[2:3], uniforms(settings, (1, 2, 3), 2, 1))
    assert not torch.equal(together[2], together[3])
    assert not torch.equal(together, uniforms(Sampling(6, seed=4), (1, 2, 3), 0, 4))
