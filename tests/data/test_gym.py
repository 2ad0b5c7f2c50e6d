"""reasoning-gym as pool and benchmark, graded by its own scorers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.mixture import Entry, reward_of
from slmreason.data.sources import load_problems
from slmreason.evaluate.benchmarks import short_name
from slmreason.verify.gym import families
from slmreason.verify.gym_reward import GymReward, stated
from slmreason.verify.rewards import AnswerReward

pytest.importorskip("reasoning_gym")
SUMS = "reasoning_gym:chain_sum?size=6&difficulty=0,3&seed=4"


def test_difficulties_come_in_rotation_and_are_the_family_in_the_id() -> None:
    loaded = load_problems(SUMS)
    assert [problem.id.partition("#")[0] for problem in loaded.problems] == [
        f"reasoning_gym:chain_sum?difficulty={level}&seed=4&size=3" for level in (0, 3, 0, 3, 0, 3)
    ]
    digits = [len(problem.answer.lstrip("-")) for problem in loaded.problems]
    assert max(digits[::2]) < max(digits[1::2])
    assert {problem.source for problem in loaded.problems} == {"reasoning_gym:chain_sum"}


def test_a_limit_takes_the_first_and_an_option_is_a_dial_by_name() -> None:
    assert load_problems(SUMS, limit=2).problems == load_problems(SUMS).problems[:2]
    [problem] = load_problems(
        "reasoning_gym:chain_sum?size=1&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    ).problems
    assert len([word for word in problem.question.partition(": ")[2].split() if word.isdigit()]) == 2


@pytest.mark.parametrize("name", ["chain_sum", "isomorphic_strings", "polynomial_multiplication", "sudoku"])
def test_the_same_problems_are_made_in_every_process_and_their_answers_score(name: str) -> None:
    source = f"reasoning_gym:{name}?size=3&seed=3"
    code = (
        f"from slmreason.data.sources import load_problems; print([p.key for p in load_problems({source!r}).problems])"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    problems = load_problems(source).problems
    assert found[0] == found[1] == f"{[problem.key for problem in problems]}\n"
    verdicts = GymReward().grade([(problem, f"<answer>{problem.answer}</answer>") for problem in problems])
    assert all(verdict.correct and verdict.reward == 1.0 for verdict in verdicts)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("reasoning_gym:chain_sun", "no such generator; near it are chain_sum"),
        ("reasoning_gym:chain_sum?difficulty=99", "difficulty 99 is beyond its dials, which go from 0 to 10"),
        ("reasoning_gym:gsm_symbolic?difficulty=1", "gsm_symbolic has no difficulty"),
        ("reasoning_gym:chain_sum?colour=3", "unexpected keyword argument 'colour'"),
        ("reasoning_gym:chain_sum?min_terms=5&max_terms=2", "max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum?size=x", "size, seed and difficulty take whole numbers"),
        ("reasoning_gym:chain_sum?size=1&difficulty=1,2", "size must be at least 1 for each difficulty"),
        ("reasoning_gym:codeio?size=2", "it runs code that comes with its data"),
        (
            "reasoning_gym:modulo_grid?size=1&difficulty=2&seed=3",
            "the answer is too long to be scored: 3659 characters",
        ),
        ("reasoning_gym:rubiks_cube?size=2", "no usable problem; .* the generator names no answer: it is None"),
    ],
)
def test_a_source_that_cannot_be_made_is_refused(source: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{source.partition('?')[0].replace('.', '[.]')}.*{says}"):
        load_problems(source)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reasoning_gym.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"reasoning-gym is not installed: pip install 'slmreason\[gym\]'"):
        load_problems("reasoning_gym:chain_sum?size=1")


def test_the_share_of_each_difficulty_sums_to_the_size() -> None:
    assert [family.size for family in families("reasoning_gym:chain_sum?size=8&difficulty=0,1,2")] == [3, 3, 2]


# -- the verifier -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 1 2\n3 4 </answer>", "1 2\n3 4"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        (r"so \boxed{\text{north}}", "north"),
        (r'\boxed{{"a": 1}}', '{"a": 1}'),
        ("The answer is 12.", "12"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("", None),
    ],
)
def test_an_answer_is_read_whole(text: str, answer: str | None) -> None:
    assert stated(text) == answer


def test_a_wrong_answer_and_none_are_wrong_and_a_part_is_worth_a_part() -> None:
    problem = load_problems(SUMS).problems[0]
    reward = GymReward()
    assert [reward(problem, text).correct for text in ("\\boxed{123456}", "", "No idea at all, sorry.")] == [False] * 3
    [grid] = load_problems("reasoning_gym:word_sorting?size=1&seed=1").problems
    words = grid.answer.split(", ")
    partly = reward(grid, f"<answer>{', '.join([words[1], words[0], *words[2:]])}</answer>")
    assert not partly.correct
    assert 0 < partly.reward < 1


def test_an_id_that_makes_another_question_gives_no_verdict_and_is_noted() -> None:
    problem = load_problems(SUMS).problems[0]
    reward = GymReward()
    assert not reward(replace(problem, question="Else?"), f"\\boxed{{{problem.answer}}}").correct
    assert [reject.reason for reject in reward.drain_rejects()] == ["other problem"]
    assert reward.drain_rejects() == []


def test_an_answer_that_is_too_long_is_wrong_without_a_score() -> None:
    problem = load_problems(SUMS).problems[0]
    assert not GymReward()(problem, f"<answer>{'9' * 20_000}</answer>").correct


def test_a_score_that_takes_too_long_is_wrong_and_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import slmreason.verify.gym as gym\ndef score(*_):\n    while True: pass\ngym.score = score\n"
    )
    problem = load_problems(SUMS).problems[0]
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = GymReward(workers=1, timeout_s=0.2, memory_mb=2047)
    assert not reward(problem, "\\boxed{1}").correct
    assert [reject.reason for reject in reward.drain_rejects()] == ["timeout"]


def test_the_generators_scorer_is_the_verifier_where_no_other_is_given() -> None:
    entries = [Entry(SUMS), Entry("embedded:chain/train?count=2")]
    data = ReasoningDataModule(list(entries))
    data.load(lambda problem: len(problem.question), {})
    reward = reward_of(AnswerReward(), entries)
    kinds = (
        {type(reward.reward_for(problem)) for problem in data.problems[:6]},
        type(reward.reward_for(data.problems[-1])),
    )
    assert kinds == ({GymReward}, AnswerReward)
    own = AnswerReward()
    assert reward_of(AnswerReward(), [Entry(SUMS, reward=own)]).reward_for(data.problems[0]) is own


def test_a_benchmark_has_its_generators_name() -> None:
    assert short_name(SUMS) == "chain_sum"
