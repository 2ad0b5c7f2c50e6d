"""Real commands in processes of their own, on a small configuration, and what their run folders hold."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slmreason.embedded.families import make_problems, rebuild, write_solution

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config=quickstart", "--data.train=embedded:chain/train?count=32", "--data.batch_size=4",
    "--data.token_budget=1000", "--curriculum.rounds=1", "--curriculum.evaluate=ends", "--curriculum.probe.attempts=4",
    "--curriculum.probe.epoch_share=1", "--sft.epochs=2", "--sft.learning_rate=1e-3", "--sft.warmup_steps=0",
    "--grpo.group_size=4", "--grpo.learning_rate=1e-4", "--grpo.warmup_steps=0", "--cft.learning_rate=1e-4",
    "--benchmarks=[embedded:chain/test?count=10]", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
# The same global batch: two processes, or one that accumulates twice. GRPO counts prompts over all processes.
ONE = ["--trainer.devices=1", "--trainer.accumulate_grad_batches=2", "--grpo.prompts_per_step=4"]
TWO = ["--trainer.devices=2", "--grpo.prompts_per_step=8"]
LORA = ["--student.lora.r=8", "--grpo.kl=0.01"]


def long(*values: Any, **options: Any) -> Any:
    """A set of parameters whose test takes long, beside one that does not."""
    return pytest.param(*values, marks=pytest.mark.long, **options)


@dataclass
class Run:
    folder: Path
    output: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "student" / "model.safetensors")

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def epoch_losses(self, stage: str) -> list[float]:
        """The loss of each epoch: a mean over all target tokens, or over the steps."""
        with open(self.folder / "round-01" / stage / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        column = f"{stage}/loss" if stage == "grpo" else f"{stage}/loss_epoch"
        return [float(row[column]) for row in rows if row.get(column)]


def command(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in processes of its own, which it starts itself."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE"))}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "slmreason.cli", *args], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, **options,
    )  # fmt: skip


def pool_with_traces(path: Path, count: int) -> Path:
    """Embedded problems as a file, with solutions that came with them in the column `trace`."""
    rows = [
        {"question": problem.question, "answer": problem.answer,
         "trace": write_solution([step.text for step in rebuild(problem.id).steps], problem.answer)}
        for problem in make_problems("chain", "train", count)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
