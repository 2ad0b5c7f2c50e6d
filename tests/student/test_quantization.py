"""Weights of four bits: what is asked of transformers, what is refused, and what our own paths do with such layers."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import integrations
from torch import nn
from transformers import AutoModelForCausalLM

from slmreason.rollout.projections import Product, fast
from slmreason.student import Lora, Student
from slmreason.student.quantization import is_quantized, quantization_config, saved_plainly


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module by the name of the library, and a GPU that is said to be there."""
    module = types.ModuleType("bitsandbytes")
    module.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


def test_transformers_is_asked_for_nf4(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="seen"):
        Student("embedded:qwen2", lora=Lora(r=4), dtype="bfloat16", quantization="nf4")
    config = asked["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == asked["dtype"] == torch.bfloat16


def test_a_gpu_is_needed(bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"student\.quantization: nf4 needs a GPU \(CUDA\), and there is none here"):
        Student("embedded:qwen2", lora=Lora(r=4), quantization="nf4")


def test_the_library_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmreason.student.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'needs bitsandbytes: pip install "slmreason\[quantization\]"'):
        Student("embedded:qwen2", lora=Lora(r=4), quantization="nf4")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (None, "student.quantization: nf4 weights are frozen; train adapters"),
        (Lora(r=4, options={"use_dora": True}), "leave out student.lora.options.use_dora"),
        (Lora(r=4, options={"use_rslora": True, "bias": "all"}), "leave out student.lora.options.bias"),
    ],
)
def test_what_could_not_be_trained_is_refused(bitsandbytes: Any, lora: Lora | None, said: str) -> None:
    with pytest.raises(ValueError, match="student") as caught:
        quantization_config("nf4", lora, torch.bfloat16)
    assert said in str(caught.value)


class Quantized(nn.Linear):
    """A layer as bitsandbytes has it: another class, and a weight that says so."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight / 2, self.bias)


def quantize(student: Student, monkeypatch: pytest.MonkeyPatch) -> list[Quantized]:
    """Doubles the weights that the adapters stand on, which its products halve again."""
    found = []
    for module in student.network.modules():
        base: Any = getattr(module, "base_layer", None)
        if type(base) is nn.Linear:
            base.weight.data *= 2
            base.__class__ = Quantized
            base.weight.quant_state = "nf4"
            found.append(base)
    monkeypatch.setattr(integrations, "dequantize_module_weight", lambda module: module.weight.data / 2)
    return found


def test_quantized_layers_are_called_as_they_are_and_saved_whole(
    lora_student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: tensor.clone() for name, tensor in lora_student.weights()}
    layers = quantize(lora_student, monkeypatch)
    assert layers
    assert all(is_quantized(layer) for layer in layers)
    made = fast(lora_student)
    assert not any(isinstance(product, Product) for layer in made.layers for product in (layer.out, layer.down))
    for name, tensor in lora_student.weights():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_a_model_is_saved_without_what_quantized_it() -> None:
    model: Any = types.SimpleNamespace(hf_quantizer="its", config=types.SimpleNamespace(quantization_config={"a": 1}))
    with saved_plainly(model):
        assert model.hf_quantizer is None
        assert not hasattr(model.config, "quantization_config")
    assert (model.hf_quantizer, model.config.quantization_config) == ("its", {"a": 1})
