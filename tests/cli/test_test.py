"""`slmreason test`: the table, the scores and every answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmreason.cli import main


def test_test_gives_pass_at_k_and_maj_at_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--benchmarks=[embedded:chain/test?count=10]", "--evaluation.samples=4", "--evaluation.k=[1,4]"]
    assert main(["test", "--config", "quickstart", f"--out={tmp_path / 'test.jsonl'}", *options]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("chain", "pass@1", "pass@4", "maj@4"))
    assert len((tmp_path / "test.jsonl").read_text().splitlines()) == 3
    answers = [json.loads(line) for line in (tmp_path / "test.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10 * 4
    first = json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])
    assert sum(answer["correct"] for answer in answers) / 40 == pytest.approx(first["value"])


def test_without_a_benchmark_there_is_nothing_to_test(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config=quickstart", "--benchmarks=[]"]) == 2
    assert "benchmarks is empty" in capsys.readouterr().err
