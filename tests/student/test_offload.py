"""Activations on the CPU: the same numbers, and nothing but activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from slmreason.records import Example
from slmreason.student import Lora, Student, offload
from slmreason.student.packing import collate

EXAMPLES = [Example((5, 6, 7), (8, 9, 10), "", "rollout"), Example((11, 12), (13, 14), "", "rollout")]


def gradients(lora: Lora | None, offloads: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    student = Student("embedded:qwen2", instruction="", lora=lora, activation_offload=offloads)
    student.score(collate(EXAMPLES, 0)).log_probs.sum().backward()
    return {name: p.grad for name, p in student.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [None, Lora(r=4), Lora(r=4, options={"use_dora": True})])
def test_gradients_are_the_same_bit_for_bit(lora: Lora | None) -> None:
    plain, offloaded = gradients(lora, False), gradients(lora, True)
    assert plain.keys() == offloaded.keys()
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())


def test_activations_go_over_and_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    went: list[torch.Tensor] = []

    class Watched(save_on_cpu):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.library = self.pack_hook
            self.pack_hook = self.watch

        def watch(self, tensor: torch.Tensor) -> Any:
            went.append(tensor)
            return self.library(tensor)

    monkeypatch.setattr(offload, "save_on_cpu", Watched)
    student = Student("embedded:qwen2", instruction="", activation_offload=True)
    batch = collate(EXAMPLES, 0)
    with torch.no_grad():
        student.score(batch)  # finds the layout too
    assert went == []
    student.score(batch).log_probs.sum().backward()
    assert len(went) > 4 * len(student.base_model.model.layers)
    weights = {parameter.data_ptr() for parameter in student.network.parameters()}
    assert not any(tensor.data_ptr() in weights for tensor in went)


def test_it_is_refused_beside_checkpointing() -> None:
    with pytest.raises(ValueError, match=r"student\.activation_offload: student\.gradient_checkpointing keeps no"):
        Student("embedded:qwen2", gradient_checkpointing=True, activation_offload=True)
