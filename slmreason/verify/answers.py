r"""Is this completion's final answer the gold answer? math-verify decides, plain numbers and words aside.

What a model wrote is hostile until shown otherwise: only the final answer is looked at, its length is bounded, numbers
that could fill the memory are refused before any algebra runs, and the algebra runs in a process that can be killed
(`slmreason.verify.process_pool`). Reading an answer takes time in proportion to the text.

A gold answer says how it wants to be compared: `2, 3` is a list in this order, `\{2, 3\}` a set in any order. Where an
answer comes from is told in `slmreason.verify.extract`, option letters in `slmreason.verify.choices`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from slmreason.verify.bounds import too_large
from slmreason.verify.choices import choice_letter, chosen
from slmreason.verify.extract import final_answer
from slmreason.verify.intervals import as_intervals
from slmreason.verify.notation import is_words, last_boxed, same_text, tidy
from slmreason.verify.process_pool import DEFAULT, RIGHT, WRONG, Limits, Pair, Ruling, shared_pool
from slmreason.verify.quantities import (
    MAX_ANSWER_CHARS,
    Exact,
    as_number,
    exact,
    in_base,
    list_items,
    same_unit,
    without_unit,
)

__all__ = [
    "MAX_ANSWER_CHARS",
    "MAX_GOLD_CHARS",
    "Claim",
    "as_number",
    "choice_letter",
    "final_answer",
    "is_correct",
    "last_boxed",
    "list_items",
    "rule",
    "same_value",
    "tidy",
]

MAX_GOLD_CHARS = 4 * MAX_ANSWER_CHARS
TOO_LARGE = Ruling(False, "too large")
FLOAT_NOISE = Fraction(1, 10**13)
"""By what share a float64 may be off after some sums."""
MAX_FORMS = 4
"""So many ways to write one answer may stand side by side."""
PLACES = 6
"""A decimal equals a number that is none when both are the same at so many places, as math-verify rounds."""
_RELATION = re.compile(r"\\(?:ne|ge|le|not)(?![a-zA-Z])|[<>]")
_APPROXIMATELY = re.compile(r"\\(?:approx|simeq|sim|cong|doteq)(?![a-zA-Z])|(?<![<>!])~=?")
_NAME = re.compile(
    r"(?:\\?[a-zA-Z]+(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*|\\text\s*\{[^{}]*\}|\\angle\s*\w+|\\[a-z]+\s*\{\w+\}"
    r"|[a-zA-Z][a-zA-Z ]{0,40})"
    r"(?:\s*\([^()=]*\)|\s*\\text\s*\{[^{}]*\})?"
)
_MODULUS = re.compile(
    r"\s*(?:\\pmod\s*(?:\{[^{}]*\}|\w+)|\(?\s*\\b?mod(?![a-z])\s*(?:\{[^{}]*\}|\w+)\s*\)?|\\text\s*\{\s*\(?mod\s*\w+\)?\s*\})$"
)
_PAIR_OF_BRACKETS = re.compile(r"\\?[{(\[](.*?)\\?[})\]]", re.DOTALL)
_OPENING = re.compile(r"\s*(?:\\?\{|[(\[]|\\begin|\\l(?:angle|floor|ceil))")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")


class Claim(NamedTuple):
    """A completion and what its answer should be."""

    text: str
    """Its answer is the last box or `<answer>` tag, else the expression behind the last marker that has one (`####`,
    `A:`, `answer is`, ...), else the last expression."""
    gold: str
    """The gold answer, with or without a box or dollar signs."""
    is_choice: bool = False
    """Compare option letters and nothing else."""
    tolerance: float = 0.0
    """By how much a number may differ, in its own unit."""
    relative_tolerance: float = 0.0
    """By what share of the gold number an answer may differ."""
    options: tuple[str, ...] = ()
    """Texts of the options of a multiple-choice problem, where they are known."""
    truncated: bool = False
    """The token limit cut the text off: without a finished answer (box, tag or marker) it is wrong."""


def rule(claims: Iterable[Claim], limits: Limits = DEFAULT) -> list[Ruling]:
    """Whether each claim's final answer equals its gold answer in value; the algebra of all of them side by side.

    Raises:
        RuntimeError: a process for the algebra cannot be started.
    """
    return _settle([_claim_plan(claim) for claim in claims], limits)


def is_correct(text: str, gold: str, is_choice: bool = False, tolerance: float = 0.0, truncated: bool = False) -> bool:
    """True when the final answer of `text` equals `gold` in value: `rule` for a single claim."""
    return rule([Claim(text, gold, is_choice, tolerance, truncated=truncated)])[0].correct


def same_value(answer: str, gold: str, tolerance: float = 0.0) -> bool:
    r"""True when two answers are equal in value: numbers as decimals, lists item by item, all else as math-verify says.

    Args:
        answer: what a model gave; a unit behind its number is overlooked.
        gold: `2, 3` asks for this order, `\{2, 3\}` for any order.
        tolerance: by how much a number may differ, in its own unit.
    """
    if max(len(answer), len(gold)) > MAX_GOLD_CHARS:
        return False
    return _settle([_value_plan(tidy(answer), tidy(gold), Margin(tolerance))], DEFAULT)[0].correct


# Is it the gold answer? -----------------------------------------------------------------------------------------------


class Margin(NamedTuple):
    """By how much a number may differ from the gold one."""

    absolute: float = 0.0
    relative: float = 0.0

    def of(self, gold: Fraction) -> Fraction:
        return max(Fraction(repr(self.absolute)), abs(gold) * Fraction(repr(self.relative)))

    @property
    def is_zero(self) -> bool:
        return not self.absolute and not self.relative


_Plan = Ruling | tuple[Pair, ...]
"""A ruling, or the pairs of expressions that must all be equal."""


def _settle(plans: Sequence[_Plan], limits: Limits) -> list[Ruling]:
    pairs = [pair for plan in plans if not isinstance(plan, Ruling) for pair in plan]
    found = dict(zip(pairs, shared_pool(limits).compare(pairs), strict=True)) if pairs else {}
    return [plan if isinstance(plan, Ruling) else _all_right(found[pair] for pair in plan) for plan in plans]


def _all_right(rulings: Iterable[Ruling]) -> Ruling:
    return next((ruling for ruling in rulings if not ruling.correct), RIGHT)


def _claim_plan(claim: Claim) -> _Plan:
    if claim.is_choice or claim.options:
        gold = choice_letter(claim.gold)
        letter = chosen(claim.text, claim.options, truncated=claim.truncated)
        return RIGHT if letter is not None and letter == gold else WRONG
    words = is_words(_tidy_gold(claim.gold))
    answer = final_answer(claim.text, claim.truncated, words)
    if answer is None or len(answer) > MAX_GOLD_CHARS:
        return WRONG
    return _answer_plan(answer, claim.gold, Margin(claim.tolerance, claim.relative_tolerance))


@lru_cache(maxsize=4096)  # all rollouts of a problem share its gold answer
def _tidy_gold(gold: str) -> str:
    return tidy(gold)


@lru_cache(maxsize=65_536)
def _answer_plan(answer: str, gold: str, margin: Margin) -> _Plan:
    """Two answers are equal when they are the same text, spacing aside, or equal in value."""
    mine, theirs = tidy(answer), _tidy_gold(gold)
    return RIGHT if same_text(mine, theirs) else _value_plan(mine, theirs, margin)


def _value_plan(answer: str, gold: str, margin: Margin) -> _Plan:
    """How two tidied answers are compared that are not the same text."""
    if is_words(gold):
        return _words_plan(answer, gold)
    if max(len(answer), len(gold)) > MAX_GOLD_CHARS or not answer:
        return WRONG
    answer, gold = _last_side(answer, gold), _last_side(gold, answer)
    mine, my_unit = without_unit(answer)
    theirs, their_unit = without_unit(gold)
    if exact(mine) is not None or exact(theirs) is not None:
        if not same_unit(my_unit, their_unit):
            return WRONG
        quick = _numbers_plan(mine, theirs, margin)
        if quick is not None:
            return quick
    bases = in_base(mine), in_base(theirs)
    if bases[0] or bases[1]:
        return _bases_plan(mine, theirs, *bases)
    wanted = _expanded(gold)
    if len(wanted) > 1 and not ("\\infty" in answer and as_intervals(gold)):
        return _list_plan(answer, wanted, margin, any_order="\\pm" in answer + gold)
    return _single_plan(mine, theirs, answer, gold, margin)


def _words_plan(answer: str, gold: str) -> _Plan:
    """A gold answer of words: the same words, or the number that they are."""
    mine, theirs = exact(without_unit(answer)[0]), exact(gold)
    if mine is not None and theirs is not None:
        return RIGHT if mine.value == theirs.value else WRONG
    return RIGHT if same_text(answer, gold) else WRONG


def _numbers_plan(answer: str, gold: str, margin: Margin) -> Ruling | None:
    """The ruling where both are plain numbers; None where the algebra must tell."""
    mine, theirs = exact(answer), exact(gold)
    if mine is None or theirs is None:
        return None
    if _close(mine, theirs, margin):
        return RIGHT
    # A percent sign that only one of them has: `4.2\%` for 4.2, and `10\%` for 0.1.
    if mine.is_percent != theirs.is_percent:
        return RIGHT if _close(_as_share(mine), _as_share(theirs), margin) else WRONG
    return WRONG


def _as_share(number: Exact) -> Exact:
    return number._replace(value=number.value / 100, is_decimal=True) if number.is_percent else number


def _close(mine: Exact, theirs: Exact, margin: Margin) -> bool:
    difference = abs(mine.value - theirs.value)
    if difference <= margin.of(theirs.value):
        return True
    if mine.is_decimal == theirs.is_decimal:
        return False
    whole = theirs.value if mine.is_decimal else mine.value
    if whole.limit_denominator(10**PLACES) == whole and _is_terminating(whole):
        # 18 needs no rounding: 17.9999999 is another number, 17.999999999999996 is what a computer makes of 18.
        return difference <= abs(whole) * FLOAT_NOISE
    # One of them was rounded, perhaps: 0.333333 is 1/3. A small number needs more places to be told from zero.
    smallest = min(abs(mine.value), abs(theirs.value))
    if smallest == 0 or difference * 1000 > smallest:
        return False
    places = PLACES
    while smallest < Fraction(1, 10) and places < 60:
        smallest, places = smallest * 10, places + 1
    return round(mine.value, places) == round(theirs.value, places)


def _is_terminating(value: Fraction) -> bool:
    """Whether a number can be written with a decimal point and some digits."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _bases_plan(answer: str, gold: str, mine: tuple[str, str] | None, theirs: tuple[str, str] | None) -> _Plan:
    """Numbers in another base: the digits decide, and the base where the answer names one."""
    if mine and theirs:
        return RIGHT if mine == theirs else WRONG
    digits = theirs[0] if theirs else None
    return RIGHT if digits is not None and answer.lower() == digits else WRONG


def _list_plan(answer: str, wanted: Sequence[str], margin: Margin, any_order: bool) -> _Plan:
    given = _expanded(answer)
    if len(given) == 1 and (inner := _PAIR_OF_BRACKETS.fullmatch(answer)):
        given = _expanded(inner.group(1))
    if len(given) != len(wanted):
        return WRONG
    if any_order:
        given, wanted = sorted(given, key=_rank), sorted(wanted, key=_rank)
    plans = [_answer_plan(mine, theirs, margin) for mine, theirs in zip(given, wanted, strict=True)]
    return _together(plans)


def _together(plans: Sequence[_Plan]) -> _Plan:
    settled = _all_right(plan for plan in plans if isinstance(plan, Ruling))
    if not settled.correct:
        return settled
    pairs = tuple(pair for plan in plans if not isinstance(plan, Ruling) for pair in plan)
    return pairs or RIGHT


def _rank(item: str) -> tuple[Fraction, str]:
    number = exact(without_unit(_last_side(item, ""))[0])
    return (number.value if number else Fraction(0), item)


def _expanded(answer: str) -> list[str]:
    r"""The items of a list; `a \pm b` is two of them."""
    items: list[str] = []
    for item in list_items(answer):
        bare = _last_side(item, "")
        signs = _PLUS_MINUS.findall(bare) if not _OPENING.match(bare) else []
        items += [_PLUS_MINUS.sub(sign, bare).lstrip("+ ") for sign in "+-"] if signs else [item]
    return items


def _single_plan(mine: str, theirs: str, answer: str, gold: str, margin: Margin) -> _Plan:
    """One answer against one gold answer, neither of them plain numbers, as math-verify compares them."""
    if "\\infty" in answer + gold or "\\cup" in answer + gold:
        answer, gold = as_intervals(answer) or answer, as_intervals(gold) or gold
        mine, theirs = answer, gold
    is_set = _PAIR_OF_BRACKETS.fullmatch(theirs) is not None
    alternatives = _expanded(answer)
    if len(alternatives) > 1 and not _OPENING.match(gold):
        # One answer in two forms is one; several alternatives for one are none.
        same = [_answer_plan(alternative, gold, margin) for alternative in alternatives[:MAX_FORMS]]
        return _together(same) if len(alternatives) <= MAX_FORMS else WRONG
    if is_set and gold.startswith("\\{"):
        quick = _sets_plan(answer, gold, margin)
        if quick is not None:
            return quick
    elif gold.startswith("(") and is_set and not _OPENING.match(answer) and "," in answer and "infty" not in gold:
        return _list_plan(answer, list_items(gold[1:-1]), margin, any_order=False)
    relations = _RELATION.search(answer), _RELATION.search(gold)
    if relations[0] and not relations[1] and not re.search(r"\\infty|\\cup|\\in(?![a-z])|^\s*[(\[]", gold):
        return WRONG  # `\ge 9` is not 9
    if relations[1] and not relations[0] and exact(mine) is not None:
        return WRONG
    if relations[0] and _RELATION.match(answer.strip()):
        mine = f"{_variable(gold)} {mine}"
    if len(mine) > MAX_ANSWER_CHARS or len(theirs) > MAX_GOLD_CHARS:
        return WRONG
    if too_large(mine, theirs):
        return TOO_LARGE
    mine, theirs = _told_apart(mine, theirs)
    if margin.is_zero:
        return ((mine, theirs),)
    return ((mine, theirs, f"{margin.absolute!r} {margin.relative!r}"),)


def _sets_plan(answer: str, gold: str, margin: Margin) -> Ruling | None:
    r"""Sets of plain numbers, in any order; None where an item is none."""
    inner = [match.group(1) if (match := _PAIR_OF_BRACKETS.fullmatch(text)) else text for text in (answer, gold)]
    sides = []
    for text in inner:
        numbers = [exact(without_unit(_last_side(item, ""))[0]) for item in _expanded(text)]
        if not numbers or None in numbers:
            return None
        sides.append(sorted({number for number in numbers if number is not None}))
    if len(sides[0]) != len(sides[1]):
        return WRONG
    return RIGHT if all(_close(mine, theirs, margin) for mine, theirs in zip(*sides, strict=True)) else WRONG


# Equations, relations and letters -------------------------------------------------------------------------------------


def _last_side(answer: str, other: str) -> str:
    r"""The value that an equation gives: `x = 5`, `f(x) = 5`, `3+4 = 7`, `v \approx 4.2`; anything else as it is.

    An equation stays one beside another, and so does one whose left side is more than a name or arithmetic.
    """
    if "mod" in answer and "mod" not in other:
        answer = _MODULUS.sub("", answer.replace(r"\equiv", "=")).strip()
    parts = [part.strip() for part in _APPROXIMATELY.split(answer) if part.strip()]
    if len(parts) > 1 or _APPROXIMATELY.match(answer.strip()):
        exact_side = parts[0] if parts else answer
        answer = parts[-1] if len(parts) > 1 and _NAME.fullmatch(exact_side) else exact_side
    if "=" not in answer or ("=" in other and "," not in answer + other):
        return answer
    sides = _sides(answer) if len(list_items(answer)) == 1 else [answer]
    if len(sides) < 2 or any(not side for side in sides[1:]):
        return answer.strip("= ") if sides and not sides[0] and len(sides) == 2 else answer
    is_name = not sides[0] or _NAME.fullmatch(sides[0]) is not None
    is_arithmetic = all(not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", side)) for side in sides[:-1])
    return sides[-1] if is_name or is_arithmetic else answer


def _sides(answer: str) -> list[str]:
    """What stands between the equals signs outside of brackets."""
    sides, depth = [""], 0
    for at, character in enumerate(answer):
        depth += (character in "([{") - (character in ")]}")
        if character == "=" and depth == 0 and answer[at - 1 : at] not in ("<", ">", "!"):
            sides.append("")
        else:
            sides[-1] += character
    return [side.strip() for side in sides]


def _variable(gold: str) -> str:
    found = re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", gold)
    return found.group() if found else "x"


def _told_apart(answer: str, gold: str) -> tuple[str, str]:
    """Both with other letters where math-verify would take two letters for one: it folds them to one case."""
    plain = [re.sub(r"\\(?:text\s*\{[^{}]*\}|[a-zA-Z]+)", " ", side) for side in (answer, gold)]
    letters = set(re.findall("[a-zA-Z]", " ".join(plain)))
    clashing = sorted({c for side in plain for c in set(side) if c.isupper() and c.isascii() and c.lower() in side})
    if "E" in letters and "E" not in clashing and any(re.search(r"E\s*_", side) for side in plain):
        clashing.append("E")  # with an index it is no Euler's number, which math-verify cannot read
    free = [letter for letter in "qwzvuykjhbaxnmt" if letter not in letters and letter.upper() not in letters]
    renamed = dict(zip(clashing, free, strict=False))
    if not renamed:
        return answer, gold

    def rename(text: str) -> str:
        return re.sub(
            r"\\(?:text\s*\{[^{}]*\}|[a-zA-Z]+)|[A-Z]", lambda found: renamed.get(found.group(), found.group()), text
        )

    return rename(answer), rename(gold)
