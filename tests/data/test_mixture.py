"""Several data sets as one pool, and the part of it that is held out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmreason.data.columns import Columns
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.mixture import Entry, entries_of, held_out, reward_of, shares
from slmreason.records import Problem
from slmreason.verify.rewards import AnswerReward
from tests.plugins import CoinReward


def pool(folder: Path, name: str, count: int, question: str = "question") -> str:
    rows = [{question: f"{name} {number} + 1 = ?", "answer": str(number + 1)} for number in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / f"{name}.jsonl")


def characters(problem: Problem) -> int:
    return len(problem.question)


def loaded(train: Any, **options: Any) -> ReasoningDataModule:
    data = ReasoningDataModule(train, **options)
    data.load(characters, {})
    return data


def counts(data: ReasoningDataModule) -> dict[str, int]:
    return dict(Counter(problem.question.partition(" ")[0] for problem in data.problems))


def test_a_list_without_weights_is_all_rows_of_all(tmp_path: Path) -> None:
    data = loaded([pool(tmp_path, "a", 3), Entry(pool(tmp_path, "b", 5, "q"), Columns(question="q"))])
    assert counts(data) == {"a": 3, "b": 5}
    assert len({problem.id for problem in data.problems}) == 8


def test_a_weight_is_the_share_of_the_pool_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = pool(tmp_path, "a", 30), pool(tmp_path, "b", 100)
    with caplog.at_level(logging.INFO, "slmreason"):
        data = loaded([first, Entry(second, weight=2)])
    assert counts(data) == {"a": 30, "b": 60}
    assert f"by weight 30 of 30 of {first} (33%); 60 of 100 of {second} (67%)" in caplog.text


def test_who_is_drawn_follows_the_seed_alone(tmp_path: Path) -> None:
    train = [pool(tmp_path, "a", 10), Entry(pool(tmp_path, "b", 40), weight=1)]
    one, same, other = (loaded(train, seed=seed).problems for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_each_entry_has_its_own_limit_and_the_pools_limit_is_of_each(tmp_path: Path) -> None:
    train = [Entry(pool(tmp_path, "a", 9), limit=2), pool(tmp_path, "b", 9)]
    assert counts(loaded(train)) == {"a": 2, "b": 9}
    assert counts(loaded(train, limit=4)) == {"a": 2, "b": 4}


def test_columns_of_the_pool_are_those_of_entries_without_their_own(tmp_path: Path) -> None:
    train = [pool(tmp_path, "a", 2, "text"), Entry(pool(tmp_path, "b", 2, "q"), Columns(question="q"))]
    assert counts(loaded(train, columns=Columns(question="text"))) == {"a": 2, "b": 2}


def test_what_is_rejected_is_counted_before_the_lot_is_drawn(tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"question": f"a {'x' * (99 * (n % 2))} {n}?", "answer": "1"} for n in range(8)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = loaded([Entry(str(long), weight=1), pool(tmp_path, "b", 50)], max_prompt_tokens=50)
    assert counts(data) == {"a": 4, "b": 4}
    assert len(data.rejects) == 4


def test_a_data_set_that_stands_twice_is_trained_on_once(tmp_path: Path) -> None:
    source = pool(tmp_path, "a", 3)
    data = loaded([Entry(source, limit=2), source])
    assert counts(data) == {"a": 3}
    assert [reject.reason.partition(":")[0] for reject in data.rejects] == ["the problem stands twice"] * 2


def test_another_problem_with_the_same_id_gets_one_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    first, second = pool(tmp_path, "a", 2), pool(tmp_path / "x", "b", 2)
    data = loaded([f"pool={first}", f"pool={second}"])
    assert [problem.id for problem in data.problems] == [
        "pool-000000", "pool-000001", "pool-000000@2", "pool-000001@2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ([], "data.train: an empty list names no data set"),
        (["{path: a.jsonl, weigth: 2}"], r"data.train: .* is no data set; .* path, columns, weight, reward, limit and"),
        ("{path: a.jsonl}", "data.train: .* is no data set"),
    ],
)
def test_what_is_no_data_set_is_refused(train: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        entries_of(train, "data.train")


@pytest.mark.parametrize("options", [{"weight": 0}, {"weight": -1}, {"weight": float("inf")}, {"limit": 0}])
def test_an_entry_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Entry("a.jsonl", **options)


def test_an_entry_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    good = pool(tmp_path, "a", 2)
    with pytest.raises(ValueError, match=r"no-such\.jsonl: no such file"):
        loaded([good, str(tmp_path / "no-such.jsonl")])
    with pytest.raises(ValueError, match=r"data.train: .*b\.jsonl: every problem was rejected: prompt too long"):
        loaded([good, pool(tmp_path, 60 * "b", 2)], max_prompt_tokens=20)


sizes_and_weights = st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=5)


@given(drawn=sizes_and_weights)
def test_shares_keep_the_weights_as_far_as_whole_problems_can(drawn: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*drawn, strict=True)
    found = shares(sizes, weights)
    assert all(1 <= count <= size for count, size in zip(found, sizes, strict=True))
    assert any(count == size for count, size in zip(found, sizes, strict=True))
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    assert all(abs(count - max(1, scale * weight)) <= 0.5 for count, weight in zip(found, weights, strict=True))


# -- the part that is held out ----------------------------------------------------------------------------------------


def problems(count: int) -> list[Problem]:
    return [Problem(f"p{number}", f"What is {number}?", str(number)) for number in range(count)]


def test_the_held_out_part_is_about_its_share_and_never_trained_on(tmp_path: Path) -> None:
    data = loaded(pool(tmp_path, "a", 400), holdout=0.25)
    assert 70 < len(data.holdout) < 130
    assert len(data.holdout) + len(data.problems) == 400
    assert not {problem.key for problem in data.holdout} & {problem.key for problem in data.problems}
    assert loaded(pool(tmp_path, "a", 400)).holdout == ()


def test_the_same_problems_are_held_out_whatever_else_the_pool_holds() -> None:
    few = {problem.id for problem in held_out(problems(200), 0.2)[1]}
    many = {problem.id for problem in held_out(list(reversed(problems(300))), 0.2)[1]}
    assert few <= many


def test_a_problem_that_stands_twice_is_on_one_side() -> None:
    twice = [*problems(50), *(Problem(f"again-{p.id}", p.question, p.answer) for p in problems(50))]
    kept, held = held_out(twice, 0.5)
    assert not {problem.key for problem in kept} & {problem.key for problem in held}


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_both_parts_have_a_problem(share: float) -> None:
    kept, held = held_out(problems(2), share)
    assert (len(kept), len(held)) == (1, 1)


def test_a_share_out_of_range_and_a_pool_of_one_problem_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.holdout must be at least 0 and below 1, got 1"):
        ReasoningDataModule("a.jsonl", holdout=1)
    with pytest.raises(ValueError, match="data.holdout: 0.5 of 1 problem leaves nothing to train on"):
        loaded(pool(tmp_path, "a", 1), holdout=0.5)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_without_rewards_of_their_own_the_reward_is_the_configs() -> None:
    reward = AnswerReward()
    assert reward_of(reward, [Entry("a.jsonl"), Entry("embedded:chain/train")]) is reward


def test_answers_to_a_data_set_are_graded_by_its_own_reward(tmp_path: Path) -> None:
    own, source = CoinReward(), pool(tmp_path, "a", 1)
    entries = [Entry(f"mine={source}", reward=own), Entry("embedded:chain/train?count=1")]
    reward = reward_of(AnswerReward(), entries)
    data = loaded(entries)
    graders = [reward.reward_for(problem) for problem in data.problems]
    assert graders[0] is own
    assert isinstance(graders[1], AnswerReward)


def test_two_rewards_for_one_name_are_refused() -> None:
    same = [Entry("pool=a.jsonl", reward=CoinReward()), Entry("pool=b.jsonl", reward=CoinReward())]
    assert reward_of(AnswerReward(), same).reward_for(Problem("p", "?", "1", source="pool")) is same[0].reward
    with pytest.raises(ValueError, match=r"pool=b\.jsonl: two entries of pool have different rewards"):
        reward_of(CoinReward(), [same[0], Entry("pool=b.jsonl", reward=AnswerReward())])
