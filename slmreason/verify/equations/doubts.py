"""Why an equation that is false in every reading may still say something true: it is then left unread.

Each function looks for one kind of doubt: units that cannot be compared, numbers that are a range or belong to a longer
quantity, and a result that the text calls rounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, product, takewhile

from slmreason.verify.equations.lexing import OPERATORS, Token
from slmreason.verify.equations.operands import Operand
from slmreason.verify.equations.reading import Reading
from slmreason.verify.equations.terms import Term
from slmreason.verify.equations.units import dimensions, noun, same_kind

MENTION_CHARS = 60
"""So far around an equation its result may be called rounded."""
NEAR_WORDS = 3
"""A number so many words behind a result may be part of it: `17 / 5 = 3 full groups and 2 students`."""

_ROUNDED = re.compile(
    r"\b(?:round\w*|approx\w*|nearly|almost|roughly|estimat\w*|truncat\w*|floor|ceil\w*|nearest|integer)\b",
    re.IGNORECASE,
)
_FULL = ("whole", "full", "complete", "entire")
_AND_A_HALF = re.compile(
    r"\s*(?:\w+ )?and (?:an? |one |two |three )?(?:half|thirds?|quarters?|fourths?|fifths?|eighths?)\b"
)
_AVERAGE = re.compile(r"\b(?:average|mean|median) of(?: the)? *$", re.IGNORECASE)
_RANGE = re.compile(r"(?<![\d.,/(-])(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)(?![\d.,/)-])")
_SPACED = re.compile(r" [-+*/x] ")
_HYPHENATED = re.compile(r"(?<![\d.,/])\d{1,9}-(\d{1,9})/(\d{1,9})(?!\d)")
_CLAUSE = re.compile(
    r"because|so|is|are|was|were|then|that|which|if|when|since|after|before|while|has|have|had|gives|leaves|makes"
    r"|to|for|from|during|until|by|but|or|as|than|of|in|on|at|into|the|per|each|every|total"
)
"""Words that start something new behind a quantity, or in front of one."""


def is_doubtful(left: Operand, right: Operand) -> bool:
    """Whether an equation of these sides, which no reading makes true, may be meant in a way that is none of them."""
    return (
        _mixes_units(left, right)
        or _runs_on(left, right)
        or _is_range(left, right)
        or _is_called_rounded(left, right)
        or _is_asked(right)
    )


def _mixes_units(left: Operand, right: Operand) -> bool:
    """Units that nobody can convert: `3 packs + 2 bottles = 20 bottles`, `4 daps / 7 = 7 yaps / 7`."""
    sides = left.terms, [*right.terms[:-1], *_with_unit_behind(right.terms[-1:], right)]
    if any(not same_kind(one.units, other.units) for side in sides for one, other in combinations(side, 2)):
        return True
    both_compute = all(len(side) > 1 or not side[0].is_quantity for side in sides)
    quantities = [[term for term in side if term.is_quantity or both_compute] for side in sides]
    return any(
        not same_kind(one.units, other.units) and (both_compute or dimensions(one.units) or dimensions(other.units))
        for one, other in product(*quantities)
    )


def _with_unit_behind(last: Sequence[Term], right: Operand) -> list[Term]:
    """The last term of a result with the noun behind it, when it has no unit of measure: `= 8 people in all`."""
    nouns = takewhile(bool, (noun(token.text) for token in _words(right.behind)))
    return [replace(term, units=term.units or frozenset(filter(None, nouns))) for term in last]


def _runs_on(left: Operand, right: Operand) -> bool:
    """A number follows the unit of the result, or stands before the first: `17 / 5 = 3 groups and 2 students`."""
    return (
        _goes_on(right.behind)
        or _starts_earlier(left.before)
        or _AND_A_HALF.match(right.line, right.end, right.end + MENTION_CHARS) is not None
        or _is_ratio(left.before, right.behind)
        or _is_averaged(left)
    )


def _words(tokens: Sequence[Token]) -> Iterator[Token]:
    """The words at the start of the tokens that may belong to one quantity."""
    for token in tokens[: NEAR_WORDS + 1]:
        if token.kind != "word" or _CLAUSE.fullmatch(token.text.lower()):
            return
        yield token


def _goes_on(behind: Sequence[Token]) -> bool:
    """Whether a few words and then a number follow a result, which does not start another equation."""
    words = len(list(_words(behind)))
    follower, after = behind[words : words + 1], behind[words + 1 : words + 2]
    if not 0 < words <= NEAR_WORDS or not follower or follower[0].kind not in ("number", "$"):
        return False
    return not after or after[0].kind not in OPERATORS


def _starts_earlier(before: Sequence[Token]) -> bool:
    """Whether a number with its noun stands directly in front, and is not itself the result of an equation."""
    nouns = [token for token in before[-3:] if not (token.kind == "word" and token.text.lower() == "and")]
    if len(nouns) < 2 or nouns[-2].kind != "number" or not list(_words(nouns[-1:])):
        return False
    place = len(before) - 1 - [*reversed(before)].index(nouns[-2])
    return place == 0 or before[place - 1].kind not in ("=", "$")


def _is_ratio(before: Sequence[Token], behind: Sequence[Token]) -> bool:
    """A colon apart from what precedes it divides: `6 + 6 = 24 : 2`, `8 : 4 + 1 = 3`."""
    leads = before[-1:] and before[-1].text == ":" and len(before) > 1 and before[-2].end < before[-1].start
    follows = len(behind) > 1 and behind[0].text == ":" and behind[1].kind == "number"
    return bool(leads) or follows


def _is_averaged(left: Operand) -> bool:
    """`The average of 3 + 4 + 5 = 4`"""
    kinds = {token.kind for token in left.tokens}
    before = left.line[max(0, left.start - MENTION_CHARS) : left.start]
    return "+" in kinds and "/" not in kinds and _AVERAGE.search(before) is not None


def _is_range(left: Operand, right: Operand) -> bool:
    """`10-15 * 2 = 20-30` and `1-1/2 cups + 1/2 cup`: a hyphen that is no minus."""
    if any(int(top) < int(bottom) for side in (left, right) for top, bottom in _HYPHENATED.findall(side.text)):
        return True
    ranges = [any(float(low) < float(high) for low, high in _RANGE.findall(side.text)) for side in (left, right)]
    return (
        all(ranges) or (ranges[1] and len(right.numbers) == 2) or (ranges[0] and _SPACED.search(left.text) is not None)
    )


def _is_called_rounded(left: Operand, right: Operand) -> bool:
    """`11 / 5 = 2 full weeks`: off by less than one, and the text says so."""
    if not _differ_by_less_than_one(left, right):
        return False
    line = right.line
    around = line[max(0, left.start - MENTION_CHARS) : left.start] + line[right.end : right.end + MENTION_CHARS]
    is_full = right.behind[:1] and right.behind[0].text.lower() in _FULL
    return bool(is_full) or _ROUNDED.search(around) is not None


def _differ_by_less_than_one(left: Operand, right: Operand) -> bool:
    amounts = left.amount(Reading()), right.amount(Reading())
    if amounts[0] is None or amounts[1] is None:
        return False
    last_digit = Fraction(1, 10 ** min((token.decimals for token in right.numbers), default=0))
    return abs(amounts[0].value - amounts[1].value) < last_digit


def _is_asked(right: Operand) -> bool:
    """`Is 3 + 4 = 8?`"""
    return bool(right.behind) and right.behind[0].text == "?"
