"""PSFT: which student its ratios are taken to, and that a fit goes on with it where it was cut off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from slmreason.data.batches import PackedDataset
from slmreason.modules.old_policy import OldPolicy
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.objectives import supervised_loss
from slmreason.run.tree import SafetensorsIO
from slmreason.student import Lora, Student
from slmreason.student.packing import collate
from tests.modules.test_modules import QUIET, solution_examples

PLAN = [[0, 1], [2, 3], [4, 5], [6, 7]]


def psft(student: Student, steps: int, clip: float = 0.001) -> SFTModule:
    module = SFTModule(student, SFTSettings(loss="psft", psft_steps=steps, psft_clip=clip))
    module.configure_optimizers = lambda: torch.optim.SGD(student.parameters(), lr=0.1)  # type: ignore[method-assign]
    return module


def loader(student: Student, accumulate: int = 1) -> DataLoader[Any]:
    examples = solution_examples(student, 8)
    return DataLoader(PackedDataset(examples, PLAN, accumulate, student.pad_token_id), batch_size=None)  # type: ignore[arg-type]


def nudge(student: Student, by: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in student.trained.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))


def weights(student: Student) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_psft_fit_equals_a_plain_loop_with_a_copy_of_the_student(student: Student, accumulate: int) -> None:
    """Two optimizer steps to a copy; in the second the clip takes the gradient of many tokens."""
    ours, theirs = copy.deepcopy(student), copy.deepcopy(student)
    L.Trainer(max_epochs=1, accumulate_grad_batches=accumulate, **QUIET).fit(psft(ours, 2), loader(ours, accumulate))
    held = 0
    for number, batch in enumerate(loader(theirs, accumulate)):
        step, within = divmod(number, accumulate)
        if step % 2 == 0 and within == 0:
            old = copy.deepcopy(theirs)
        with torch.no_grad():
            old_log_probs = old.score(batch).log_probs
        log_probs = theirs.score(batch).log_probs
        held += int(((log_probs - old_log_probs).exp() > 1.001).sum())
        loss = supervised_loss(log_probs, batch.global_target_tokens, "psft", old_log_probs, clip_high=0.001)
        loss.backward()
        if within == accumulate - 1:
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
                    parameter.grad = None
    assert held > 0
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [None, Lora(r=4, alpha=8)])
def test_the_old_policy_is_the_student_of_the_first_of_its_steps(lora: Lora | None) -> None:
    student = Student("embedded:qwen2", instruction="", lora=lora)
    batch = collate(solution_examples(student, 4), student.pad_token_id)
    policy, before = OldPolicy(student, steps=2), student.score(batch).log_probs.detach()
    policy.begin(0)
    assert policy.log_probs(batch) is None
    nudge(student)
    present = weights(student)
    policy.begin(1)
    torch.testing.assert_close(policy.log_probs(batch), before)
    assert torch.equal(weights(student), present)
    policy.begin(2)
    assert policy.log_probs(batch) is None


def test_the_old_policy_of_adapters_is_a_copy_of_adapters_alone() -> None:
    student = Student("embedded:qwen2", instruction="", lora=Lora(r=4, alpha=8))
    policy = OldPolicy(student, steps=2)
    policy.begin(0)
    assert policy.state_dict()["weights"].keys() == {name for name, _ in student.trained.state()}


def test_the_old_policy_is_put_back_beside_the_present_student(student: Student) -> None:
    batch = collate(solution_examples(student, 4), student.pad_token_id)
    policy = OldPolicy(student, steps=3)
    policy.begin(3)
    nudge(student)
    policy.begin(4)
    state, old = policy.state_dict(), policy.log_probs(batch)
    present = weights(student)
    restored = OldPolicy(student, steps=3)
    restored.load_state_dict(state)
    assert restored.state_dict() is not None  # a checkpoint before the first step keeps what was read
    restored.begin(5)
    assert torch.equal(restored.log_probs(batch), old)  # type: ignore[arg-type]
    assert torch.equal(weights(student), present)
    restored.begin(6)
    assert restored.log_probs(batch) is None


def test_a_psft_fit_goes_on_between_two_looks_at_the_student(student: Student, tmp_path: Path) -> None:
    """Three steps to a copy and four to an epoch: the second epoch begins with the copy of step 3."""
    ended = []
    for epochs, resumed in ((2, False), (1, False), (2, True)):
        trained = copy.deepcopy(student)
        saver = ModelCheckpoint(dirpath=tmp_path / f"{epochs}-{resumed}", save_last=True)
        options = QUIET | {"enable_checkpointing": True, "callbacks": [saver], "plugins": [SafetensorsIO()]}
        trainer = L.Trainer(max_epochs=epochs, **options)
        path = str(tmp_path / "1-False" / "last.ckpt") if resumed else None
        trainer.fit(psft(trained, 3), loader(trained), ckpt_path=path)
        ended.append(weights(trained))
    assert torch.equal(ended[0], ended[2])
    assert not torch.equal(ended[0], ended[1])
