"""vLLM, in this process or in one beside it: for the student's rollouts, and for a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.rollout.vllm.engine import VLLMEngine
    from slmreason.rollout.vllm.options import LONGEST, Spec, VLLMOptions, check_installed
    from slmreason.rollout.vllm.process import Worker

__all__ = [
    "LONGEST",
    "Spec",
    "VLLMEngine",
    "VLLMOptions",
    "Worker",
    "check_installed",
]

__getattr__ = lazily(
    __name__,
    {
        "LONGEST": "options",
        "Spec": "options",
        "VLLMEngine": "engine",
        "VLLMOptions": "options",
        "Worker": "process",
        "check_installed": "options",
    },
)
