r"""Gold answers: how one is read from its column, and which can never be matched by any answer.

A gold that is wrong in form makes its problem unsolvable for ever: it would look hard, be bridged, be criticised and
be trained on. So a gold is rejected where it is read unless it is short, is no prose, and verifies against itself.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from slmreason.data.rows import as_text, printed_float
from slmreason.records import Problem
from slmreason.verify.answers import Claim, final_answer, last_boxed, list_items, rule, tidy

AnswerFormat = Literal["auto", "plain", "hash", "boxed", "index", "index1"]
MAX_GOLD_CHARS = 1024
MAX_WORDS = 5
"""A gold of more words than these, without a sign of mathematics, is prose."""
MAX_WORDS_WITH_SIGNS = 40
_PLAIN = re.compile(r"-?\d{1,18}(?:\.\d{1,12})?|-?\d{1,3}(?:,\d{3})+|[A-Z]")
_SIMPLE = re.compile(
    r"(?=.*[\da-zA-Z])(?:\\(?:[dt]?frac|sqrt|pi|theta|alpha|beta|cdot|times|left|right|infty|sin|cos|tan|log|ln)(?![a-zA-Z])"
    r"|[-\d^_+*/=(){}\[\], ]|\.(?=\d)|(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z]))+"
)
_BRACES = re.compile(r"[{}]")
MAX_SIMPLE_CHARS = 200
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>", re.IGNORECASE)
_MARKER = re.compile(r"\banswer\b", re.IGNORECASE)
_SAID = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is)?\s*[:=]?\s*", re.IGNORECASE)
_NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+)?"
_LEADING_NUMBER = re.compile(rf"(?:\\?\$)?({_NUMBER})\s*\\?%?[.;,:]?(?=\s+[(\w])")
_BOX = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])\s*")
_IN_MATHS = re.compile(r"[^$\n]{1,80}?(?=\$|\\[)\]])")
_TOKEN = re.compile(
    rf"{_NUMBER}|-?\\[dt]?frac\s*(?:\{{[^{{}}]*\}}|\d)\s*(?:\{{[^{{}}]*\}}|\d)|-?\\sqrt\s*(?:\{{[^{{}}]*\}}|\d+)"
    r"|\\(?:text|textbf|mathrm)\s*\{[^{}]*\}|\\pi(?![a-z])|\([A-Za-z]\)|[A-Za-z](?![A-Za-z])"
)
_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\b|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE_END = re.compile(r"(?<=[^\W\d_]{2})[.!?][\"')\]]*\s+(?=\S)|(?<=\d)[.!?]\s+(?=[A-Z])|\n\s*(?=\S)")
_SIGNS = re.compile(r"[=\\^<>≤≥∈]")
_VERB = re.compile(r"\b(?:is|are|was|were|has|have|had|gets?|got|needs?|makes?|costs?|equals?|there|so|because)\b")
_REASON = re.compile(r"\b(?:because|since|therefore|thus|hence)\b")
_PLACEHOLDERS = {"n/a", "null", "nan", "tbd", "todo", "unknown"}


def read_gold(value: Any, answer_format: AnswerFormat = "auto") -> tuple[str, str | None]:
    r"""The gold answer and, where the column holds a whole solution, that solution.

    `auto` looks for `####`, then a box, then `<answer>`, then words that announce an answer.

    Raises:
        ValueError: the value is empty, not in the format asked for, or nothing that an answer could ever equal.
    """
    items = value if isinstance(value, list | tuple) else (value,)
    text = ", ".join(printed_float(as_text(item, "answer")) for item in items)
    said = _after_thoughts(text)
    answer, solution = _found(said, answer_format)
    if not answer.strip():
        raise ValueError("empty answer")
    answer = answer.strip()
    if fault := _fault(answer):
        raise ValueError(fault)
    return answer, text if solution else None


def is_plain(answer: str) -> bool:
    """Whether a gold is a plain number or an option's letter, which needs no test."""
    return _PLAIN.fullmatch(answer) is not None


def is_simple(answer: str) -> bool:
    """Whether a gold is sure to equal itself: short, of signs and common commands alone, with braces that pair.

    Such a gold comes out of a box as it went in, and the same text is right; asking the verifier takes far longer.
    """
    if len(answer) > MAX_SIMPLE_CHARS or not _SIMPLE.fullmatch(answer):
        return False
    depth = 0
    for brace in _BRACES.findall(answer):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def unmatched(problems: Sequence[Problem]) -> dict[str, str]:
    """The problems whose gold is not even equal to itself, by id, with the reason.

    What is neither a plain number nor simple is asked of the verifier in one call, each gold once.
    """
    asked = dict.fromkeys((p.answer, p.choices is not None, p.tolerance) for p in problems
                          if not is_plain(p.answer) and not is_simple(p.answer))  # fmt: skip
    claims = [
        Claim(f"The answer is \\boxed{{{_as_written(gold)}}}.", gold, is_choice, tolerance)
        for gold, is_choice, tolerance in asked
    ]
    rulings = rule(claims) if claims else []
    never = {key for key, ruling in zip(asked, rulings, strict=True) if not ruling.correct}
    return {
        p.id: f"the gold answer does not verify against itself: {reprlib.repr(p.answer)}"
        for p in problems
        if never and (p.answer, p.choices is not None, p.tolerance) in never
    }


def _as_written(gold: str) -> str:
    r"""A gold as a model would write it: a set of several answers without its braces."""
    inner = re.fullmatch(r"\\\{(.*)\\\}", tidy(gold), re.DOTALL)
    return inner.group(1) if inner and len(list_items(inner.group(1))) > 1 else gold


def as_set(answer: str) -> str:
    r"""A gold list `2, 3` as the set `\{2, 3\}`, which the verifier compares in any order; all else as it is."""
    items = [tidy(item) for item in list_items(tidy(answer))]
    return f"\\{{{', '.join(items)}\\}}" if len(items) > 1 else answer


# -- where in a text the answer stands ------------------------------------------------------------------------------


def _found(text: str, answer_format: AnswerFormat) -> tuple[str, bool]:
    """(the answer, whether the text around it is a solution)."""
    boxed = _box(text)
    if answer_format == "hash" or (answer_format == "auto" and "####" in text):
        if "####" not in text:
            raise ValueError("no `####` in the answer")
        return _after_mark(text), True
    if answer_format == "boxed" or (answer_format == "auto" and boxed is not None):
        if boxed is None:
            raise ValueError(r"no \boxed{} in the answer")
        return boxed, True
    if answer_format == "auto" and (tagged := _tagged(text)) is not None:
        return tagged, True
    if answer_format == "auto" and _MARKER.search(text) and (marked := final_answer(text)):
        return marked, is_prose(text)
    return text, False


def _tagged(text: str) -> str | None:
    """What stands between the last `<answer>` and its end."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(0, end))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _after_thoughts(text: str) -> str:
    """What follows the thoughts of a model that thought first.

    Raises:
        ValueError: they never end.
    """
    if "<" not in text:
        return text
    ends = [match.end() for match in _THOUGHT_END.finditer(text)]
    behind = text[ends[-1] if ends else 0 :]
    if _THOUGHT_START.search(behind):
        raise ValueError("the block of thoughts in the answer never closes")
    return behind


def _after_mark(text: str) -> str:
    """The answer behind the last `####`: what stands first there, since some go on after it."""
    lines = text.rpartition("####")[2].strip().splitlines()
    line = " ".join((lines[0] if lines else "").split()).strip("*_` ")
    line = line[match.end() :] if (match := _SAID.match(line)) else line
    number = _LEADING_NUMBER.match(line)
    return number.group(1) if number and is_prose(line) else line.strip()


def _box(text: str) -> str | None:
    r"""What the last box of a text holds: `\boxed{3}`, or `\boxed 3` as TeX takes it; None where there is no box.

    Raises:
        ValueError: there are boxes alone that nothing can be read from.
    """
    places = list(_BOX.finditer(text)) if "box" in text else []
    if not places:
        return None
    behind = text[places[-1].end() :]
    if not behind.startswith("{") and (content := _unbraced(behind)) is not None:
        return content
    boxed = last_boxed(text)
    if boxed is None:
        raise ValueError("the box in the answer cannot be read: it is empty, or its brace never closes")
    return boxed


def _unbraced(behind: str) -> str | None:
    """What a box without braces holds: all up to the end of the formula, or the first number, command or letter."""
    whole = _IN_MATHS.match(behind)
    if whole and not _WORD.search(_COMMAND.sub(" ", whole.group())):
        return whole.group().strip()
    token = _TOKEN.match(behind)
    return token.group() if token else None


# -- what no answer could equal -------------------------------------------------------------------------------------


def _fault(answer: str) -> str | None:
    if is_plain(answer):
        return None
    if answer.casefold() in _PLACEHOLDERS or not any(map(_says_something, answer)):
        return f"the gold answer says nothing: {reprlib.repr(answer)}"
    if len(answer) > MAX_GOLD_CHARS:
        return f"the gold answer is too long to be matched: {len(answer)} characters, {MAX_GOLD_CHARS} are the most"
    if "\n" in answer and "\\" not in answer:
        return f"the gold answer has several lines: {reprlib.repr(answer)}"
    if is_prose(answer):
        return (
            f"the gold answer is prose: {reprlib.repr(answer)}; data.columns.answer names the column of the answer, "
            "data.columns.answer_format how it stands there"
        )
    return None


def _says_something(character: str) -> bool:
    return character.isalnum() or (unicodedata.category(character)[0] == "S" and character not in "$`^~")


def is_prose(text: str) -> bool:
    """Whether a text is sentences rather than an answer: nobody would write the same ones."""
    words = len(_WORD.findall(_COMMAND.sub(" ", text)))
    if _REASON.search(text.casefold()):
        return True
    if words < 3:
        return False
    if words >= 4 and _SENTENCE_END.search(text.strip()):
        return True
    if _SIGNS.search(text):
        return words > MAX_WORDS_WITH_SIGNS
    return words > MAX_WORDS or bool(re.search(r"\d", text) and _VERB.search(text.casefold()))
