"""From a line to tokens: numbers, words, signs, and what arithmetic may stop at or may not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from slmreason.verify.equations.units import Meaning, is_unit, letter_unit, meanings, stem

MAX_NUMBER_CHARS = 40
MAX_PARTS = 4
"""So many numbers may make one quantity: `1 day 2 hours 5 minutes 10 seconds`."""

_LABELS = "day|week|month|year|step|part|case|question|equation|group|class|round|level"
_TOKEN = re.compile(
    rf"""
    (?P<date>   (?<![\d/.-])(?:(?:19|20)\d\d-[01]?\d-[0-3]?\d|[0-3]?\d([/-])[0-3]?\d\2(?:19|20)\d\d)(?![\d/.-]) )
    |(?P<code>  \b0[xXbBoO][0-9a-fA-F]+\b )
    |(?P<label> (?<!\d[ ])\b(?:(?i:{_LABELS})|Days|Weeks)[ ]\d+\b )
    |(?P<mixed> \d++[ ]{{1,3}}(?:and[ ])?\$?\(?\d++/\d++\)?(?![.,/]?\d) )
    |(?P<number>(?:\d{{1,3}}(?:[ ]\d{{3}})+(?![\d,])|\d+(?:,\d+)*)(?:\.\d+(?:\.\.\.(?![ ]?[-+*/=)]))?)?|\.\d+ )
    |(?P<arrow> [=!<>]=+|[=-]{{1,3}}> )
    |(?P<times> (?<![^\W\d_])[xX](?=[ ]?[\d.($]) )
    |(?P<word>  (?:divided|multiplied)[ ]by\b|(?:/[ ]?)?[^\W\d_]\w*(?:['’-][^\W\d_]+)* )
    |(?P<symbol>[-+*/()=%]|\$(?=[ ]?(?:\.?\d|\())|(?<![^ =])\$(?=-[.\d]) )
    |(?P<formula>(?<![ ])\$(?=[ ]?[-+*/=]) )
    |(?P<stop>  [$,.;:?!"'’“”\[\]{{<>≈#|•] )
    |(?P<bar>   \S )
    """,
    re.VERBOSE,
)
_GOOD_NUMBER = re.compile(r"(?:0|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*)?(?:\.\d+)?")
_EUROPEAN = re.compile(r"(?P<thousands>[1-9]\d{0,2}\.\d{3})|(?P<decimal>(?:0|[1-9]\d{0,2}),(?!000)\d{3})")
OPERATORS = ("+", "-", "*", "/")
WORD_OPERATORS = {"of": "*", "times": "*", "plus": "+", "minus": "-", "divided by": "/", "multiplied by": "*"}
_NO_UNITS = re.compile(
    "am|pm|mod|modulo|o['’]clock|squared|cubed|factorial|choose|root|sqrt|log|ln|exp|sin|cos|tan|cot|pi|theta"
)
"""Behind a number these words make something else of it: `16 squared`, `11 am`, `4 pi`."""
_ZERO = Fraction(0)


@dataclass(frozen=True)
class Part:
    """`2 hours` of `2 hours 30 minutes`."""

    value: Fraction
    meaning: Meaning
    unit: str


@dataclass(frozen=True)
class Token:
    kind: str
    """`number`, `word`, one of `+-*/()=%$`, `stop` (arithmetic may end or start here) or `bar` (it may not)."""
    text: str
    start: int
    end: int
    value: Fraction = _ZERO
    european: Fraction | None = None
    """Its value where points part thousands and a comma is the decimal point, when that is another one: 1.500."""
    parts: tuple[Part, ...] = ()
    """What a number in several units consists of, the largest unit first."""

    @property
    def decimals(self) -> int:
        """How many digits stand behind the point."""
        return len(self.text.rstrip(".").partition(".")[2])


def read_tokens(line: str) -> list[Token]:
    """The tokens of a line."""
    tokens: list[Token] = []
    measured: frozenset[str] | None = None
    for found in _TOKEN.finditer(line):
        if found.lastgroup == "formula":  # its end in LaTeX: `$5 * 3$ = $15$`
            continue
        before = tokens[-1] if tokens else None
        value = _number(found)
        kind, text = "number" if value is not None else _kind(found, before), found.group()
        if kind == "number" and _touches(before, found) and before and before.kind in ("number", "word", "bar"):
            kind = "bar"  # `x2`, `1.2.3`
        if kind == "bar" and found.lastgroup == "word" and len(text) == 1 and before and before.kind == "number":
            measured = _dimensions_of(line) if measured is None else measured
            unit = letter_unit(text, measured)
            kind, text = ("word", unit) if unit else (kind, text)
        tokens.append(Token(kind, text, found.start(), found.end(), value or _ZERO, _european(found)))
    return tokens


def _dimensions_of(line: str) -> frozenset[str]:
    """The dimensions of the units that follow a number in a line, those of one letter aside."""
    words = re.findall(r"\d ?([^\W\d_]{2,20})(?![^\W_])", line)
    return frozenset(dimension for word in words for dimension, _ in meanings(word))


def _touches(before: Token | None, found: re.Match[str]) -> bool:
    return before is not None and before.end == found.start()


def _number(found: re.Match[str]) -> Fraction | None:
    """The value of a number, plain (`1,200.5`, `80 000`) or mixed (`1 and 1/2`); None for `16,0000` and `07`."""
    text = found.group()
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if found.lastgroup == "mixed":
        whole, top, bottom = map(int, re.findall(r"\d+", text))
        return whole + Fraction(top, bottom) if top < bottom else None
    plain = text.replace(" ", "").rstrip(".")
    good = found.lastgroup == "number" and _GOOD_NUMBER.fullmatch(plain)
    return Fraction(plain.replace(",", "")) if good else None


def _european(found: re.Match[str]) -> Fraction | None:
    form = _EUROPEAN.fullmatch(found.group()) if found.lastgroup == "number" else None
    if form is None:
        return None
    if form["decimal"] and found.string[found.start() - 1 : found.start()] == "$":
        return None
    return Fraction(form.group().replace(".", "")) if form["thousands"] else Fraction(form.group().replace(",", "."))


def _kind(found: re.Match[str], before: Token | None) -> str:
    text, following = found.group(), found.string[found.end() : found.end() + 2]
    behind_number = before is not None and before.kind == "number" and _touches(before, found)
    match found.lastgroup:
        case "symbol":
            return text
        case "times":
            return "*"
        case "label":
            return "word"
        case "arrow":
            return "stop"
        case "word" if not (before and before.kind == ")" and _touches(before, found)):  # `(1/2)bh`
            return _word_kind(text, before, behind_number, following)
        case "stop" if not (behind_number and (text in "!|" or (text in ":.," and re.match(r"[\d\\]", following)))):
            return "stop"  # `5!`, `2|x|`, `10:30` and `0.\\overline{3}` go on
    return "bar"


def _word_kind(text: str, before: Token | None, behind_number: bool, following: str) -> str:
    """A word that is a unit or prose, an operator (`3 times 4`), or neither: a variable, a clock time."""
    name = text.lower().strip("/ ")
    ends_operand = before is not None and before.kind in ("number", "%", ")")
    if ends_operand and name == "percent":
        return "%"
    is_operator = name in WORD_OPERATORS and (ends_operand or (before and name != "of"))
    if is_operator and re.match(r" ?[\d.$(]", following):
        return WORD_OPERATORS[name]
    is_variable = len(name) == 1 and (behind_number or name not in "ai")
    is_product = behind_number and len(name) == 2 and text.isalpha() and not (is_unit(name) or name == "in")  # `2ab`
    is_ordinal = behind_number and name in ("st", "nd", "rd", "th")
    is_function = following.startswith("(")
    is_other = re.search(r"[\d_]", name) or (ends_operand and _NO_UNITS.fullmatch(name)) or name in ("am", "pm", "mod")
    return "bar" if is_variable or is_product or is_ordinal or is_function or is_other else "word"


# Quantities in several units ------------------------------------------------------------------------------------------


def merge_parts(tokens: Sequence[Token], line: str) -> list[Token]:
    """The tokens with each `2 hours 30 minutes`, `5 feet and 6 inches`, `$2 and 50 cents` made one number."""
    merged: list[Token] = []
    place = 0
    while place < len(tokens):
        parts, end = _parts(tokens, place)
        if len(parts) > 1:
            start, last = tokens[place].start, tokens[end - 1].end
            merged.append(Token("number", line[start:last], start, last, parts[0].value, parts=tuple(parts)))
            place = end
        else:
            merged.append(tokens[place])
            place += 1
    return merged


def _parts(tokens: Sequence[Token], place: int) -> tuple[list[Part], int]:
    """The parts of the quantity that starts at a token, in ever smaller units of one kind, and where it ends."""
    parts: list[Part] = []
    end = place
    while len(parts) < MAX_PARTS:
        start = end
        if parts and start < len(tokens) and (tokens[start].text.lower() == "and" or tokens[start].text == ","):
            start += 1
        found, after = _part(tokens, start)
        smaller = [part for part in found if not parts or _continues(parts[-1], part)]
        if parts and len(parts) == 1:  # of the meanings of a pound, the one that has ounces or pence
            pairs = [(large, small) for large in _part(tokens, place)[0] for small in found if _continues(large, small)]
            if not pairs:
                break
            parts, smaller = [pairs[0][0]], [pairs[0][1]]
        if not smaller:
            break
        parts, end = [*parts, smaller[0]], after
    return parts, end


def _continues(large: Part, small: Part) -> bool:
    return large.meaning[0] == small.meaning[0] and large.meaning[1] > small.meaning[1]


def _part(tokens: Sequence[Token], place: int) -> tuple[list[Part], int]:
    """A number with a unit of measure at a token, in each of its meanings, and where it ends."""
    window = tokens[place : place + 2]
    if len(window) < 2:
        return [], place
    if window[0].kind == "$" and window[1].kind == "number":
        return [Part(window[1].value, meanings("$")[0], "$")], place + 2
    if window[0].kind == "number" and window[1].kind == "word":
        unit = window[1].text
        return [Part(window[0].value, meaning, stem(unit)) for meaning in meanings(unit)], place + 2
    return [], place


def halved(token: Token, european: bool) -> Token:
    """The token with half of its last digit as its value; a cut one, `1.66...`, may be off by a whole digit."""
    if token.parts:
        smallest = replace(token.parts[-1], value=Fraction(1, 2))
        return replace(token, parts=(*(replace(part, value=_ZERO) for part in token.parts[:-1]), smallest))
    decimals = token.decimals
    if european and token.european is not None:
        decimals = 3 if "," in token.text else 0
    digit = Fraction(1, 10**decimals)
    return replace(token, value=digit if token.text.endswith("...") else digit / 2, european=None)
