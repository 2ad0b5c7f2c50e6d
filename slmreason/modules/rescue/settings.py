"""The `grpo.rescue` section of the config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

RescueKind = Literal["handover", "sft_gate", "chord"]


@dataclass(frozen=True)
class RescueSettings:
    """What a step does for problems that no rollout solved. They are harvested and are evidence in any case."""

    kind: RescueKind | None = None
    """`handover` samples such a problem again behind the fewest first steps of its trace that lead to a right answer,
    and trains on what follows them. `sft_gate` adds SFT on its trace. `chord` mixes SFT on the traces of all problems
    of the step with GRPO. Null does nothing. Traces are those that the Bridge chose for SFT, else the data set's."""
    samples: int = 2
    """handover: continuations sampled at each number of steps that the search tries. Where one of them is right, the
    group is filled up to grpo.group_size."""
    max_sampled_tokens: int | None = None
    """handover: once so many tokens a problem, on average over those that a step searches for, have been sampled, the
    search begins no more; groups that it has found are filled up beyond it. Null for no limit."""
    sft_weight: float = 1.0
    """sft_gate: weight of a problem's SFT loss beside the GRPO loss of another; both are means over tokens."""
    mu: float = 0.5
    """chord: weight of SFT when a fit begins; GRPO has the rest."""
    mu_end: float = 0.05
    """chord: weight of SFT when the fit ends. It falls, or rises, along a cosine."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of its range, or does nothing; the message names the key.
        """
        owners = {"samples": "handover", "max_sampled_tokens": "handover", "sft_weight": "sft_gate",
                  "mu": "chord", "mu_end": "chord"}  # fmt: skip
        others = {key: f"with grpo.rescue.kind {self.kind or 'null'}" for key, kind in owners.items()
                  if kind != self.kind}  # fmt: skip
        refuse_idle(self, "grpo.rescue", others)
        if self.samples < 1:
            raise ValueError(f"grpo.rescue.samples must be at least 1, got {self.samples}")
        if self.max_sampled_tokens is not None and self.max_sampled_tokens < 1:
            raise ValueError(f"grpo.rescue.max_sampled_tokens must be at least 1, got {self.max_sampled_tokens}")
        if not self.sft_weight > 0:
            raise ValueError(f"grpo.rescue.sft_weight must be above 0, got {self.sft_weight}")
        for key in ("mu", "mu_end"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"grpo.rescue.{key} must be within 0 and 1, got {getattr(self, key)}")
        if self.kind == "chord" and max(self.mu, self.mu_end) == 0:
            raise ValueError("grpo.rescue.mu and grpo.rescue.mu_end: with 0 for both chord does nothing")


def refuse_idle(settings: Any, section: str, idle: Mapping[str, str]) -> None:
    """Refuses values that change nothing.

    Args:
        settings: a dataclass.
        section: its key in a config.
        idle: keys that have no effect beside the others, and why; a key at its default is let pass.

    Raises:
        ValueError: one has another value than its default; the message names it.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in idle and value != field.default:
            raise ValueError(f"{section}.{field.name}: {value} does nothing {idle[field.name]}")
