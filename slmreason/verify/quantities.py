r"""Plain numbers and what stands behind them: values that need no algebra, units, scale words, lists.

`exact` reads integers, decimals, fractions, mixed and repeating numbers, powers of ten, percent, `9 million` and
`twenty-one`. What it cannot read for certain is left to math-verify.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from slmreason.verify.notation import tidy

MAX_ANSWER_CHARS = 256
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*|\d*)(?:\.\d+)?")
_POWER_OF_TEN = re.compile(r"(?:(.+?)\s*(?:\\times|\\cdot|\*)\s*|([-+]?))10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|(\d))")
_CURRENCY = re.compile(r"\\\$|[$€£¥₹₩₽₪฿]|\b(?:USD|EUR|GBP)\b|\bRs\.?(?=\s*\d)")
_PLAIN = r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+"
_FRACTION = re.compile(
    rf"(?:(\d+)\s*(?=\\frac)|(\d+)\s+(?=\d+\s*/))?(?:\\frac\s*\{{\s*(-?(?:{_PLAIN}))\s*\}}\s*\{{\s*(-?(?:{_PLAIN}))\s*\}}"
    rf"|({_PLAIN})\s*/\s*({_PLAIN}))"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}")
_PERIODIC = re.compile(r"(\d*)\.(\d*?)(\d+?)\3+\s*\\[lc]?dots")
_BASE = re.compile(r"\(?(-?[0-9A-Fa-f]+)\)?_\{?(?:\\text\{)?\s*(\d+|[a-z]+)\s*\}*")
_SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}  # fmt: skip
_SCALE = re.compile(rf"(.+?)\s*(?:\\text\s*\{{\s*)?\b({'|'.join(_SCALES)})s?\s*\}}?")
_LEADING_SCALE = re.compile(rf"(?:{'|'.join(_SCALES)})s?\b")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORD_VALUES = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5,
    "fifths": 5, "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10,
}  # fmt: skip
_COMMAND = re.compile(r"\\(?:frac|sqrt|pi|times|cdot|binom|infty|left|right|ln|log|sin|cos|tan|exp|pm|div)(?![a-zA-Z])")
_UNIT_WORD = r"(?:[a-zA-Z]{2,}|[mgshLlNJWVCFKA]|\$)\.?(?:\s*\^\s*\{?-?\d\}?|\s*[²³])?"
_UNIT = re.compile(
    r"(?:\s*(?:°|\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z]))\s*(?:\\text\s*\{\s*[CF]\s*\}|[CF]\b)?"
    r"|\s*(?:\^\s*\{?\s*)?\\text\s*\{[^{}]*[a-zA-Z][^{}]*\}\s*\}?(?:\s*\^\s*\{?-?\d\}?)?"
    r"(?:\s*(?:/|\\cdot)?\s*(?:\\text\s*\{[^{}]*\}|[a-zA-Z]{1,3}\b)(?:\s*\^\s*\{?-?\d\}?)?)*(?:\s*\})?"
    r"|\s*\\frac\s*\{\s*\\text\s*\{[^{}]*\}\s*\}\s*\{\s*\\text\s*\{[^{}]*\}\s*\}"
    rf"|(?:\s+|(?<=\d)(?=[a-zA-Z]{{2}})){_UNIT_WORD}(?:\s*(?:/|\s)\s*{_UNIT_WORD}){{0,5}})$"
)
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|[a-z]*illion|dozen|half|halves|squared|cubed|factorial|over|times|plus|minus|divided|mod"
    r"|choose|and|or|to|not|root|power|sqrt|pi|is|equals|if|when|where|for|with|base)s?\b",
    re.IGNORECASE,
)
_AND = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\w\\])(?:and|or)\b|\\(?:lor|vee|land|wedge)(?![a-zA-Z])")
_ALIASES = {
    "cm": "centimeter centimetre centimeters centimetres cms", "m": "meter metre meters metres",
    "km": "kilometer kilometre kilometers kilometres kms", "mm": "millimeter millimetre millimeters millimetres",
    "in": "inch inches", "ft": "foot feet", "yd": "yard yards", "mi": "mile miles",
    "g": "gram grams", "kg": "kilogram kilograms kgs", "lb": "pound pounds lbs", "oz": "ounce ounces",
    "s": "sec secs second seconds", "min": "mins minute minutes", "h": "hr hrs hour hours", "d": "day days",
    "wk": "week weeks", "mo": "month months", "yr": "year years yrs", "dollar": "dollars usd", "cent": "cents",
    "degree": "degrees deg", "radian": "radians rad",
}  # fmt: skip
_CANONICAL = {alias: unit for unit, aliases in _ALIASES.items() for alias in (unit, *aliases.split())}


class Exact(NamedTuple):
    """A number without rounding of ours."""

    value: Fraction
    is_decimal: bool
    """Written with a decimal point or a power of ten, so perhaps rounded by whoever wrote it."""
    is_percent: bool = False
    """`value` is that of the number before the percent sign."""


def as_number(answer: str) -> Decimal | None:
    r"""The value of a plain decimal number, else None.

    Thousands separators, a currency sign and a power of ten (`4.5e33`, `4.5 \times 10^{33}`) are allowed.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    return _decimal(_CURRENCY.sub("", tidy(answer), count=1).strip())


def _decimal(plain: str) -> Decimal | None:
    match = _POWER_OF_TEN.fullmatch(plain)
    if match:
        mantissa, sign, *powers = match.groups()
        plain, power = mantissa or f"{sign}1", powers[0] or powers[1]
    if not plain or not _NUMBER.fullmatch(plain) or not any(character.isdigit() for character in plain):
        return None
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None
    return number.scaleb(int(power)) if match else number


@lru_cache(maxsize=65_536)
def exact(answer: str) -> Exact | None:
    """The number that a tidied answer without its unit is; None for anything else, a list too."""
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return None
    plain = _CURRENCY.sub("", answer, count=1).strip()
    if plain.endswith("%"):
        part = exact(plain.rstrip("%").rstrip("\\").rstrip())
        return None if part is None or part.is_percent else part._replace(is_percent=True)
    if re.fullmatch(r"\d{1,3}(?: \d{3})+", plain):
        plain = plain.replace(" ", "")
    decimal = _decimal(plain)
    if decimal is not None:
        return Exact(Fraction(decimal), "." in plain or "10" in plain and "^" in plain)
    scaled = _SCALE.fullmatch(plain)
    if scaled:
        part = exact(scaled[1]) or _word_number(scaled[1])
        return None if part is None else part._replace(value=part.value * _SCALES[scaled[2]])
    return _fraction(plain) or _repeating(plain) or _word_number(plain)


def _fraction(plain: str) -> Exact | None:
    unsigned = plain.lstrip("+-").lstrip()
    match = _FRACTION.fullmatch(unsigned)
    if not match or len(plain) - len(unsigned) > 2:
        return None
    whole = match[1] or match[2]
    numerator, denominator = (Fraction(n.replace(",", "")) for n in (match[3] or match[5], match[4] or match[6]))
    if denominator == 0 or (whole and (numerator < 0 or denominator < 0)):
        return None
    value = Fraction(whole or 0) + numerator / denominator
    return Exact(-value if plain.startswith("-") else value, is_decimal=False)


def _repeating(plain: str) -> Exact | None:
    r"""`12.1\overline{6}` is 12 + 15/90."""
    match = _REPEATING.fullmatch(plain.lstrip("+-")) or _PERIODIC.fullmatch(plain.lstrip("+-"))
    if not match:
        return None
    whole, fixed, period = match.groups()
    shift = 10 ** len(fixed)
    value = Fraction(int(whole or 0)) + Fraction(int(fixed or 0), shift)
    value += Fraction(int(period), (10 ** len(period) - 1) * shift)
    return Exact(-value if plain.startswith("-") else value, is_decimal=False)


def _word_number(plain: str) -> Exact | None:
    """`twenty-one`, `two hundred and five`, `three quarters`, `half`."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", plain).strip(" .'\"").lower()
    tokens = re.split(r"[\s-]+", words)
    if not words or len(tokens) > 12 or not all(re.fullmatch("[a-z]+", token) for token in tokens):
        return None
    sign = -1 if tokens[0] in ("minus", "negative") else 1
    tokens = tokens[1:] if sign < 0 else tokens
    if tokens and tokens[-1] in _PARTS:
        count = _whole_words(tokens[:-1]) if tokens[:-1] not in ([], ["a"]) else 1
        return None if count is None else Exact(Fraction(sign * count, _PARTS[tokens[-1]]), is_decimal=False)
    total = _whole_words(tokens)
    return None if total is None else Exact(Fraction(sign * total), is_decimal=False)


def _whole_words(tokens: list[str]) -> int | None:
    total = group = 0
    seen = False
    for token in tokens:
        if token == "and" and seen:
            continue
        if token in _WORD_VALUES:
            if group % 100 and not (group % 100 >= 20 and group % 10 == 0 and _WORD_VALUES[token] < 10):
                return None  # "one two" is no number
            group += _WORD_VALUES[token]
        elif token in ("hundred", "dozen") and seen:
            group *= _SCALES[token]
        elif token in _SCALES and seen:
            total, group = total + group * _SCALES[token], 0
        else:
            return None
        seen = True
    return total + group if seen else None


def in_base(answer: str) -> tuple[str, str] | None:
    """(digits, base) of a number in another base, as `321_5`; None for anything else."""
    match = _BASE.fullmatch(answer.replace(" ", ""))
    return (match[1].lower(), str(_whole_words([match[2]]) or match[2])) if match else None


def without_unit(answer: str) -> tuple[str, str | None]:
    r"""(value, unit) of a number with a unit behind it, as `7 dollars per hour` or `166\,\mathrm{cm}^{2}`.

    Letters are a unit only behind a number: `\frac{3}{5} t`, `5x` and `6m` are products, `9 million` is a number, and
    a unit alone is no answer. The unit is None where there is none.
    """
    found = _UNIT.search(answer[-MAX_ANSWER_CHARS:])
    if not found:
        return answer, None
    head = answer[: len(answer) - len(found.group())].rstrip()
    unit = found.group().strip()
    scale = _LEADING_SCALE.match(unit)
    if scale:  # `9 million dollars`: the first word belongs to the number
        head, unit = f"{head} {scale[0]}".rstrip(), unit[scale.end() :].strip()
        if not unit:
            return answer, None
    if not head or _NO_UNIT.search(unit) or not _is_numeric(head):
        return answer, None
    return head, unit


def _is_numeric(head: str) -> bool:
    """True for an expression of numbers alone: letters in it are TeX commands or scale words."""
    if not re.search(r"\d|\\pi|\\infty", head) or head.endswith(("^", "_", "+", "-", "/", "\\cdot", "\\times", "=")):
        return False
    plain = re.sub(rf"\\text\s*\{{\s*(?:{'|'.join(_SCALES)})s?\s*\}}|\b(?:{'|'.join(_SCALES)})s?\b", "", head)
    return not re.search(r"[a-zA-Z]", _COMMAND.sub("", plain))


def same_unit(mine: str | None, theirs: str | None) -> bool:
    """False only for two units that are both known and differ; a unit that is missing or unknown is overlooked."""
    first, second = _known_unit(mine), _known_unit(theirs)
    return first is None or second is None or first == second


def _known_unit(unit: str | None) -> str | None:
    if not unit:
        return None
    plain = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", unit)
    words = re.sub(r"[\s{}^.]+", " ", plain.replace("\\circ", "degree").replace("°", "degree")).strip().split()
    if len(words) == 2 and words[1] in ("2", "3"):
        return f"{_CANONICAL[words[0].lower()]}^{words[1]}" if words[0].lower() in _CANONICAL else None
    if len(words) == 2 and words[0].lower() in ("square", "sq", "cubic"):
        power = 3 if words[0].lower() == "cubic" else 2
        return f"{_CANONICAL[words[1].lower()]}^{power}" if words[1].lower() in _CANONICAL else None
    return _CANONICAL.get(words[0].lower() if len(words[0]) > 1 else words[0]) if len(words) == 1 else None


def list_items(answer: str) -> list[str]:
    """The items of a list with commas, semicolons, `and` or `or` between them; one item when it is none (1,234)."""
    if as_number(answer) is not None or _word_number(answer) is not None:
        return [answer]
    items, depth = [""], 0
    for character in _AND.sub(",", answer):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]
