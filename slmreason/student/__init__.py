"""The student: one causal language model with its tokenizer, trained by every stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.student.layout import PLAIN_ATTENTION
    from slmreason.student.loading import EMBEDDED, resolve_model
    from slmreason.student.lora import Lora
    from slmreason.student.scoring import TokenScores
    from slmreason.student.student import Student

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
        "Lora": "lora",
        "PLAIN_ATTENTION": "layout",
        "Student": "student",
        "TokenScores": "scoring",
        "resolve_model": "loading",
    },
)
