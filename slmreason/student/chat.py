"""Chat templates and special tokens: how a question becomes a prompt, and what ends the student's turn.

The template is the student's own. Its frame is the only source of special tokens: what a dataset or a teacher writes
is plain text, even where it spells one. A prompt with its target is always the beginning of the conversation as the
template renders it as a whole; a template with which that cannot be had is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from slmreason.records import Turn
from slmreason.student.template import ANSWER, CLOSE, DATE, OPEN, ChatTemplate, is_open
from slmreason.student.turns import EarlierTurns


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
        self.tokenizer, self.instruction = tokenizer, instruction
        self._section = section
        self._template = ChatTemplate(
            tokenizer,
            system_prompt=system_prompt,
            path=chat_template,
            variables=chat_template_kwargs or {},
            date=date,
            section=section,
        )
        self._earlier = EarlierTurns(partial(self._template.render, add_generation_prompt=True))
        prompt, whole = self._template.prompt, self._template.whole
        self._turn_tokens = self._find_turn_tokens(whole + prompt)
        self._opening, self._before = self._template.frame()
        """What follows the template's prompt up to where the answer begins, and stands before an answer without
        thoughts."""
        self.opens_thought = is_open(prompt + self._opening)
        """Whether the prompt ends within a thought, so that a completion begins in it."""
        after = whole.rpartition(ANSWER)[2]
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
        rendered = self._template.render(plain, add_generation_prompt=True) + self._opening
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


def _is_mark(token: str) -> bool:
    """Whether a token may frame a turn: no word, no white space, no thought."""
    return len(token.strip()) > 2 and not token.strip().isalnum() and token not in (OPEN, CLOSE)
