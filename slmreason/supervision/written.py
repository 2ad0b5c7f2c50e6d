"""What a teacher wrote counts as a cost of the student's training."""

from __future__ import annotations

from collections.abc import Iterable

from slmreason.student import Student


def count_written(student: Student, texts: Iterable[str | None]) -> None:
    """Adds what a teacher wrote, in tokens of the student, to what its training has cost."""
    student.tokens.written += sum(len(student.encode_target(text)) for text in texts if text)
