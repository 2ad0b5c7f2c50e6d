"""The paper's recipe on the real GSM8K train file, with a small random Qwen2 in place of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmreason.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_all_7473_problems_are_read_and_a_student_that_solves_nothing_is_told_so(
    real_data: Path, random_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    status = main([
        "fit", "--config", "gsm8k-qwen2.5-0.5b",
        f"--data.train={real_data / 'gsm8k' / 'train.jsonl.gz'}", f"--student.model={random_qwen2}",
        "--rollout=HFEngine", "--student.dtype=float32", "--student.lora=null", f"--run_dir={run_dir}",
        "--data.max_prompt_tokens=2000", "--data.batch_size=8",
        "--curriculum.rounds=1", "--curriculum.probe.attempts=1", "--curriculum.probe.epoch_share=0",
        "--sft.epochs=1", "--bridge.max_trace_tokens=1400", "--bridge.handover=false",
        "--bridge.handover_search=false", "--bridge.rationalise=0", "--bridge.max_sampled_tokens=null",
        "--grpo.max_completion_tokens=4", "--grpo.prompts_per_step=4",
        f"--benchmarks=[gsm8k={real_data / 'gsm8k' / 'test.jsonl.gz'}, svamp={real_data / 'svamp' / 'test.jsonl.gz'}]",
        "--evaluation.limit=8", "--evaluation.max_new_tokens=4", "--curriculum.evaluate=ends",
        "--trainer.precision=32-true", "--trainer.accelerator=cpu", "--trainer.limit_train_batches=2",
        "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    assert status == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "pool: 7473 problems" in shown
    ledger = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    assert len({row["problem_id"] for row in ledger}) == 7473
    outcomes = {e["stage"]: e["outcome"] for e in json.loads((run_dir / "summary.json").read_text())}
    assert outcomes["round 1 sft"] == "done"
    assert "Consolidation Set is empty" in outcomes["round 1 grpo"]
    assert "no all-zero group was harvested" in outcomes["round 1 cft"]
    assert "Consolidation Set is empty" in shown
    assert (run_dir / "student" / "model.safetensors").exists()
    # GSM8K's own false equations are rejected with their reason, not trained on.
    rejects = [json.loads(line) for line in (run_dir / "round-01" / "sft" / "rejects.jsonl").read_text().splitlines()]
    assert 0 < sum("false equation" in reject["reason"] for reject in rejects) < 400
