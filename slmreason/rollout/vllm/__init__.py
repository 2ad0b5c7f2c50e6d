"""Rollouts with vLLM, in this process or in one beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.rollout.vllm.engine import LONGEST, VLLMEngine

__all__ = [
    "LONGEST",
    "VLLMEngine",
]

__getattr__ = lazily(
    __name__,
    {
        "LONGEST": "engine",
        "VLLMEngine": "engine",
    },
)
