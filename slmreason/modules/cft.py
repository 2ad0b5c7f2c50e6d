"""Critique fine-tuning: the same objective as SFT, on diagnoses, repairs and new traces of harvested failures."""

from __future__ import annotations

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import StudentModule
from slmreason.modules.settings import CFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.student import Student


class CFTModule(SFTModule):
    """Turns groups that carried no gradient into supervision. A fit of its own (arXiv 2501.17703: mixing did worse)."""

    stage = CFTSettings.stage

    def __init__(self, student: Student, settings: CFTSettings | None = None) -> None:
        super().__init__(student, settings or CFTSettings())

    def enter(self, data: ReasoningDataModule) -> int:
        """Critiques are made by a curriculum alone."""
        return StudentModule.enter(self, data)
