"""Units: which words are one, what it is in others of its kind, and when two nouns are the same.

A noun that is no unit of measure (`apples`) counts things, one by one.
"""

from __future__ import annotations

import re
from functools import lru_cache

_DIMENSIONS: dict[str, dict[str, int]] = {
    "time": {
        **{"second secs sec": 1, "minute mins min": 60, "hour hrs hr": 3600, "day": 86_400},
        **{"week wks wk": 604_800, "fortnight": 1_209_600},
    },
    # Apart from days: a month has four weeks in one text and thirty days in another.
    "calendar": {"month mos mo": 1, "quarter": 3, "year yrs yr": 12, "decade": 120, "century centuries": 1200},
    "length": {"inch inches": 1, "foot feet ft": 12, "yard yds yd": 36, "mile": 63_360},
    "metric length": {
        **{"millimeter millimetre mm": 1, "centimeter centimetre cms cm": 10, "decimeter decimetre dm": 100},
        **{"meter metre": 1000, "kilometer kilometre kms km": 1_000_000},
    },
    "mass": {"ounce oz": 1, "pound lbs lb": 16, "ton": 32_000},
    "metric mass": {"milligram mg": 1, "gram gm": 1000, "kilogram kilo kgs kg": 10**6, "tonne ton": 10**9},
    "volume": {
        **{"teaspoon tsp": 1, "tablespoon tbsp": 3, "ounce oz": 6, "cup": 48, "pint": 96},
        **{"quart": 192, "gallon gal": 768},
    },
    "metric volume": {
        **{"milliliter millilitre ml": 1, "centiliter centilitre cl": 10, "deciliter decilitre dl": 100},
        "liter litre": 1000,
    },
    "money": {
        **{"cent penny pennies pence": 1, "nickel": 5, "dime": 10, "quarter": 25},
        "$ dollar buck usd euro eur pound gbp rupee": 100,
    },
}
_LETTERS = {"g": "gram", "m": "meter", "l": "liter", "h": "hour", "s": "second"}
"""Letters that are units beside a unit of the same kind (`2 kg - 500 g`) and variables elsewhere."""
MULTIPLIERS: dict[str, int] = {
    **{
        "pair": 2,
        "ten": 10,
        "dozen": 12,
        "score": 20,
        "hundred": 100,
        "gross": 144,
        "thousand": 1000,
        "million": 10**6,
        "billion": 10**9,
        "trillion": 10**12,
    }
}
COINS = frozenset(("penny", "pennies", "nickel", "dime", "quarter"))
POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
RATE_WORDS = ("per", "a", "an", "each", "every")

Meaning = tuple[str, int]
"""A dimension, and how many of its smallest unit."""


def _meanings() -> dict[str, tuple[Meaning, ...]]:
    table: dict[str, tuple[Meaning, ...]] = {}
    for dimension, units in _DIMENSIONS.items():
        for names, scale in units.items():
            for name in names.split():
                table[name] = (*table.get(name, ()), (dimension, scale))
    return table


_MEANINGS = _meanings()
_SCALES = {dimension: sorted(set(units.values())) for dimension, units in _DIMENSIONS.items()}


@lru_cache(maxsize=4096)
def meanings(word: str) -> tuple[Meaning, ...]:
    """What a word may stand for as a unit of measure; a pound is money or mass. Empty when it is none."""
    name = word.lower()
    return _MEANINGS.get(name) or _MEANINGS.get(name.removesuffix("s")) or ()


def letter_unit(letter: str, line_units: frozenset[str]) -> str | None:
    """The unit that a letter stands for in a line that measures in these dimensions."""
    name = _LETTERS.get(letter.lower() if letter == "L" else letter)
    return name if name and meanings(name)[0][0] in line_units else None


def multiplier(word: str) -> int | None:
    """12 for a dozen."""
    name = word.lower()
    return MULTIPLIERS.get(name) or MULTIPLIERS.get(name.removesuffix("s"))


def is_unit(word: str) -> bool:
    """Whether a word measures or multiplies, or starts a unit that does: `square feet`."""
    return bool(meanings(word)) or multiplier(word) is not None or word.lower() in POWERS


def scales(unit: Meaning) -> list[int]:
    """What a number without a unit may be counted in beside one of this unit: this one and smaller ones."""
    dimension, largest = unit
    return [scale for scale in _SCALES[dimension] if scale <= largest]


_NO_NOUN = re.compile(
    r"of|in|on|at|for|the|an?|from|to|with|by|and|so|then|is|are|was|were|that|which|it|per|each|every"
    r"|left|remain(?:s|ing)?|total|more|less|fewer|extra|other|altogether|together|overall|over|away|out|back|up"
    r"|already|still|only|also|just|now|new|old|off|s?he|they|we|i|you|his|her|their|its|my|our|this|these|those"
    r"|all|both|have|has|had"
)


def stem(word: str) -> str:
    """A noun without its plural."""
    name = word.lower()
    if name.endswith("ies") and len(name) > 4:
        return name[:-3] + "y"
    if re.search(r"(?:s|x|z|ch|sh)es$", name):
        return name[:-2]
    return name.removesuffix("s")


def noun(word: str) -> str | None:
    """The stem of a word that says what is counted; None for `of`, `left`, `dozen`."""
    name = word.lower()
    return None if _NO_NOUN.fullmatch(name) or name in POWERS or multiplier(name) else stem(name)


def same_kind(units: frozenset[str], others: frozenset[str]) -> bool:
    """Whether two quantities of these units can be added without knowing more about them."""
    return not units or not others or bool(units & others) or bool(dimensions(units) & dimensions(others))


@lru_cache(maxsize=4096)
def dimensions(units: frozenset[str]) -> frozenset[str]:
    return frozenset(dimension for unit in units for dimension, _ in meanings(unit))
