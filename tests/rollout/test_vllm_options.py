"""The options of vLLM: as keys of the classes that take them, and what is said of wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
from jsonargparse import set_parsing_settings

from slmreason.cli.config import ConfigError, Parser
from slmreason.rollout.engine import RolloutEngine
from slmreason.rollout.vllm import Spec, VLLMEngine, VLLMOptions
from slmreason.rollout.vllm.worker import spec_of
from slmreason.teacher.base import Teacher
from slmreason.teacher.vllm import VLLMTeacher

OPTIONS = {field.name for field in fields(VLLMOptions)} - {"section"}
OWN: dict[type, set[str]] = {
    VLLMEngine: {"placement", "adapters"},
    VLLMTeacher: {
        "model", "temperature", "top_p", "seed", "max_completion_tokens", "device", "chat_template", "prompts",
    },
}  # fmt: skip


@pytest.mark.parametrize("cls", OWN)
def test_keys_of_a_class_are_its_own_and_the_options_each_with_its_words(cls: type) -> None:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser()
    parser.add_class_arguments(cls, "given")
    words = {action.dest.removeprefix("given."): action.help for action in parser._actions if "." in action.dest}
    assert words.keys() == OWN[cls] | OPTIONS
    assert [key for key, help in words.items() if not help or len(help) < 10] == []


@pytest.mark.parametrize(("section", "cls"), [("rollout", VLLMEngine), ("teacher", VLLMTeacher)])
def test_the_help_of_a_class_has_the_words_of_the_options(section: str, cls: type) -> None:
    command = [sys.executable, "-m", "slmreason.cli", "fit", f"--{section}.help", cls.__name__]
    environ = os.environ | {"COLUMNS": "1000"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True)
    assert "Completions that are decoded side by side. (a whole number; default: 256)" in done.stdout
    assert "--teacher.prompts" in done.stdout or "--rollout.placement" in done.stdout


@pytest.mark.parametrize("wrong", ["gpu_memory", "section", "options"])
def test_a_key_that_there_is_not_is_refused(wrong: str) -> None:
    parser = Parser()
    parser.add_subclass_arguments(RolloutEngine, "rollout")
    parser.add_subclass_arguments(Teacher, "teacher", required=False)
    parser.parse_args(["--rollout=VLLMEngine", "--rollout.log_dir=x"])
    with pytest.raises(ConfigError, match=wrong):
        parser.parse_args(["--rollout=VLLMEngine", f"--rollout.{wrong}=x"])
    with pytest.raises(ConfigError, match=wrong):
        parser.parse_args(
            ["--rollout=VLLMEngine", "--teacher=VLLMTeacher", "--teacher.model=x", f"--teacher.{wrong}=x"]
        )


@pytest.mark.parametrize("section", ["rollout", "teacher"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_sequences": 0}, r"max_sequences must be at least 1, got 0"),
        ({"timeout_s": 0.0}, r"timeout_s must be above 0, got 0\.0"),
        ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization must be above 0 and at most 1, got 0\.0"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be above 0 and at most 1, got 1\.5"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(section: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{section}\.{words}$"):
        VLLMOptions(section=section, **options)


def test_a_worker_gets_the_spec_that_was_sent() -> None:
    options = VLLMOptions(section="teacher", cache_gib=0.5, log_dir="logs")
    spec = Spec(model="m", dtype="float32", eos_ids=(1, 2), max_model_len=64, options=options, lora_rank=8)
    assert spec_of(json.loads(json.dumps(spec, default=vars))) == spec
