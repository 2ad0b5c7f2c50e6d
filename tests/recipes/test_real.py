"""Real pretrained students. `SLMREASON_STUDENTS` names a folder that has them in Hugging Face form, under these names.

They take minutes each, on two cores that have bfloat16: `pytest -m real tests/recipes/test_real.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import peak_bytes
from benchmarks.faults import differing, digest
from slmreason.cli import main
from slmreason.curriculum.memory import sampling_bytes, shape_of
from slmreason.embedded.families import make_problems
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.rollout.vllm import VLLMEngine
from slmreason.student import Lora, Student
from tests.curriculum.test_memory import expected_and_measured, micro_batch
from tests.recipes.test_real_students import gsm8k_like
from tests.runs import ROOT

FOLDER = Path(os.environ.get("SLMREASON_STUDENTS", "/nowhere"))
QWEN, SMOL = FOLDER / "qwen2.5-coder-0.5b-instruct", FOLDER / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not (QWEN.is_dir() and SMOL.is_dir()), reason="SLMREASON_STUDENTS names no folder with them"),
]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
GREEDY = Sampling(40, temperature=0.0)


def prompts(student: Student) -> list[tuple[int, ...]]:
    return [student.encode_question(problem.question) for problem in make_problems("chain", "train", 6)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that name a pool and a benchmark in GSM8K's form."""
    folder = tmp_path_factory.mktemp("data")
    train, test = gsm8k_like(folder / "train.jsonl", "train"), gsm8k_like(folder / "test.jsonl", "test")
    return [f"--data.train=openai/gsm8k={train}", f"--benchmarks=[gsm8k={test}]", "--data.limit=8",
            "--evaluation.limit=8", "--trainer.enable_progress_bar=false"]  # fmt: skip


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """The run folder of the recipe for a CPU on eight problems."""
    run = tmp_path_factory.mktemp("cycle") / "run"
    status = main([
        "fit", "--config=gsm8k-cpu", *data, f"--student.model={QWEN}", f"--run_dir={run}",
        "--grpo.prompts_per_step=4", "--grpo.max_completion_tokens=200", "--curriculum.evaluate=ends",
    ])  # fmt: skip
    assert status == 0
    return run


def test_the_whole_cycle_runs(cycle: Path) -> None:
    summary = json.loads((cycle / "summary.json").read_text())
    assert [entry["stage"] for entry in summary] == ["base", "round 1 sft", "round 1 grpo", "round 1 cft"]
    for entry in summary:
        assert entry["outcome"] == "done" or entry["outcome"].startswith("skipped: ")
    assert summary[1]["outcome"] == "done"
    answers = [json.loads(line) for line in (cycle / "answers" / "base.jsonl").read_text().splitlines()]
    assert any(row["correct"] for row in answers)  # it is no random model
    assert all("<|im_" not in row["text"] for row in answers)


@pytest.mark.parametrize("adapters", [False, True])
def test_an_export_loads_in_transformers(cycle: Path, tmp_path: Path, adapters: bool) -> None:
    out = tmp_path / "out"
    assert main(["export", str(cycle), str(out), *(["--form=adapter"] if adapters else [])]) == 0
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(QWEN, dtype=torch.bfloat16), out)
    else:
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    said = model.generate(**rows, do_sample=False, max_new_tokens=60)[0, rows["input_ids"].shape[1] :]
    assert "7" in tokenizer.decode(said)


@needs_vllm
def test_an_export_loads_in_vllm(cycle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(cycle), str(out), "--dtype=float32"]) == 0
    exported = Student(str(out))
    engine = VLLMEngine(cache_gib=1, placement="worker", timeout_s=600)
    try:
        engine.sync(exported)
        theirs = engine.generate(exported, prompts(exported), 1, GREEDY)
    finally:
        engine.close()
    ours = HFEngine().generate(exported, prompts(exported), 1, GREEDY)
    assert [group[0].token_ids for group in theirs] == [group[0].token_ids for group in ours]


@needs_vllm
@pytest.mark.parametrize("folder", [SMOL, QWEN], ids=lambda folder: folder.name)
def test_vllm_decodes_greedily_what_our_engine_does(folder: Path) -> None:
    student = Student(str(folder))
    engine = VLLMEngine(cache_gib=1, placement="worker", timeout_s=600)
    try:
        engine.sync(student)
        theirs = engine.generate(student, prompts(student), 1, GREEDY)
    finally:
        engine.close()
    ours = HFEngine().generate(student, prompts(student), 1, GREEDY)
    for [one], [other] in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "lora", "dtype", "sequences"),
    [(QWEN, Lora(r=32), "bfloat16", 8), (QWEN, None, "bfloat16", 4), (SMOL, None, "float32", 8)],
    ids=["qwen lora", "qwen full", "smol float32"],
)
def test_memory_of_training_is_within_a_fifth_of_what_is_said(
    folder: Path, lora: Lora | None, dtype: Literal["float32", "bfloat16"], sequences: int
) -> None:
    student = Student(str(folder), lora=lora, dtype=dtype)
    expected, measured = expected_and_measured(student, "32-true", micro_batch(student, sequences, 256))
    print(f"{folder.name}: {expected / 1e9:.2f} GB said, {measured / 1e9:.2f} GB measured")
    assert expected == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(("folder", "rows"), [(QWEN, 64), (SMOL, 64)], ids=["qwen", "smol"])
def test_memory_of_sampling_is_within_a_fifth_of_what_is_said(folder: Path, rows: int) -> None:
    student, engine = Student(str(folder), dtype="bfloat16"), HFEngine(max_sequences=rows)
    questions = [student.encode_question(problem.question) for problem in make_problems("chain", "train", rows // 8)]
    longest = max(map(len, questions)) + 64
    engine.generate(student, questions[:1], 1, Sampling(2))  # what is tried once is tried
    weights = sum(parameter.nbytes for parameter in student.parameters())
    measured = weights + peak_bytes(lambda: engine.generate(student, questions, 8, Sampling(64)))
    shape = shape_of(student)
    expected = weights + sampling_bytes(engine, student, shape, longest, 0)
    print(f"{folder.name}: {expected / 1e9:.2f} GB said, {measured / 1e9:.2f} GB measured")
    assert expected == pytest.approx(measured, rel=0.2)


# -- killed while it probes, in SFT and in GRPO ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(data: list[str]) -> list[str]:
    """A command with the smaller student, whose coin rewards let every stage have something to do."""
    return [
        sys.executable, "-m", "slmreason.cli", "fit", "--config=gsm8k-cpu", *data, f"--student.model={SMOL}",
        "--reward=tests.plugins.CoinReward", "--curriculum.checkpoint.chunk=2",
        "--curriculum.checkpoint.every_n_steps=1", "--data.batch_size=2", "--grpo.prompts_per_step=2",
        "--grpo.max_completion_tokens=40", "--evaluation.max_new_tokens=40", "--curriculum.evaluate=ends",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> dict[str, str]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run([*small, f"--run_dir={run}"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return digest(run)


def probing(run: Path) -> bool:
    journal = run / "resume" / "journal.jsonl"
    return journal.exists() and re.search(r'"key": ?"round 1 probe', journal.read_text()) is not None


def within(stage: str) -> Callable[[Path], bool]:
    return lambda run: any((run / "resume").glob(f"*in-round-1-{stage}-*.ckpt"))


def processes(small: list[str], run: Path) -> Iterator[subprocess.Popen[str]]:
    while True:
        yield subprocess.Popen(
            [*small, f"--run_dir={run}", "--resume=auto"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def test_a_run_that_is_killed_everywhere_ends_as_one_that_is_not(
    tmp_path: Path, small: list[str], undisturbed: dict[str, str]
) -> None:
    run = tmp_path / "run"
    started = processes(small, run)
    for moment in (probing, within("sft"), within("grpo")):
        process = next(started)
        while not moment(run):
            assert process.poll() is None, process.communicate()[0][-2000:]
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = next(started)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-2000:]
    assert differing(undisturbed, digest(run)) == []
