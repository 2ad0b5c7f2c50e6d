"""Optimizers by class path against the same classes by hand, on weights of float32 and of half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slmreason.callbacks import KeepCheckpoints
from slmreason.modules.settings import SFTSettings
from slmreason.run.tree import load_tree, save_tree
from slmreason.student import Lora, Student
from slmreason.student.optimizer import MASTER, release
from slmreason.student.optimizers import ByClass, make_by_class
from tests.student.test_optimizer import equal, fit, made_weights, train

SGD = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"adjust_lr_fn": "match_rms_adamw"}}
ADAFACTOR = "torch.optim.Adafactor"
HALF = torch.bfloat16


def chosen(given: str | dict[str, Any], weight_decay: float = 0.1) -> ByClass:
    return ByClass.of("sft.optimizer", given, weight_decay)


def made(given: str | dict[str, Any], weights: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    return make_by_class(chosen(given), weights, 1e-3, 0.1, **more)


def by_hand(given: str | dict[str, Any], weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    matrices, vectors = [weights[0], weights[2]], [weights[1]]
    groups: Any = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if given is SGD:
        return [torch.optim.SGD(groups, lr=1e-3, momentum=0.9)]
    if given is ADAFACTOR:
        return [torch.optim.Adafactor(groups, lr=1e-3)]
    rest = torch.optim.AdamW(vectors, lr=1e-3, weight_decay=0.0)
    return [torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), rest]


class Both:
    """Steps of several optimizers."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("given", [SGD, ADAFACTOR, MUON])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_weights_go_the_way_of_float32_weights_by_hand(given: Any, dtype: torch.dtype) -> None:
    ours = made_weights(dtype)
    theirs = [nn.Parameter(weight.detach().float()) for weight in ours]
    train(made(given, ours), ours, range(20), of=dtype)
    train(Both(by_hand(given, theirs)), theirs, range(20), of=dtype)  # type: ignore[arg-type]
    assert equal(ours, [weight.to(dtype) for weight in theirs])
    assert not equal(ours, made_weights(dtype))


@pytest.mark.parametrize("given", [SGD, ADAFACTOR, MUON])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_saved_optimizer_goes_on_bit_for_bit(given: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    through = made_weights(dtype)
    train(made(given, through), through, range(12), of=dtype)
    first = made_weights(dtype)
    optimizer = made(given, first)
    train(optimizer, first, range(6), of=dtype)
    save_tree(tmp_path / "saved.safetensors", {"optimizer": optimizer.state_dict(), "weights": list(first)})
    saved = load_tree(tmp_path / "saved.safetensors")
    second = [nn.Parameter(tensor.clone()) for tensor in saved["weights"]]
    again = made(given, second)
    again.load_state_dict(saved["optimizer"])
    train(again, second, range(6, 12), of=dtype)
    assert equal(second, through)


@pytest.mark.parametrize("given", [SGD, MUON])
@pytest.mark.parametrize("lora", [None, Lora(r=4, options={"use_dora": True})])
def test_two_steps_and_two_more_are_four(given: Any, lora: Lora | None, tmp_path: Path) -> None:
    settings = SFTSettings(learning_rate=1e-3, weight_decay=0.1, optimizer=given)
    straight = Student("embedded:qwen2", instruction="", lora=lora)
    before = [parameter.detach().clone() for parameter in straight.trained.parameters()]
    fit(straight, KeepCheckpoints(lambda _: tmp_path / "two.ckpt", lambda _: {}, lambda: None, 2, None),
        settings=settings)  # fmt: skip
    resumed = Student("embedded:qwen2", instruction="", lora=lora)
    fit(resumed, checkpoint=tmp_path / "two.ckpt", settings=settings)
    assert equal(resumed.trained.parameters(), straight.trained.parameters())
    assert not equal([parameter.float() for parameter in resumed.trained.parameters()], before)
    left, expected = resumed.trained.take_masters(), straight.trained.take_masters()
    assert equal(list(left.values()), list(expected.values()))
    assert bool(left) == (lora is None or any("magnitude" in name for name, _ in resumed.trained.state()))


def test_a_schedule_reaches_every_part() -> None:
    weights = made_weights(HALF)
    optimizer = made(MUON, weights)
    before = [weight.detach().clone() for weight in weights]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(optimizer, weights, range(3), of=HALF)
    assert equal(weights, before)


def test_embeddings_go_to_adamw_beside_a_class_of_matrices() -> None:
    weights = made_weights(torch.float32)
    optimizer = made(MUON, weights, embeddings=[weights[0]])
    momenta = [group.get("momentum") for group in optimizer.param_groups for _ in group["params"]]
    order = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert order == [id(weights[2]), id(weights[0]), id(weights[1])]
    assert momenta == [0.95, None, None]


def test_copies_go_from_fit_to_fit() -> None:
    weights = made_weights(HALF)
    optimizer = made(SGD, weights)
    train(optimizer, weights, range(3), of=HALF)
    left = release(optimizer)
    assert set(left) == set(weights)
    assert equal([left[weight].to(HALF) for weight in weights], weights)
    again = made(SGD, weights, masters=left)
    assert again.state_dict()["state"][0][MASTER] is left[weights[0]]


def test_weights_without_a_gradient_are_left_alone() -> None:
    weights = made_weights(HALF)
    before = [weight.detach().clone() for weight in weights]
    made(SGD, weights).step()
    assert equal(weights, before)


@pytest.mark.parametrize(
    ("given", "weight_decay", "said"),
    [
        ("torch.optim.Sgd", 0.0, "sft.optimizer: torch.optim.Sgd cannot be imported"),
        ("torch.nn.Linear", 0.0, "sft.optimizer: torch.nn.Linear is no torch.optim.Optimizer"),
        ("SGD", 0.0, "sft.optimizer: SGD cannot be imported"),
        ("torch.optim.LBFGS", 0.0, "sft.optimizer: torch.optim.lbfgs.LBFGS cannot be made or used"),
        ("torch.optim.SparseAdam", 0.0, "cannot be made or used: SparseAdam does not support dense gradients"),
        ("torch.optim.Rprop", 0.1, "sft.weight_decay: 0.1 does nothing with torch.optim.Rprop"),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}, 0.0, "init_args.lr: write sft.learning_rate"),
        ({"class_path": "torch.optim.SGD", "init_args": {"mass": 1}}, 0.0, "cannot be made or used"),
        ({"class": "torch.optim.SGD"}, 0.0, "sft.optimizer: needs a class path"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(given: Any, weight_decay: float, said: str) -> None:
    with pytest.raises(ValueError, match="sft") as caught:
        SFTSettings(optimizer=given, weight_decay=weight_decay)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
