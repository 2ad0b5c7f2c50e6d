"""`benchmarks.probe`: what is in the file is not sampled again, and is of the same student and settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.probe import AT_A_TIME, add_arguments, probed
from slmreason.embedded.families import make_problems
from slmreason.records import Evidence
from slmreason.student import Student

POOL = make_problems("chain", "train", 2 * AT_A_TIME)


def options(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--student", default="embedded:qwen2")
    parser.add_argument("--dtype", default="float32")
    add_arguments(parser, attempts=2)
    return parser.parse_args(["--tokens=40", *args])


def test_a_file_is_gone_on_with_and_gives_the_same_as_without(
    student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = f"--probe={tmp_path / 'probe.jsonl'}"
    without = probed(student, POOL, options())
    assert probed(student, POOL, options(file), enough=lambda found: True) == without[:AT_A_TIME]
    capsys.readouterr()
    assert probed(student, POOL, options(file)) == without
    assert capsys.readouterr().out.startswith("probed 32 of 32")  # the first half was not sampled again
    assert probed(student, POOL[:20], options(file)) == without[:20]
    assert capsys.readouterr().out == ""


def test_it_ends_where_there_is_enough(student: Student) -> None:
    asked: list[int] = []

    def enough(found: Sequence[Evidence]) -> bool:
        asked.append(len(found))
        return True

    assert len(probed(student, POOL, options(), enough)) == AT_A_TIME
    assert asked == [AT_A_TIME]


def test_a_file_of_other_settings_is_refused(student: Student, tmp_path: Path) -> None:
    file = f"--probe={tmp_path / 'probe.jsonl'}"
    probed(student, POOL[:2], options(file))
    with pytest.raises(ValueError, match=r"--probe: .*probe\.jsonl is of .*'tokens': 40.*, not of .*'tokens': 41"):
        probed(student, POOL[:2], options(file, "--tokens=41"))


def test_a_probe_that_was_stopped_before_its_first_result_is_gone_on_with(student: Student, tmp_path: Path) -> None:
    file = f"--probe={tmp_path / 'probe.jsonl'}"
    assert probed(student, [], options(file)) == []
    first = probed(student, POOL[:2], options(file))
    assert probed(student, POOL[:2], options(file)) == first
