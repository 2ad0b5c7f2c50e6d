"""An optimizer step that came out non-finite, in a file from which it can be computed again.

The file is safetensors with JSON inside, no pickle: where the step lay, the micro-batches of all processes, and the
weights that were trained as they were at that moment. What is frozen comes from where the student came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from slmreason.modules.policy_batch import PolicyBatch
from slmreason.modules.rescue.batches import TraceBatch
from slmreason.run.tree import load_tree, save_tree
from slmreason.runtime.distributed import barrier, gather, is_first
from slmreason.student import Student
from slmreason.student.packing import PackedBatch

if TYPE_CHECKING:
    from slmreason.modules.base import StudentModule

Batch = PackedBatch | PolicyBatch | TraceBatch
HALF = {"bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class BadBatch:
    """A step that was skipped."""

    about: dict[str, Any]
    """Stage, epoch, step, learning rate, loss, gradient norm, precision, and the rows of each micro-batch as text."""
    batches: list[Batch]
    """The micro-batches of the first process, then those of the next."""
    weights: dict[str, Tensor]
    """What is trained, by parameter name."""


def save_bad_batch(path: Path, student: Student, batches: Sequence[Batch], about: Mapping[str, Any]) -> None:
    """Writes a step; every process must call it with its own micro-batches, the first one writes.

    Raises:
        OSError: it cannot be written, e.g. since the disk is full.
    """
    parts = gather([_parts(batch) for batch in batches])
    weights = {name: tensor.to("cpu", copy=True) for name, tensor in student.trained.state() if is_first()}
    if is_first():
        rows = [[student.tokenizer.decode(row) for row in part["input_ids"].tolist()] for part in parts]
        save_tree(path, {"about": {**about, "rows": rows}, "batches": parts, "weights": weights})
    barrier()  # nobody may end the run while the first process writes


def load_bad_batch(path: Path, device: torch.device | str = "cpu") -> BadBatch:
    """Reads what `save_bad_batch` wrote.

    Raises:
        ValueError: the file is not there, is torn, or is something else.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or tree.keys() != {"about", "batches", "weights"}:
        raise ValueError(f"{path}: not a saved batch")
    return BadBatch(tree["about"], [_batch(part, device) for part in tree["batches"]], tree["weights"])


def repeat_bad_batch(path: Path, module: StudentModule) -> tuple[float, float]:
    """Computes a saved step again. The module's student gets the saved weights, and their gradient.

    Args:
        module: of the same stage and settings, with the student that the run began with.

    Returns:
        (loss, gradient norm) of the whole step.

    Raises:
        ValueError: the file cannot be read, or is of another stage or student.
    """
    student, bad = module.student, load_bad_batch(path, module.student.device)
    if bad.about["stage"] != module.stage:
        raise ValueError(f"{path}: of stage {bad.about['stage']}, not {module.stage}")
    number, _, kind = bad.about["precision"].partition("-")
    if kind == "true" and number in HALF:
        student.to(HALF[number])
    student.trained.load(bad.weights, str(path))
    student.train()
    student.zero_grad()
    total = 0.0
    for batch in bad.batches:
        with torch.autocast(student.device.type, HALF.get(number), enabled=kind == "mixed"):
            loss = module.loss_of(batch)
        loss.backward()
        total += float(loss.detach())
    return total, gradient_norm(student.trained.parameters())


def gradient_norm(parameters: Sequence[Tensor]) -> float:
    """The Euclidean norm of the gradient, over all shards; 0 where there is none."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _parts(batch: Batch) -> dict[str, Tensor]:
    """The fields of a batch, those of its packed rows among them, as tensors on the CPU."""
    own = vars(batch).copy()
    own |= vars(own.pop("packed")) if "packed" in own else {}
    return {name: torch.as_tensor(value).cpu() for name, value in own.items() if value is not None}


def _batch(parts: dict[str, Tensor], device: torch.device | str) -> Batch:
    values: dict[str, Any] = {name: tensor.to(device) for name, tensor in parts.items()}
    values["order"] = tuple(int(index) for index in values["order"])
    for name in ("global_target_tokens", "window", "num_tokens"):
        values[name] = int(values[name])
    packed = PackedBatch(**{field.name: values.pop(field.name, None) for field in fields(PackedBatch)})
    if "advantages" in values:
        return PolicyBatch(packed, **values)
    return TraceBatch(packed, **values) if values else packed
