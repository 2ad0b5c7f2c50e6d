"""`benchmarks.screen` on simulated rollouts: what it says of scores that tell, and of scores that do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.screen import analyse
from slmreason.records import TraceScores
from tests.runs import ROOT


def found(slope: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=150)
    mean = np.clip(1 / (1 + np.exp(0.5 + slope * x)), 0.02, 0.98)
    rho = rng.beta(4 * mean, 4 * (1 - mean))
    scores = [TraceScores(f"p{i}", 1 + 0.1 * value, 2.0, 1.0, 90, 120) for i, value in enumerate(x.tolist())]
    return analyse(scores, rng.random((150, 16)) < rho[:, None])


def test_scores_that_tell_of_rho_decide_more_bands_right_the_fewer_rollouts_there_are() -> None:
    row = found(slope=2.0)
    low, high = row["rank_correlation_95"]
    assert 0.4 < low < row["rank_correlation"] < high < 1
    assert row["predictor"]["used"] == 1
    assert [each["rollouts"] for each in row["bands"]] == [0, 1, 2, 4, 8]
    gains = [each["difference"] for each in row["bands"]]
    assert gains[0] > 0.05
    assert row["bands"][0]["difference_95"][0] > 0
    assert gains[-1] < gains[0]
    assert row["bands"][0]["gain_nats_95"][0] > 0
    assert row["of_each_score"]["mean_nll"] < -0.5


def test_scores_that_tell_nothing_decide_nothing() -> None:
    row = found(slope=0.0)
    assert row["predictor"]["used"] == 0
    assert row["rank_correlation_95"][0] < 0.2
    low, high = row["bands"][0]["gain_nats_95"]
    assert low < 0.05
    assert high < 0.2


@pytest.mark.slow
def test_the_script_measures_a_student(tmp_path: Path) -> None:
    out = tmp_path / "screen.json"
    command = [sys.executable, "-m", "benchmarks.screen", "--data=embedded:chain/train?count=80", "--problems=70",
               "--attempts=4", "--tokens=80", f"--out={out}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [row] = json.loads(out.read_text())["rows"]
    assert row["problems"] == 70
    assert row["forward"]["tokens"] > 0 < row["probe"]["tokens"]
    assert len(row["each"]) == 70
    assert {each["rollouts"] for each in row["bands"]} == {0, 1, 2}
