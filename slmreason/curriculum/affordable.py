"""For how many problems SFT makes traces, where `curriculum.max_tokens` does not reach for all of them.

Without it a run could spend all that is left on traces, and train on none of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

TRIAL = 32
"""Problems whose traces show what the others will cost."""
MOST_EPOCHS = 4
"""That are kept free for a trace: up to four, repeated data is worth nearly as much as new data (2305.16264). A fit
with more of them, such as one that is to last until the budget is spent, has as many problems as one with four."""


@dataclass(frozen=True)
class Affordable:
    """What a fit of SFT may still spend."""

    max_tokens: int
    """Of the whole run."""
    spent: Callable[[], int]
    """Tokens of the run so far."""
    epochs: int
    """Of the fit, each of which trains on the whole set."""
    rng: Callable[[int], random.Random]
    """epoch -> what decides who goes without."""

    def trained(self, tokens: int, epoch: int) -> int:
        """What it costs to train on so many tokens of prompts and targets, from this epoch (0 is the first) on."""
        return tokens * min(self.epochs - epoch, MOST_EPOCHS)

    def problems(self, held: int, each: float) -> float:
        """For how many further problems there is enough.

        Args:
            held: tokens that training on what is in the set already takes.
            each: tokens that a problem takes: its trace, and training on it.
        """
        left = max(0, self.max_tokens - self.spent() - held)
        return left / each if each else float("inf")
