"""What stands in a prompt before its question, in the form that a chat template takes.

Templates differ in what they allow. One without a place for a system turn gets its text at the head of the first user
turn; one that leaves out earlier turns cannot ask such a problem, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from slmreason.records import Turn

Message = dict[str, str]
Render = Callable[[list[Message]], str]
"""Messages to the text of their prompt; ValueError where the template refuses them."""
SYSTEM, EARLIER, REPLY, LAST = "SYSTEM-11235", "EARLIER-81321", "REPLY-34558", "LAST-91442"
"""Texts that no template prints by itself."""


class EarlierTurns:
    """What a template does with the turns before a question; found by trying, when a problem first has any."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def messages(self, turns: Sequence[Turn], asked: str) -> list[Message]:
        """The turns and what is asked as messages that the template prints in full.

        Raises:
            ValueError: there are earlier turns of a conversation, and the template leaves them out.
        """
        messages = as_messages([*turns, Turn("user", asked)])
        if turns and turns[0].role == "system" and not self._takes_system:
            messages = without_system(messages)
        if any(turn.role != "system" for turn in turns) and not self._takes_earlier:
            raise ValueError("student.chat_template: the chat template leaves out the earlier turns of a conversation")
        return messages

    @cached_property
    def _takes_system(self) -> bool:
        return self._prints([Turn("system", SYSTEM), Turn("user", LAST)])

    @cached_property
    def _takes_earlier(self) -> bool:
        return self._prints([Turn("user", EARLIER), Turn("assistant", REPLY), Turn("user", LAST)])

    def _prints(self, said: Sequence[Turn]) -> bool:
        try:
            rendered = self._render(as_messages(said))
        except ValueError:
            return False
        return all(turn.text in rendered for turn in said)


def as_messages(turns: Sequence[Turn]) -> list[Message]:
    """Turns as messages of a conversation."""
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def joined_systems(messages: Sequence[Message]) -> list[Message]:
    """The same messages, the system turns at their beginning as one: templates take one."""
    count = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{"role": "system", "content": text}, *messages[count:]]


def without_system(messages: Sequence[Message]) -> list[Message]:
    """The same messages, the text of the system turn at the head of the turn behind it."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    text = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{"role": messages[1]["role"], "content": text}, *messages[2:]]
