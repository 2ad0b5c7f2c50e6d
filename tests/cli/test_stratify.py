"""`slmreason stratify`: bands from recorded rollouts and from new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmreason.cli import main


def test_stratify_takes_recorded_rollouts(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = real_data / "model_solutions" / "gsm8k_gpt3_4x1319.jsonl.gz"
    assert main(["stratify", f"--recorded={recorded}", f"--out={tmp_path / 'strata.jsonl'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "agrees with 5276 of 5276 recorded labels" in shown
    assert all(band in shown for band in ("simple", "medium", "hard"))
    assert len((tmp_path / "strata.jsonl").read_text().splitlines()) == 1319


def test_stratify_probes_the_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "strata.jsonl"
    assert (
        main(["stratify", "--config", "quickstart", "--data.limit=12", "--curriculum.probe.attempts=4", f"--out={out}"])
        == 0
    )
    assert len(out.read_text().splitlines()) == 12
    assert "mean rho" in capsys.readouterr().out
