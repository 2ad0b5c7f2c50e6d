"""`slmreason critique`: what it is asked to work on."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmreason.cli import main


def test_critique_needs_a_harvest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["critique", "--config=quickstart"]) == 2
    assert "--harvest is needed" in capsys.readouterr().err
    assert main(["critique", "--config=quickstart", f"--harvest={tmp_path / 'none.jsonl'}"]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
