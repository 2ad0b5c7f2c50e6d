"""What becomes of AdamW's updates in bfloat16: without float32 copies of the weights, and with them.

    python -m benchmarks.precision --out benchmarks/results/precision.json

Each row is beside the same steps on float32 weights. `moved` is the share of the weights that differ from what they
were at first, `size` the length of the whole update over that of float32's, `cosine` the angle between the two.

Simulated: a million weights whose gradients have a mean of their own, a third of their noise's size. The same
gradients, rounded to bfloat16, go to all sides. Trained: SFT of the embedded student, whose gradients are each side's
own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import quiet, save, solutions
from slmreason.student import Lora, Student
from slmreason.student.optimizer import MASTER, make_adamw
from slmreason.student.packing import collate

HIDDEN = 896
"""Of Qwen2.5-0.5B; the first matrix of an adapter is drawn from the interval of 1 / sqrt(HIDDEN) to both sides of 0."""


@dataclass(frozen=True)
class Case:
    """Weights, a learning rate and a number of steps."""

    name: str
    learning_rate: float
    steps: int
    weights: Callable[[], Tensor]
    adapter: bool = False
    """Adapters are kept in float32 themselves."""


def _normal() -> Tensor:
    return 0.02 * torch.randn(1000, 1000)


def _lora_a() -> Tensor:
    return (2 * torch.rand(1000, 1000) - 1) / HIDDEN**0.5


CASES = [
    Case("all weights, GRPO", 1e-6, 120, _normal),
    Case("all weights, CFT", 5e-6, 60, _normal),
    Case("all weights, SFT", 1e-5, 120, _normal),
    Case("norm weights of 1", 1e-5, 120, lambda: torch.ones(1000)),
    Case("A of LoRA, GRPO", 3e-5, 120, _lora_a, adapter=True),
    Case("A of LoRA, SFT", 1e-4, 120, _lora_a, adapter=True),
]


def simulated(case: Case) -> dict[str, Any]:
    """A case with gradients that are drawn."""
    torch.manual_seed(0)
    start = case.weights().bfloat16()
    mean = torch.randn(start.shape) / 3
    whole, plain = nn.Parameter(start.float()), nn.Parameter(start.clone())
    ours = nn.Parameter(start.float() if case.adapter else start.clone())
    optimizer = make_adamw([ours], case.learning_rate, 0.0)
    sides = [
        (whole, torch.optim.AdamW([whole], lr=case.learning_rate, weight_decay=0.0)),
        (plain, torch.optim.AdamW([plain], lr=case.learning_rate, weight_decay=0.0)),
        (ours, optimizer),
    ]
    for _ in range(case.steps):
        gradient = (mean + torch.randn(start.shape)).bfloat16()
        for weight, side in sides:
            weight.grad = gradient.to(weight.dtype)
            side.step()
    copy = optimizer.state[ours].get(MASTER, ours.detach())
    expected = whole.detach() - start.float()
    row = {"case": case.name, "learning_rate": case.learning_rate, "steps": case.steps,
           "plain": compared_update(plain.detach() - start.float(), expected),
           "ours": compared_update(copy - start.float(), expected)}  # fmt: skip
    if not case.adapter:
        row["ours, weights as they are used"] = compared_update(ours.detach() - start.float(), expected)
    return row


def compared_update(update: Tensor, expected: Tensor) -> dict[str, float]:
    """See the top of the file. Any shape, both float32."""
    product = float((update.double() * expected.double()).sum())
    mine, theirs = float(update.double().norm()), float(expected.double().norm())
    return {
        "moved": float((update != 0).double().mean()),
        "size": mine / theirs,
        "cosine": product / (mine * theirs) if mine else 0.0,
    }


def trained(learning_rate: float, steps: int, lora: Lora | None) -> dict[str, Any]:
    """SFT of the embedded student on solutions of its pool, 32 a step, in the three ways."""
    updates = {name: sft_update(name, learning_rate, steps, lora) for name in ("float32", "plain", "ours")}
    return {
        "case": f"{'adapters' if lora else 'all weights'} of the embedded student, SFT",
        "learning_rate": learning_rate, "steps": steps,
        **{name: compared_update(updates[name], updates["float32"]) for name in ("plain", "ours")},
    }  # fmt: skip


def sft_update(side: str, learning_rate: float, steps: int, lora: Lora | None, device: str = "cpu") -> Tensor:
    """What training adds to the weights: float32, flat; the copies' update where there are copies."""
    torch.manual_seed(0)
    student = Student("embedded:qwen2", lora=lora, instruction="")
    student.to(torch.float32 if side == "float32" else torch.bfloat16)
    student.to(device)
    parameters = student.trained.parameters()
    if side == "plain":  # as it was: adapters are rounded too
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()
    start = [parameter.detach().bfloat16().float() for parameter in parameters]
    if side == "float32":
        with torch.no_grad():
            for parameter, value in zip(parameters, start, strict=True):
                parameter.copy_(value)
    make = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    optimizer = make if side != "ours" else make_adamw(parameters, learning_rate, 0.0)
    examples = solutions(student, 32 * steps)
    for step in range(steps):
        batch = collate(examples[32 * step : 32 * (step + 1)], student.pad_token_id, hidden_size=student.hidden_size)
        optimizer.zero_grad()
        (-student.score(batch.to(device)).log_probs.mean()).backward()
        optimizer.step()
    ends = [optimizer.state[parameter].get(MASTER, parameter.detach()).float() for parameter in parameters]
    return torch.cat([(end - begin).flatten() for end, begin in zip(ends, start, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of the embedded student's SFT")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    rows = [simulated(case) for case in CASES]
    rows += [trained(rate, options.steps, None) for rate in (1e-6, 1e-5)]
    rows += [trained(rate, options.steps, Lora(r=8, alpha=16)) for rate in (3e-5, 1e-4)]
    for row in rows:
        print(f"{row['case']} at {row['learning_rate']:g}, {row['steps']} steps")
        for side in row.keys() - {"case", "learning_rate", "steps"}:
            print(f"  {side}: " + ", ".join(f"{name} {value:.3f}" for name, value in row[side].items()))
    save(options.out, rows)


if __name__ == "__main__":
    main()
