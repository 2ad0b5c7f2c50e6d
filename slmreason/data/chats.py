"""Conversations as rows: `messages` (role, content), ShareGPT's `conversations` (from, value), and TRL's prompt lists.

The last user turn is the question, and an assistant turn behind it the solution. What was said before stays in the
prompt: a system turn, and earlier turns of user and assistant. Conversations in which they do not take turns are
rejected, since most chat templates refuse them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmreason.data.rows import as_text, kind_of
from slmreason.records import Role, Turn

COLUMNS = ("messages", "conversations", "conversation")
"""What a column of conversations is called, where the config names none."""
ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
MAX_LITERAL_CHARS = 100_000


@dataclass(frozen=True)
class Chat:
    """A question, what was said before it and, if the conversation has one, the answer to it."""

    question: str
    solution: str | None
    turns: tuple[Turn, ...] = ()


def turns_in(value: Any) -> list[Mapping[str, Any]] | None:
    """The turns of a conversation, also where it is written as text or as columns in one; None for anything else."""
    if isinstance(value, str):
        value = _written(value)
    if isinstance(value, Mapping) and _is_turn(value):
        parts = [part for part in value.values() if isinstance(part, list | tuple)]
        if len(parts) == len(value) and len({len(part) for part in parts}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(value, list | tuple) and value and all(_is_turn(turn) for turn in value):
        return list(value)
    return None


def _written(text: str) -> Any:
    """A list of objects that stands in a cell of a table: as JSON, or as Python prints it."""
    text = text.strip()
    if not (text.startswith("[") and text[1:].lstrip().startswith("{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > MAX_LITERAL_CHARS:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and bool({"role", "from"} & set(turn)) and bool({"content", "value"} & set(turn))


def read_chat(turns: Sequence[Mapping[str, Any]], system: Any = None) -> Chat:
    """The question of a conversation, what was said before it, and the answer to it.

    Args:
        system: what stands in a column of its own, as in some ShareGPT files.

    Raises:
        ValueError: nobody asks, a turn is empty, or user and assistant do not take turns; the message says which.
    """
    said = [Turn(_role(turn), _content(turn, number)) for number, turn in enumerate(turns, start=1)]
    opening = system_turns(system)
    while said and said[0].role == "system":
        first = said.pop(0)
        opening += (first,) if first.text else ()
    roles = [turn.role for turn in said]
    if not roles or roles != _alternating(len(roles)):
        raise ValueError(f"a conversation of another form: {_described(roles)}; user and assistant must take turns "
                         "behind a system turn, and the last user turn is the question")  # fmt: skip
    if empty := next((turn.role for turn in said if not turn.text), None):
        raise ValueError(f"the {empty} turn of the conversation is empty")
    solution = said.pop().text if roles[-1] == "assistant" else None
    question = said.pop().text
    return Chat(question, solution, (*opening, *said))


def system_turns(value: Any) -> tuple[Turn, ...]:
    """What a column of its own says to the student before anybody asks; nothing where it is empty or no text."""
    return (Turn("system", value.strip()),) if isinstance(value, str) and value.strip() else ()


def _alternating(count: int) -> list[str]:
    return [("user", "assistant")[at % 2] for at in range(count)]


def answer_in(turns: Sequence[Mapping[str, Any]]) -> str:
    """What the assistant says last in a column that is a conversation, with or without the question before it.

    Raises:
        ValueError: its last turn is not the assistant's, or is empty.
    """
    said = [(_role(turn), _content(turn, number)) for number, turn in enumerate(turns, start=1)]
    roles = [role for role, _ in said if role != "system"]
    is_dialogue = bool(roles) and roles[-1] == "assistant" and roles == _alternating(len(roles))
    if not (is_dialogue or roles == ["assistant"]) or not said[-1][1]:
        raise ValueError(f"a conversation of another form: {_described(roles)}; its last turn must be the assistant's, "
                         "which is the answer")  # fmt: skip
    return said[-1][1]


def _described(roles: Sequence[str]) -> str:
    counts = {role: roles.count(role) for role in dict.fromkeys(roles)}
    if not roles:
        return "nobody asks"
    last = f", the last is of the {roles[-1]}" if roles[-1] != "assistant" else ""
    return ", ".join(f"{count} {role} turn{'s' * (count > 1)}" for role, count in counts.items()) + last


def _role(turn: Mapping[str, Any]) -> Role:
    given = turn.get("role", turn.get("from"))
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"a turn of {given!r}: there are {', '.join(sorted(ROLES))}")
    return role


def _content(turn: Mapping[str, Any], number: int) -> str:
    what = f"turn {number} of the conversation"
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"{what} calls a tool, which a student cannot")
    content = turn["content"] if "content" in turn else turn["value"]
    if isinstance(content, list | tuple):
        is_text = [isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str)
                                             and part.get("type", "text") == "text") for part in content]  # fmt: skip
        if not all(is_text):
            raise ValueError(f"{what} holds more than text")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{what} must be a text: it is {kind_of(content)}")
    return as_text(content, what).strip()
