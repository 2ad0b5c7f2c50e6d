"""Equations that can be read in a trace, checked exactly. A trace with a false one is never trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_SIDE = rf"[-(\s$]*(?:{_NUMBER})[)\s]*(?:[-+*/x×÷][-(\s$]*(?:{_NUMBER})[)\s]*)*"
_CHAIN = re.compile(rf"(?<![\w.%/*+)\]]){_SIDE}(?:=\s*{_SIDE})+(?![\w(%/*^]|[.,:]\d)")
_TOKEN = re.compile(rf"{_NUMBER}|[-+*/()]")
_ANNOTATION = re.compile(r"<<([^<>=]{1,200}=[^<>=]{1,60})>>")


@dataclass(frozen=True)
class Equation:
    """An equation as it stands in a text, and whether it holds."""

    text: str
    holds: bool


def read_equations(text: str) -> list[Equation]:
    """Every plain equation (`12 * 4 = 48`, chains too) and GSM8K annotation (`<<12*4=48>>`) of a text, in order.

    Sides are plain arithmetic on numbers; anything with a letter or a unit is left unread rather than guessed.
    A decimal side holds within half of its last digit, so `10 / 3 = 3.33` is true.
    """
    plain = _ANNOTATION.sub(" ", text)
    sides = [(match.start(), match.group()) for match in _CHAIN.finditer(plain) if _stands_alone(plain, match)]
    sides += [(match.start(), match.group(1)) for match in _ANNOTATION.finditer(text)]
    found = []
    for _, equation in sorted(sides):
        holds = equation_holds(equation)
        if holds is not None:
            found.append(Equation(equation.strip(), holds))
    return found


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    """False when the left side is the tail of something longer, as in `40 trees - 3 = 37` or `2x - 5 = 13`."""
    before, equation = text[: match.start()].rstrip(), match.group().lstrip()
    if before.endswith(("+", "-", "*", "/", "x", "×", "÷", "%", ")", "^")):
        return False
    if equation.startswith("-") and before[-1:].isalnum():
        return False
    return re.search(r"\dx[^\d\s(]|\dx\s*[-+=]", equation) is None


def false_equations(text: str) -> list[str]:
    """The equations of a text that are not true."""
    return [equation.text for equation in read_equations(text) if not equation.holds]


def equation_holds(equation: str) -> bool | None:
    """True or false when every side of `a = b = ...` can be evaluated, else None (also when no side computes)."""
    sides = equation.split("=")
    values = [evaluate(side) for side in sides]
    if any(value is None for value in values) or not any(re.search(r"\d\s*\)?\s*[-+*/x×÷]", side) for side in sides):
        return None
    return all(
        abs(left - right) <= max(_tolerance(a), _tolerance(b))  # type: ignore[operator]
        for (a, left), (b, right) in zip(
            list(zip(sides, values, strict=True)), list(zip(sides, values, strict=True))[1:], strict=False
        )
    )


def _tolerance(side: str) -> Fraction:
    """Half of the last digit of a side that is one decimal number, else 0."""
    match = re.fullmatch(r"[\s$-]*\d*\.(\d+)\s*", side)
    return Fraction(1, 2 * 10 ** len(match.group(1))) if match else Fraction(0)


def evaluate(expression: str) -> Fraction | None:
    """The exact value of plain arithmetic with + - * / and brackets; None when it is anything else."""
    cleaned = expression.replace("$", "").replace("x", "*").replace("×", "*").replace("÷", "/").strip()
    tokens = _TOKEN.findall(cleaned)
    if not tokens or len(tokens) > 64 or "".join(tokens) != re.sub(r"\s+", "", cleaned):
        return None
    try:
        value, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return value if not rest else None


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        right, rest = _product(tokens[1:])
        value, tokens = (value + right if tokens[0] == "+" else value - right), rest
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _atom(tokens)
    while tokens and tokens[0] in "*/":
        right, rest = _atom(tokens[1:])
        value, tokens = (value * right if tokens[0] == "*" else value / right), rest
    return value, tokens


def _atom(tokens: list[str]) -> tuple[Fraction, list[str]]:
    head, rest = tokens[0], tokens[1:]
    if head == "-":
        value, rest = _atom(rest)
        return -value, rest
    if head == "(":
        value, rest = _sum(rest)
        if rest[0] != ")":
            raise ValueError("unbalanced bracket")
        return value, rest[1:]
    return Fraction(head.replace(",", "")), rest
