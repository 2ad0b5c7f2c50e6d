"""Difficulty-aware SFT-then-RL for small language models, on Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.cli.python import FitResult, fit
    from slmreason.data.datamodule import ReasoningDataModule
    from slmreason.modules.cft import CFTModule
    from slmreason.modules.grpo import GRPOModule
    from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings
    from slmreason.modules.sft import SFTModule
    from slmreason.records import Problem
    from slmreason.rollout.transformers import HFEngine
    from slmreason.rollout.vllm.engine import VLLMEngine
    from slmreason.student.lora import Lora
    from slmreason.student.student import Student
    from slmreason.verify.rewards import AnswerReward

__all__ = [
    "AnswerReward",
    "CFTModule",
    "CFTSettings",
    "FitResult",
    "GRPOModule",
    "GRPOSettings",
    "HFEngine",
    "Lora",
    "Problem",
    "ReasoningDataModule",
    "SFTModule",
    "SFTSettings",
    "Student",
    "VLLMEngine",
    "fit",
]

__getattr__ = lazily(
    __name__,
    {
        "AnswerReward": "verify.rewards",
        "CFTModule": "modules.cft",
        "CFTSettings": "modules.settings",
        "FitResult": "cli.python",
        "GRPOModule": "modules.grpo",
        "GRPOSettings": "modules.settings",
        "HFEngine": "rollout.transformers",
        "Lora": "student.lora",
        "Problem": "records",
        "ReasoningDataModule": "data.datamodule",
        "SFTModule": "modules.sft",
        "SFTSettings": "modules.settings",
        "Student": "student.student",
        "VLLMEngine": "rollout.vllm.engine",
        "fit": "cli.python",
    },
)
