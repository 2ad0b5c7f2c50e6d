r"""Equations that can be read in a text, checked exactly. A trace with a false one is never trained on.

Each `=` is an equation of what stands directly to its left and to its right: arithmetic on numbers, with units,
currency signs and percent, plain or in LaTeX. What cannot be read for certain (a variable, a power, a clock time) is
left unread rather than guessed, and an equation that can honestly be read in several ways (`3 / 1/4 = 12`,
`$0.75 * 2 = 150 cents`, `0.2 * 100 = 20%`) is false only when it is false in all of them.

The texts are hostile until shown otherwise: the patterns run in linear time, an operand has a bounded number of
tokens and a number a bounded number of digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import product

MAX_TOKENS = 64
"""An operand with more tokens is left unread; this bounds the depth of its brackets too."""
MAX_NUMBER_CHARS = 40
MAX_UNIT_WORDS = 6
MAX_ALTERNATIVES = 4
"""So many ways to cut an operand from its text are tried."""
FLOAT_CHARS = 15
FLOAT_PRECISION = Fraction(1, 10**12)
"""A decimal with so many characters is one that a machine rounded; equations with it hold up to this share."""
MAX_TEXT_CHARS = 200_000
"""A longer text has nothing that could be relied on: what is hostile takes up to 40 microseconds a character."""
REMAINDER_CHARS = 60
"""So far behind an equation a remainder may be mentioned: `13 / 6 = 2 full cycles with a remainder of 1`."""


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
        for line in _plain(text).split("\n")
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
    tokens = _tokens(_plain(expression))
    return None if any(token.kind == "word" for token in tokens) else _value(tokens, _READINGS[0])


# From text to plain lines ---------------------------------------------------------------------------------------------

_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_FRACTION = re.compile(r"\\[dt]?frac ?\{([^{}]*)\} ?\{([^{}]*)\}")
_NESTED_FRACTIONS = 4
_PLAIN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) ?\{([^{}]*)\}", r" \1 "),
        (r"([=+*/-] ?)\\f?box(?:ed)? ?\{([^{}]*)\}", r"\1 \2 "),
        (r"\\f?box(?:ed)? ?\{([^{}]*)\}", r" ; \1 ; "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\!|(?<!\d)\*\*|\*\*(?!\d)", ""),
        (r"\{,\}", ","),
        (r"\\(?:begin|end) ?\{\w+\*?\}", " ; "),
        (r"\\\\", "\n"),
        (r"\\[()\[\],;: ]|\$\$|[&~\u00a0\u202f]|\^ ?(?:\{ ?\\circ ?\}|\\circ)|°", " "),
        (r"\\([%$])", r"\1"),
        (r"[€£¥]", "$"),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])|[×·⋅∗]", "*"),
        (r"\\div(?![a-zA-Z])|[÷∕⁄]", "/"),
        (r"[−–‒]", "-"),
        (r"\\[lc]?dots(?![a-zA-Z])|…", "..."),
        (r"\\(?:approx|q?quad|implies|to|[lL]?(?:ong)?[rR]ightarrow)(?![a-zA-Z])", " ; "),
        (r"(\d) ?\\[dt]?frac ?\{(\d+)\} ?\{(\d+)\}", r"\1 \2/\3"),
        (r"\\[dt]?frac ?(\d) ?(\d)", r"(\1/\2)"),
        (r"\n[ \t]{0,40}=", " ="),
    )
)


def _plain(text: str) -> str:
    """A text with its LaTeX made plain, as far as that is simple."""
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    for _ in range(_NESTED_FRACTIONS):
        text, count = _FRACTION.subn(lambda found: f"({_bracketed(found[1])}/{_bracketed(found[2])})", text)
        if not count:
            break
    return text


def _bracketed(expression: str) -> str:
    return expression.strip() if re.fullmatch(r"\s*[\d.,]+\s*", expression) else f"({expression.strip()})"


# From a line to tokens ------------------------------------------------------------------------------------------------

_LABELS = "day|week|month|year|step|part|case|question|equation|group|class|round|level"
_TOKEN = re.compile(
    rf"""
    (?P<label>  \b(?:(?i:{_LABELS})|Days|Weeks)[ ]\d+\b )
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
_OPERATORS = ("+", "-", "*", "/")
_WORD_OPERATORS = {"of": "*", "times": "*", "plus": "+", "minus": "-", "divided by": "/", "multiplied by": "*"}
_ZERO = Fraction(0)


@dataclass(frozen=True)
class _Token:
    kind: str
    """`number`, `word`, one of `+-*/()=%$`, `stop` (arithmetic may end or start here) or `bar` (it may not)."""
    text: str
    start: int
    end: int
    value: Fraction = _ZERO


def _tokens(line: str) -> list[_Token]:
    tokens: list[_Token] = []
    for found in _TOKEN.finditer(line):
        if found.lastgroup == "formula":  # its end in LaTeX: `$5 * 3$ = $15$`
            continue
        before = tokens[-1] if tokens else None
        value = _number(found)
        kind = "number" if value is not None else _kind(found, before)
        if kind == "number" and _touches(before, found) and before and before.kind in ("number", "word", "bar"):
            kind = "bar"  # `x2`, `1.2.3`
        tokens.append(_Token(kind, found.group(), found.start(), found.end(), value or _ZERO))
    return tokens


def _touches(before: _Token | None, found: re.Match[str]) -> bool:
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


def _kind(found: re.Match[str], before: _Token | None) -> str:
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


def _word_kind(text: str, before: _Token | None, behind_number: bool, following: str) -> str:
    """A word that is a unit or prose, an operator (`3 times 4`), or neither: a variable, a clock time."""
    name = text.lower().strip("/ ")
    ends_operand = before is not None and before.kind in ("number", "%", ")")
    if ends_operand and name == "percent":
        return "%"
    is_operator = name in _WORD_OPERATORS and (ends_operand or (before and name != "of"))
    if is_operator and re.match(r" ?[\d.$(]", following):
        return _WORD_OPERATORS[name]
    is_variable = len(name) == 1 and (behind_number or name not in "ai")
    is_ordinal = behind_number and name in ("st", "nd", "rd", "th")
    is_function = following.startswith("(")
    is_other = re.search(r"[\d_]", name) or name in ("am", "pm", "mod")
    return "bar" if is_variable or is_ordinal or is_function or is_other else "word"


# From tokens to values ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """One honest way to read an equation."""

    percent: Fraction
    """What `%` stands for; 1 in `0.2 * 100 = 20%`."""
    tight: bool
    """A proper fraction behind a slash is one number: `3 / 1/4` is 12."""
    scaled: bool
    """Units count: `2 hours = 120 minutes`."""


_READINGS = [
    _Reading(percent, tight, scaled)
    for scaled, tight, percent in product((False, True), (False, True), (Fraction(1, 100), Fraction(1)))
]
_SCALES: dict[str, Fraction | int] = {
    **{"cent": Fraction(1, 100), "penny": Fraction(1, 100), "nickel": Fraction(1, 20), "dime": Fraction(1, 10)},
    **{"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800},
    **{"inch": 1, "inches": 1, "foot": 12, "feet": 12, "yard": 36, "mile": 63_360},
    **{"ounce": 1, "pound": 16, "ton": 32_000, "cup": 1, "pint": 2, "quart": 4, "gallon": 16},
    **{"gram": 1, "kilogram": 1000, "kg": 1000, "meter": 1, "kilometer": 1000, "km": 1000, "ml": 1, "liter": 1000},
    **{"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9},
}
"""What a unit is in another one of its kind: cents in dollars, hours in seconds."""


def _scale(word: str) -> Fraction | int | None:
    name = word.lower()
    return _SCALES.get(name, _SCALES.get(name.removesuffix("s")))


class _Unreadable(ValueError):
    """These tokens are not arithmetic."""


class _Parser:
    """Recursive descent over the tokens of one operand, from the first as far as it goes."""

    def __init__(self, tokens: Sequence[_Token], reading: _Reading) -> None:
        self.tokens, self.reading, self.place = tokens, reading, 0

    def kind(self, ahead: int = 0) -> str:
        place = self.place + ahead
        return self.tokens[place].kind if place < len(self.tokens) else "end"

    def take(self, *kinds: str) -> _Token | None:
        """The next token, taken, when it is of one of these kinds."""
        if self.kind() not in kinds:
            return None
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> Fraction:
        value = self.product()
        while sign := self.take("+", "-"):
            value += self.product() if sign.kind == "+" else -self.product()
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            if self.take("*") or self._is_product_of_brackets():
                value *= self.signed()
            elif self.take("/"):
                value /= self._fraction() if self.reading.tight and self._fraction_follows() else self.signed()
            else:
                return value

    def signed(self) -> Fraction:
        return -self.signed() if self.take("-") else self.quantity()

    def quantity(self) -> Fraction:
        if self.take("$") and self.take("-"):
            return -self.quantity()
        if number := self.take("number"):
            value = number.value
        elif self.take("("):
            value = self.sum()
            if not self.take(")"):
                raise _Unreadable
        else:
            raise _Unreadable
        if self.take("%"):
            value *= self.reading.percent
        return value * self._unit()

    def _unit(self) -> Fraction:
        """Takes the words behind a number; what they stand for when units count."""
        scale, rate = Fraction(1), False
        for _ in range(MAX_UNIT_WORDS):
            if word := self.take("word"):
                rate = rate or word.text == "per" or "/" in word.text
                scale *= 1 if rate else (_scale(word.text) or 1)
        return scale if self.reading.scaled else Fraction(1)

    def _is_product_of_brackets(self) -> bool:
        """At the second bracket of `(2)(3)`, which `2 (as we saw)` is not."""
        return self.kind() == "(" and self.tokens[self.place - 1].end == self.tokens[self.place].start

    def _fraction_follows(self) -> bool:
        if [self.kind(ahead) for ahead in range(3)] != ["number", "/", "number"]:
            return False
        return self.tokens[self.place].value < self.tokens[self.place + 2].value

    def _fraction(self) -> Fraction:
        top = self.quantity()
        self.take("/")
        return top / self.quantity()


def _value(tokens: Sequence[_Token], reading: _Reading) -> Fraction | None:
    """The value of an operand; None when it is not arithmetic from end to end."""
    value, length = _prefix_value(tokens, reading)
    return value if length == len(tokens) <= MAX_TOKENS else None


def _prefix_value(tokens: Sequence[_Token], reading: _Reading) -> tuple[Fraction | None, int]:
    parser = _Parser(tokens[: MAX_TOKENS + 1], reading)
    try:
        return parser.sum(), parser.place
    except (_Unreadable, ZeroDivisionError):
        return None, 0


# From tokens to equations ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    """One side of an equation."""

    tokens: Sequence[_Token]
    line: str

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

    @property
    def numbers(self) -> list[_Token]:
        return [token for token in self.tokens if token.kind == "number"]

    @property
    def has_units(self) -> bool:
        return any(token.kind == "word" and _scale(token.text) for token in self.tokens)

    def measured(self, reading: _Reading) -> tuple[Fraction, Fraction] | None:
        """The value and by how much it may be off, because it is rounded; None when it cannot be read so."""
        value = _value(self.tokens, reading)
        return None if value is None else (value, max(self._half_digit(reading), self._float_error(value)))

    def _half_digit(self, reading: _Reading) -> Fraction:
        """Half of the last digit of an operand that is one decimal or percentage, else 0."""
        digits = self.numbers[0].text.partition(".")[2]
        is_percentage = any(token.kind == "%" for token in self.tokens)
        if len(self.numbers) > 1 or not (digits or is_percentage):
            return _ZERO
        # `1.66...` is cut, not rounded.
        half = (Fraction(1) if digits.endswith("...") else Fraction(1, 2)) / 10 ** len(digits.rstrip("."))
        halved = [replace(token, value=half) if token.kind == "number" else token for token in self.tokens]
        return abs(_value(halved, reading) or _ZERO)

    def _float_error(self, value: Fraction) -> Fraction:
        """What a number as a machine prints it, `26.666666666666668`, may be off."""
        is_float = any("." in token.text and len(token.text) > FLOAT_CHARS for token in self.numbers)
        return abs(value) * FLOAT_PRECISION if is_float else _ZERO


def _line_equations(line: str) -> Iterator[Equation]:
    tokens = _tokens(line) if "=" in line else []
    for place, token in enumerate(tokens):
        if token.kind == "=":
            rights = _right_operands(tokens, place, line)
            lefts = _left_operands(tokens, place, line) if rights else []
            if lefts and max(len(lefts[0].numbers), len(rights[0].numbers)) > 1:
                text = " ".join(line[lefts[0].start : rights[0].end].split())
                yield Equation(text, None if _agree(lefts, rights) else _fault(lefts[0], rights[0]))


def _agree(lefts: Sequence[_Operand], rights: Sequence[_Operand]) -> bool:
    """Whether two sides are equal in some honest reading."""
    has_units = any(operand.has_units for operand in (*lefts, *rights))
    for reading in _READINGS:
        if has_units or not reading.scaled:
            pairs = product(*([side.measured(reading) for side in sides] for sides in (lefts, rights)))
            if any(left and right and abs(left[0] - right[0]) <= max(left[1], right[1]) for left, right in pairs):
                return True
    return False


def _fault(left: _Operand, right: _Operand) -> str:
    computed, stated = (left, right) if len(left.numbers) > 1 else (right, left)
    values = {_value(computed.tokens, reading) for reading in _READINGS if not reading.scaled} - {None}
    is_value = f"is {_shown(values.pop() or _ZERO)}, not" if len(values) == 1 else "is not"  # `36 / 2/3` is 6 or 54
    return f"{computed.text} {is_value} {stated.text}."


def _shown(value: Fraction) -> str:
    """A number in digits, rounded when it has many."""
    if value.denominator == 1 and abs(value) < 10**MAX_NUMBER_CHARS:
        return str(value.numerator)
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    if Fraction(decimal) == value and len(str(decimal)) <= 12:
        return str(decimal)
    return f"about {decimal:.6g}"


_REMAINDER = re.compile(r"\b(?:remainder|remain(?:s|ing)?|left ?over)\b", re.IGNORECASE)
_MODULO = re.compile(r"[ (\\]{0,3}p?mod")
_PROSE = re.compile(
    r"because|so|is|are|was|were|and|then|that|which|if|when|since|after|while|has|have|had"
    r"|gives|leaves|makes|means|equals|costs"
)
"""Words that are part of no unit."""
_TAIL = re.compile(
    r"(?:\b(?:(?:add|from).* to|(?:multipl|divid).* by|from|than|over|half|third|quarter|twice|double|triple)(?: of)?"
    r"|\d \w+ of)(?: the| a)? *$",
    re.IGNORECASE,
)
"""Arithmetic behind these is the end of something longer: `half of the 8 + 4`, `8 packs of 5 * 4`."""
TAIL_CHARS = 60


def _right_operands(tokens: Sequence[_Token], equals: int, line: str) -> list[_Operand]:
    """The longest arithmetic behind an equals sign, then what precedes an operator in words: `= 1/3 of 150`.

    Empty when it is the start of something that cannot be read.
    """
    behind = tokens[equals + 1 : equals + 2 + MAX_TOKENS]
    value, length = _prefix_value(behind, _READINGS[0])
    if value is None or length > MAX_TOKENS:
        return []
    following = behind[length].kind if length < len(behind) else "stop"
    goes_on = following in ("bar", "%", *_OPERATORS)
    if following in ("number", "$"):
        goes_on = behind[length - 1].kind != "word"
    ends_at = max(token.end for token in behind[:length] if token.kind != "word")
    is_divided = any(token.kind == "/" for token in tokens[max(0, equals - MAX_TOKENS) : equals])
    leaves = _REMAINDER.search(line, ends_at, ends_at + REMAINDER_CHARS) if is_divided else None
    if goes_on or leaves or _MODULO.match(line, ends_at):
        return []
    ends = [length, *(place for place in range(1, length) if behind[place].text.lower() in _WORD_OPERATORS)]
    return [_Operand(behind[: _without_prose(behind, end)], line) for end in ends[:MAX_ALTERNATIVES]]


def _without_prose(tokens: Sequence[_Token], end: int) -> int:
    """`end` without the words before it that are no known units."""
    words = 0
    while tokens[end - words - 1].kind == "word":
        words += 1
    end -= words
    while words and _scale(tokens[end].text):
        end, words = end + 1, words - 1
    return end


def _left_operands(tokens: Sequence[_Token], equals: int, line: str) -> list[_Operand]:
    """The longest arithmetic before an equals sign, then what follows a dash that may be no minus.

    Empty when it is the end of something that cannot be read.
    """
    start = _left_start(tokens, equals)
    dashes = [p for p in range(start, equals - 1) if tokens[p].kind == "-" and (not p or tokens[p - 1].kind == "word")]
    starts = [start, *(place + after for place in dashes for after in (1, 0))][:MAX_ALTERNATIVES]
    if start == 0 and tokens[0].text in _OPERATORS:  # the bullet of a list
        starts = [1, *starts]
    operands = [_Operand(tokens[place:equals], line) for place in starts]
    if _is_tail(tokens, start, line) or _is_name(tokens, start, equals):
        return []
    return operands if _value(operands[0].tokens, _READINGS[0]) is not None else []


def _left_start(tokens: Sequence[_Token], equals: int) -> int:
    """Where the longest run of tokens that may be arithmetic starts before an equals sign."""
    depth, start = 0, equals
    while start > max(0, equals - MAX_TOKENS):
        depth += (tokens[start - 1].kind == ")") - (tokens[start - 1].kind == "(")
        if depth < 0 or _divides(tokens, start - 1):
            break
        start -= 1
    return start


def _divides(tokens: Sequence[_Token], place: int) -> bool:
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


def _is_tail(tokens: Sequence[_Token], start: int, line: str) -> bool:
    """True when arithmetic from `start` on is the end of something longer."""
    if start == 0:
        return False
    before, earlier = tokens[start - 1], tokens[start - 2] if start > 1 else None
    if before.kind == "word":
        return _TAIL.search(line, max(0, before.end - TAIL_CHARS), before.end) is not None
    if before.kind == "stop" and earlier:  # `14, 400 / 80` and `.8 + . 84`
        is_torn = before.text == "," and earlier.kind == "number" and re.fullmatch(r"\d{3}", tokens[start].text)
        return bool(is_torn) or earlier.kind in _OPERATORS
    if before.kind == "(":
        return earlier is not None and earlier.kind in ("number", ")", *_OPERATORS)
    if before.kind == ")":  # `(1/2) 278 + 11`, but `(2) 5 + 3 = 8` is the second of a list
        return start > 3
    return before.kind not in ("=", "stop") or (before.text == "|" and tokens[start].kind == "-")


def _is_name(tokens: Sequence[_Token], start: int, equals: int) -> bool:
    """True when a number stands for something: `Remaining 10 = 60 / 6`, `8 batches = 5.5 * 8`, `1/2 a cup = 4`."""
    numbers = [token.value for token in tokens[start:equals] if token.kind == "number"]
    has_unit = tokens[equals - 1].kind == "word"
    if len(numbers) == 1:
        return has_unit or (start > 0 and tokens[start - 1].kind == "word")
    return has_unit and len(numbers) == 2 and tokens[start + 1].kind == "/" and numbers[0] < numbers[1]
