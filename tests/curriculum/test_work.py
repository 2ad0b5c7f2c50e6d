"""Long work in batches of the rollout engine: the order of its results, and what is not done again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from slmreason.curriculum.settings import CheckpointSettings
from slmreason.curriculum.work import Work
from slmreason.embedded.families import make_problems
from slmreason.records import Problem, Tokens
from slmreason.rollout.transformers import HFEngine
from slmreason.run import journal as journal_module
from slmreason.run.journal import Journal
from slmreason.student import Student

PROBLEMS = make_problems("chain", "train", 10)


def work_in(folder: Path, student: Student, rows: int = 16, chunk: int | None = None) -> Work:
    journal = Journal(folder, list, Tokens)
    journal.open()
    return Work(student, HFEngine(max_sequences=rows), journal, CheckpointSettings(chunk=chunk), Console(quiet=True))


def gone_through(work: Work) -> tuple[list[str], list[list[Problem]], int]:
    """(ids in the order of the results, the batches that were made, completions that were known)"""
    batches: list[list[Problem]] = []

    def make(batch: list[Problem]) -> list[dict[str, str]]:
        batches.append(batch)
        return [{"id": problem.id} for problem in batch]

    with work.watching("x", 8 * len(PROBLEMS), 10, "probe") as watch:
        rows = work.in_batches("key", PROBLEMS, make, dict, 8, watch)
    return [row["id"] for row in rows], batches, watch.known


def test_results_stand_in_the_order_of_the_problems_and_batches_fill_the_engine(tmp_path: Path) -> None:
    student = Student("embedded:qwen2")
    ids, batches, _ = gone_through(work_in(tmp_path, student))
    assert ids == [problem.id for problem in PROBLEMS]
    assert [len(batch) for batch in batches] == [2] * 5  # 16 rows, 8 of each problem
    lengths = [student.prompt_length(problem) for batch in batches for problem in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1  # else the order says nothing
    _, batches, _ = gone_through(work_in(tmp_path / "other", student, chunk=7))
    assert [len(batch) for batch in batches] == [7, 3]


def test_what_is_noted_is_not_made_again_but_for_batches_of_another_size(tmp_path: Path) -> None:
    student = Student("embedded:qwen2")
    ids, *_ = gone_through(work_in(tmp_path, student))
    assert gone_through(work_in(tmp_path, student)) == (ids, [], 80)
    again, batches, known = gone_through(work_in(tmp_path, student, rows=32))
    assert (again, [len(batch) for batch in batches], known) == (ids, [4, 4], 16)  # the last is the same in both


class SlowMachine:
    """Each batch takes as long as it has rollouts, times a factor; nothing else takes any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds_each: float) -> None:
        self.now, self.each = 0.0, seconds_each
        monkeypatch.setattr(journal_module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def takes(self, batch: list[Problem]) -> None:
        self.now += 8 * len(batch) * self.each


def slowly(
    work: Work, machine: SlowMachine, key: str = "key", dies_at: int | None = None
) -> tuple[list[str], list[int]]:
    """(ids of the results, sizes of the batches that were made)"""
    sizes: list[int] = []

    def make(batch: list[Problem]) -> list[dict[str, str]]:
        if len(sizes) == dies_at:
            raise KeyboardInterrupt
        sizes.append(len(batch))
        machine.takes(batch)
        return [{"id": problem.id} for problem in batch]

    with work.watching("x", 8 * len(PROBLEMS), 10, "probe") as watch:
        rows = work.in_batches(key, PROBLEMS, make, dict, 8, watch)
    return [row["id"] for row in rows], sizes


def test_batches_that_take_too_long_are_halved_twice_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student("embedded:qwen2")
    ids = [problem.id for problem in PROBLEMS]
    work = work_in(tmp_path / "fast", student, rows=32)
    assert slowly(work, SlowMachine(monkeypatch, 2.8)) == (ids, [4, 4, 2])  # 90 s each
    assert work.parts == 1
    work = work_in(tmp_path / "slow", student, rows=32)
    assert slowly(work, SlowMachine(monkeypatch, 5.0)) == (ids, [4, 2, 2, 2])  # 160 s, then 80 s
    assert slowly(work, SlowMachine(monkeypatch, 5.0), "later") == (ids, [2] * 5)
    work = work_in(tmp_path / "slowest", student, rows=32)
    assert slowly(work, SlowMachine(monkeypatch, 50.0)) == (ids, [4, 2, *[1] * 4])
    assert work.parts == 4
    work = work_in(tmp_path / "chosen", student, chunk=7)
    assert slowly(work, SlowMachine(monkeypatch, 50.0)) == (ids, [7, 3])


def test_a_run_that_goes_on_makes_the_batches_that_it_would_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Student("embedded:qwen2")
    ids = [problem.id for problem in PROBLEMS]
    with pytest.raises(KeyboardInterrupt):
        slowly(work_in(tmp_path, student, rows=32), SlowMachine(monkeypatch, 5.0), dies_at=2)
    again = work_in(tmp_path, student, rows=32)
    assert slowly(again, SlowMachine(monkeypatch, 0.0)) == (ids, [2, 2])  # this machine is fast, and yet
    assert again.parts == 2
