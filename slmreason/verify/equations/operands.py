"""The two sides of an equals sign: which tokens to its left and to its right belong to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from slmreason.verify.equations.lexing import OPERATORS, WORD_OPERATORS, Token, halved
from slmreason.verify.equations.reading import MAX_TOKENS, Amount, Reading, amount_of, prefix_amount
from slmreason.verify.equations.terms import Term, add_known_units, add_percentages, terms_of
from slmreason.verify.equations.units import RATE_WORDS, Meaning, is_unit, meanings

MAX_ALTERNATIVES = 4
"""So many ways to cut an operand from its text are tried."""
FLOAT_CHARS = 15
FLOAT_PRECISION = Fraction(1, 10**12)
"""A decimal with so many characters is one that a machine rounded; equations with it hold up to this share."""
REMAINDER_CHARS = 60
"""So far behind an equation a remainder may be mentioned: `13 / 6 = 2 full cycles with a remainder of 1`."""
TAIL_CHARS = 60
_ZERO = Fraction(0)
_NOTHING = Amount()

_REMAINDER = re.compile(r"\b(?:remainder|remain(?:s|ing)?|left ?over)\b", re.IGNORECASE)
_MODULO = re.compile(r"[ (\\]{0,3}p?mod")
_PROSE = re.compile(
    r"because|so|is|are|was|were|and|then|that|which|if|when|since|after|while|has|have|had"
    r"|gives|leaves|makes|means|equals|costs"
)
"""Words that are part of no unit."""
_TAIL = re.compile(
    r"(?:\b(?:(?:add|from).* to|(?:multipl|divid).* by|from|than|over|half|third|quarter|twice|double|triple)(?: of)?"
    r"|\b(?:root|cube|factorial|logarithm|sine|cosine|tangent) of"
    r"|\b(?:sum|average|product|difference|between)\b[^.,;=]* and"
    r"|\d \w+ of)(?: the| a)? *$",
    re.IGNORECASE,
)
"""Arithmetic behind these is the end of something longer: `half of the 8 + 4`, `8 packs of 5 * 4`."""


@dataclass(frozen=True)
class Operand:
    """One side of an equation."""

    tokens: Sequence[Token]
    line: str
    before: Sequence[Token] = ()
    """The tokens of the line in front of it, up to MAX_TOKENS."""
    behind: Sequence[Token] = ()
    """What follows it, from the words that are no known units, up to MAX_TOKENS."""

    @property
    def start(self) -> int:
        return self.tokens[0].start

    @property
    def end(self) -> int:
        """Where it ends without the words behind it that are no known units."""
        return self.tokens[_without_prose(self.tokens, len(self.tokens)) - 1].end

    @property
    def text(self) -> str:
        return " ".join(self.line[self.start : self.end].split())

    @cached_property
    def numbers(self) -> list[Token]:
        return [token for token in self.tokens if token.kind == "number"]

    @cached_property
    def words(self) -> list[str]:
        return [token.text.lower().strip("/ ") for token in self.tokens if token.kind == "word"]

    @property
    def has_units(self) -> bool:
        return any(token.parts for token in self.tokens) or any(map(is_unit, self.words))

    @cached_property
    def units(self) -> frozenset[Meaning]:
        """What it measures, and in which units, going by its words."""
        parts = (part.meaning for token in self.tokens for part in token.parts)
        return frozenset((*parts, *(meaning for word in self.words for meaning in meanings(word))))

    @property
    def has_rates(self) -> bool:
        """True for `60 miles per hour`, where the unit behind `per` is known."""
        names = [token.text for token in self.tokens if token.kind == "word"]
        pairs = zip(["", *names], names, strict=False)
        return any(meanings(name.strip("/ ")) and ("/" in name or before in RATE_WORDS) for before, name in pairs)

    @property
    def divides_twice(self) -> bool:
        """True for `3 / 1/4`."""
        kinds = [token.kind for token in self.tokens]
        return any(kinds[place] == kinds[place + 2] == "/" for place in range(len(kinds) - 2))

    @cached_property
    def terms(self) -> list[Term]:
        return terms_of(self.tokens)

    @cached_property
    def adds_known_units(self) -> bool:
        return add_known_units(self.terms)

    @cached_property
    def adds_percentages(self) -> bool:
        return add_percentages(self.terms)

    def amount(self, reading: Reading) -> Amount | None:
        return amount_of(self.tokens, reading)

    def uncertainty(self, reading: Reading) -> Amount:
        """Half of the last digit of an operand that is one decimal, percentage or quantity in several units."""
        if len(self.numbers) > 1:
            return _NOTHING
        number = self.numbers[0]
        is_rounded = number.parts or number.decimals or any(token.kind == "%" for token in self.tokens)
        if not is_rounded and not (reading.european and number.european is not None):
            return _NOTHING
        half = halved(number, reading.european)
        return _absolute([half if token is number else token for token in self.tokens], reading)

    @property
    def float_error(self) -> Fraction:
        """Which share of a number as a machine prints it, `26.666666666666668`, may be off."""
        is_float = any("." in token.text and len(token.text) > FLOAT_CHARS for token in self.numbers)
        return FLOAT_PRECISION if is_float else _ZERO


def _absolute(tokens: Sequence[Token], reading: Reading) -> Amount:
    amount = amount_of(tokens, reading) or _NOTHING
    return Amount(abs(amount.measured), abs(amount.bare))


def right_operands(tokens: Sequence[Token], equals: int, line: str) -> list[Operand]:
    """The longest arithmetic behind an equals sign, then what precedes an operator in words: `= 1/3 of 150`.

    Empty when it is the start of something that cannot be read.
    """
    behind = tokens[equals + 1 : equals + 2 + MAX_TOKENS]
    value, length = prefix_amount(behind, Reading())
    if value is None or length > MAX_TOKENS:
        return []
    following = behind[length].kind if length < len(behind) else "stop"
    goes_on = following in ("bar", "%", *OPERATORS)
    if following in ("number", "$"):
        goes_on = behind[length - 1].kind != "word" and not behind[length - 1].parts
    ends_at = max(token.end for token in behind[:length] if token.kind != "word")
    is_divided = any(token.kind == "/" for token in tokens[max(0, equals - MAX_TOKENS) : equals])
    leaves = _REMAINDER.search(line, ends_at, ends_at + REMAINDER_CHARS) if is_divided else None
    if goes_on or leaves or _MODULO.match(line, ends_at):
        return []
    ends = [length, *(place for place in range(1, length) if behind[place].text.lower() in WORD_OPERATORS)]
    cuts = [_without_prose(behind, end) for end in ends[:MAX_ALTERNATIVES]]
    return [Operand(behind[:cut], line, (), behind[cut:]) for cut in cuts]


def _without_prose(tokens: Sequence[Token], end: int) -> int:
    """`end` without the words before it that are no known units."""
    words = 0
    while tokens[end - words - 1].kind == "word":
        words += 1
    end -= words
    while words and is_unit(tokens[end].text):
        end, words = end + 1, words - 1
    return end


def left_operands(tokens: Sequence[Token], equals: int, line: str) -> list[Operand]:
    """The longest arithmetic before an equals sign, then what follows a dash that may be no minus.

    Empty when it is the end of something that cannot be read.
    """
    start = _left_start(tokens, equals)
    dashes = [p for p in range(start, equals - 1) if tokens[p].kind == "-" and (not p or tokens[p - 1].kind == "word")]
    starts = [start, *(place + after for place in dashes for after in (1, 0))][:MAX_ALTERNATIVES]
    if start == 0 and tokens[0].text in OPERATORS:  # the bullet of a list
        starts = [1, *starts]
    operands = [Operand(tokens[place:equals], line, tokens[max(0, place - MAX_TOKENS) : place]) for place in starts]
    if _is_tail(tokens, start, line) or _is_name(tokens, start, equals):
        return []
    return operands if operands[0].amount(Reading()) is not None else []


def _left_start(tokens: Sequence[Token], equals: int) -> int:
    """Where the longest run of tokens that may be arithmetic starts before an equals sign."""
    depth, start = 0, equals
    while start > max(0, equals - MAX_TOKENS):
        depth += (tokens[start - 1].kind == ")") - (tokens[start - 1].kind == "(")
        if depth < 0 or _divides(tokens, start - 1):
            break
        start -= 1
    return start


def _divides(tokens: Sequence[Token], place: int) -> bool:
    """Whether no arithmetic goes on from the token at `place` to the next."""
    token, follower = tokens[place], tokens[place + 1]
    if token.kind in ("=", "stop", "bar"):
        return True
    if token.kind == "word" and _PROSE.fullmatch(token.text.lower()):
        return True
    if token.kind == "word" and token.text == "of":  # `1/3 of Tom's cards`, but `4 pieces of bread`
        earlier = ["", "", *(token.kind for token in tokens[max(0, place - 2) : place])]
        return earlier[-1] in ("%", ")") or earlier[-2] == "/" or follower.kind in ("number", "$")
    return token.kind in ("word", ")", "%", "number") and follower.kind in ("number", "$")


def _is_tail(tokens: Sequence[Token], start: int, line: str) -> bool:
    """True when arithmetic from `start` on is the end of something longer."""
    if start == 0:
        return False
    before, earlier = tokens[start - 1], tokens[start - 2] if start > 1 else None
    if before.kind == "word":
        return _TAIL.search(line, max(0, before.end - TAIL_CHARS), before.end) is not None
    if before.kind == "stop" and earlier:  # `14, 400 / 80` and `.8 + . 84`
        is_torn = before.text == "," and earlier.kind == "number" and re.fullmatch(r"\d{3}", tokens[start].text)
        return bool(is_torn) or earlier.kind in OPERATORS
    if before.kind == "(":
        return earlier is not None and earlier.kind in ("number", ")", *OPERATORS)
    if before.kind == ")":  # `(1/2) 278 + 11`, but `(2) 5 + 3 = 8` is the second of a list
        return start > 3
    return before.kind not in ("=", "stop") or (before.text == "|" and tokens[start].kind == "-")


def _is_name(tokens: Sequence[Token], start: int, equals: int) -> bool:
    """True when a number stands for something: `Remaining 10 = 60 / 6`, `8 batches = 5.5 * 8`, `1/2 a cup = 4`."""
    numbers = [token.value for token in tokens[start:equals] if token.kind == "number"]
    has_unit = tokens[equals - 1].kind == "word"
    if len(numbers) == 1:
        return has_unit or (start > 0 and tokens[start - 1].kind == "word")
    return has_unit and len(numbers) == 2 and tokens[start + 1].kind == "/" and numbers[0] < numbers[1]
