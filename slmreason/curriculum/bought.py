"""What measuring outside GRPO took of a round's tokens, and what it changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bought:
    """One measurement outside GRPO."""

    round: int
    stage: str
    label: str
    """For those who watch."""
    wanted: int
    """Problems that were to be measured."""
    problems: int
    """Problems that there were tokens for; all of them without `curriculum.probe.share`."""
    rollouts: int
    tokens: int
    first_bands: int
    """Problems of the pool that have a band since, and had none."""
    moved: int
    """Problems of the pool that are in another band since."""

    @property
    def per_thousand(self) -> float:
        """Problems that have another band, or their first, for each thousand tokens."""
        return 1000 * (self.first_bands + self.moved) / self.tokens if self.tokens else 0.0

    def describe(self, allowed: float) -> str:
        """The line that says what was bought.

        Args:
            allowed: tokens that `curriculum.probe.share` left for measuring.
        """
        return (
            f"{self.label}: {self.tokens} of {allowed:.0f} tokens bought {self.rollouts} rollouts of {self.problems} "
            f"of {self.wanted} problems: {self.first_bands} have their first band, {self.moved} another one "
            f"({self.per_thousand:.2f} for each 1,000 tokens)"
        )


def as_summary(bought: Sequence[Bought]) -> list[dict[str, Any]]:
    """What a stage's entry in summary.json says of them."""
    return [{**_without_place(each), "bands_per_1000_tokens": round(each.per_thousand, 3)} for each in bought]


def _without_place(bought: Bought) -> dict[str, Any]:
    return {name: value for name, value in asdict(bought).items() if name not in ("round", "stage")}
