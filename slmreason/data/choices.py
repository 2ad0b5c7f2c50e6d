"""Multiple choice: the options of a row in the forms that datasets have, and which of them its key names.

A key may be a letter, an option's own text, or a number. Whether numbers count from 0 or from 1, or are texts of
options, no row can tell alone: the whole column decides (`Numbering`).
"""

from __future__ import annotations

import ast
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slmreason.data.golds import AnswerFormat, read_gold
from slmreason.data.rows import as_text

HIDDEN_COLUMNS = ("choices", "options")
"""What a column of options is called; it is read when `data.columns.choices` names it."""
MAX_OPTIONS = 26
MAX_LITERAL_CHARS = 100_000
_LABELLED = re.compile(r"\(?\s*([A-Za-z])\s*[).:]\s*(.*\S)", re.DOTALL)
_IN_A_LINE = re.compile(r"(?:^|,)\s*([a-z])\s*\)\s*")
_NUMBER = re.compile(r"[\[(]?([-+]?\d{1,6})(?:\.0+)?[\])]?\.?")
_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[$*`]")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|final\s+)?(?:answer|option|choice)\s*(?:is)?\s*:?\s*)?"
    r"[\[(]?([A-Za-z])[\])]?(?:[.):]+\s*(.*)|\s*)",
    re.IGNORECASE | re.DOTALL,
)
_NAMED_KEY = re.compile(r"key|label|idx|index|option|letter|choice|correct|position|number|gold", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """The options of a row, in the order in which they become A, B, C, ..."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] = ()
    """What the dataset itself calls them, if it says: `1`, `2`, ... in some rows of ARC."""


@dataclass(frozen=True)
class NumberKey:
    """A key that is a number: which option it names says the column."""

    value: int
    is_text: bool
    """It was written as a text, `"2"`, not as a number."""
    num_options: int
    same_text: int | None
    """The option whose own text is this number, if there is one."""


# -- options --------------------------------------------------------------------------------------------------------


def read_options(value: Any, column: str) -> Options:
    """The options of a row: a list of texts or of numbers, `{label, text}` in lists or one a row, `{"A": ...}`, or
    any of these written as JSON.

    Raises:
        ValueError: they are none of these; the message names the column.
    """
    what = f"column {column!r}"
    if isinstance(value, str):
        value = _written(value)
    if isinstance(value, Mapping):
        value = _pairs(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        labels, texts = [_named(item, "label|key|id") for item in value], [_named(item, "text|value") for item in value]
    else:
        labels, texts = [], list(value) if isinstance(value, list | tuple) else []
    kinds = {str if isinstance(text, str) else type(text) for text in texts}
    if not texts or len(kinds) > 1 or kinds & {bool} or not kinds <= {str, int, float}:
        raise ValueError(f"{what} must be a list of option texts")
    if len(texts) > MAX_OPTIONS:
        raise ValueError(f"{what} has {len(texts)} options; there are {MAX_OPTIONS} letters")
    options = [as_text(text, what) for text in texts]
    if not all(option.strip() for option in options):
        raise ValueError(f"{what} has an option without text")
    if labels and None not in labels:
        return _in_order(options, [_bare(as_text(label, what)) for label in labels])
    return Options(_without_labels(options))


def _written(text: str) -> Any:
    """Options that stand in one text: JSON, a Python list, or `a ) 38 , b ) 27` as in MathQA."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{") and len(stripped) <= MAX_LITERAL_CHARS:
        for read in (json.loads, ast.literal_eval):
            try:
                return read(stripped)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
    parts = _IN_A_LINE.split(stripped)
    labels = parts[1::2]
    if len(labels) > 1 and not parts[0].strip() and labels == [chr(97 + i) for i in range(len(labels))]:
        return [part.strip(" ,") for part in parts[2::2]]
    return None


def _pairs(value: Mapping[str, Any]) -> Any:
    """`{"text": [...], "label": [...]}` and `{"A": "...", "B": "..."}` as a list of labels with texts."""
    texts, labels = value.get("text"), value.get("label")
    if isinstance(texts, list | tuple):
        if not isinstance(labels, list | tuple):
            return texts
        return (
            [{"label": label, "text": text} for label, text in zip(labels, texts, strict=True)]
            if len(labels) == len(texts)
            else None
        )
    return [{"label": label, "text": text} for label, text in value.items() if text is not None]


def _named(item: Mapping[str, Any], names: str) -> Any:
    return next((item[name] for name in names.split("|") if name in item), None)


def _in_order(options: list[str], labels: list[str]) -> Options:
    """By label where these are the first letters, as the listing under the question will have them."""
    letters = [chr(65 + i) for i in range(len(labels))]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two options have the same label: {reprlib.repr(labels)}")
    if sorted(labels) == letters:
        options = [options[labels.index(letter)] for letter in letters]
        labels = letters
    return Options(tuple(options), tuple(labels))


def _without_labels(options: list[str]) -> tuple[str, ...]:
    """`A) 21`, `B) 22` as `21`, `22`: the listing puts its own letters before them."""
    found = [_LABELLED.fullmatch(option.strip()) for option in options]
    letters = [match.group(1).upper() if match else "" for match in found]
    if len(options) < 2 or letters != [chr(65 + i) for i in range(len(options))]:
        return tuple(options)
    return tuple(match.group(2) for match in found if match)


# -- which option the key names -------------------------------------------------------------------------------------


def read_key(value: Any, options: Options, answer_format: AnswerFormat) -> tuple[str | NumberKey, str | None]:
    """The letter of the right option, or its number as the dataset has it, and the worked solution around it if any.

    Raises:
        ValueError: the key names no option, or two.
    """
    number, count = _number(value), len(options.texts)
    if answer_format in ("index", "index1"):
        position = None if number is None else number - (answer_format == "index1")
        if position is None or not 0 <= position < count:
            raise ValueError(f"answer is not the position of an option: {reprlib.repr(value)}")
        return chr(65 + position), None
    if isinstance(value, list | tuple) and len(value) != 1:
        raise ValueError(f"the answer names {len(value)} options: {reprlib.repr(value)}; one is needed")
    solution = None
    if number is None or answer_format in ("hash", "boxed"):
        value, solution = read_gold(value, answer_format)
        number = _number(value)
    if number is None:
        return _letter(value, options), solution
    text = isinstance(value, str)
    if text and (label := _bare(str(value))) in options.labels:
        return chr(65 + options.labels.index(label)), solution
    same = _same_text(str(number), options)
    if answer_format == "plain":
        if same is None:
            raise ValueError(f"the answer {number} is the text of no option; data.columns.answer_format index or "
                             "index1 takes it for a position")  # fmt: skip
        return chr(65 + same), solution
    return NumberKey(number, text, count, same), solution


def _number(value: Any) -> int | None:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip())
        return int(match.group(1)) if match else None
    return value if isinstance(value, int) else None


def _letter(answer: str, options: Options) -> str:
    plain = " ".join(_DRESS.sub(lambda match: match.group(1) or "", answer).split())
    by_text = _same_text(plain, options)
    match = _LETTER.fullmatch(plain)
    if match is None:
        if by_text is None:
            raise ValueError(f"the answer is none of the options: {reprlib.repr(answer)}")
        return chr(65 + by_text)
    named, behind = match.group(1).upper(), (match.group(2) or "").strip()
    if named in options.labels:
        index = options.labels.index(named)
    else:
        index = ord(named) - 65
    if by_text is not None and by_text != index:
        if len(plain) > 1 or index >= len(options.texts):
            return chr(65 + by_text)
        raise ValueError(f"the answer {plain!r} is the text of one option and the letter of another")
    if index >= len(options.texts):
        raise ValueError(f"the answer is option {named}, beyond the {len(options.texts)} options")
    if behind and (by_behind := _same_text(behind, options)) is not None and by_behind != index:
        raise ValueError(f"the answer names option {named} with the text of option {chr(65 + by_behind)}")
    return chr(65 + index)


def _same_text(text: str, options: Options) -> int | None:
    wanted = _squeezed(text)
    found = [index for index, option in enumerate(options.texts) if _squeezed(option) == wanted]
    return found[0] if len(found) == 1 else None


def _squeezed(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _bare(label: str) -> str:
    return label.strip().strip("().[]:").strip().upper()


def hidden_options(row: Mapping[str, Any], answer: str) -> str | None:
    """Why a gold cannot be right that names an option which the question does not show; None where it names none."""
    for column in HIDDEN_COLUMNS:
        try:
            options = read_options(row[column], column) if column in row else None
        except ValueError:
            continue
        if options is None or _same_text(answer, options) is not None:
            continue
        number = _number(answer)
        is_letter = re.fullmatch(r"[(\[]?[A-Z][)\].]?", answer.strip()) is not None
        if is_letter or (number is not None and 0 <= number <= len(options.texts)):
            return (
                f"the answer {answer!r} names an option, and no question shows the options: data.columns.choices "
                f"{column} puts them under it"
            )
    return None


# -- what numbers in a column mean ----------------------------------------------------------------------------------

Numbering = Literal["from 0", "from 1", "texts"]


def numbering(keys: Sequence[NumberKey], column: str) -> tuple[Numbering, bool]:
    """What the numbers in a column of keys mean, and whether the column itself shows it.

    They are texts of options when they are that in more rows than they could be positions. A 0 among positions says
    that they count from 0, and a position equal to the number of options, without any 0, from 1. Where neither is
    there, numbers count from 0 (an index) and texts from 1 (a printed key).

    Args:
        column: its name, which decides where a column could be both.
    """
    as_texts = sum(key.same_text is not None for key in keys)
    in_range = sum(0 <= key.value <= key.num_options for key in keys)
    if as_texts and as_texts >= in_range:
        if as_texts > in_range:
            return "texts", True
        written = all(key.is_text for key in keys)
        if as_texts == len(keys) and written and not _NAMED_KEY.search(column):
            return "texts", False
    if any(key.value == 0 for key in keys):
        return "from 0", True
    if any(key.value == key.num_options for key in keys):
        return "from 1", as_texts < in_range
    return ("from 1" if all(key.is_text for key in keys) else "from 0"), False


def letter_of(key: NumberKey, meaning: Numbering) -> str:
    """The letter of the option that a number names.

    Raises:
        ValueError: it names none.
    """
    if meaning == "texts":
        if key.same_text is None:
            raise ValueError(f"the answer {key.value} is the text of no option, as the others of its column are")
        return chr(65 + key.same_text)
    position = key.value - (meaning == "from 1")
    if not 0 <= position < key.num_options:
        raise ValueError(f"the answer {key.value}, counted {meaning}, is beyond the {key.num_options} options")
    return chr(65 + position)
