"""The LightningModules of the three stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.modules.base import StudentModule
    from slmreason.modules.cft import CFTModule
    from slmreason.modules.grpo import GRPOModule
    from slmreason.modules.sft import SFTModule

__all__ = [
    "CFTModule",
    "GRPOModule",
    "SFTModule",
    "StudentModule",
]

__getattr__ = lazily(
    __name__,
    {
        "CFTModule": "cft",
        "GRPOModule": "grpo",
        "SFTModule": "sft",
        "StudentModule": "base",
    },
)
