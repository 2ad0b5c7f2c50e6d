r"""Are two expressions equal? math-verify reads and compares them; numbers at a few points confirm or refute it.

math-verify takes a small difference for none (`chop`), so any small number would equal a small gold one, and it gives
up where `simplify` does. Two expressions are therefore evaluated at fixed points with 30 digits first: where they
differ at a positive point they are different, where they agree at all points they are equal, and else it decides.

Runs in the worker processes (`slmreason.verify.process_worker`), for it may take any time and memory.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig
from sympy import (
    Derivative,
    Expr,
    Float,
    Integral,
    Limit,
    Number,
    Product,
    Rational,
    Sum,
    Symbol,
    Tuple,
    UnevaluatedExpr,
)
from sympy.core.function import AppliedUndef
from sympy.sets.sets import FiniteSet

from slmreason.verify.quantities import as_number

DIGITS = 30
AGREE = Rational(1, 10**20)
"""Expressions that agree to this share at each point are equal."""
DIFFER = Rational(1, 10**9)
"""Expressions that differ by more at a point are different."""
DIFFER_ROUNDED = Rational(1, 10**4)
"""The same for numbers that were rounded: it is 6 places that decide, this tells small ones from zero."""
_POINTS = (
    (1303, 887, 2111, 401, 3137, 1973, 677, 2749),
    (3571, 2903, 709, 1847, 1153, 607, 2333, 419),
    (-1307, 2221, -883, 619, -1831, 1709, -3011, 2477),
    (-577, -2969, 1511, -811, 2027, -1213, 997, -1741),
)
_DENOMINATORS = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)
"""No simple numbers, at which different expressions may be equal: 2 cos(pi t) is -1 at many a third."""
_UNBOUNDED = (Integral, Sum, Product, Limit, Derivative, AppliedUndef)
_READING = LatexExtractionConfig(
    boxed_match_priority=0,
    # Units are cut off by us (slmreason.verify.quantities), who know whether the gold answer has letters.
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    ),
)


def same_expression(answer: str, gold: str, margin: str = "") -> bool:
    """True when two expressions are equal.

    Args:
        margin: `"0.1 0.01"` lets a number differ by 0.1 or by 1 % of the gold one.

    Raises:
        MemoryError: the comparison needs more memory than there is.
    """
    number = as_number(gold)
    # It rounds to so many places behind the point; a small gold needs more of them to be told from zero.
    places = 6 - min(0, number.adjusted()) if number else 6
    absolute, relative = (Rational(part) for part in (margin or "0 0").split())
    return any(
        _same(wanted, given, places, absolute, relative)
        for wanted, given in product(_expressions(gold), _expressions(answer))
    )


def _same(wanted: Any, given: Any, places: int, absolute: Rational, relative: Rational) -> bool:
    try:
        if isinstance(wanted, Tuple) and isinstance(given, Tuple) and len(wanted) == len(given):
            return all(_same(w, g, places, absolute, relative) for w, g in zip(wanted, given, strict=True))
        if isinstance(wanted, FiniteSet) and isinstance(given, FiniteSet) and (absolute or relative):
            pairs = zip(sorted(wanted, key=_size), sorted(given, key=_size), strict=True)
            return all(_same(w, g, places, absolute, relative) for w, g in pairs)
        if absolute or relative:
            close = _within(wanted, given, absolute, relative)
            if close is not None:
                return close
        known = _by_numbers(wanted, given)
        if known is not None:
            return known
        return bool(
            verify(
                wanted,
                given,
                float_rounding=places,
                allow_set_relation_comp=True,
                timeout_seconds=None,
                raise_on_error=True,
            )
        )
    except MemoryError:  # one of the many errors that it would else answer with no
        raise
    except Exception:
        return False


def _size(expression: Expr) -> float:
    return float(expression.evalf())


def _within(wanted: Any, given: Any, absolute: Rational, relative: Rational) -> bool | None:
    """Whether two numbers differ by no more than the margin; None where one of them is none."""
    values = [_value(side, {}) for side in (wanted, given)]
    if None in values or any(side.free_symbols for side in (wanted, given)):
        return None
    difference = abs(values[0] - values[1])
    slack = Rational(1, 10**12) * max(abs(values[0]), absolute)  # a decimal margin at its very end
    return bool(difference <= max(absolute, relative * abs(values[0])) + slack)


def _by_numbers(wanted: Any, given: Any) -> bool | None:
    """Whether two expressions are equal by their values at fixed points; None where these do not tell."""
    if not isinstance(wanted, Expr) or not isinstance(given, Expr) or _is_percent(wanted) != _is_percent(given):
        return None
    if wanted.has(*_UNBOUNDED) or given.has(*_UNBOUNDED):
        return None
    symbols = sorted(wanted.free_symbols | given.free_symbols, key=str)
    if len(symbols) > len(_DENOMINATORS) or not all(isinstance(symbol, Symbol) for symbol in symbols):
        return None
    is_rounded = wanted.has(Float) or given.has(Float)
    agreed = 0
    for number, point in enumerate(_POINTS if symbols else _POINTS[:1]):
        values = {symbol: Rational(n, d) for symbol, n, d in zip(symbols, point, _DENOMINATORS, strict=False)}
        first, second = _value(wanted, values), _value(given, values)
        if first is None or second is None:
            continue
        size = max(abs(first), abs(second))
        difference = abs(first - second)
        if difference <= AGREE * size:
            agreed += 1
        elif number < 2:
            return False if difference > (DIFFER_ROUNDED if is_rounded else DIFFER) * size else None
        else:
            return None  # as |x| and x, which are equal where x is a length
    return True if agreed == len(_POINTS if symbols else _POINTS[:1]) and not is_rounded else None


def _value(expression: Any, values: dict[Any, Any]) -> Any:
    """The value at a point as a number, complex or not; None where there is none."""
    try:
        value = expression.evalf(DIGITS, subs=values) if values else expression.evalf(DIGITS)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return None
    real, imaginary = value.as_real_imag()
    is_number = isinstance(real, Number) and isinstance(imaginary, Number) and real.is_finite and imaginary.is_finite
    return value if is_number else None


def _is_percent(expression: Expr) -> bool:
    return bool(expression.has(UnevaluatedExpr))


@lru_cache(maxsize=1024)  # all rollouts of a problem share its gold answer
def _expressions(answer: str) -> list[Any]:
    """What math-verify reads in an answer as a whole: some number in it is not the answer."""
    explicit = re.sub(r"(?<=\d)\s*\((?=\s*-?[\d.]+\s*\))", r" \\cdot (", answer)  # 6(6) is no mixed number
    found = parse(f"${explicit}$", [_READING], fallback_mode="no_fallback", parsing_timeout=None)
    return list(found)
