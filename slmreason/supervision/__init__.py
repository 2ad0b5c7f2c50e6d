"""What the student is trained on: traces that the Bridge makes learnable, and critiques of failed attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.supervision.critique import CritiqueSettings
    from slmreason.supervision.settings import BridgeSettings

__all__ = [
    "BridgeSettings",
    "CritiqueSettings",
]

__getattr__ = lazily(
    __name__,
    {
        "BridgeSettings": "settings",
        "CritiqueSettings": "critique",
    },
)
