"""The whole curriculum with vLLM: beside the same with transformers, in every placement, in one process and two."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from slmreason.cli import main
from tests.runs import ONE, SMALL, TWO, Run, command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

VLLM = "VLLMEngine"
SETTINGS = [
    "--data.train=embedded:chain/train?count=64",
    "--curriculum.probe.attempts=4",
    "--curriculum.probe.epoch_share=0",
    "--curriculum.evaluate=ends",
    "--sft.epochs=1",
    "--grpo.epochs=2",
    "--grpo.prompts_per_step=8",
    "--grpo.group_size=8",
    "--benchmarks=[embedded:chain/test?count=20]",
    "--trainer.enable_progress_bar=false",
]


SHORT = ["--rollout.cache_gib=0.1", "--data.train=embedded:chain/train?count=24", "--sft.epochs=1",
         "--curriculum.stages=[sft, grpo]"]  # fmt: skip


def outcomes(run_dir: Path) -> dict[str, str]:
    return {row["stage"]: row["outcome"] for row in json.loads((run_dir / "summary.json").read_text())}


def column(run_dir: Path, round_number: int, name: str) -> list[float]:
    """A metric at each GRPO step of a round."""
    with open(run_dir / f"round-{round_number:02d}" / "grpo" / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_the_curriculum_goes_as_with_transformers(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("hf", "vllm")}
    for name, engine in (("hf", "HFEngine"), ("vllm", VLLM)):
        args = ["--config", "quickstart", f"--run_dir={folders[name]}", f"--rollout={engine}", *SETTINGS]
        assert main(["fit", *args]) == 0
    assert outcomes(folders["hf"]) == outcomes(folders["vllm"])
    assert set(outcomes(folders["vllm"]).values()) == {"done"}
    for round_number in (1, 2):
        rewards = {name: column(folder, round_number, "grpo/reward_step") for name, folder in folders.items()}
        # A mean of rewards within 0 and 1 varies by at most 0.5 over the root of their number. The rollouts of one
        # prompt may all agree, so each prompt counts once; three standard errors of the difference are allowed.
        prompts = {name: 8 * len(steps) for name, steps in rewards.items()}
        assert min(prompts.values()) >= 24
        tolerance = 3 * 0.5 * math.sqrt(sum(1 / count for count in prompts.values()))
        means = {name: sum(steps) / len(steps) for name, steps in rewards.items()}
        assert means["vllm"] == pytest.approx(means["hf"], abs=tolerance)
        assert 0 < means["vllm"] < 1
        mismatch = column(folders["vllm"], round_number, "grpo/sampler_mismatch")
        assert len(mismatch) > 2
        assert 0 < max(mismatch) < 1e-3


@pytest.mark.long
def test_where_vllm_runs_and_how_many_processes_train_makes_no_difference(tmp_path: Path) -> None:
    runs = {
        "worker": [*ONE, f"--rollout={VLLM}"],
        "in_process": [*ONE, f"--rollout={VLLM}", "--rollout.placement=in_process"],
        "two": [*TWO, f"--rollout={VLLM}", "--trainer.strategy=fsdp"],
    }
    made: dict[str, Run] = {}
    for name, args in runs.items():
        done = command("fit", *SMALL, f"--run_dir={tmp_path / name}", *args, *SHORT)
        assert done.returncode == 0, done.stdout[-3000:]
        made[name] = Run(tmp_path / name, done.stdout)
        assert outcomes(tmp_path / name)["round 1 grpo"] == "done"
    for name in ("in_process", "two"):
        assert made[name].rows("ledger.jsonl") == made["worker"].rows("ledger.jsonl")
        for key, tensor in made[name].weights.items():
            # Adam turns float noise in near-zero gradients into steps of the learning rate's size.
            torch.testing.assert_close(tensor, made["worker"].weights[key], rtol=0, atol=1e-4)


def test_a_run_whose_engine_dies_says_so_and_goes_on_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit", *SMALL, *ONE, f"--rollout={VLLM}", *SHORT, "--curriculum.stages=[grpo]",
            "--trainer.callbacks+=tests.plugins.KillsEngine"]  # fmt: skip
    monkeypatch.setenv("KILL_ENGINE", "1")
    died = command(*args, f"--run_dir={tmp_path / 'cut'}")
    assert died.returncode != 0
    assert "the vLLM worker died while" in died.stdout
    assert "The end of its log:" in died.stdout
    monkeypatch.delenv("KILL_ENGINE")
    for name in ("cut", "whole"):
        done = command(*args, f"--run_dir={tmp_path / name}", "--resume=auto")
        assert done.returncode == 0, done.stdout[-3000:]
    cut, whole = Run(tmp_path / "cut", ""), Run(tmp_path / "whole", "")
    assert cut.rows("ledger.jsonl") == whole.rows("ledger.jsonl")
    for key, tensor in cut.weights.items():
        torch.testing.assert_close(tensor, whole.weights[key], rtol=0, atol=1e-4)
