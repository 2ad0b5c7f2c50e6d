"""Long work in batches of the rollout engine: the order of its results, and what is not done again."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from slmreason.curriculum.settings import CheckpointSettings
from slmreason.curriculum.work import Work
from slmreason.embedded.families import make_problems
from slmreason.records import Problem, Tokens
from slmreason.rollout.transformers import HFEngine
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

    with work.watching("x", 8 * len(PROBLEMS), 10) as watch:
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
    assert (again, len(batches), known) == (ids, 3, 0)
