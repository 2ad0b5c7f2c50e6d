"""The decode loop against transformers' generate, and the sampler's numbers against the trainer's."""

from __future__ import annotations

import pytest
import torch

from slmreason.embedded.families import make_problems
from slmreason.records import Example
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Completion, Sampling, stable_seed
from slmreason.rollout.transformers import HFEngine, bytes_of, limits_within, sample
from slmreason.student import Student
from slmreason.student.packing import collate
from slmreason.verify.rewards import AnswerReward


def prompts_for(student: Student, count: int = 7) -> list[tuple[int, ...]]:
    return [student.encode_question(p.question) for p in make_problems("chain", "train", count)]


@pytest.mark.parametrize("name", ["embedded:qwen2", "embedded:llama"])
def test_greedy_tokens_equal_generate_one_prompt_at_a_time(name: str) -> None:
    student = Student(name, instruction="")
    prompts = prompts_for(student)
    ours = HFEngine(max_sequences=4).generate(student, prompts, 1, Sampling(40, temperature=0.0))
    for prompt, group in zip(prompts, ours, strict=True):
        theirs = student.network.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert list(group[0].token_ids) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_log_probs_equal_the_trainers(student: Student, temperature: float) -> None:
    prompts = prompts_for(student)
    groups = HFEngine().generate(student, prompts, 4, Sampling(40, temperature, seed=3))
    examples = [
        Example(prompt, completion.token_ids, "", "rollout")
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    batch = collate(examples, student.pad_token_id)
    with torch.no_grad():
        trainer = student.score(batch, temperature).log_probs
    sampler = torch.tensor([p for i in batch.order for p in groups[i // 4][i % 4].log_probs])
    torch.testing.assert_close(sampler, trainer, rtol=1e-4, atol=1e-4)


def test_a_completion_stops_at_its_end_token_or_is_marked_truncated(student: Student) -> None:
    groups = HFEngine().generate(student, prompts_for(student), 4, Sampling(20, seed=1))
    completions = [completion for group in groups for completion in group]
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        ended = completion.token_ids[-1] in student.eos_ids
        assert ended != completion.truncated
        assert not any(token in student.eos_ids for token in completion.token_ids[:-1])
        assert (
            len(completion.log_probs)
            == len(completion.token_ids)
            == (20 if completion.truncated else len(completion.token_ids))
        )


def test_the_same_seed_repeats_another_differs_and_the_global_rng_is_untouched(student: Student) -> None:
    engine, prompts = HFEngine(), prompts_for(student)
    before = torch.get_rng_state()
    first, again, other = (engine.generate(student, prompts, 8, Sampling(30, seed=s)) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other
    assert any(len({completion.token_ids for completion in group}) > 1 for group in first)


def test_what_is_drawn_does_not_depend_on_the_batch(student: Student) -> None:
    prompts = prompts_for(student)
    together = HFEngine().generate(student, prompts, 8, Sampling(30, seed=5))
    for engine in (HFEngine(max_sequences=3), HFEngine(max_cache_tokens=500)):
        assert [tokens(g) for g in engine.generate(student, prompts, 8, Sampling(30, seed=5))] == [
            tokens(g) for g in together
        ]
    backwards = HFEngine().generate(student, prompts[::-1][:3], 8, Sampling(30, seed=5))
    assert [tokens(g) for g in backwards] == [tokens(g) for g in together[::-1][:3]]


def tokens(group: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in group]


def test_a_group_larger_than_the_batch_is_cut_and_put_together(student: Student) -> None:
    seen: list[tuple[int, int]] = []
    engine = HFEngine(max_sequences=3)
    groups = engine.generate(student, prompts_for(student, 2), 8, Sampling(10), lambda *more: seen.append(more))
    assert [len(group) for group in groups] == [8, 8]
    ended, sampled = map(sum, zip(*seen, strict=True))
    assert (ended, sampled) == (16, sum(len(c.token_ids) for group in groups for c in group))
    assert len(seen) > 6  # within a batch too


def draws(count: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_top_p_draws_from_the_nucleus_only() -> None:
    logits = torch.tensor([[0.6, 0.25, 0.1, 0.05]]).log().repeat(500, 1)
    token, log_prob = sample(logits, Sampling(1, top_p=0.8), draws(500))
    assert set(token.tolist()) == {0, 1}
    expected = torch.tensor([0.6, 0.25])[token]  # of the whole distribution, as the trainer scores it
    torch.testing.assert_close(log_prob.exp(), expected)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(20_000, 1)
    token, _ = sample(logits, Sampling(1), draws(20_000))
    shares = torch.bincount(token, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.015)


def test_collect_grades_each_completion_by_its_text(student: Student) -> None:
    problems = make_problems("chain", "train", 8, (1, 2))
    groups = collect(student, HFEngine(), AnswerReward(format_weight=0.1), problems, 4, Sampling(40))
    assert [group.problem for group in groups] == problems
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.correct for rollout in rollouts} == {True, False}
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.correct == (f"\\boxed{{{group.problem.answer}}}" in rollout.text.splitlines()[-1])
            assert rollout.reward == pytest.approx(rollout.correct + 0.1 * ("\\boxed{" in rollout.text))


def test_stable_seed_depends_on_the_key_alone() -> None:
    assert stable_seed(1, "a") == stable_seed(1, "a") != stable_seed("a", 1)
    assert 0 <= stable_seed() < 2**63


def test_a_gpu_decodes_as_many_completions_as_its_free_memory_holds() -> None:
    """Qwen2.5-0.5B in bfloat16: 24 layers with 2 heads of 64 for keys and values, a vocabulary of 151,936."""
    token, row = 2 * 24 * 2 * 64 * 2, 151_936 * 14
    assert limits_within(70 << 30, token, row) == (1024, 1 << 20)
    sequences, tokens = limits_within(4 << 30, token, row)
    assert sequences * row <= 1 << 30 < (sequences + 1) * row
    assert tokens * token <= 2 << 30 < (tokens + 1) * token
    assert limits_within(0, token, row) == (1, 1)


def test_what_a_token_takes_in_the_cache_is_what_the_cache_holds(student: Student) -> None:
    cache = student.network(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    held = sum(keys.nbytes + values.nbytes for keys, values, *_ in cache)
    assert bytes_of(student)[0] == held // 3


def test_wrong_engine_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sequences"):
        HFEngine(max_sequences=0)
