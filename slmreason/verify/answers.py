r"""Is this completion's final answer the gold answer? math-verify decides; plain numbers and letters take a short cut.

What a model wrote is hostile until shown otherwise: only the final answer is looked at, its length is bounded, powers
that could fill the memory are refused before any algebra runs, and the algebra runs in a process that can be killed
(`slmreason.verify.pool`). Reading an answer takes time in proportion to the text.

A gold answer says how it wants to be compared: `2, 3` is a list in this order, `\{2, 3\}` a set in any order.

Characters count as what a reader sees: digits of any script, full-width letters, every dash that stands for a minus,
and nothing where nothing is printed. Letters of other alphabets that look like ours are other letters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import NamedTuple

from slmreason.verify.pool import DEFAULT, RIGHT, WRONG, Limits, Pair, Ruling, shared_pool

MAX_ANSWER_CHARS = 256
MAX_GOLD_CHARS = 4 * MAX_ANSWER_CHARS
MAX_DIGITS = 100_000
TOO_LARGE = Ruling(False, "too large")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*|\d*)(?:\.\d+)?")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])")
_POWER_OF_TEN = re.compile(r"(?:(.+?)\s*(?:\\times|\\cdot|\*|×)\s*|([-+]?))10\s*\^\s*(?:\{\s*([-+]?\d{1,3})\s*\}|(\d))")
_UNIT = re.compile(
    r"(?<=[\d})])(?:\\[ ,;:]|~|\s)*(?:°|\^\s*(?:\{\s*\\circ\s*\}|\\circ)"
    r"|(?:\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*[a-zA-Z]{2}[^{}]*\}|\b[ckm]m\b(?:/[hs]\b)?)(?:\s*\^\s*\{?[23]\}?)?"
    r"|\s(?!(?:hundred|thousand|\w*illion|dozen|half|squared|cubed|factorial)s?$)[a-zA-Z]{3,})$"
)
_PERCENT = re.compile(r"\s*\\?%$")
_AND = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\w\\])(?:and|or)\b")
_BRACKETED = re.compile(r"(?:\\left)?\s*\\?[{(\[](.*?)(?:\\right)?\s*\\?[})\]]", re.DOTALL)
_MARKER = re.compile(r"(?:####|\bA:|\b[Ff]inal [Aa]nswer(?: is)?:?|\b[Aa]nswer(?: is)?:?)\s*(.+)")
_LAST_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")
_BRACE = re.compile(r"\\f?box(?:ed)?\s*\{|[{}]")
_CHARACTERS = {
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-"),
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width
    # Zero width and direction marks.
    **dict.fromkeys([0xAD, 0x61C, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF]),
}
_LETTER = re.compile(r"\(?([A-Z])[).:]?(?:\s.*)?", re.DOTALL)
_POWER = re.compile(r"\s*(?:\^|\*\*|\\exp\b)\s*")
_HUGE = re.compile(r"[\d)}]+\s*!|\\[a-z]?(?:binom|choose|prod|sum|int)(?![a-zA-Z])")


class Claim(NamedTuple):
    """A completion and what its answer should be."""

    text: str
    """Its last boxed expression is its answer, else what follows its last `####`, `A:` or `answer is`, else its last
    number (as math-verify's own fallback)."""
    gold: str
    """The gold answer, with or without a box or dollar signs."""
    is_choice: bool = False
    """Compare option letters and nothing else."""
    tolerance: float = 0.0
    """By how much a decimal number may differ, in its own unit."""


def rule(claims: Iterable[Claim], limits: Limits = DEFAULT) -> list[Ruling]:
    """Whether each claim's final answer equals its gold answer in value; the algebra of all of them side by side.

    Raises:
        RuntimeError: a process for the algebra cannot be started.
    """
    return _settle([_claim_plan(claim) for claim in claims], limits)


def is_correct(text: str, gold: str, is_choice: bool = False, tolerance: float = 0.0) -> bool:
    """True when the final answer of `text` equals `gold` in value: `rule` for a single claim."""
    return rule([Claim(text, gold, is_choice, tolerance)])[0].correct


def same_value(answer: str, gold: str, tolerance: float = 0.0) -> bool:
    r"""True when two answers are equal in value: numbers as decimals, lists item by item, all else as math-verify says.

    Args:
        answer: what a model gave; a unit behind its number is overlooked.
        gold: `2, 3` asks for this order, `\{2, 3\}` for any order.
        tolerance: by how much a decimal number may differ, in its own unit.
    """
    return _settle([_value_plan(answer, gold, tolerance)], DEFAULT)[0].correct


# From a text to its answer --------------------------------------------------------------------------------------------


def final_answer(text: str) -> str | None:
    """The part of a completion that counts as its answer; None when there is none."""
    text = _as_seen(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    marked = _MARKER.findall(text)
    if marked:
        return str(marked[-1]).strip().rstrip(".") or None
    numbers = _LAST_NUMBER.findall(text)
    return str(numbers[-1]).rstrip(",") if numbers else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` whose braces close, else None."""
    if "box" not in text:
        return None
    last, opened = (-1, -1), []
    for brace in _BRACE.finditer(text):
        if brace.group() != "}":
            opened.append(brace.end() if len(brace.group()) > 1 else -1)
        elif opened and (start := opened.pop()) > last[0]:
            last = start, brace.start()
    return text[slice(*last)] if last[0] >= 0 else None


def _as_seen(text: str) -> str:
    return text if text.isascii() else text.translate(_CHARACTERS)


def choice_letter(answer: str) -> str | None:
    r"""The option letter of `C`, `(C)`, `C) Ann`, `\text{C}`; None for anything else."""
    inner = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", answer).strip(" $.")
    match = _LETTER.fullmatch(inner)
    return match.group(1) if match else None


# Is it the gold answer? -----------------------------------------------------------------------------------------------

_Plan = Ruling | tuple[Pair, ...]
"""A ruling, or the pairs of expressions that must all be equal."""


def _settle(plans: Sequence[_Plan], limits: Limits) -> list[Ruling]:
    pairs = [pair for plan in plans if not isinstance(plan, Ruling) for pair in plan]
    found = dict(zip(pairs, shared_pool(limits).compare(pairs), strict=True)) if pairs else {}
    return [plan if isinstance(plan, Ruling) else _all_right(found[pair] for pair in plan) for plan in plans]


def _all_right(rulings: Iterable[Ruling]) -> Ruling:
    return next((ruling for ruling in rulings if not ruling.correct), RIGHT)


def _claim_plan(claim: Claim) -> _Plan:
    answer = final_answer(claim.text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return WRONG
    if claim.is_choice:
        letter = choice_letter(answer)
        return RIGHT if letter is not None and letter == choice_letter(claim.gold) else WRONG
    return _answer_plan(answer, claim.gold, claim.tolerance)


@lru_cache(maxsize=65_536)
def _answer_plan(answer: str, gold: str, tolerance: float) -> _Plan:
    """Two answers are equal when they are the same text, spacing aside, or equal in value."""
    return RIGHT if _squeeze(tidy(answer)) == _squeeze(tidy(gold)) else _value_plan(answer, gold, tolerance)


def _value_plan(answer: str, gold: str, tolerance: float) -> _Plan:
    answer, gold = tidy(answer), tidy(gold)
    mine, theirs = as_number(answer), as_number(gold)
    if mine is not None and theirs is not None:
        return RIGHT if _close(mine, theirs, tolerance) else WRONG
    mine, theirs = as_number(_PERCENT.sub("", answer)), as_number(_PERCENT.sub("", gold))
    if mine is not None and theirs is not None and _close(mine, theirs, tolerance):
        return RIGHT
    wanted = list_items(gold)
    if len(wanted) > 1:
        return _list_plan(answer, wanted, tolerance)
    if len(answer) > MAX_ANSWER_CHARS or len(gold) > MAX_GOLD_CHARS:
        return WRONG
    return TOO_LARGE if _too_large(answer, gold) else ((answer, gold),)


def _list_plan(answer: str, wanted: Sequence[str], tolerance: float) -> _Plan:
    given = list_items(answer)
    if len(given) == 1 and (inner := _BRACKETED.fullmatch(answer)):
        given = list_items(inner.group(1))
    if len(given) != len(wanted):
        return WRONG
    plans = [_answer_plan(mine, theirs, tolerance) for mine, theirs in zip(given, wanted, strict=True)]
    settled = _all_right(plan for plan in plans if isinstance(plan, Ruling))
    return (
        tuple(pair for plan in plans if not isinstance(plan, Ruling) for pair in plan) if settled.correct else settled
    )


def _close(mine: Decimal, theirs: Decimal, tolerance: float) -> bool:
    return mine == theirs or abs(mine - theirs) <= Decimal(repr(tolerance))


def as_number(answer: str) -> Decimal | None:
    r"""The value of a plain decimal number, else None.

    Thousands separators, a currency sign and a power of ten (`4.5e33`, `4.5 \times 10^{33}`) are allowed.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    plain = tidy(answer).removeprefix("\\$").strip()
    match = _POWER_OF_TEN.fullmatch(plain)
    if match:
        mantissa, sign, *powers = match.groups()
        plain, power = mantissa or f"{sign}1", powers[0] or powers[1]
    if not plain or not _NUMBER.fullmatch(plain):
        return None
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None
    return number.scaleb(int(power)) if match else number


def tidy(answer: str) -> str:
    r"""An answer without box, dollar signs, last full stop, unit and thousands spacing; `4e3` as `4 \times 10^{3}`."""
    answer = _as_seen(answer)
    plain = re.sub(r"(?<!\\)\$", "", last_boxed(answer) or answer)
    plain = re.sub(r"(?<=\d),\s*\\!\s*(?=\d)", "", plain).replace("\\!", "")
    # Programming languages write 1./3; TeX writes 0.\overline{3}.
    plain = re.sub(r"(?<=\d)\.(?=[\s/*+)-])", "", " ".join(plain.split()).rstrip(" .\\"))
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _UNIT.sub("", plain))


def list_items(answer: str) -> list[str]:
    """The items of a list with commas, `and` or `or` between them; one item when it is no list, as 1,234 is none."""
    if as_number(answer) is not None:
        return [answer]
    items, depth = [""], 0
    for character in _AND.sub(",", answer):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _squeeze(answer: str) -> str:
    """Two texts that differ only in what TeX does not print are the same text; a space between digits it prints."""
    plain = re.sub(r"\\(?:left|right)(?![a-z])|\\[ ,;:]|~", " ", answer)
    plain = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain)
    plain = re.sub(r"\{(\w)\}", r"\1", plain)
    return plain[2:-2] if plain.startswith("\\{") and plain.endswith("\\}") else plain


def _too_large(answer: str, gold: str) -> bool:
    """True when the algebra of an answer could fill the memory, and the gold answer is no excuse for that."""
    if not set(_HUGE.findall(_squeeze(answer))) <= set(_HUGE.findall(_squeeze(gold))):
        return True
    return _digits(answer) > max(MAX_DIGITS, _digits(gold))


def _digits(expression: str) -> float:
    """A bound on the digits of any number in an expression: the longest times all exponents; infinite for a tower."""
    digits = float(max(map(len, re.findall(r"\d+", expression)), default=0))
    for match in _POWER.finditer(expression):
        exponent = _exponent(expression[match.end() :])
        if _POWER.search(exponent) or "!" in exponent:
            return math.inf
        digits *= math.prod(max(1.0, float(number)) for number in re.findall(r"\d+", exponent))
    return digits


def _exponent(text: str) -> str:
    """What stands at the start of `text` as an exponent, with the sign of a further power behind it."""
    command = re.match(r"\\[a-zA-Z]+\s*", text)
    if command or text[:1] in ("{", "("):
        end, depth = command.end() if command else 0, 0
        while end < len(text) and (depth or text[end] in "{("):
            depth += (text[end] in "{(") - (text[end] in "})")
            end += 1
    else:
        end = len(text) - len(re.sub(r"^[-+]?[\w.]*", "", text))
    behind = _POWER.match(text, end)
    return text[: behind.end() if behind else end]
