"""The recipes for real students, end to end, with a small random checkpoint of exactly their architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slmreason.embedded.families import make_problems, rebuild
from tests.models import make_checkpoint
from tests.runs import command, long

pytestmark = pytest.mark.slow

RECIPES = {"gsm8k-qwen2.5-0.5b": "qwen2.5", "gsm8k-llama3.2-1b": "llama3"}
SMALL = [
    "--rollout=HFEngine", "--reward=tests.plugins.CoinReward", "--curriculum.rounds=1", "--curriculum.evaluate=ends",
    "--curriculum.probe.attempts=4", "--data.token_budget=2000", "--data.batch_size=4", "--bridge.max_trace_tokens=400",
    "--sft.epochs=1", "--sft.warmup_steps=0", "--grpo.prompts_per_step=8", "--grpo.group_size=4",
    "--grpo.max_completion_tokens=16", "--evaluation.max_new_tokens=16", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


def gsm8k_like(path: Path, split: str) -> Path:
    """Problems in GSM8K's own form: a worked solution, then `#### 24`."""
    rows = [
        {"question": p.question, "answer": "\n".join(step.text for step in rebuild(p.id).steps) + f"\n#### {p.answer}"}
        for p in make_problems("chain", split, 24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("devices", [1, long(2)])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipe_runs_end_to_end(recipe: str, devices: int, tmp_path: Path) -> None:
    """One device: LoRA as the recipe has it. Several: all weights, sharded, by the overlay."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", RECIPES[recipe])
    train, test = gsm8k_like(tmp_path / "train.jsonl", "train"), gsm8k_like(tmp_path / "test.jsonl", "test")
    overlay = ["--config=full-fsdp"] if devices > 1 else []
    done = command(
        "fit", f"--config={recipe}", *overlay, *SMALL, f"--trainer.devices={devices}", f"--student.model={checkpoint}",
        f"--data.train={train}", f"--benchmarks=[gsm8k={test}]", f"--run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    outcomes = {e["stage"]: e["outcome"] for e in json.loads((tmp_path / "run" / "summary.json").read_text())}
    assert [outcomes[f"round 1 {stage}"] for stage in ("sft", "grpo", "cft")] == ["done"] * 3
    with open(tmp_path / "run" / "round-01" / "cft" / "set-epoch-1.jsonl") as file:
        assert {json.loads(line)["origin"] for line in file} == {"new_trace"}  # these solutions cannot diagnose
    before = load_file(checkpoint / "model.safetensors")
    after = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(after[name], before[name].bfloat16())}
    # LoRA adapts the linear layers alone; full fine-tuning moves the embedding too.
    assert ("model.embed_tokens.weight" in changed) == (devices > 1)
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(checkpoint))
