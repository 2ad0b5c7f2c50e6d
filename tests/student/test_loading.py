"""What a checkpoint's settings would break late is mended or refused when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from slmreason.cli.parts import check_positions
from slmreason.records import Problem
from slmreason.student import Lora, Student
from slmreason.student.saving import try_saving
from tests.models import make_checkpoint


def changed(folder: Path, name: str, **settings: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **settings}))
    return folder


def test_sampling_flags_without_do_sample_are_saved_with_it(tmp_path: Path) -> None:
    folder = changed(make_checkpoint(tmp_path / "m", "qwen2.5"), "generation_config.json", temperature=0.6, top_p=0.9)
    student = Student(str(folder))
    try_saving(student)
    student.save(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


def test_generation_settings_that_cannot_be_saved_are_dropped_but_for_their_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen2.5")
    changed(folder, "generation_config.json", early_stopping=True, temperature=0.6)
    with caplog.at_level("WARNING", "slmreason"):
        student = Student(str(folder))
    assert "only its tokens are kept" in caplog.text
    student.save(tmp_path / "saved")
    assert student.chat.turn_end in GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id


def test_a_pad_token_without_embedding_is_replaced(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2.5")
    student = Student(str(folder))
    student.tokenizer.add_special_tokens({"pad_token": "<|beyond|>"})
    student.tokenizer.save_pretrained(folder)
    again = Student(str(folder))
    known = again.base_model.get_input_embeddings().weight.shape[0]
    assert again.tokenizer.pad_token_id == known
    assert again.pad_token_id in again.eos_ids


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen2.5")
    student = Student(str(folder))
    student.base_model.resize_token_embeddings(student.chat.turn_end)
    student.base_model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"student.model: its tokenizer's '<\|im_\w+\|>' is token \d+, and the model"):
        Student(str(folder))


@pytest.mark.parametrize("lora", [None, Lora(r=2)])
def test_an_adapters_folder_is_its_base_with_the_adapter_folded_in(lora: Lora | None, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", "qwen2.5")
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    student = Student(str(tmp_path / "adapter"), lora=lora)
    ids = torch.tensor([student.encode_question("1+1?")])
    with torch.no_grad():
        torch.testing.assert_close(student.network(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    trainable = student.trained.parameters()
    assert len(trainable) > 0
    assert student.name == str(base)


def test_an_adapter_without_its_base_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="student.model: cannot load .*does not say of which model"):
        Student(str(tmp_path))


@pytest.mark.parametrize("key", ["grpo.max_completion_tokens", "bridge.max_trace_tokens"])
def test_what_does_not_fit_the_models_positions_is_said_before_anything_is_sampled(key: str, student: Student) -> None:
    made = SimpleNamespace(
        student=student,
        data=SimpleNamespace(problems=[Problem("p", "What is 1 + 1?", "2")]),
        curriculum=SimpleNamespace(stages=["sft", "grpo"]),
        bridge=SimpleNamespace(max_trace_tokens=1020 if key.startswith("bridge") else 10),
    )
    config = SimpleNamespace(grpo=SimpleNamespace(max_completion_tokens=1020 if key.startswith("grpo") else 10))
    with pytest.raises(ValueError, match=rf"{key}: the longest prompt .* exceeds the student's 1024 positions"):
        check_positions(made, config)  # type: ignore[arg-type]
    config.grpo.max_completion_tokens = made.bridge.max_trace_tokens = 10
    check_positions(made, config)  # type: ignore[arg-type]


@pytest.mark.parametrize(("multiplies", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_fastest_dtype_is_what_the_machine_multiplies_in_and_is_said(
    multiplies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "slmreason.student.loading")
    monkeypatch.setattr("slmreason.student.loading.multiplies_in_bfloat16", lambda: multiplies)
    assert Student("embedded:qwen2", dtype="fastest").base_model.dtype == dtype
    assert f"student.dtype fastest: {str(dtype).removeprefix('torch.')}" in caplog.text
