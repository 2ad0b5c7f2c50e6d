"""From graded groups to micro-batches: which completions are trained on, where they lie, and what the tensors hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slmreason.modules.policy_batch import Sample, StepSize, fill, layout, samples_of
from slmreason.modules.settings import GRPOSettings
from slmreason.student import Student
from slmreason.student.bundles import Bundle, alone
from tests import reference
from tests.modules.test_modules import made_groups


def sample(prompt: int, completion: int, advantage: float = 1.0, start: int = 10) -> Sample:
    ids = tuple(range(start, start + prompt + completion))
    log_probs = tuple(-0.01 * place for place in range(completion))
    return Sample("p", ids[:prompt], ids[prompt:], log_probs, advantage)


def test_samples_are_the_completions_of_informative_groups_in_order(student: Student) -> None:
    groups = made_groups(student)
    informative = [rollout for group in (groups[0], groups[2]) for rollout in group.rollouts]
    samples = samples_of(groups, GRPOSettings())
    assert [s.completion_ids for s in samples] == [r.completion_ids for r in informative]
    assert [s.problem_id for s in samples] == [groups[0].problem.id] * 4 + [groups[2].problem.id] * 4
    theirs = [a for group in (groups[0], groups[2])
              for a in reference.advantages([r.reward for r in group.rollouts], True)]  # fmt: skip
    assert [s.advantage for s in samples] == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("scale", ["none", "batch", "maxrl", "rloo"])
def test_advantages_are_scaled_as_the_setting_says(student: Student, scale: str) -> None:
    groups = made_groups(student)
    rows = [[rollout.reward for rollout in group.rollouts] for group in groups]
    every = [reward for row in rows for reward in row]  # of the group without variance too
    theirs = [a for row in (rows[0], rows[2]) for a in reference.scaled_advantages(row, scale, every)]
    samples = samples_of(groups, GRPOSettings(advantage_scale=scale))  # type: ignore[arg-type]
    assert [s.advantage for s in samples] == pytest.approx(theirs, rel=1e-5)


def test_length_costs_what_advantages_are_made_of_and_not_what_is_trained_on(student: Student) -> None:
    groups = made_groups(student)
    lengths = [[len(rollout.completion_ids) for rollout in group.rollouts] for group in groups]
    longest = max(max(row) for row in lengths)
    settings = GRPOSettings(max_completion_tokens=longest, overlong_cache=longest - 2, advantage_scale="none")
    rows = [[rollout.reward + reference.overlong(length, longest, longest - 2)
             for rollout, length in zip(group.rollouts, row, strict=True)]
            for group, row in zip(groups, lengths, strict=True)]  # fmt: skip
    assert len(set(rows[2])) > 2
    theirs = [a for row in (rows[0], rows[2]) for a in reference.scaled_advantages(row, "none", [])]
    samples = samples_of(groups, settings)  # the group that failed differs in length alone, and stays out
    assert [s.advantage for s in samples] == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_no_group_is_no_sample() -> None:
    assert samples_of([], GRPOSettings(advantage_scale="batch")) == []


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=30), st.integers(1, 40), st.integers(1, 4))
def test_layout_keeps_each_bundle_once_within_the_budget(
    sizes: list[tuple[int, int]], budget: int, processes: int
) -> None:
    bundles = alone([sample(*size, start=100 * number) for number, size in enumerate(sizes)])
    plans = layout(bundles, budget, processes)
    assert len(plans) == processes
    assert len({len(plan) for plan in plans}) == 1  # as many forward and backward passes in each
    for process, plan in enumerate(plans):
        assert [bundle for batch in plan for bundle in batch] == bundles[process::processes]
        assert all(len(batch) <= 1 or sum(bundle.num_tokens for bundle in batch) <= budget for batch in plan)


def test_layout_by_hand() -> None:
    first, second, third, fourth, fifth = alone([sample(2, 3, start=100 * number) for number in range(5)])
    plans = layout([first, second, third, fourth, fifth], token_budget=10, processes=2)
    assert plans == [[[first, third], [fifth]], [[second, fourth], []]]


def test_no_bundle_is_no_micro_batch() -> None:
    assert layout([], token_budget=10, processes=2) == [[], []]


def test_fill_by_hand(student: Student) -> None:
    """The second bundle is the longer one, so its row comes first."""
    short = Bundle((sample(2, 1, advantage=0.5),))
    pair = Bundle((sample(2, 3, advantage=-1.0), sample(2, 2, advantage=2.0)))
    batch = fill([short, pair], StepSize(samples=3, tokens=6), student, GRPOSettings(loss="dapo"))
    assert batch.packed.target_lengths.tolist() == [3, 2, 1]
    assert batch.packed.target_ids.tolist() == [12, 13, 14, 12, 13, 12]
    assert batch.advantages.tolist() == [-1.0, -1.0, -1.0, 2.0, 2.0, 0.5]
    torch.testing.assert_close(batch.sampler_log_probs, torch.tensor([0.0, -0.01, -0.02, 0.0, -0.01, 0.0]))
    torch.testing.assert_close(batch.weights, torch.full((6,), 1 / 6))
    assert batch.packed.global_target_tokens == 6


def test_the_weights_of_all_micro_batches_are_of_the_whole_step(student: Student) -> None:
    bundles = alone([sample(2, length) for length in (1, 4, 7)])
    step = StepSize(samples=3, tokens=12)
    batches = [fill([bundle], step, student, GRPOSettings()) for bundle in bundles]
    assert [float(batch.weights.sum()) for batch in batches] == pytest.approx([1 / 3] * 3)


def test_an_empty_micro_batch_has_no_target(student: Student) -> None:
    batch = fill([], StepSize(samples=3, tokens=12), student, GRPOSettings())
    assert batch.packed.num_target_tokens == 0
    assert [len(t) for t in (batch.advantages, batch.weights, batch.sampler_log_probs)] == [0, 0, 0]
    assert batch.packed.global_target_tokens == 12


def test_the_tensors_are_float32_under_another_default(student: Student) -> None:
    groups = made_groups(student)
    settings = GRPOSettings(overlong_cache=500, max_completion_tokens=512)
    advantages = [s.advantage for s in samples_of(groups, settings)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [s.advantage for s in samples_of(groups, settings)] == advantages
        batch = fill(alone([sample(2, 3)]), StepSize(1, 3), student, GRPOSettings())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {batch.advantages.dtype, batch.weights.dtype, batch.sampler_log_probs.dtype} == {torch.float32}
