"""From tokens to values: recursive descent over the tokens of one operand, in one of its honest readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from slmreason.verify.equations.lexing import Token
from slmreason.verify.equations.units import POWERS, RATE_WORDS, meanings, multiplier

MAX_TOKENS = 64
"""An operand with more tokens is left unread; this bounds the depth of its brackets too."""
MAX_UNIT_WORDS = 6
_LOWER = ("off", "less", "discount", "decrease", "reduction", "cheaper")
_HIGHER = ("more", "increase", "extra", "markup", "raise")
CHANGE_WORDS = frozenset((*_LOWER, *_HIGHER))
Percent = Literal["share", "whole", "running", "first"]
_ONE, _ZERO = Fraction(1), Fraction(0)


@dataclass(frozen=True)
class Reading:
    """One honest way to read an equation."""

    percent: Percent = "share"
    """What `25%` stands for: a `share` (0.25), a `whole` number (25, as in `0.2 * 100 = 20%`), or, in a sum, a share of
    the sum so far (`running`: `$80 - 25%`) or of its first term (`first`: `100 + 10% + 5% = 115`)."""
    tight: bool = False
    """A proper fraction behind a slash is one number: `3 / 1/4` is 12."""
    european: bool = False
    """`1.500` is fifteen hundred and `1,500` one and a half."""
    scaled: bool = False
    """Units count: `2 hours = 120 minutes`."""
    smallest: bool = False
    """Where units do not count, `2 hours 30 minutes` is 150 and not 2.5."""
    meaning: int = 0
    """Which meaning of a word with several counts: a pound is money or mass."""
    rates: bool = False
    """The unit behind `per` counts too: `60 miles per hour * 30 minutes = 30 miles`."""


@dataclass(frozen=True)
class Amount:
    """A value in two parts: what is measured in a known unit, and what has none."""

    measured: Fraction = _ZERO
    bare: Fraction = _ZERO

    @property
    def value(self) -> Fraction:
        return self.measured + self.bare if self.measured else self.bare

    def __add__(self, other: Amount) -> Amount:
        measured = self.measured + other.measured if self.measured or other.measured else _ZERO
        return Amount(measured, self.bare + other.bare)

    def __mul__(self, other: Amount) -> Amount:
        bare = self.bare * other.bare
        measured = self.value * other.value - bare if self.measured or other.measured else _ZERO
        return Amount(measured, bare)

    def __truediv__(self, other: Amount) -> Amount:
        if other.measured:
            return Amount(measured=self.value / other.value)
        return Amount(self.measured / other.bare if self.measured else _ZERO, self.bare / other.bare)

    def times(self, factor: Fraction | int) -> Amount:
        return Amount(self.measured * factor if self.measured else _ZERO, self.bare * factor)

    def counted_in(self, scale: int) -> Fraction:
        """The value when what has no unit is counted in one of this scale."""
        return self.measured + self.bare * scale


@dataclass(frozen=True)
class _Factor:
    amount: Amount
    percent: Fraction | None = None
    """The share when this is `25%`, else None."""
    change: int = 0
    """-1 for `25% off`, 1 for `25% more`."""


class _Unreadable(ValueError):
    """These tokens are not arithmetic."""


class _Parser:
    """Reads the tokens of one operand, from the first as far as it goes."""

    def __init__(self, tokens: Sequence[Token], reading: Reading) -> None:
        self.tokens, self.reading, self.place = tokens, reading, 0

    def kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place].kind if place < len(self.tokens) else "end"

    def take(self, *kinds: str) -> Token | None:
        """The next token, taken, when it is of one of these kinds."""
        if self.kind() not in kinds:
            return None
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> Amount:
        first = total = self.product().amount
        while sign := self.take("+", "-"):
            term = self.product()
            amount = term.amount
            if term.percent is not None and self.reading.percent in ("running", "first"):
                amount = (total if self.reading.percent == "running" else first).times(term.percent)
            total += amount if sign.kind == "+" else amount.times(-1)
        return total

    def product(self) -> _Factor:
        """A term; its percent is None unless it is a percentage and nothing else."""
        factor = self.signed()
        amount, percent = factor.amount, factor.percent
        while True:
            if self.take("*") or self._is_product_of_brackets():
                amount, percent = amount * self._changed(self.signed()), None
            elif self.take("/"):
                amount, percent = self._quotient(amount), None
            else:
                return _Factor(amount, percent)

    def _changed(self, factor: _Factor) -> Amount:
        """A factor; `20% off` is 0.8 where percentages are of something."""
        is_relative = self.reading.percent in ("running", "first")
        if factor.change and factor.percent is not None and is_relative:
            return Amount(bare=1 + factor.change * factor.percent)
        return factor.amount

    def _quotient(self, amount: Amount) -> Amount:
        """Behind a slash: the amount divided by what follows."""
        if self.reading.tight and self._fraction_follows():
            return amount / self._fraction()
        bottom = self._bottom_of_fraction()
        if bottom is None:
            return amount / self.signed().amount
        self.place += 1  # `1/2 hour` is half of an hour
        unit = self._unit(Amount(bare=_ONE))
        return Amount(amount.value * unit.measured, amount.value * unit.bare).times(1 / self._number(bottom))

    def _bottom_of_fraction(self) -> Token | None:
        """The number that follows a slash, when it and the one before are a fraction with a unit."""
        top, bottom = self._bare_number(-2), self._bare_number(0)
        if top is None or bottom is None or self.kind(1) != "word":
            return None
        return bottom if top.value < bottom.value or top.end + 1 == bottom.start else None

    def _bare_number(self, ahead: int) -> Token | None:
        place = self.place + ahead
        token = self.tokens[place] if 0 <= place < len(self.tokens) else None
        return token if token and token.kind == "number" and not token.parts else None

    def signed(self) -> _Factor:
        if self.take("-"):
            factor = self.signed()
            percent = None if factor.percent is None else -factor.percent
            return _Factor(factor.amount.times(-1), percent, factor.change)
        return self.quantity()

    def quantity(self) -> _Factor:
        dollars = self.take("$") is not None
        if dollars and self.take("-"):
            factor = self.signed()
            return _Factor(factor.amount.times(-1))
        if number := self.take("number"):
            amount = self._several(number) if number.parts else Amount(bare=self._number(number))
        elif self.take("("):
            amount = self.sum()
            if not self.take(")"):
                raise _Unreadable
        else:
            raise _Unreadable
        if dollars and self.reading.scaled and not amount.measured and not self._other_unit_follows():
            amount = Amount(measured=amount.bare * meanings("$")[0][1])
        if self.take("%"):
            return self._percentage(amount)
        return _Factor(self._unit(amount))

    def _other_unit_follows(self) -> bool:
        """True in `$1 hr`, where the sign starts a formula."""
        found = meanings(self.tokens[self.place].text) if self.kind() == "word" else ()
        return bool(found) and all(dimension != "money" for dimension, _ in found)

    def _number(self, token: Token) -> Fraction:
        return token.european if self.reading.european and token.european is not None else token.value

    def _several(self, token: Token) -> Amount:
        """`2 hours 30 minutes`, in the smallest unit of its kind, or in one of its own."""
        total = sum((part.value * part.meaning[1] for part in token.parts), _ZERO)
        if self.reading.scaled:
            return Amount(measured=total)
        return Amount(bare=total / token.parts[-1 if self.reading.smallest else 0].meaning[1])

    def _percentage(self, amount: Amount) -> _Factor:
        share = amount.times(Fraction(1, 100))
        word = self.tokens[self.place].text.lower() if self.kind() == "word" else ""
        change = (word in _HIGHER) - (word in _LOWER)
        unit = self._unit(amount if self.reading.percent == "whole" else share)
        return _Factor(unit, share.value, change)

    def _unit(self, amount: Amount) -> Amount:
        """Takes the words behind a number; the amount in the smallest unit of their kind when units count."""
        is_measured, is_rate, power, last = False, False, 1, _ONE
        for _ in range(MAX_UNIT_WORDS):
            if (word := self.take("word")) is None:
                break
            name = word.text.lower().strip("/ ")
            is_rate = is_rate or name in RATE_WORDS or "/" in word.text
            if not self.reading.scaled:
                continue
            if name in ("squared", "cubed"):
                amount = amount.times(last ** (POWERS[name] - 1))
            elif name in POWERS:
                power = POWERS[name]
            elif found := meanings(name):
                last, scale = Fraction(found[self.reading.meaning % len(found)][1]), _ONE
                scale, power = last**power, 1
                if not is_rate:
                    amount, is_measured = amount.times(scale), True
                elif self.reading.rates:
                    amount, is_measured = amount.times(1 / scale), True
            elif factor := multiplier(name):
                amount = amount if is_rate else amount.times(factor)
        return Amount(measured=amount.value) if is_measured else amount

    def _is_product_of_brackets(self) -> bool:
        """At the second bracket of `(2)(3)`, which `2 (as we saw)` is not."""
        return self.kind() == "(" and self.tokens[self.place - 1].end == self.tokens[self.place].start

    def _fraction_follows(self) -> bool:
        if [self.kind(ahead) for ahead in range(3)] != ["number", "/", "number"]:
            return False
        return self.tokens[self.place].value < self.tokens[self.place + 2].value

    def _fraction(self) -> Amount:
        top = self.quantity().amount
        self.take("/")
        return top / self.quantity().amount


def amount_of(tokens: Sequence[Token], reading: Reading) -> Amount | None:
    """The amount of an operand; None when it is not arithmetic from end to end."""
    amount, length = prefix_amount(tokens, reading)
    return amount if length == len(tokens) <= MAX_TOKENS else None


def prefix_amount(tokens: Sequence[Token], reading: Reading) -> tuple[Amount | None, int]:
    """The longest arithmetic at the start of the tokens, and how many of them it takes."""
    parser = _Parser(tokens[: MAX_TOKENS + 1], reading)
    try:
        return parser.sum(), parser.place
    except (_Unreadable, ZeroDivisionError):
        return None, 0
