"""Chat templates and special tokens: how a question becomes a prompt, and what ends the student's turn.

The template is the student's own. Its frame is the only source of special tokens: what a dataset or a teacher writes
is plain text, even where it spells one. A prompt with its target is always the beginning of the conversation as the
template renders it as a whole; a template with which that cannot be had is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import partial
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from slmreason.records import Turn
from slmreason.student.turns import EarlierTurns, joined_systems

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
_QUESTION, _ANSWER = "QUESTION-24680", "ANSWER-13579"
_EMPTY_THOUGHT = re.compile(rf"\s*(?:{OPEN})?\s*(?:{CLOSE})?\s*")
_TODAY = re.compile(r"""strftime_now\s*\(\s*(['"])(.*?)\1\s*\)""")
_RESERVED = {"messages", "add_generation_prompt", "tokenize", "chat_template", "strftime_now", "return_dict", "tools"}


class Chat:
    """A tokenizer with its template, a system prompt and an instruction."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None,
        system_prompt: str | None = None,
        instruction: str = "",
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
        section: str = "student",
    ) -> None:
        """
        Args:
            generation_config: Of the model; what it says of the end of a turn counts, and nothing else.
            chat_template: Path of a jinja file that replaces the tokenizer's template.
            chat_template_kwargs: Variables for the template, in every rendering.
            date: What a template that asks for today's date gets; YYYY-MM-DD.
            section: Of the config that these settings come from, for messages.

        Raises:
            ValueError: the template cannot be rendered, does not hold the question, or renders a conversation
                otherwise than as its prompt and an answer; or nothing says what ends a turn. The message names the key.
        """
        self.tokenizer, self.system_prompt, self.instruction = tokenizer, system_prompt, instruction
        self._section = section
        if chat_template is not None:
            tokenizer.chat_template = _read_template(chat_template, section)
        elif not tokenizer.chat_template:
            begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
            tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        self._template = _with_date(tokenizer.get_chat_template(), date, section)
        self._kwargs = self._variables(chat_template_kwargs or {})
        self._in_parts = False
        """Whether the template reads contents as lists of parts."""
        self._earlier = EarlierTurns(partial(self._render, add_generation_prompt=True))
        prompt, whole = self._probe()
        self._turn_tokens = self._find_turn_tokens(whole + prompt)
        self._opening, self._before = self._find_frame(prompt, whole)
        """What follows the template's prompt up to where the answer begins, and stands before an answer without
        thoughts."""
        self.opens_thought = _is_open(prompt + self._opening)
        """Whether the prompt ends within a thought, so that a completion begins in it."""
        after = whole.rpartition(_ANSWER)[2]
        turn_end = self._first_turn_token(after)
        self._after = after[: len(after) - len(after.lstrip())] if turn_end is not None else ""
        """White space that the template puts between an answer and the end of its turn."""
        self._find_ends(generation_config, turn_end)

    def _find_ends(self, generation_config: GenerationConfig | None, turn_end: int | None) -> None:
        eos = self.tokenizer.eos_token_id
        ends = [eos, getattr(generation_config, "eos_token_id", None)]
        found = {int(i) for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}
        if turn_end is None and not found:
            raise ValueError(
                f"{self._section}.model: neither its tokenizer, template nor generation config says what ends a turn"
            )
        self.turn_end = turn_end if turn_end is not None else int(eos) if eos is not None else min(found)
        """The token that ends every training target: the template's, else the tokenizer's end-of-sequence token."""
        self.eos_ids = frozenset(found | {self.turn_end})
        """Every token that ends a turn while sampling (Llama 3 lists several)."""

    def prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a chat turn with `text`, up to where the student begins to answer."""
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of messages, of which the last is the user's, up to where the student begins to answer."""
        plain = [{**message, "content": self.plain(message["content"])} for message in messages]
        rendered = self._render(plain, add_generation_prompt=True) + self._opening
        # The template brings its own beginning-of-sequence token, where the model has one.
        return tuple(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def question(self, question: str, turns: Sequence[Turn] = ()) -> tuple[int, ...]:
        """Token ids of the prompt that asks for a solution: the question, the instruction, the generation prompt.

        Args:
            turns: what was said before the question; a system turn follows the student's own system prompt.

        Raises:
            ValueError: there are earlier turns, and the template leaves them out.
        """
        asked = f"{question}\n{self.instruction}" if self.instruction else question
        return self.conversation(self._earlier.messages(turns, asked))

    def text(self, text: str) -> tuple[int, ...]:
        """Token ids of the beginning of an answer, without any special token.

        An answer without thoughts of its own has the empty ones of the template before it, if there are any.
        """
        text = self.plain(text)
        if self.opens_thought and CLOSE in text:
            text = text.lstrip().removeprefix(OPEN).lstrip("\n")  # the prompt has opened it
        elif not text.lstrip().startswith(OPEN) or not self._before.strip():
            text = self._before + text
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def target(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer and of the end of the turn, once, though the text may spell it too."""
        text = text.rstrip()
        for token in sorted(self._turn_tokens, key=len, reverse=True):
            text = text.removesuffix(token)
        return (*self.text(text + self._after), self.turn_end)

    def answer(self, ids: list[int]) -> str:
        """The text of a completion, with the thought that its prompt has opened."""
        text = self.decode(ids)
        return f"{OPEN}\n{text}" if self.opens_thought else text

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without any that is special or frames a turn."""
        frame = set(self._turn_tokens.values())
        return str(self.tokenizer.decode([i for i in ids if i not in frame], skip_special_tokens=True)).strip()

    def plain(self, text: str) -> str:
        """The text with the spelling of turn tokens broken, so that no dataset can end or open a turn."""
        for token in self._turn_tokens:
            if token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    # -- what the template does -------------------------------------------------------------------------------------

    def _variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _RESERVED:
                raise ValueError(f"{self._section}.chat_template_kwargs: {name} is not for a config to set")
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                raise ValueError(f"{self._section}.chat_template_kwargs: the chat template knows no {name}")
        return dict(given)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        conversation: list[dict[str, Any]] = [*joined_systems([*system, *messages])]
        if self._in_parts:
            conversation = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt,
                    chat_template=self._template, **self._kwargs,
                )
            )  # fmt: skip
        except Exception as error:  # whatever a template does with what it is given
            what = "system_prompt" if system else "chat_template"
            raise ValueError(f"{self._section}.{what}: the chat template refuses it: {error}") from error

    def _probe(self) -> tuple[str, str]:
        """(the prompt of a question, the conversation with its answer), with contents in the form that is read."""
        question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        fault: ValueError | None = None
        for self._in_parts in (False, True):
            try:
                prompt = self._render([question], add_generation_prompt=True)
                whole = self._render([question, answer], add_generation_prompt=False)
            except ValueError as error:
                fault = fault or error
                continue
            held = [_QUESTION in prompt, _QUESTION in whole, _ANSWER in whole]
            held += [self.system_prompt.strip() in prompt] if self.system_prompt else []
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

    def _find_frame(self, prompt: str, whole: str) -> tuple[str, str]:
        """(what the template leaves out of the prompt, what stands before an answer without thoughts).

        Raises:
            ValueError: the prompt with an answer is not the beginning of the conversation.
        """
        head = whole.rpartition(_ANSWER)[0]
        if head.startswith(prompt):
            between = head[len(prompt) :]
            if _EMPTY_THOUGHT.fullmatch(between):
                return "", between
            if "add_generation_prompt" not in self._template and self._tells_roles():
                log.info("the chat template has no generation prompt: %r begins an answer, as in its conversations",
                         between)  # fmt: skip
                return between, ""
        opened = prompt.rpartition(OPEN)
        if _is_open(prompt) and not opened[2].strip() and head in (opened[0], opened[0].rstrip()):
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
        asked = self._render([{"role": "user", "content": _ANSWER}], add_generation_prompt=False)
        answer = self._render(
            [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}],
            add_generation_prompt=False,
        )
        return asked not in answer

    def _find_turn_tokens(self, frame: str) -> dict[str, int]:
        """The special tokens, and those of the template's frame that were added as if they were none."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {
            token.content: i
            for i, token in added
            if token.special or (_is_mark(token.content) and token.content in frame)
        }

    def _first_turn_token(self, text: str) -> int | None:
        """The first token of a text that frames turns, if there is one."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        known = set(self._turn_tokens.values())
        return next((int(i) for i in ids if i in known), None)


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


def _is_open(text: str) -> bool:
    return text.rfind(OPEN) > text.rfind(CLOSE)


def _is_mark(token: str) -> bool:
    """Whether a token may frame a turn: no word, no white space, no thought."""
    return len(token.strip()) > 2 and not token.strip().isalnum() and token not in (OPEN, CLOSE)


def _common(one: str, other: str) -> str:
    """The beginning that two texts share."""
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:end]
