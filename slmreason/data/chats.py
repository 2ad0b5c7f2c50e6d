"""Conversations as rows: `messages` (role, content) and ShareGPT's `conversations` (from, value).

A problem is one question with one answer, so a row is read when it holds one user turn and at most one assistant turn
behind it. A longer conversation is rejected: its last question alone would be another question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmreason.data.rows import as_text, kind_of

COLUMNS = ("messages", "conversations", "conversation")
"""What a column of conversations is called, where the config names none."""
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}


@dataclass(frozen=True)
class Chat:
    """A question and, if the conversation has one, the answer to it."""

    question: str
    solution: str | None
    system: str | None
    """What the conversation begins with before anybody asks."""


def turns_in(value: Any) -> list[Mapping[str, Any]] | None:
    """The turns of a conversation, also where it is written as JSON or as columns in one; None for anything else."""
    if isinstance(value, str):
        if not value.startswith("[{"):
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping) and _is_turn(value):
        parts = [part for part in value.values() if isinstance(part, list | tuple)]
        if len(parts) == len(value) and len({len(part) for part in parts}) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(value, list | tuple) and value and all(_is_turn(turn) for turn in value):
        return list(value)
    return None


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and bool({"role", "from"} & set(turn)) and bool({"content", "value"} & set(turn))


def read_chat(turns: list[Mapping[str, Any]], system: Any = None) -> Chat:
    """The one question of a conversation, and the answer to it.

    Args:
        system: what stands in a column of its own, as in some ShareGPT files.

    Raises:
        ValueError: it has no question, several, or turns that are neither; the message says which.
    """
    said = [(_role(turn), _content(turn, number)) for number, turn in enumerate(turns, start=1)]
    opening = [system.strip()] if isinstance(system, str) and system.strip() else []
    while said and said[0][0] == "system":
        opening += [text] if (text := said.pop(0)[1]) else []
    roles = [role for role, _ in said]
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(f"a conversation of another form: {_described(roles)}; one user turn and one assistant turn "
                         "behind it make a problem with its solution")  # fmt: skip
    question, solution = said[0][1], said[1][1] if len(said) > 1 else None
    if not question or solution == "":
        raise ValueError(f"the {'assistant' if question else 'user'} turn of the conversation is empty")
    return Chat(question, solution, "\n".join(opening) or None)


def answer_in(turns: list[Mapping[str, Any]]) -> str:
    """What the assistant says in a column of answers that is a conversation, with or without the question before it.

    Raises:
        ValueError: there is not one assistant turn at its end.
    """
    said = [(_role(turn), _content(turn, number)) for number, turn in enumerate(turns, start=1)]
    roles = [role for role, _ in said if role != "system"]
    if roles not in (["assistant"], ["user", "assistant"]) or not said[-1][1]:
        raise ValueError(f"a conversation of another form: {_described(roles)}; one assistant turn is the answer")
    return said[-1][1]


def _described(roles: list[str]) -> str:
    counts = {role: roles.count(role) for role in dict.fromkeys(roles)}
    if not roles:
        return "nobody asks"
    last = f", the last is of the {roles[-1]}" if roles[-1] != "assistant" else ""
    return ", ".join(f"{count} {role} turn{'s' * (count > 1)}" for role, count in counts.items()) + last


def _role(turn: Mapping[str, Any]) -> str:
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
