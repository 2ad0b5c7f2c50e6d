"""What stands in a prompt before its question, in the form that a chat template takes.

Templates differ in what they allow. One without a place for a system turn gets its text at the head of the first user
turn; one that leaves out earlier turns cannot ask such a problem, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slmreason.records import Turn

Message = dict[str, str]
Render = Callable[[list[Message]], str]
"""Messages to the text of their prompt; ValueError where the template refuses them."""
SYSTEM, EARLIER, REPLY, LAST = "SYSTEM-11235", "EARLIER-81321", "REPLY-34558", "LAST-91442"
"""Texts that no template prints by itself."""


def as_messages(turns: Sequence[Turn], question: str) -> list[Message]:
    """The turns and the question as messages of a conversation."""
    said = [*turns, Turn("user", question)]
    return [{"role": turn.role, "content": turn.text} for turn in said]


def takes_system(render: Render) -> bool:
    """Whether a template prints a system turn."""
    messages = as_messages([Turn("system", SYSTEM)], LAST)
    try:
        return SYSTEM in render(messages)
    except ValueError:
        return False


def takes_earlier(render: Render) -> bool:
    """Whether a template prints the turns before the last one."""
    messages = as_messages([Turn("user", EARLIER), Turn("assistant", REPLY)], LAST)
    try:
        rendered = render(messages)
    except ValueError:
        return False
    return EARLIER in rendered and REPLY in rendered


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
