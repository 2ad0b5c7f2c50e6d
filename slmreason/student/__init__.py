"""The student: one causal language model with its tokenizer, trained by every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.student.loading import EMBEDDED, resolve_model
    from slmreason.student.scoring import TokenScores
    from slmreason.student.student import PLAIN_ATTENTION, Lora, Student

__all__ = [
    "EMBEDDED",
    "PLAIN_ATTENTION",
    "Lora",
    "Student",
    "TokenScores",
    "resolve_model",
]

__getattr__ = lazily(
    __name__,
    {
        "EMBEDDED": "loading",
        "Lora": "student",
        "PLAIN_ATTENTION": "student",
        "Student": "student",
        "TokenScores": "scoring",
        "resolve_model": "loading",
    },
)
