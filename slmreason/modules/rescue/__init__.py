"""What a GRPO step does for problems that no rollout solved: options, a file each, none of them on by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.modules.rescue.settings import RescueSettings

__all__ = ["RescueSettings"]

__getattr__ = lazily(__name__, {"RescueSettings": "settings"})
