"""What a result says of the command that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import _shown
from tests.runs import ROOT


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--out", "/a/b.json", "--student", "/home/me/students/small"], ["--student", "students/small"]),
        (["--out=/a/b.json", "--data=/home/me/gsm8k/train.jsonl"], ["--data=gsm8k/train.jsonl"]),
        (["openai/gsm8k=/home/me/gsm8k/train.jsonl"], ["openai/gsm8k=gsm8k/train.jsonl"]),
        (["[gsm8k=/home/me/a/b,svamp=/home/me/c/d]"], ["[gsm8k=a/b,svamp=c/d]"]),
        (["runs/a/b", "embedded:chain/train?count=2"], ["runs/a/b", "embedded:chain/train?count=2"]),
    ],
)  # fmt: skip
def test_of_a_path_of_this_machine_the_end_is_shown(args: list[str], shown: list[str]) -> None:
    assert _shown(args) == shown


RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_no_result_names_a_path_of_the_machine_that_made_it(path: Path) -> None:
    result = json.loads(path.read_text())
    command = result.get("command") if isinstance(result, dict) else None
    assert command is None or _shown(command.split()) == command.split()
