"""What a chat completion says, in the shapes that OpenAI-compatible servers give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPOKEN = (None, "text", "output_text")
"""Types of the parts of a content that are the answer; others are thoughts (`reasoning`, `thinking`) or no text."""
FILTERED = "content_filter"
"""The finish reason of an answer that the server's filter withheld or cut."""


def is_content(content: Any) -> bool:
    """True for what an answer's content can be: a text, nothing, or parts."""
    if isinstance(content, list):
        return all(isinstance(part, str | Mapping) for part in content)
    return content is None or isinstance(content, str | Mapping)


def content_text(content: Any) -> str:
    """The text of a content, without the parts that are thoughts. Servers put thoughts beside the content too."""
    if isinstance(content, list):
        return "".join(map(content_text, content))
    if isinstance(content, Mapping):
        return _part_text(content) if content.get("type") in SPOKEN else ""
    return content if isinstance(content, str) else ""


def refusal_in(content: Any, refusal: Any, finish_reason: Any) -> str | None:
    """Why the model or its server gave no answer, in their words; None where there is one."""
    parts = [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []
    words = [str(part.get("refusal") or "") for part in parts if part.get("type") == "refusal"]
    said = refusal if isinstance(refusal, str) and refusal.strip() else " ".join(filter(None, words))
    if said:
        return f"the model refused: {said}"
    return "the server's content filter withheld the answer" if finish_reason == FILTERED else None


def _part_text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if isinstance(text, Mapping):
        text = text.get("value")
    return text if isinstance(text, str) else ""
