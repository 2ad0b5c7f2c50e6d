"""`benchmarks.bridge` and `benchmarks.bridged` on the embedded student: what the one keeps the other trains on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bridged import intervals, pairs_of
from slmreason.records import BridgeResult
from slmreason.run.files import read_records
from slmreason.supervision.settings import BridgeSettings
from tests.runs import ROOT


def ran(*args: str) -> str:
    command, environ = [sys.executable, "-m", *args], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_what_the_bridge_chose_and_the_raw_traces_are_trained_on_and_measured(tmp_path: Path) -> None:
    traces, out = tmp_path / "traces.jsonl", tmp_path / "bridged.json"
    data = "--data=embedded:chain/train?count=64"
    ran("benchmarks.bridge", data, "--problems=12", "--attempts=8", "--tokens=120", f"--traces={traces}")
    results = read_records(traces, BridgeResult)
    assert len(results) == 12
    trained = pairs_of(results, BridgeSettings(raw="last"))
    differ = [pair for pair in trained if pair.raw != pair.chosen]
    compared = [pair for pair in pairs_of(results, BridgeSettings()) if pair.raw != pair.chosen]
    assert differ
    assert len(differ) >= len(compared)
    said = ran("benchmarks.bridged", data, f"--traces={traces}", "--held_out=8", "--attempts=2", "--tokens=80",
               "--learning_rate=1e-3", f"--out={out}")  # fmt: skip
    assert f"{len(trained)} problems to train on, {len(differ)} with another trace, 8 held out" in said
    [row] = json.loads(out.read_text())["rows"]
    assert [(run["arm"], run["seed"]) for run in row["runs"]] == [
        ("chosen", 1), ("raw", 1), ("chosen", 2), ("raw", 2)
    ]  # fmt: skip
    rho = {(run["arm"], run["seed"]): run["rho"] for run in row["runs"]}
    assert len({row["base"]["mean"], *rho.values()}) > 1  # it was trained
    ahead: dict[str, Any] = row["chosen - raw"]
    mean = (rho["chosen", 1] + rho["chosen", 2] - rho["raw", 1] - rho["raw", 2]) / 2
    assert ahead["mean"] == pytest.approx(mean)
    assert ahead["low"] <= ahead["mean"] <= ahead["high"]


def test_an_interval_is_of_the_difference_problem_by_problem() -> None:
    """Problems differ more than the arms: one is ahead by a tenth on each."""
    base = np.linspace(0.0, 0.8, 9)
    found = intervals({"chosen": [base + 0.1, base + 0.1], "raw": [base, base]}, base)
    ahead = found["chosen - raw"]
    assert (ahead["low"], ahead["mean"], ahead["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert found["chosen"]["high"] - found["chosen"]["low"] > 0.2
