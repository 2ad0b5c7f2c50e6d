"""Critique fine-tuning: the same objective as SFT, on diagnoses, repairs and new traces of harvested failures."""

from __future__ import annotations

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import Decay, StudentModule
from slmreason.modules.sft import SFTModule
from slmreason.student import Student


class CFTModule(SFTModule):
    """Turns groups that carried no gradient into supervision. A fit of its own (arXiv 2501.17703: mixing did worse)."""

    stage = "cft"

    def __init__(
        self,
        student: Student,
        learning_rate: float = 5e-6,
        epochs: int = 1,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Decay = "constant",
        max_skipped_steps: int = 3,
    ) -> None:
        """
        Args:
            learning_rate: Peak learning rate of AdamW.
            epochs: Epochs of each CFT fit; problems that a newer rollout solved leave the set between them.
            weight_decay: On matrices only.
            warmup_steps: Optimizer steps of linear warm-up at the start of each fit.
            decay: How the learning rate falls over the fit.
            max_skipped_steps: A step whose loss or gradient is not finite is skipped; the run stops, and keeps the
                batch, when this many in a row are.
        """
        super().__init__(student, learning_rate, epochs, weight_decay, warmup_steps, decay, max_skipped_steps)

    def enter(self, data: ReasoningDataModule) -> int:
        """Critiques are made by a curriculum alone."""
        return StudentModule.enter(self, data)
