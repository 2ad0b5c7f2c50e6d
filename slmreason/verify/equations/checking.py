"""From the two sides of an equals sign to what is wrong with the equation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import product

from slmreason.verify.equations.doubts import is_doubtful
from slmreason.verify.equations.lexing import MAX_NUMBER_CHARS, Token, merge_parts, read_tokens
from slmreason.verify.equations.operands import Operand, left_operands, right_operands
from slmreason.verify.equations.plain import plain_text
from slmreason.verify.equations.reading import CHANGE_WORDS, Amount, Percent, Reading, amount_of
from slmreason.verify.equations.units import meanings, scales

MAX_TEXT_CHARS = 200_000
"""A longer text has nothing that could be relied on: what is hostile takes up to 100 microseconds a character."""
MAX_READINGS = 24
MAX_WORK = 800
"""An equation with more readings, or with more tokens in all of its readings, is left unread."""
_ANNOTATION = re.compile(r"<<([^<>]*)>>")


@dataclass(frozen=True)
class Equation:
    """An equation as it stands in a text, LaTeX made plain, and what is wrong with it."""

    text: str
    fault: str | None
    """None when it holds, else a sentence: `48/2 is 24, not 25.`"""

    @property
    def holds(self) -> bool:
        return self.fault is None


def read_equations(text: str) -> list[Equation]:
    """Every equation of a text that can be read, line by line; GSM8K's annotations (`<<48/2=24>>`) too.

    A chain `a = b = c` is two equations, so `2*3 = 6 + 1 = 7` holds a false one. A decimal number holds when the other
    side rounds to it: `10 / 3 = 3.33`.
    """
    return [
        equation
        for line in plain_text(text).split("\n")
        for part in (_ANNOTATION.sub("", line), *_ANNOTATION.findall(line))
        for equation in _line_equations(part)
    ]


def false_equations(text: str) -> list[str]:
    """The equations of a text that are not true; for a text that is too long to be checked, a note that it is."""
    if len(text) > MAX_TEXT_CHARS:
        return [f"unchecked, the text has {len(text)} characters and the cap is {MAX_TEXT_CHARS}"]
    return [equation.text for equation in read_equations(text) if not equation.holds]


def equation_holds(text: str) -> bool | None:
    """Whether every equation of a text holds; None when there is none that can be read and computes something."""
    found = read_equations(text)
    return all(equation.holds for equation in found) if found else None


def evaluate(expression: str) -> Fraction | None:
    """The exact value of plain arithmetic with + - * / and brackets; None when it is anything else."""
    tokens = read_tokens(plain_text(expression))
    amount = None if any(token.kind == "word" for token in tokens) else amount_of(tokens, Reading())
    return amount.value if amount else None


# One line -------------------------------------------------------------------------------------------------------------


def _line_equations(line: str) -> Iterator[Equation]:
    """The equations of a line. One that is false is read again with `2 hours 30 minutes` as two numbers."""
    plain = read_tokens(line) if "=" in line else []
    merged = merge_parts(plain, line)
    apart = {token.start: place for place, token in enumerate(plain) if token.kind == "="}
    for place, token in enumerate(merged):
        if token.kind == "=":
            equation = _equation(merged, place, line)
            if equation and not equation.holds and len(merged) < len(plain):
                again = _equation(plain, apart[token.start], line)
                equation = again if again and again.holds else equation
            if equation:
                yield equation


def _equation(tokens: Sequence[Token], place: int, line: str) -> Equation | None:
    """The equation around an equals sign; None when it cannot be read for certain."""
    rights = right_operands(tokens, place, line)
    lefts = left_operands(tokens, place, line) if rights else []
    if not lefts or max(len(lefts[0].numbers), len(rights[0].numbers)) < 2:
        return None
    readings = _readings(lefts, rights)
    work = len(readings) * sum(len(side.tokens) for side in (*lefts, *rights))
    if len(readings) > MAX_READINGS or (len(readings) > 1 and work > MAX_WORK):
        return None
    text = " ".join(line[lefts[0].start : rights[0].end].split())
    if any(_agree(lefts, rights, reading) for reading in readings):
        return Equation(text, None)
    if is_doubtful(lefts[0], rights[0]):
        return None
    return Equation(text, _fault(lefts[0], rights[0], readings))


def _readings(lefts: Sequence[Operand], rights: Sequence[Operand]) -> list[Reading]:
    """The honest readings of an equation that may differ; more than MAX_READINGS of them are cut to one more."""
    sides = (*lefts, *rights)
    tokens = [token for side in sides for token in side.tokens]
    has_units = any(side.has_units for side in sides)
    has_two_meanings = any(len(meanings(word)) > 1 for side in sides for word in side.words)
    found = [
        Reading(percent, tight, european, scaled, smallest, meaning, rates)
        for percent, tight, european, scaled in product(
            _percents(sides),
            _flags(any(side.divides_twice for side in sides)),
            _flags(any(token.european is not None for token in tokens)),
            _flags(has_units),
        )
        for smallest in _flags(not scaled and any(token.parts for token in tokens))
        for meaning in range(1 + (scaled and has_two_meanings))
        for rates in _flags(scaled and any(side.has_rates for side in sides))
    ]
    return found[: MAX_READINGS + 1]


def _flags(matters: bool) -> tuple[bool, ...]:
    return (False, True) if matters else (False,)


def _percents(sides: Sequence[Operand]) -> list[Percent]:
    """What the percent signs of an equation may stand for."""
    if not any(token.kind == "%" for side in sides for token in side.tokens):
        return ["share"]
    is_relative = any(side.adds_percentages or CHANGE_WORDS.intersection(side.words) for side in sides)
    return ["share", "whole", "running", "first"] if is_relative else ["share", "whole"]


@dataclass(frozen=True)
class _Measured:
    """An operand in one reading."""

    operand: Operand
    amount: Amount
    uncertainty: Amount

    def counted_in(self, scale: int) -> tuple[Fraction, Fraction]:
        """Its value and by how much it may be off, numbers without a unit counted in one of this scale."""
        value = self.amount.counted_in(scale)
        return value, max(self.uncertainty.counted_in(scale), abs(value) * self.operand.float_error)


def _measured(sides: Sequence[Operand], reading: Reading) -> list[_Measured]:
    """The operands that have a value in a reading. `2 hours + 15 minutes` has none when units do not count."""
    readable = (side for side in sides if reading.scaled or not side.adds_known_units)
    amounts = ((side, side.amount(reading)) for side in readable)
    return [_Measured(side, amount, side.uncertainty(reading)) for side, amount in amounts if amount is not None]


def _agree(lefts: Sequence[Operand], rights: Sequence[Operand], reading: Reading) -> bool:
    """Whether two sides, cut from the text in one way or another, are equal in a reading."""
    counted = {1}
    if reading.scaled:
        for side in (*lefts[:1], *rights[:1]):
            counted |= {scale for unit in side.units for scale in scales(unit)}
            counted |= {meanings("$")[0][1] for token in side.tokens if token.kind == "$"}
    for left, right in product(_measured(lefts, reading), _measured(rights, reading)):
        if not _is_honest(reading, left.operand, right.operand, left.amount.value):
            continue
        for scale in counted:
            (value, off), (other, other_off) = left.counted_in(scale), right.counted_in(scale)
            if abs(value - other) <= max(off, other_off):
                return True
    return False


def _is_honest(reading: Reading, left: Operand, right: Operand, value: Fraction) -> bool:
    """Whether 25% may be 25: in `0.2 * 100 = 20%`, `25% + 30% = 55`; not in `$80 - 25% = $55`, `25% * 80 = 2000`."""
    if reading.percent != "whole":
        return True
    with_percent = [side for side in (left, right) if any(token.kind == "%" for token in side.tokens)]
    if len(with_percent) == 2 or len(with_percent[0].numbers) == 1:
        return True
    has_hundred = any(token.value == 100 for token in with_percent[0].numbers)  # `30 / 150 * 100%`
    return (has_hundred or abs(value) <= 100) and not with_percent[0].adds_percentages


def _fault(left: Operand, right: Operand, readings: Sequence[Reading]) -> str:
    computed, stated = (left, right) if len(left.numbers) > 1 else (right, left)
    values = {amount.value for reading in readings if (amount := computed.amount(reading))}
    is_value = f"is {_shown(values.pop())}, not" if len(values) == 1 else "is not"  # `36 / 2/3` is 6 or 54
    return f"{computed.text} {is_value} {stated.text}."


def _shown(value: Fraction) -> str:
    """A number in digits, rounded when it has many."""
    if value.denominator == 1 and abs(value) < 10**MAX_NUMBER_CHARS:
        return str(value.numerator)
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    if Fraction(decimal) == value and len(str(decimal)) <= 12:
        return str(decimal)
    return f"about {decimal:.6g}"
