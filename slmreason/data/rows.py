"""Values of a row: which column is what, numbers as text, names that any file can hold."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from slmreason.records import check_text

PLACE = re.compile(r"\{([^{}]*)\}")
_PRINTED_FLOAT = re.compile(r"-?\d+\.\d{5,}(?:[eE][-+]?\d+)?")
_DOUBLE_DIGITS = 16
"""Significant digits from which on a printed double shows what its bits are, not what was meant."""
_FLOAT32_DIGITS = 11
"""As many as a float32 is never written with."""
_ROUNDED_BITS = 18
"""A float32 with so many bits was rounded from a decimal; it has 24."""
_FLOAT32_MAX = 3.4e38
SHOWN_COLUMNS = 12
_KINDS: dict[type, str] = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"
}  # fmt: skip


def check_row(row: Any) -> None:
    """
    Raises:
        ValueError: the row could not be read, or is not an object.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object: it is {kind_of(row)}")


def value_of(row: Any, column: str) -> Any:
    """The value of a column: `a|b` takes the first that is there and not null, `{a} {b}` joins columns into a text.

    Raises:
        ValueError: the row is not an object or has no such column; the message names those it has.
    """
    check_row(row)
    if "{" in column:
        texts = {name: as_text(value_of(row, name), f"column {name!r}") for name in PLACE.findall(column)}
        return PLACE.sub(lambda match: texts[match.group(1)], column).strip()
    there = [option for option in _options(column) if option in row]
    if not there:
        columns = sorted(map(str, row))
        more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
        raise ValueError(f"no column {column!r}: there are {columns[:SHOWN_COLUMNS]}{more}")
    return next((row[option] for option in there if row[option] is not None), None)


def has_column(row: Mapping[str, Any], column: str) -> bool:
    """Whether `value_of` would find a value; a column that is put together from others is taken to be there."""
    return "{" in column or any(row.get(option) is not None for option in _options(column))


@lru_cache
def _options(column: str) -> tuple[str, ...]:
    return tuple(column.split("|"))


def text_of(value: Any, column: str) -> str:
    """The value of a column that must be a text with something in it.

    Raises:
        ValueError: it is none; the message names the column.
    """
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a text: it is {kind_of(value)}")
    if not value.strip():
        raise ValueError(f"column {column!r} is empty")
    return as_text(value, f"column {column!r}").strip()


def as_text(value: Any, what: str) -> str:
    """A text as it is, or a finite number as text, 7.0 as `7`.

    Raises:
        ValueError: the value is neither, or holds half a character; the message names `what` it is.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"{what} must be a text or a number: it is {kind_of(value)}")
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise ValueError(f"{what} must be finite: it is {value}")
        return number_text(value)
    check_text(text := str(value), what)
    return text


def kind_of(value: Any) -> str:
    """What a value is, in words of JSON."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def number_text(value: float | Decimal) -> str:
    """The shortest decimal that a finite number stands for: `0.1` for 0.1 held as float32, `0.3` for 0.1 + 0.2."""
    if isinstance(value, float):
        if value.is_integer():
            value = Decimal(int(value)) if abs(value) < 2**53 else Decimal(repr(value))
        else:
            value = Decimal(_meant(value))
    exponent = value.adjusted() if value else 0
    if not -20 <= exponent <= 40:
        return str(value)
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def printed_float(text: str) -> str:
    """A text in which somebody printed a double with all its digits, as `number_text` has it; any other as it is."""
    stripped = text.strip()
    if not _PRINTED_FLOAT.fullmatch(stripped) or repr(float(stripped)) != stripped.replace("E", "e"):
        return text
    return number_text(float(stripped))


def narrow_float(value: float) -> float:
    """A number of a float32 column as the decimal that was stored there."""
    if not math.isfinite(value) or value.is_integer() or abs(value) > _FLOAT32_MAX:
        return value
    return float(str(np.float32(value)))


def _meant(value: float) -> str:
    """The decimal that a double stands for, where its digits are too many to have been written by anybody."""
    printed = repr(value)
    digits = _significant(printed)
    if digits < _FLOAT32_DIGITS:
        return printed
    is_narrow = abs(value) <= _FLOAT32_MAX and float(np.float32(value)) == value
    # A fraction of few bits, as 1/65536, was written so; one of many was rounded to a float32 and widened.
    if is_narrow and (digits >= _DOUBLE_DIGITS or value.as_integer_ratio()[0].bit_length() >= _ROUNDED_BITS):
        return str(np.float32(value))
    if digits < _DOUBLE_DIGITS:
        return printed
    for precision in (15, 14, 13, 12):  # the tail of a sum or a product: 0.30000000000000004, 2.9999999999999996
        rounded = f"{value:.{precision}g}"
        if _significant(rounded) <= precision - 4:
            return rounded
    return printed


def _significant(number: str) -> int:
    """Significant digits of a printed number, without the zeros at either end."""
    return len(number.lower().partition("e")[0].replace(".", "").strip("-+0"))


def readable(name: str | os.PathLike[str]) -> str:
    r"""The name of a file as any other file can hold it: what is not UTF-8 in it as `\xe9`."""
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
