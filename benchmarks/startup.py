"""Seconds from the start of a command to its first training step, ours and a script with TRL's GRPOTrainer.

    python -m benchmarks.startup --out benchmarks/results/startup.json

Both load the same small model from disk and eight problems, and build their trainer. Ours has its evidence from a file,
so that nothing is measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from benchmarks.common import alternate, compared, embedded_folder, save
from slmreason.embedded.families import make_problems

TRL = """
import sys
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
import json, os, time

class First(TrainerCallback):
    def on_step_begin(self, *_, **__):
        print("FIRST", time.time(), flush=True)
        os._exit(0)

rows = [{"prompt": [{"role": "user", "content": q}]} for q in json.loads(open(sys.argv[2]).read())]
config = GRPOConfig(output_dir=sys.argv[3], per_device_train_batch_size=8, num_generations=8, use_cpu=True, bf16=False,
                    report_to="none", disable_tqdm=True, max_completion_length=16)
GRPOTrainer(model=sys.argv[1], reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=Dataset.from_list(rows), callbacks=[First()]).train()
"""


class FirstStep(Callback):
    """Ends the process at the first training batch, saying when that was."""

    def on_train_batch_start(self, *_: Any) -> None:
        print("FIRST", time.time(), flush=True)
        os._exit(0)


def seconds_to_first_step(command: Sequence[str]) -> list[float]:
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FIRST")]
    if not first:
        raise RuntimeError(f"{' '.join(command)} had no first step:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [float(first[0]) - began]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        problems = make_problems("chain", "train", 8)
        evidence = [{"problem_id": p.id, "attempts": 8, "successes": 4} for p in problems]
        (folder / "evidence.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evidence))
        (folder / "questions.json").write_text(json.dumps([p.question for p in problems]))
        (folder / "trl_script.py").write_text(TRL)
        ours = [
            sys.executable, "-m", "slmreason.cli", "fit", "--config", "quickstart", "--data.train",
            "embedded:chain/train?count=8", "--data.evidence", str(folder / "evidence.jsonl"), "--curriculum.stages",
            "[grpo]", "--curriculum.probe.refresh", "missing", "--benchmarks", "[]", "--student.model",
            embedded_folder(), "--run_dir", str(folder / "run"), "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false", "--trainer.callbacks+=benchmarks.startup.FirstStep",
        ]  # fmt: skip
        theirs = [sys.executable, str(folder / "trl_script.py"), embedded_folder(), str(folder / "questions.json"),
                  str(folder / "out")]  # fmt: skip
        sides: dict[str, Callable[[], Sequence[float]]] = {
            "ours": partial(seconds_to_first_step, ours), "trl": partial(seconds_to_first_step, theirs)
        }  # fmt: skip
        for side in sides.values():
            side()  # what is read from disk is in memory afterwards, for both
        save(options.out, [compared(alternate(sides, options.rounds))])


if __name__ == "__main__":
    main()
