"""Rounds of fits on one student, and what they leave in the run folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.curriculum.curriculum import CheckpointSettings, Curriculum, CurriculumSettings, ProbeSettings

__all__ = [
    "CheckpointSettings",
    "Curriculum",
    "CurriculumSettings",
    "ProbeSettings",
]

__getattr__ = lazily(
    __name__,
    {
        "CheckpointSettings": "curriculum",
        "Curriculum": "curriculum",
        "CurriculumSettings": "curriculum",
        "ProbeSettings": "curriculum",
    },
)
