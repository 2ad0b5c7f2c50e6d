"""What users' rewards give: numbers of numpy and torch are converted, what is no verdict is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch

from slmreason.records import Problem
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import to_json
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward, RewardFn, Verdict
from slmreason.verify.verdicts import RewardError, graded, try_reward, verdict_on

PROBLEM = Problem("p", "1 + 1 = ?", "2")


class Gives(RewardFn):
    """A user's reward, which gives one thing whatever it is asked."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __call__(self, problem: Problem, text: str) -> Any:
        return self.given


class Grades(Gives):
    """One that grades many together."""

    def grade(self, pairs: Sequence[tuple[Problem, str]]) -> Any:
        return self.given(len(pairs))


CONVERTED: dict[str, tuple[Any, Verdict]] = {
    "plain": (Verdict(0.5, True), Verdict(0.5, True)),
    "int": (Verdict(1, True), Verdict(1.0, True)),
    "bool for a reward": (Verdict(True, True), Verdict(1.0, True)),
    "fraction": (Verdict(Fraction(1, 2), True), Verdict(0.5, True)),  # type: ignore[arg-type]
    "numpy float32": (Verdict(np.float32(0.5), np.bool_(True)), Verdict(0.5, True)),  # type: ignore[arg-type]
    "numpy float64": (Verdict(np.float64(0.5), True), Verdict(0.5, True)),
    "numpy int64": (Verdict(np.int64(1), np.int64(0)), Verdict(1.0, False)),  # type: ignore[arg-type]
    "array of one": (Verdict(np.array([0.5]), np.array(True)), Verdict(0.5, True)),  # type: ignore[arg-type]
    "torch": (Verdict(torch.tensor(0.5), torch.tensor(True)), Verdict(0.5, True)),  # type: ignore[arg-type]
    "torch bfloat16": (Verdict(torch.tensor([0.5], dtype=torch.bfloat16), False), Verdict(0.5, False)),  # type: ignore[arg-type]
    "torch with a gradient": (Verdict(torch.tensor(0.5, requires_grad=True), True), Verdict(0.5, True)),  # type: ignore[arg-type]
    "0 and 1 for correct": (Verdict(0.0, 1), Verdict(0.0, True)),  # type: ignore[arg-type]
    "1.0 for correct": (Verdict(0.0, 1.0), Verdict(0.0, True)),  # type: ignore[arg-type]
    "bare True": (True, Verdict(1.0, True)),
    "bare numpy bool": (np.bool_(False), Verdict(0.0, False)),
    "bare torch bool": (torch.tensor(True), Verdict(1.0, True)),
}

REFUSED: dict[str, Any] = {
    "None": None, "bare float": 1.0, "bare int": 1, "bare numpy float": np.float32(1), "bare tensor": torch.tensor(1.0),
    "text": "right", "pair": (1.0, True), "dict": {"reward": 1.0, "correct": True},
    "None for a reward": Verdict(None, True), "text for a reward": Verdict("1.0", True),  # type: ignore[arg-type]
    "nan": Verdict(math.nan, True), "inf": Verdict(math.inf, True), "numpy nan": Verdict(np.float32("nan"), True),  # type: ignore[arg-type]
    "too large for a float": Verdict(10**400, True), "complex": Verdict(1j, True),  # type: ignore[arg-type]
    "decimal": Verdict(Decimal("0.5"), True), "array of two": Verdict(np.ones(2), True),  # type: ignore[arg-type]
    "empty tensor": Verdict(torch.ones(0), True), "None for correct": Verdict(1.0, None),  # type: ignore[arg-type]
    "0.5 for correct": Verdict(1.0, 0.5), "text for correct": Verdict(1.0, "yes"),  # type: ignore[arg-type]
    "array of two for correct": Verdict(1.0, np.ones(2)), "nan for correct": Verdict(1.0, math.nan),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_what_is_a_verdict_in_other_numbers_is_converted(name: str) -> None:
    given, verdict = CONVERTED[name]
    for found in (graded(Gives(given), [(PROBLEM, "a")])[0], verdict_on(Gives(given), PROBLEM, "a")):
        assert found == verdict
        assert (type(found.reward), type(found.correct)) == (float, bool)
        json.dumps(vars(found))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_verdict_is_refused_by_the_class_and_the_key(name: str) -> None:
    for attempt in (
        lambda: graded(Gives(REFUSED[name]), [(PROBLEM, "a")]),
        lambda: verdict_on(Gives(REFUSED[name]), PROBLEM, "a"),
        lambda: try_reward(Gives(REFUSED[name]), PROBLEM),
    ):
        with pytest.raises(RewardError, match=r"^reward: tests\.verify\.test_verdicts\.Gives: "):
            attempt()


def endless(_: int) -> Iterator[Verdict]:
    return repeat(Verdict(1.0, True))


COLLECTIONS: dict[str, tuple[Callable[[int], Any], str]] = {
    "None": (lambda n: None, "grade gave None, where a list with a verdict for each completion is needed"),
    "one verdict": (lambda n: Verdict(1.0, True), "where a list with a verdict for each completion is needed"),
    "a number": (lambda n: 1.0, "where a list with a verdict for each completion is needed"),
    "too short": (lambda n: [Verdict(1.0, True)] * (n - 1), "grade gave 1 verdicts for 2 completions"),
    "empty": (lambda n: [], "grade gave 0 verdicts for 2 completions"),
    "too long": (lambda n: [Verdict(1.0, True)] * (n + 1), "grade gave more than 2 verdicts for 2 completions"),
    "endless": (endless, "grade gave more than 2 verdicts for 2 completions"),
    "dict": (lambda n: dict.fromkeys(range(n), Verdict(1.0, True)), "where a list with a verdict"),
    "set": (lambda n: {Verdict(1.0, True), Verdict(0.0, True)}, "where a list with a verdict"),
}


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_list_of_another_length_is_refused(name: str) -> None:
    make, says = COLLECTIONS[name]
    with pytest.raises(RewardError, match=r"^reward: tests\.verify\.test_verdicts\.Grades: ") as caught:
        graded(Grades(make), [(PROBLEM, "a"), (PROBLEM, "b")])
    assert says in str(caught.value)
    with pytest.raises(RewardError):
        try_reward(Grades(make), PROBLEM)


@pytest.mark.parametrize("collection", [list, tuple, iter, lambda made: (verdict for verdict in made), np.array])
def test_verdicts_come_in_any_sequence_or_as_a_generator(collection: Callable[[list[Any]], Any]) -> None:
    reward = Grades(lambda n: collection([np.bool_(i % 2) for i in range(n)]))
    assert [v.correct for v in graded(reward, [(PROBLEM, "a")] * 3)] == [False, True, False]


def test_a_reward_that_fails_is_named_with_the_line_before_anything_is_sampled() -> None:
    class Fails(RewardFn):
        def __call__(self, problem: Problem, text: str) -> Verdict:
            raise KeyError("gold")

    with pytest.raises(
        RewardError, match=r"Fails: grading .* failed with KeyError: 'gold' \(.*test_verdicts\.py, line"
    ):
        try_reward(Fails(), PROBLEM)


def test_the_built_in_reward_starts_nothing_when_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnswerReward, "grade", lambda *_: pytest.fail("it was asked"))
    try_reward(AnswerReward(), PROBLEM)


def test_rollouts_hold_plain_numbers(student: Student) -> None:
    reward = Gives(Verdict(np.float32(0.5), torch.tensor(True)))  # type: ignore[arg-type]
    [group] = collect(student, HFEngine(), reward, [PROBLEM], 2, Sampling(4, 1.0, 1.0, 0))
    assert json.loads(json.dumps(to_json(group)))["rollouts"][0]["reward"] == 0.5
