"""Whether training on the device does what it should: in bfloat16, with adapters, sharded, and gone on with."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common import solutions
from benchmarks.gpu_sections.lab import Lab, Outcome, products_in, worst
from benchmarks.precision import compared_update, sft_update
from slmreason.curriculum.trainer import with_strategy
from slmreason.data.batches import PackedDataset
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.run.tree import SafetensorsIO
from slmreason.runtime.distributed import close
from slmreason.student import Student
from slmreason.student.packing import collate

RATE = 1e-5
CLOSE = 0.02
"""Share of an update by which another may be off that should be the same. AdamW makes steps of the rate's size of what
rounding, or kernels that add in any order, leave of gradients near zero."""


def fit(
    lab: Lab,
    student: Student,
    steps: int,
    epochs: int = 1,
    callbacks: Sequence[Callback] = (),
    checkpoint: Path | None = None,
    **trainer: Any,
) -> SFTModule:
    """SFT of an embedded student, 8 examples a step.

    Args:
        steps: of an epoch.
        checkpoint: is gone on from.
    """
    examples = solutions(student, 8 * steps)
    plan = [list(range(8 * step, 8 * (step + 1))) for step in range(steps)]
    dataset = PackedDataset(examples, plan, 1, student.pad_token_id, hidden_size=student.hidden_size)
    module = SFTModule(student, SFTSettings(RATE, epochs))
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                             "enable_model_summary": False, "use_distributed_sampler": False}  # fmt: skip
    made = L.Trainer(max_epochs=epochs, accelerator=lab.device.type, devices=1, callbacks=list(callbacks),
                     plugins=[SafetensorsIO()], **quiet, **with_strategy(trainer))  # fmt: skip
    loader: Any = DataLoader(dataset, batch_size=None)  # type: ignore[arg-type]
    made.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module


def trained(student: Student) -> dict[str, Tensor]:
    """What training changed, on the CPU in float32."""
    return {name: tensor.detach().float().cpu().clone() for name, tensor in student.trained.state()}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of two such states."""
    return max(worst(ours[name], theirs[name]) for name in theirs)


def off_by(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far two updates are from each other, as a share of the length of one."""
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in start)
    length = sum(float((theirs[name] - start[name]).double().square().sum()) for name in start)
    return float((difference / length) ** 0.5)


def bf16_step(lab: Lab) -> Outcome:
    """Updates in bfloat16 without and with float32 copies beside those in float32; a gradient that is infinite."""
    steps = lab.sizes.train_steps
    updates = {side: sft_update(side, 1e-6, steps, None, lab.device.type).cpu()
               for side in ("float32", "plain", "ours")}  # fmt: skip
    figures: dict[str, Any] = {side: compared_update(updates[side], updates["float32"]) for side in ("plain", "ours")}
    figures["infinite gradient"] = skipped = infinite_gradient(lab)
    moved, cosine = figures["ours"]["moved"], figures["ours"]["cosine"]
    passed = moved > 0.95 and cosine > 0.9 and skipped["skipped"] == 1 and skipped["moved_by_it"] == 0
    passed = passed and skipped["moved_after"] > 0
    without = figures["plain"]["moved"]
    return Outcome(f"moved {moved:.0%}, without copies {without:.0%}", passed, figures)


class Poisons(Callback):
    """Makes the gradient of the second step infinite, and keeps the weights after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        if len(self.states) == 1:
            next(p for p in pl_module.student.trained.parameters() if p.grad is not None).grad.fill_(float("inf"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.states.append(weights_of(pl_module.student))


def weights_of(student: Student) -> dict[str, Tensor]:
    return {n: p.detach().float().cpu().clone() for n, p in student.network.named_parameters() if p.requires_grad}


def infinite_gradient(lab: Lab) -> dict[str, float]:
    poisons = Poisons()
    with unheard("slmreason.modules.base"):
        module = fit(lab, lab.small(dtype=torch.bfloat16), 4, callbacks=[poisons], precision="bf16-true")
    first, second, _, last = poisons.states
    return {"skipped": module.skipped_steps, "moved_by_it": apart(second, first), "moved_after": apart(last, second)}


def lora(lab: Lab) -> Outcome:
    """Adapters in bfloat16: they stay float32 and move, the base does not, and folded in they say the same."""
    student = lab.small(lora=True, dtype=torch.bfloat16)
    base = {n: p.detach().clone() for n, p in student.network.named_parameters() if not p.requires_grad}
    before = trained(student)
    fit(lab, student, 4, precision="bf16-true")
    student.to(lab.device)  # a Trainer may leave it elsewhere
    moved = apart(trained(student), before)
    kept = max(worst(p, base[n]) for n, p in student.network.named_parameters() if n in base)
    kinds = {str(p.dtype) for p in student.trained.parameters()}
    figures: dict[str, Any] = {"moved": moved, "base_moved": kept, "adapters": sorted(kinds), **folded(lab)}
    passed = moved > 0 and kept == 0 and kinds == {"torch.float32"}
    passed = passed and figures["folded_to_adapters"] < 1e-4 and figures["reference_to_base"] < 1e-5
    figure = f"adapters {', '.join(sorted(kinds))}, folded {figures['folded_to_adapters']:.1g}"
    return Outcome(figure.replace("torch.", ""), passed, figures)


@torch.no_grad()
def folded(lab: Lab) -> dict[str, float]:
    """Float32 log-probs with adapters beside those of the folded weights, and without them beside the base's."""
    adapted, plain = lab.small(lora=True), lab.small()
    batch = collate(solutions(plain, lab.sizes.problems), plain.pad_token_id,
                    hidden_size=plain.hidden_size).to(lab.device)  # fmt: skip
    with products_in("highest"):
        with adapted.reference_policy.answering():
            reference = worst(adapted.score(batch).log_probs, plain.score(batch).log_probs)
        names = dict(plain.base_model.named_parameters())
        for name, tensor in adapted.weights():
            if name in names:
                names[name].copy_(tensor)
        difference = worst(adapted.score(batch).log_probs, plain.score(batch).log_probs)
    return {"folded_to_adapters": difference, "reference_to_base": reference}


def fsdp(lab: Lab) -> Outcome:
    """FSDP2 in one process beside no strategy: the same weights after four steps."""
    figures: dict[str, Any] = {}
    for precision in ("32-true", "bf16-true"):
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        plain, sharded = (lab.small(dtype=dtype) for _ in range(2))
        start = trained(plain)
        fit(lab, plain, 4, precision=precision)
        with environment_kept():
            try:
                fit(lab, sharded, 4, precision=precision, strategy="fsdp")
                ours = trained(sharded)
            finally:
                close()
        theirs = trained(plain)
        figures[precision] = {"apart": apart(ours, theirs), "moved": apart(ours, start),
                              "off_by": off_by(ours, theirs, start)}  # fmt: skip
    full, half = figures["32-true"]["off_by"], figures["bf16-true"]["off_by"]
    figure = f"updates off by {full:.1g}, in bf16 by {half:.1g}"
    passed = full < CLOSE and half < 10 * CLOSE and all(row["moved"] > 0 for row in figures.values())
    return Outcome(figure, passed, figures)


class SavesEpoch(Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def resume(lab: Lab) -> Outcome:
    """Two steps, a checkpoint, and two more from it, beside four in one go, in bfloat16 with copies."""
    path = lab.scratch / "two-steps.ckpt"
    whole, second = (lab.small(dtype=torch.bfloat16) for _ in range(2))
    start = trained(whole)
    fit(lab, whole, 2, epochs=2, callbacks=[SavesEpoch(path)], precision="bf16-true")
    with unheard("lightning.pytorch"):
        module = fit(lab, second, 2, epochs=2, checkpoint=path, precision="bf16-true")
    assert module.student.policy_version == 4
    ours, theirs = trained(second), trained(whole)
    figures = {"apart": apart(ours, theirs), "moved": apart(theirs, start), "off_by": off_by(ours, theirs, start)}
    passed = figures["moved"] > 0 and figures["off_by"] < CLOSE
    return Outcome(f"update off by {figures['off_by']:.1g}", passed, figures)


@contextmanager
def environment_kept() -> Iterator[None]:
    """Puts back the process's environment: Lightning leaves the addresses of a group of processes in it."""
    kept = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        os.environ.update(kept)


@contextmanager
def unheard(name: str) -> Iterator[None]:
    """Within it a logger says nothing that is below an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
