"""Every rollout in Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import load_dataset

from slmreason.callbacks.dump import rollout_rows
from slmreason.cli import main
from slmreason.records import Problem, Rollout, RolloutGroup


def group(number: int) -> RolloutGroup:
    rollouts = tuple(
        Rollout((1, 2), (3,) * (i + 1), (-0.5,) * (i + 1), f"text {i}", float(i), i == 1, i == 0, 7) for i in range(2)
    )
    return RolloutGroup(Problem(f"p{number}", "How many?", "2"), rollouts)


def test_a_row_has_what_a_rollout_was_and_where() -> None:
    rows = rollout_rows([group(0), group(1)], epoch=1, batch_idx=5)
    assert [(row["problem_id"], row["group"], row["completion"]) for row in rows] == [
        ("p0", 0, "text 0"), ("p0", 0, "text 1"), ("p1", 1, "text 0"), ("p1", 1, "text 1")
    ]  # fmt: skip
    assert rows[1] | {"reward": 1.0, "correct": True, "truncated": False, "completion_tokens": 2} == rows[1]
    assert {(row["epoch"], row["batch"], row["policy_version"]) for row in rows} == {(1, 5, 7)}
    assert "completion_ids" not in rows[0]
    assert rollout_rows([group(0)], 0, 0, with_tokens=True)[1]["completion_ids"] == [3, 3]


def test_a_run_leaves_all_its_rollouts_where_datasets_reads_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    args = ["fit", "--config=quickstart", "--data.train=embedded:chain/train?count=12", "--curriculum.rounds=1",
            "--curriculum.stages=[grpo]", "--data.routing=all", "--curriculum.probe.refresh=never", "--grpo.epochs=1",
            "--grpo.prompts_per_step=4", "--grpo.group_size=2", "--grpo.max_completion_tokens=24", "--benchmarks=[]",
            "--trainer.callbacks=slmreason.callbacks.DumpRollouts", "--trainer.enable_progress_bar=false",
            f"--run_dir={run}"]  # fmt: skip
    assert main(args) == 0
    files = sorted((run / "round-01" / "grpo" / "rollouts").glob("*.parquet"))
    ledger: list[dict[str, Any]] = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    read = load_dataset("parquet", data_files=[str(file) for file in files], split="train", cache_dir=str(tmp_path))
    assert len(read) == sum(row["attempts"] for row in ledger)
    assert sum(read["correct"]) == sum(row["successes"] for row in ledger)
    assert sum(read["completion_tokens"]) == sum(row["tokens"] for row in ledger)
    assert len(files) == 3
    assert pq.read_table(files[0]).num_rows == 4 * 2
