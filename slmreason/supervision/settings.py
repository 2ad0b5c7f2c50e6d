"""The `bridge` section of the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slmreason.records import Band


@dataclass
class BridgeSettings:
    """How hard problems are bridged."""

    bands: tuple[Band, ...] = ("hard",)
    """Problems of these bands are bridged; in SFT the others have their raw teacher trace."""
    select: bool = True
    """Choose among raw, rewritten and handed-over traces; false trains on the raw trace (a control)."""
    raw: Literal["compared", "last"] = "compared"
    """`compared` chooses the raw trace where it is the most learnable; `last` only where no other passed. What a
    student would never write itself has a high surprisal, which lowers the ratio: a real student often has its lowest
    ratio at the raw trace."""
    handover: bool = True
    """Propose the teacher's first steps followed by the student's own continuation."""
    handover_share: float = 0.5
    """Share of the teacher's steps that are handed over; `handover_search` finds its own."""
    handover_search: bool = False
    """Sample the continuations: first behind all steps but the last two; then, as far as the tokens go, behind fewer,
    to find the least help that ends right. Only for problems that have no verified trace but the raw one, so it serves
    where no teacher rewrites."""
    handover_samples: int = 4
    """At each number of steps that `handover_search` tries, continuations are sampled until one ends right, so many at
    most."""
    rationalise: int = 0
    """For a problem that has no verified trace but the raw one and that the most help did not serve, the student sees
    the raw one and writes its own (STaR), until one passes, so often at most. It is trained on with the plain
    question."""
    temperature: float = 0.7
    """At which `handover_search` and `rationalise` sample."""
    max_sampled_tokens: int | None = None
    """Once so many tokens a problem, on average over the problems that are bridged together, have been sampled for
    `handover_search` and `rationalise`, no more are begun; null for no limit."""
    max_trace_tokens: int = 512
    """A longer candidate is rejected and counted."""
    max_mean_nll: float = 3.0
    """Nats a token. A trace beyond it is chosen only when every other is beyond it too: ranks are capped and
    surprisal is not, so the ratio alone would favour a near-impossible trace."""
    min_mean_nll: float = 0.0
    """Nats a token. A chosen trace below it is known by heart: training on it again teaches nothing and costs what the
    student knows besides, so it is rejected, and its problem is left to GRPO and CFT."""
    max_rank: int = 100
    """Ranks are capped here in the rank-surprisal ratio."""
    exemplars: int = 3
    """The student's own correct solutions that the teacher is shown as style."""
    traces: str | None = None
    """File of `slmreason bridge`, perhaps edited: its chosen traces are verified and trained on as they are."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of its range, or contradicts another; the message names the key.
        """
        if self.handover_samples < 1:
            raise ValueError(f"bridge.handover_samples must be at least 1, got {self.handover_samples}")
        if self.rationalise < 0:
            raise ValueError(f"bridge.rationalise must be at least 0, got {self.rationalise}")
        if self.temperature <= 0:
            raise ValueError(f"bridge.temperature must be above 0 (equal samples add nothing), got {self.temperature}")
        if self.max_sampled_tokens is not None and self.max_sampled_tokens < 1:
            raise ValueError(f"bridge.max_sampled_tokens must be at least 1, got {self.max_sampled_tokens}")
        if self.raw == "last" and not self.select:
            raise ValueError("bridge.raw: last does nothing with bridge.select: false, which takes the raw trace alone")
        if self.handover_search and not self.handover:
            raise ValueError("bridge.handover_search: true does nothing with bridge.handover: false")

    @property
    def samples(self) -> bool:
        """Whether the student is sampled for candidates, beyond a greedy hand-over."""
        return self.select and (self.handover_search or self.rationalise > 0)
