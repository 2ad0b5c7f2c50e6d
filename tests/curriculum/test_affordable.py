"""How many traces SFT makes where the budget does not reach for all, and that it trains on those that it made."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from slmreason.curriculum.affordable import TRIAL, Affordable
from slmreason.curriculum.sets import TOO_FEW_TOKENS, AcquisitionStage, bridge_rejects
from slmreason.data.strata import Strata
from slmreason.records import BridgeResult, Example, Place, Problem, Trace
from slmreason.run.files import read_records
from slmreason.run.folder import RunFolder
from slmreason.student import Student
from tests.runs import SMALL, command

POOL = tuple(Problem(f"p{number}", f"What is {number} + 1?", str(number + 1)) for number in range(200))
STRATA = Strata(simple=(), medium=POOL[:120], hard=POOL[120:], unknown=(), solved=frozenset())
COST = 50
"""Tokens of a trace of the teacher below."""


class Spending:
    """A teacher whose traces cost the same each, and all pass."""

    def __init__(self) -> None:
        self.tokens = 0
        self.asked: list[str] = []

    def __call__(self, problems: Sequence[Problem]) -> list[BridgeResult]:
        self.tokens += COST * len(problems)
        self.asked += [problem.id for problem in problems]
        return [BridgeResult(p, (), Trace(p.id, f"The answer is \\boxed{{{p.answer}}}.", "bridged")) for p in problems]


def stage(student: Student, teacher: Spending, max_tokens: int | None, epochs: int = 3) -> AcquisitionStage:
    affordable = None
    if max_tokens is not None:
        affordable = Affordable(max_tokens, lambda: teacher.tokens, epochs, lambda epoch: random.Random(epoch))
    return AcquisitionStage(
        Place(2, "sft"), student, teach=teacher, bridge=teacher, route=lambda strata: strata, affordable=affordable
    )


def size(rows: Sequence[Example]) -> int:
    return sum(len(row) for row in rows)


@pytest.mark.parametrize("max_tokens", [20_000, 25_000])
def test_traces_and_training_on_them_fit_into_the_budget(student: Student, max_tokens: int) -> None:
    teacher = Spending()
    rows = stage(student, teacher, max_tokens).build(STRATA, 0)
    spent = teacher.tokens + 3 * size(rows)
    assert TRIAL < len(rows) < len(POOL)
    assert 0.97 * max_tokens < spent <= 1.01 * max_tokens  # what the others cost is foretold from the first ones


def test_who_goes_without_is_drawn_by_lot_and_told(student: Student, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "slmreason")
    with_budget = stage(student, Spending(), 20_000)
    made = with_budget.build(STRATA, 0)
    left_out = [result for result in with_budget.results.values() if result.left_out is not None]
    assert len(made) + len(left_out) == len(POOL)
    assert {result.band for result in left_out} == {"medium", "hard"}
    assert [str(reject.reason) for reject in bridge_rejects(left_out)] == [
        f"no trace at all: {TOO_FEW_TOKENS}" for _ in left_out
    ]
    [said] = [line for line in caplog.messages if "has room for" in line]
    assert f"has room for {len(made)} of 200 problems, drawn by lot: each takes about 50 tokens" in said


def test_the_next_epoch_asks_for_none_of_them_again(student: Student) -> None:
    teacher = Spending()
    with_budget = stage(student, teacher, 20_000)
    first = with_budget.build(STRATA, 0)
    asked = len(teacher.asked)
    assert with_budget.build(STRATA, 1) == first
    assert len(teacher.asked) == asked


def test_a_fit_without_an_end_has_as_many_problems_as_one_of_four_epochs(student: Student) -> None:
    of_four, endless, of_three = (stage(student, Spending(), 20_000, n).build(STRATA, 0) for n in (4, 1000, 3))
    assert endless == of_four
    assert TRIAL < len(endless) < len(of_three)


@pytest.mark.parametrize("max_tokens", [None, 10**9])
def test_all_have_one_where_there_is_enough(student: Student, max_tokens: int | None) -> None:
    teacher = Spending()
    assert len(stage(student, teacher, max_tokens).build(STRATA, 0)) == len(POOL)
    assert sorted(teacher.asked) == sorted(problem.id for problem in POOL)


def test_few_problems_are_not_tried_first(student: Student) -> None:
    few = replace(STRATA, medium=POOL[:TRIAL], hard=())
    assert len(stage(student, Spending(), 1).build(few, 0)) == TRIAL


def test_traces_that_cost_nothing_are_all_made(student: Student) -> None:
    def rejected(problems: Sequence[Problem]) -> list[BridgeResult]:
        return [BridgeResult(problem, (), None) for problem in problems]

    free = replace(stage(student, Spending(), 1000), teach=rejected, bridge=rejected)
    assert free.build(STRATA, 0) == []
    assert not any(result.left_out for result in free.results.values())


@pytest.mark.slow
def test_a_run_that_a_budget_ends_has_trained_on_the_traces_that_it_made(tmp_path: Path) -> None:
    limit = 24_000
    done = command(
        "fit", *SMALL, "--data.train=embedded:chain/train?count=120", "--data.routing=all", "--curriculum.stages=[sft]",
        "--curriculum.probe={refresh: never, epoch_share: 0}", f"--curriculum.max_tokens={limit}", "--sft.epochs=3",
        f"--run_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "round 1 sft, traces: curriculum.max_tokens has room for" in done.stdout
    files = RunFolder(tmp_path)
    made = read_records(files.stage(Place(1, "sft")).bridge, BridgeResult)
    left_out = [result for result in made if result.left_out is not None]
    assert 0 < len(left_out) < len(made) == 120
    [_, of_sft] = json.loads(files.summary.read_text())
    assert of_sft["rows"] == len(made) - len(left_out)
    assert 0.9 * limit < sum(of_sft["tokens"].values()) < 1.05 * limit
