"""The decoder's products in other forms: the same logits, and weights that come out as they went in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slmreason.embedded.families import make_problems
from slmreason.records import Example
from slmreason.rollout import projections, steps
from slmreason.rollout.engine import Sampling
from slmreason.rollout.projections import Product, fast, folded, side_by_side
from slmreason.rollout.steps import prefill
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student
from slmreason.student.packing import collate


def with_adapters(dtype: Literal["float32", "bfloat16"] = "float32", size: float = 0.1) -> Student:
    student = Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=16), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return student


def prompts_of(student: Student, count: int) -> list[tuple[int, ...]]:
    return [student.encode_question(problem.question) for problem in make_problems("chain", "train", count)]


def weights_of(student: Student) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.network.named_parameters()}


@torch.no_grad()
def logits_after(student: Student, products: projections.Projections | None, count: int = 3) -> Tensor:
    """Of a few steps after prompts that were read the same way. [steps, rows, vocab]"""
    lean, _ = prefill(student, prompts_of(student, 4), 2, count, projections=products)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 500, (count, 8), generator=generator)
    return torch.stack([lean.step(row).float() for row in tokens])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_every_form_gives_the_logits_of_the_modules(
    lora: bool, packed: bool, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:
        monkeypatch.setattr(projections, "PACKED_ELEMENTS", 1)
    if stacked:
        monkeypatch.setattr(projections, "STACKED_ON", ("cpu",))
    student = with_adapters() if lora else Student("embedded:qwen2", instruction="")
    expected = logits_after(student, None)
    torch.testing.assert_close(logits_after(student, fast(student)), expected, rtol=1e-4, atol=1e-4)
    with folded(student) as are_folded:
        assert are_folded == lora
        torch.testing.assert_close(logits_after(student, fast(student)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_in_half_precision_are_as_close_as_the_modules(
    packed: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast too, where float32 weights have products of half precision."""
    if packed:
        monkeypatch.setattr(projections, "PACKED_ELEMENTS", 1)
    truth = logits_after(with_adapters(), None)
    student = with_adapters("float32" if autocast else "bfloat16")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = logits_after(student, None)
        with folded(student) as are_folded:
            assert not are_folded
            ours = logits_after(student, fast(student))
    assert (ours - truth).norm() < 1.1 * (theirs - truth).norm()


def test_the_large_matrices_of_a_small_student_on_a_cpu_are_left_alone() -> None:
    student = Student("embedded:qwen2", instruction="")
    products = fast(student)
    assert not any(isinstance(layer.out, Product) for layer in products.layers)
    assert products.head is student.base_model.lm_head


def test_a_few_steps_are_not_worth_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "PACKED_ELEMENTS", 1)
    student = Student("embedded:qwen2", instruction="")
    few, many = fast(student, 31), fast(student, 32)
    assert few.head is student.base_model.lm_head
    assert isinstance(many.head, Product)
    assert many.head.packs


def test_folding_is_undone_bit_for_bit_whatever_happens_within() -> None:
    student = with_adapters()
    before = weights_of(student)
    places = {name: parameter.data_ptr() for name, parameter in student.network.named_parameters()}

    def breaks() -> None:
        with folded(student) as are_folded:
            assert are_folded
            changed = [n for n, p in student.network.named_parameters() if not torch.equal(p, before[n])]
            assert all("base_layer.weight" in name for name in changed)
            assert len(changed) == 7 * len(student.base_model.model.layers)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        breaks()
    for name, parameter in student.network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == places[name]
    example = Example((5, 6, 7), (8, 9), "", "rollout")
    batch = collate([example], 0)
    with torch.no_grad():
        after = student.score(batch).log_probs
        with student.reference_policy.answering():
            base = student.score(batch).log_probs
    assert not torch.allclose(after, base)
    plain = Student("embedded:qwen2", instruction="")
    with torch.no_grad():
        torch.testing.assert_close(base, plain.score(batch).log_probs)


@torch.no_grad()
def test_folded_weights_give_a_plain_forward_the_same_logits() -> None:
    student = with_adapters()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = student.network(input_ids=ids).logits
    with folded(student):
        torch.testing.assert_close(student.network(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_are_off_stay_off(dtype: Literal["float32", "bfloat16"]) -> None:
    student = with_adapters(dtype)
    with student.reference_policy.answering():
        expected = logits_after(student, None)
        with folded(student) as are_folded:
            assert not are_folded
            torch.testing.assert_close(logits_after(student, fast(student)), expected)


def test_the_engine_draws_the_same_tokens_with_adapters_folded() -> None:
    student = with_adapters(size=0.02)
    before = weights_of(student)
    sampling = Sampling(30, seed=4)
    ours = HFEngine().generate(student, prompts_of(student, 5), 4, sampling)
    theirs = HFEngine(fast_weights=False).generate(student, prompts_of(student, 5), 4, sampling)
    assert [c.token_ids for group in ours for c in group] == [c.token_ids for group in theirs for c in group]
    assert all(torch.equal(parameter, before[name]) for name, parameter in student.network.named_parameters())


@torch.no_grad()
def test_small_updates_in_half_precision_are_not_rounded_away() -> None:
    """What folding them in would do."""
    student = with_adapters("bfloat16", size=3e-4)
    for layer in student.base_model.model.layers:
        module = layer.mlp.down_proj
        exact = 4.0 * module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()
        side = projections._side(module, torch.bfloat16)
        assert side is not None
        down, up = side
        beside = up.float() @ down.float()
        weight = module.get_base_layer().weight
        folded_in = (weight + exact.to(weight.dtype)).float() - weight.float()
        assert (beside - exact).norm() < 0.01 * exact.norm()
        assert (folded_in - exact).norm() > 0.1 * exact.norm()


def test_weights_side_by_side_keep_their_values_and_follow_their_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 2), nn.Linear(8, 6)])
    weights = [module.weight for module in modules]
    before = [weight.detach().clone() for weight in weights]
    with torch.inference_mode():
        whole = side_by_side(weights)
    assert torch.equal(whole, torch.cat(before))
    assert side_by_side(weights).data_ptr() == whole.data_ptr()  # nothing moves a second time
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.1)
    sum(module(torch.ones(8)).sum() for module in modules).backward()
    optimizer.step()
    assert not torch.equal(weights[1], before[1])
    assert torch.equal(whole, torch.cat([weight.detach() for weight in weights]))
    save_file(modules.state_dict(), tmp_path / "modules.safetensors")
    assert torch.equal(load_file(tmp_path / "modules.safetensors")["1.weight"], weights[1])
    weights[1].data = weights[1].data.clone()  # as whoever moves a module does
    again = side_by_side(weights)
    assert again.data_ptr() != whole.data_ptr()
    assert torch.equal(again, torch.cat([weight.detach() for weight in weights]))


def test_a_student_whose_weights_lie_side_by_side_is_saved_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projections, "STACKED_ON", ("cpu",))
    student = Student("embedded:qwen2", instruction="")
    before = weights_of(student)
    fast(student)
    student.save(tmp_path / "student")
    loaded = Student(str(tmp_path / "student"), instruction="")
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.network.named_parameters())


def test_what_does_not_fit_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(projections, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(projections, "PACKED_ELEMENTS", 1)
    student = with_adapters()
    with folded(student) as are_folded:
        assert not are_folded
        assert not any(getattr(layer.out, "packs", False) for layer in fast(student).layers)
    assert "to fold the adapters takes" in caplog.text
    assert "to lay out the matrices for this processor takes" in caplog.text


def test_what_is_no_plain_projection_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    monkeypatch.setattr(projections, "PACKED_ELEMENTS", 1)
    student = Student("embedded:qwen2", instruction="")
    for layer in student.base_model.model.layers:
        layer.mlp.down_proj.__class__ = Other
        layer.self_attn.k_proj.__class__ = Other
    assert steps.is_lean(student)
    expected = logits_after(student, None)
    torch.testing.assert_close(logits_after(student, fast(student)), expected, rtol=1e-4, atol=1e-4)
