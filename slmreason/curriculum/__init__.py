"""Rounds of fits on one student, and what they leave in the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.curriculum.curriculum import Curriculum
    from slmreason.curriculum.parts import Parts
    from slmreason.curriculum.settings import CheckpointSettings, CurriculumSettings, ProbeSettings

__all__ = [
    "CheckpointSettings",
    "Curriculum",
    "CurriculumSettings",
    "Parts",
    "ProbeSettings",
]

__getattr__ = lazily(
    __name__,
    {
        "CheckpointSettings": "settings",
        "Curriculum": "curriculum",
        "CurriculumSettings": "settings",
        "Parts": "parts",
        "ProbeSettings": "settings",
    },
)
