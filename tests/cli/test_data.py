"""`slmreason data`: what a person sees of a data set before training on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_shown_as_they_are_read_with_their_exact_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?"}]
    rows = [{"prompt": turns, "answer": "1 + 1 = 2\n#### 2"}, *({"question": f"{n} + 1 = ?", "answer": str(n + 1)}
                                                            for n in range(5))]  # fmt: skip
    assert main(["data", write(tmp_path / "a.jsonl", rows), "--rows=2", "--student.instruction=Box it."]) == 0
    shown = capsys.readouterr().out
    assert shown.count("-- ") == 2
    assert f"-- {tmp_path / 'a.jsonl'}, line 1 (id " in shown
    assert "system before: Be brief.\nquestion: 1 + 1 = ?\ngold: 2\ntrace, " in shown
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1 = ?\nBox it.<|im_end|>" in shown
    assert "a.jsonl: 6 of 6 rows are problems, 0 are rejected" in shown
    assert "traces: 1 of 6 problems bring one" in shown


def test_what_is_rejected_is_counted_with_its_reason_and_the_key_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "1 + 1 = ?", "answer": "2"},
        {"question": "How many?"},
        {"question": "Who?"},
    ]
    rows.append({"question": "word " * 300, "answer": "2"})
    assert main(["data", write(tmp_path / "a.jsonl", rows), "--data.max_prompt_tokens=100"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 4 rows are problems, 3 are rejected" in shown
    assert "traces: no problem brings one; data.columns.trace names" in shown
    assert f"rejected 2, the first in {tmp_path / 'a.jsonl'}, line 2: no column" in shown
    assert "keys to set: data.columns.answer" in shown
    assert "keys to set: data.max_prompt_tokens" in shown


def test_a_data_set_without_any_problem_is_refused_with_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", write(tmp_path / "a.jsonl", [{"q": "1?", "a": "2"}])]) == 2
    assert "data.columns.question names the column" in capsys.readouterr().err


def test_each_data_set_of_a_config_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data:\n  train: ['embedded:chain/train?count=4', {path: 'embedded:logic/train', limit: 3}]\n")
    assert main(["data", "--config", str(config), "--rows=1"]) == 0
    shown = capsys.readouterr().out
    assert "embedded:chain/train?count=4: 4 of 4 rows are problems" in shown
    assert "embedded:logic/train: 3 of 3 rows are problems" in shown
