"""The LightningModules of the three stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.modules.base import StudentModule
    from slmreason.modules.cft import CFTModule
    from slmreason.modules.grpo import GRPOModule
    from slmreason.modules.rescue import RescueSettings
    from slmreason.modules.settings import CFTSettings, FitSettings, GRPOSettings, SFTSettings, ValidationSettings
    from slmreason.modules.sft import SFTModule
    from slmreason.modules.validation import Validation

__all__ = [
    "CFTModule",
    "CFTSettings",
    "FitSettings",
    "GRPOModule",
    "GRPOSettings",
    "RescueSettings",
    "SFTModule",
    "SFTSettings",
    "StudentModule",
    "Validation",
    "ValidationSettings",
]

__getattr__ = lazily(
    __name__,
    {
        "CFTModule": "cft",
        "CFTSettings": "settings",
        "FitSettings": "settings",
        "GRPOModule": "grpo",
        "GRPOSettings": "settings",
        "RescueSettings": "rescue.settings",
        "SFTModule": "sft",
        "SFTSettings": "settings",
        "StudentModule": "base",
        "Validation": "validation",
        "ValidationSettings": "settings",
    },
)
