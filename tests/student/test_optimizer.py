"""AdamW with float32 copies of half-precision weights, against PyTorch's on float32 weights; adapters in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from slmreason.callbacks import KeepCheckpoints
from slmreason.data.batches import PackedDataset, PlannedLoader
from slmreason.modules import base
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.run.tree import SafetensorsIO, load_tree, save_tree
from slmreason.student import Lora, Student
from slmreason.student import optimizer as optimizers
from slmreason.student.optimizer import MASTER, make_adamw
from tests.modules.test_modules import QUIET, solution_examples


def made_weights(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    """A matrix, a vector of ones as norms have, and a matrix that has no gradient at the first step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 16), (16,), (4, 4)]
    values = [0.02 * torch.randn(shape, generator=generator) for shape in shapes]
    values[1] = torch.ones(16)
    return [nn.Parameter(value.to(dtype)) for value in values]


def made_gradients(step: int, dtype: torch.dtype) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(100 + step)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in ((8, 16), (16,), (4, 4))]
    return [*gradients[:2], gradients[2] if step else None]


def train(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: range, of: torch.dtype) -> None:
    for step in steps:
        for weight, gradient in zip(weights, made_gradients(step, of), strict=True):
            weight.grad = None if gradient is None else gradient.to(weight.dtype)
        optimizer.step()


def masters(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[weight][MASTER] for weight in weights]


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [None, True])
def test_copies_go_the_way_of_float32_weights_that_get_the_same_gradients(
    dtype: torch.dtype, fused: bool | None
) -> None:
    half = made_weights(dtype)
    whole = [nn.Parameter(weight.detach().float()) for weight in half]
    ours = make_adamw(half, 1e-4, weight_decay=0.1, fused=fused)
    groups = [{"params": [whole[0], whole[2]], "weight_decay": 0.1}, {"params": [whole[1]], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-4, fused=fused)  # type: ignore[arg-type]
    train(ours, half, range(30), of=dtype)
    train(theirs, whole, range(30), of=dtype)
    assert equal(masters(ours, half), whole)
    assert equal(half, [weight.to(dtype) for weight in whole])
    assert {weight.dtype for weight in half} == {dtype}


def test_updates_too_small_for_the_weights_add_up() -> None:
    ours, theirs = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    pairs = [(make_adamw([ours], 1e-4, 0.0), ours), (torch.optim.AdamW([theirs], lr=1e-4, weight_decay=0.0), theirs)]
    for optimizer, weight in pairs:
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert torch.equal(theirs, torch.ones_like(theirs))  # each update is a fortieth of what bfloat16 tells apart
    assert torch.equal(ours, torch.full_like(ours, 0.99))


def test_float32_weights_are_left_to_pytorch() -> None:
    assert type(make_adamw(made_weights(torch.float32), 1e-3, 0.1)) is torch.optim.AdamW
    mixed = [*made_weights(torch.float32), *made_weights(torch.bfloat16, seed=1)]
    ours, alone = make_adamw(mixed, 1e-3, 0.1), made_weights(torch.float32)
    theirs = make_adamw(alone, 1e-3, 0.1)
    for step in range(5):
        for weight, gradient in zip(mixed, [*made_gradients(step, torch.bfloat16)] * 2, strict=True):
            weight.grad = None if gradient is None else gradient.to(weight.dtype)
        ours.step()
    train(theirs, alone, range(5), of=torch.bfloat16)
    assert equal(mixed[:3], alone)
    assert not any(MASTER in ours.state[weight] for weight in mixed[:3])


def test_pieces_give_the_same_weights_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for piece in (1 << 27, 100):
        monkeypatch.setattr(optimizers, "PIECE", piece)
        weights = made_weights(torch.bfloat16)
        train(make_adamw(weights, 1e-3, 0.1), weights, range(5), of=torch.bfloat16)
        found.append(weights)
    assert equal(*found)


@pytest.mark.parametrize("fused", [None, True])
def test_state_that_is_saved_and_read_goes_on_bit_by_bit(tmp_path: Path, fused: bool | None) -> None:
    straight = made_weights(torch.bfloat16)
    whole_way = make_adamw(straight, 1e-5, 0.1, fused)
    train(whole_way, straight, range(4), of=torch.bfloat16)

    first = made_weights(torch.bfloat16)
    before = make_adamw(first, 1e-5, 0.1, fused)
    train(before, first, range(2), of=torch.bfloat16)
    save_tree(tmp_path / "state", before.state_dict())
    second = made_weights(torch.bfloat16, seed=5)  # other weights: those of the copies count
    after = make_adamw(second, 1e-5, 0.1, fused)
    after.load_state_dict(load_tree(tmp_path / "state"))
    assert equal(second, first)
    train(after, second, range(2, 4), of=torch.bfloat16)
    assert equal(second, straight)
    for theirs, ours in zip(straight, second, strict=True):
        assert equal(list(after.state[ours].values()), list(whole_way.state[theirs].values()))


def test_state_of_a_version_without_copies_gets_them_from_the_weights() -> None:
    weights = made_weights(torch.bfloat16)
    old = torch.optim.AdamW([{"params": [weights[0], weights[2]]}, {"params": [weights[1]]}], lr=1e-3)
    train(old, weights, range(1, 3), of=torch.bfloat16)
    new = make_adamw(weights, 1e-3, 0.0)
    new.load_state_dict(old.state_dict())
    assert equal(masters(new, weights), [weight.float() for weight in weights])
    assert new.state[weights[0]]["exp_avg"].dtype == torch.float32


# -- in a fit --------------------------------------------------------------------------------------------------------


class Watches(Callback):
    """The optimizer's state after the last step, before the fit lets it go."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = trainer.optimizers[0].state
        self.copies = {p: state[MASTER].clone() for p, state in states.items() if MASTER in state}
        self.state = [value.clone() for state in states.values() for value in state.values()]


FOUR_STEPS = SFTSettings(learning_rate=1e-5, weight_decay=0.1, warmup_steps=2)


def fit(
    student: Student,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    settings: SFTSettings = FOUR_STEPS,
    **flags: Any,
) -> L.Trainer:
    """Four steps, or the last two of them where there is a checkpoint."""
    examples = solution_examples(student, 16)
    plan = [[*range(4 * i, 4 * i + 4)] for i in range(4)]
    batches = PackedDataset(examples, plan, 1, student.pad_token_id)
    loader = PlannedLoader(batches, 2 if checkpoint else 0, num_workers=0, pin_memory=False)
    saves = any(isinstance(callback, KeepCheckpoints) for callback in callbacks)
    options = {**QUIET, "enable_checkpointing": saves, "precision": "bf16-true", "gradient_clip_val": 1.0,
               "plugins": [SafetensorsIO()], **flags}  # fmt: skip
    trainer = L.Trainer(max_epochs=1, callbacks=list(callbacks), **options)
    module = SFTModule(student, settings)
    trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_two_steps_and_two_more_are_four_in_half_precision(tmp_path: Path, lora: Lora | None) -> None:
    straight, whole_way = Student("embedded:qwen2", instruction="", lora=lora), Watches()
    saves = KeepCheckpoints(lambda _: tmp_path / "two.ckpt", lambda _: {}, lambda: None, 2, None)
    fit(straight, whole_way, saves)
    resumed, rest = Student("embedded:qwen2", instruction="", lora=lora), Watches()
    trainer = fit(resumed, rest, checkpoint=tmp_path / "two.ckpt")
    assert trainer.global_step == 4
    assert equal(list(resumed.parameters()), list(straight.parameters()))
    assert equal(rest.state, whole_way.state)
    trained = resumed.trained.parameters()
    if lora is None:
        assert rest.copies.keys() == set(trained)
        assert all(torch.equal(copy.to(torch.bfloat16), weight) for weight, copy in rest.copies.items())
        assert any(not torch.equal(copy, weight.float()) for weight, copy in rest.copies.items())
    else:
        assert rest.copies == {}
        assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_a_fused_step_leaves_unscaling_and_clipping_to_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: there the step is fused by default, and Lightning clips no gradient of an optimizer that unscales."""
    found = []
    for fused in (False, True):
        make = lambda *args, masters, fused=fused: make_adamw(*args, fused, masters)  # noqa: E731
        monkeypatch.setattr(base, "make_adamw", make)
        student = Student("embedded:qwen2", instruction="")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
        plugins = [SafetensorsIO(), MixedPrecision("16-mixed", "cpu", scaler)]
        trainer = fit(student, precision=None, plugins=plugins, gradient_clip_val=0.1)
        assert trainer.optimizers[0].param_groups[0]["fused"] is fused
        found.append([parameter.detach() for parameter in student.parameters()])
    start = Student("embedded:qwen2", instruction="").parameters()
    for before, plain, fused_one in zip(start, *found, strict=True):
        torch.testing.assert_close(fused_one, plain, rtol=0, atol=2e-6)
        assert not torch.equal(plain, before)


# -- adapters --------------------------------------------------------------------------------------------------------


def test_adapters_are_moved_and_never_rounded(lora_student: Student) -> None:
    before = [parameter.detach().clone() for parameter in lora_student.trained.parameters()]
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        convert(lora_student)
        assert equal(lora_student.trained.parameters(), before)
    assert {p.dtype for p in lora_student.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_float32_adapters_of_a_bfloat16_student_multiply_in_bfloat16(lora_student: Student) -> None:
    lora_student.to(torch.bfloat16)
    kept: list[Tensor] = []
    layer = next(module for name, module in lora_student.network.named_modules() if name.endswith("q_proj"))
    inputs = torch.randn(3, 128, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(inputs)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = inputs.float() @ (layer.base_layer.weight.float() + 2.0 * b @ a).T + layer.base_layer.bias.float()
    torch.testing.assert_close(output.float(), expected, rtol=0.03, atol=0.03)
    assert a.grad is not None
    assert a.grad.dtype == torch.float32


def test_a_student_in_float32_is_as_peft_has_it(lora_student: Student) -> None:
    layer: Any = next(module for name, module in lora_student.network.named_modules() if name.endswith("q_proj"))
    inputs = torch.randn(3, 128)
    plain = layer.base_layer(inputs)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert torch.equal(layer(inputs), plain + nn.functional.linear(nn.functional.linear(inputs, a), b) * 2.0)


# -- from fit to fit -------------------------------------------------------------------------------------------------


def test_the_next_fit_goes_on_from_the_copies_and_not_from_the_rounded_weights(tmp_path: Path) -> None:
    student = Student("embedded:qwen2", instruction="")
    first, second = Watches(), Watches()
    trainer = fit(student, first)
    assert trainer.optimizers[0].state == {}  # the moments are let go
    saved = {name: tensor.clone() for name, tensor in student.trained.state()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    fit(student, second)

    again, third = Student("embedded:qwen2", instruction=""), Watches()
    again.to(torch.bfloat16)
    again.trained.load(saved, "saved")
    fit(again, third)
    assert equal(third.state, second.state)
    rounded, fourth = Student("embedded:qwen2", instruction=""), Watches()
    rounded.to(torch.bfloat16)
    rounded.trained.load({name: tensor.bfloat16() for name, tensor in saved.items()}, "rounded")
    fit(rounded, fourth)
    assert not equal(fourth.state, second.state)


def test_a_copy_of_a_weight_that_was_changed_since_is_not_used() -> None:
    student = Student("embedded:qwen2", instruction="")
    fit(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2)
    assert all(torch.equal(tensor, dict(student.network.named_parameters())[name])
               for name, tensor in student.trained.state())  # fmt: skip
