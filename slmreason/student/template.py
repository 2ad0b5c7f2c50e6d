"""A tokenizer's chat template, tried when it is loaded: what it does with a question and with an answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import date as Date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from slmreason.student.turns import joined_systems

log = logging.getLogger(__name__)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
)
"""For a base model whose tokenizer has no chat template: the question, a blank line, the answer, end of sequence."""
DATE = "2024-07-26"
"""What a template that prints the date gets if no other is chosen: the same prompts on any day."""
OPEN, CLOSE = "<think>", "</think>"
"""Around a model's thoughts. They are part of what it writes, whichever kind of token they are."""
QUESTION, ANSWER = "QUESTION-24680", "ANSWER-13579"
"""Texts of the conversation that a template is tried on; no template prints them by itself."""
_EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPEN})?\s*(?:{CLOSE})?\s*")
_TODAY = re.compile(r"""strftime_now\s*\(\s*(['"])(.*?)\1\s*\)""")
_RESERVED = {"messages", "add_generation_prompt", "tokenize", "chat_template", "strftime_now", "return_dict", "tools"}


class ChatTemplate:
    """A tokenizer's template with what every rendering has: a system prompt, the date, variables."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None,
        path: str | None,
        variables: Mapping[str, Any],
        date: str,
        section: str,
    ) -> None:
        """Gives the tokenizer the template at `path`, or a plain one if it has none. For the rest see `Chat`."""
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        self._section = section
        if path is not None:
            tokenizer.chat_template = _read_template(path, section)
        elif not tokenizer.chat_template:
            begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        self._text = _with_date(tokenizer.get_chat_template(), date, section)
        self._variables = self._known(variables)
        self._in_parts = False
        """Whether the template reads contents as lists of parts."""
        self.prompt, self.whole = self._probe()
        """The prompt of a question, and the conversation with its answer."""

    def _known(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The variables, each of which the template must know."""
        for name in given:
            if name in _RESERVED:
                raise ValueError(f"{self._section}.chat_template_kwargs: {name} is not for a config to set")
            if not re.search(rf"\b{re.escape(name)}\b", self._text):
                raise ValueError(f"{self._section}.chat_template_kwargs: the chat template knows no {name}")
        return dict(given)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The text of messages, with the system prompt before them.

        Raises:
            ValueError: the template refuses them; the message names the key.
        """
        system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
        conversation: list[dict[str, Any]] = [*joined_systems([*system, *messages])]
        if self._in_parts:
            conversation = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt,
                    chat_template=self._text, **self._variables,
                )
            )  # fmt: skip
        except Exception as error:  # whatever a template does with what it is given
            what = "system_prompt" if system else "chat_template"
            raise ValueError(f"{self._section}.{what}: the chat template refuses it: {error}") from error

    def _probe(self) -> tuple[str, str]:
        """(the prompt of a question, the conversation with its answer), with contents in the form that is read."""
        question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
        fault: ValueError | None = None
        for self._in_parts in (False, True):
            try:
                prompt = self.render([question], add_generation_prompt=True)
                whole = self.render([question, answer], add_generation_prompt=False)
            except ValueError as error:
                fault = fault or error
                continue
            held = [QUESTION in prompt, QUESTION in whole, ANSWER in whole]
            held += [self._system_prompt.strip() in prompt] if self._system_prompt else []
            if all(held):
                return prompt, whole
        if fault is not None:
            raise fault
        missing = [name for name, is_there in zip(("the question", "the question", "the answer", "the system prompt"),
                                                  held, strict=False) if not is_there]  # fmt: skip
        key = "system_prompt" if missing == ["the system prompt"] else "chat_template"
        raise ValueError(
            f"{self._section}.{key}: the chat template leaves out {missing[0]} (it should print each message's "
            "'content')"
        )

    def frame(self) -> tuple[str, str]:
        """(what the template leaves out of the prompt, what stands before an answer without thoughts).

        Raises:
            ValueError: the prompt with an answer is not the beginning of the conversation.
        """
        prompt, whole = self.prompt, self.whole
        head = whole.rpartition(ANSWER)[0]
        if head.startswith(prompt):
            between = head[len(prompt) :]
            if _EMPTY_THOUGHT.fullmatch(between):
                return "", between
            if "add_generation_prompt" not in self._text and self._tells_roles():
                log.info("the chat template has no generation prompt: %r begins an answer, as in its conversations",
                         between)  # fmt: skip
                return between, ""
        opened = prompt.rpartition(OPEN)
        if is_open(prompt) and not opened[2].strip() and head in (opened[0], opened[0].rstrip()):
            return "", f"\n{CLOSE}\n\n"  # past thoughts are left out of a conversation (DeepSeek-R1)
        shared = len(_common(prompt, head))
        before = prompt[max(0, shared - 30) : shared]
        raise ValueError(
            f"{self._section}.chat_template: its prompt with an answer is not the beginning of the conversation that "
            f"it renders: after {before!r} the prompt has {prompt[shared : shared + 30]!r}, "
            f"the conversation {whole[shared : shared + 30]!r}"
        )

    def _tells_roles(self) -> bool:
        """Whether an answer does not look like a question."""
        asked = self.render([{"role": "user", "content": ANSWER}], add_generation_prompt=False)
        answer = self.render(
            [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
            add_generation_prompt=False,
        )
        return asked not in answer


def _read_template(path: str, section: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{section}.chat_template: {path} cannot be read: {error}") from error


def _with_date(template: str, date: str, section: str) -> str:
    """A template in whose text the date stands in the place of each call for today's.

    Raises:
        ValueError: it is no date, or the template makes up how it is written.
    """
    try:
        day = Date.fromisoformat(date)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}.date: {date!r} is not a date such as {DATE}") from error
    dated, calls = _TODAY.subn(lambda call: repr(day.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise ValueError(
            f"{section}.chat_template: it asks for today's date in a form that is not written out, so that the same "
            "prompts could not be had tomorrow; write strftime_now('%d %b %Y') or the date itself"
        )
    if calls:
        key = " (student.date)" if section == "student" else ""  # a teacher has no such key
        log.info("the chat template may print the date: it is %s in every prompt of this run%s", date, key)
    return dated


def is_open(text: str) -> bool:
    """Whether a text ends within a thought."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:end]
