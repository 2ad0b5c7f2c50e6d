"""What a row asks: a text, a conversation, or an instruction with its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmreason.data import chats
from slmreason.data.columns import Columns
from slmreason.data.rows import as_text, has_column, text_of, value_of
from slmreason.records import Turn

ASKED = "question|problem"
"""Columns that are a question by themselves, whatever instruction stands beside them."""


def read_asked(row: Mapping[str, Any], columns: Columns) -> chats.Chat:
    """What a row asks: a text, a conversation, or Alpaca's instruction with its input.

    Raises:
        ValueError: it asks nothing, or in a form that cannot be asked.
    """
    is_default = columns.question == Columns.question
    if is_default and not has_column(row, ASKED) and isinstance(row.get("instruction"), str):
        return _alpaca(row)
    turns = chats.turns_in(value_of(row, columns.question)) if has_column(row, columns.question) else None
    if turns is None and is_default and not (has_column(row, columns.question) and has_column(row, columns.answer)):
        turns = next((found for name in chats.COLUMNS if (found := chats.turns_in(row.get(name)))), None)
    if turns is not None:
        return chats.read_chat(turns, row.get("system"))
    return chats.Chat(text_of(value_of(row, columns.question), columns.question), None)


def _alpaca(row: Mapping[str, Any]) -> chats.Chat:
    """An instruction, the input that it is about if there is any, and the pairs of an earlier conversation."""
    question = text_of(row["instruction"], "instruction")
    about = row.get("input")
    if about is not None and not (isinstance(about, str) and not about.strip()):
        question += "\n\n" + as_text(about, "column 'input'").strip()
    history: list[Turn] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("column 'history' must be a list of pairs: what was asked and what was answered")
        history += [Turn("user", text_of(pair[0], "history")), Turn("assistant", text_of(pair[1], "history"))]
    return chats.Chat(question, None, (*chats.system_turns(row.get("system")), *history))
