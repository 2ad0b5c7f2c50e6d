"""The exported folder in transformers, in peft and, where it is installed, in vLLM: the same greedy tokens."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from slmreason.cli import main
from slmreason.curriculum.resume import load_run
from slmreason.embedded.families import make_problems
from slmreason.export.export import export, hub_name, licence, pool_name
from slmreason.student import EMBEDDED, Lora, Student
from tests.runs import LORA, SMALL

SHORT = ["--curriculum.stages=[sft]", "--sft.epochs=1", "--trainer.devices=1", "--student.instruction=Box it."]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert main(["fit", *SMALL, *LORA, *SHORT, f"--run_dir={folder}"]) == 0
    return folder


def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [f"{problem.question}\nBox it." for problem in make_problems("chain", "test", 6)]
    return [
        list(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True,
                                           return_dict=False)) for q in questions
    ]  # fmt: skip


def greedy(model: PreTrainedModel | PeftModel, folder: Path) -> list[list[int]]:
    """transformers' own generate, which stops where the exported generation config says."""
    return [
        model.generate(input_ids=torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts(folder)
    ]


def trained(run: Path) -> Student:
    """The student as the run left it, adapters on."""
    student = Student("embedded:qwen2", lora=Lora(r=8), instruction="Box it.")
    assert load_run(run, student)[0].reports
    return student


def test_merged_folder_and_adapter_give_the_students_own_greedy_tokens(lora_run: Path, tmp_path: Path) -> None:
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert main(["export", str(lora_run), str(merged)]) == 0
    assert main(["export", str(lora_run), str(adapter), "--form=adapter"]) == 0
    student = trained(lora_run)
    expected = greedy(student.network, merged)
    assert greedy(AutoModelForCausalLM.from_pretrained(merged), merged) == expected
    base = AutoModelForCausalLM.from_pretrained(Student("embedded:qwen2").base_model.config._name_or_path)
    assert greedy(base, merged) != expected  # the adapters changed something
    with_adapter = PeftModel.from_pretrained(base, adapter)
    assert greedy(with_adapter, adapter) == expected
    assert any(tokens[-1] in student.eos_ids for tokens in expected)
    for folder in (merged, adapter):
        assert AutoTokenizer.from_pretrained(folder).chat_template == student.tokenizer.chat_template
    assert not (adapter / "model.safetensors").exists()


def test_vllm_gives_the_same_greedy_tokens(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = pytest.importorskip("vllm")
    for key, value in {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
                       "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it
    assert main(["export", str(lora_run), str(tmp_path / "merged")]) == 0
    engine = vllm.LLM(str(tmp_path / "merged"), dtype="float32", enforce_eager=True, max_model_len=512,
                      max_num_batched_tokens=2048, disable_log_stats=True)  # fmt: skip
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=40)  # where to stop is the folder's to say
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts(tmp_path / "merged")], sampling)
    theirs = [list(output.outputs[0].token_ids) for output in outputs]
    assert theirs == greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")


def test_card_has_the_training_table_and_the_folder_its_end_of_turn(lora_run: Path, tmp_path: Path) -> None:
    assert main(["export", str(lora_run), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| stage | rows | seconds | outcome | chain (n=10) |" in card
    rows = [line for line in card.splitlines() if line.startswith(("| base", "| round"))]
    summary = json.loads((lora_run / "summary.json").read_text())
    assert [row.split("|")[1].strip() for row in rows] == [entry["stage"] for entry in summary]
    assert f"{100 * summary[-1]['scores'][0]['value']:.1f}" in rows[-1]
    assert "Box it." in card
    assert "learning_rate | 0.001 |" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    student = Student("embedded:qwen2")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(student.eos_ids)


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_the_cards_snippet_runs_as_it_stands(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(lora_run), form, f"--form={form}"]) == 0
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / form / "README.md").read_text(), re.DOTALL)
    # An embedded student has no name that the hub knows.
    snippet = snippet.replace('"embedded:qwen2"', repr(str(EMBEDDED / "qwen2")))
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip()


def test_the_card_names_every_data_set_of_a_pool() -> None:
    assert pool_name("openai/gsm8k") == "openai/gsm8k"
    assert pool_name(["openai/gsm8k", {"path": "mine.jsonl", "weight": 0.5}]) == "openai/gsm8k, mine.jsonl"


def test_the_card_names_the_base_as_the_hub_does_and_its_licence(tmp_path: Path) -> None:
    assert hub_name("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (hub_name("no/name\nof the hub"), licence("no/name\nof the hub")) == (None, None)
    assert (hub_name("embedded:qwen2"), licence("embedded:qwen2")) == (None, "apache-2.0")
    folder = tmp_path / "local"
    folder.mkdir()
    assert (hub_name(str(folder)), licence(str(folder))) == (None, None)
    (folder / "config.json").write_text('{"_name_or_path": "someone/model"}')
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# Model\n")
    assert (hub_name(str(folder)), licence(str(folder))) == ("someone/model", "llama3.2")
    (folder / "config.json").write_text('{"_name_or_path": "/home/me/model"}')
    (folder / "README.md").write_text("---\nlicense: [<script>]\n---\n")
    assert (hub_name(str(folder)), licence(str(folder))) == (None, None)


def test_adapters_are_not_exported_without_the_weights_that_they_changed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("student: {lora: {r: 4, options: {init_lora_weights: pissa}}}")
    with pytest.raises(ValueError, match="options that change the weights below the adapters.*use --form merged"):
        export(tmp_path, tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    config = (lora_run / "config.yaml").read_text()
    (tmp_path / "empty" / "config.yaml").write_text(config)
    (tmp_path / "full" / "config.yaml").write_text(config.replace("  lora:\n", "  lora: null\n  was:\n"))
    for args, says in (
        ([tmp_path, tmp_path / "out"], "is not a run folder"),
        ([lora_run, tmp_path / "taken"], "exists already"),
        ([tmp_path / "empty", tmp_path / "out"], "has no checkpoint yet"),
        ([tmp_path / "full", tmp_path / "out", "--form=adapter"], "trained all weights"),
    ):
        assert main(["export", *map(str, args)]) == 2
        assert says in capsys.readouterr().err
