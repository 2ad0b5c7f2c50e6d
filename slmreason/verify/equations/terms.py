"""The terms of an operand: what stands between two signs of a sum, and which units it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from slmreason.verify.equations.lexing import Token
from slmreason.verify.equations.units import COINS, RATE_WORDS, dimensions, noun


@dataclass(frozen=True)
class Term:
    """What stands between two signs of a sum."""

    units: frozenset[str]
    """The nouns behind its numbers, those behind `per` aside; `$` for an amount of money."""
    is_quantity: bool
    """A number with its unit, and no product."""
    has_percent: bool


def terms_of(tokens: Sequence[Token]) -> list[Term]:
    """The terms of an operand, those in brackets too."""
    found: list[list[Token]] = [[]]
    for token in tokens:
        if token.kind in ("+", "-"):
            found.append([])
        else:
            found[-1].append(token)
    return [_term(term) for term in found if any(token.kind == "number" for token in term)]


def _term(tokens: Sequence[Token]) -> Term:
    units: set[str] = set()
    is_rate = False
    for token in tokens:
        if token.kind == "word":
            name = token.text.lower().strip("/ ")
            is_rate = is_rate or name in RATE_WORDS or "/" in token.text
            unit = None if is_rate else noun(name)
            units |= {unit} if unit else set()
        else:
            is_rate = False
            units |= {"$"} if token.kind == "$" else set()
            units |= {part.unit for part in token.parts}
    is_product = any(token.kind in ("*", "/") for token in tokens)
    return Term(frozenset(units), not is_product, any(token.kind == "%" for token in tokens))


def add_known_units(terms: Sequence[Term]) -> bool:
    """True for `2 hours + 15 minutes`, which is not 17 of anything; coins are counted too."""
    quantities = [term.units for term in terms if term.is_quantity and len(term.units) == 1 and not term.units & COINS]
    return any(one != other and dimensions(one) & dimensions(other) for one, other in combinations(quantities, 2))


def add_percentages(terms: Sequence[Term]) -> bool:
    """True for `$80 - 25%`, where the percentage is of something."""
    return len({term.has_percent for term in terms}) > 1
