"""Sampling completions from the student."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.rollout.engine import Completion, EngineError, RolloutEngine, Sampling
    from slmreason.rollout.transformers import HFEngine
    from slmreason.rollout.vllm.engine import VLLMEngine

__all__ = [
    "Completion",
    "EngineError",
    "HFEngine",
    "RolloutEngine",
    "Sampling",
    "VLLMEngine",
]

__getattr__ = lazily(
    __name__,
    {
        "Completion": "engine",
        "EngineError": "engine",
        "HFEngine": "transformers",
        "RolloutEngine": "engine",
        "Sampling": "engine",
        "VLLMEngine": "vllm.engine",
    },
)
