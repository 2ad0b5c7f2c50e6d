"""Whether an answer is right, and what it earns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.verify.rewards import AnswerReward, RewardFn, Verdict

__all__ = [
    "AnswerReward",
    "RewardFn",
    "Verdict",
]

__getattr__ = lazily(
    __name__,
    {
        "AnswerReward": "rewards",
        "RewardFn": "rewards",
        "Verdict": "rewards",
    },
)
