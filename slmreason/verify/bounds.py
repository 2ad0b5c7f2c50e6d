r"""How large the numbers of an expression can become, told before any algebra runs.

`5!` and `\binom{5}{2}` are small, `9^{9^{9}}` and `99999!` could fill the memory: it is a question of size, and not of
which commands stand there. Sums, products and integrals are bounded by the limits of the process that works on them.
"""

from __future__ import annotations

import math
import re

MAX_DIGITS = 100_000
MAX_FACTORIAL = 20_000
MAX_TERMS = 10_000
_POWER = re.compile(r"\s*(?:\^|\*\*|\\exp\b)\s*")
_FACTORIAL = re.compile(r"(?:(\d+)|[)}\]a-zA-Z])\s*(!+)")
_BINOMIAL = re.compile(r"\\[a-z]?binom(?![a-zA-Z])\s*(?:\{\s*(\d*)[^{}]*\}|(\d))|(\d*)[^{}]*\\choose(?![a-zA-Z])")
_SERIES = re.compile(r"\\(?:sum|prod)(?![a-zA-Z])")


def too_large(answer: str, gold: str) -> bool:
    """True when the algebra of an answer could fill the memory, and the gold answer is no excuse for that."""
    return _digits(answer) > max(MAX_DIGITS, _digits(gold))


def _digits(expression: str) -> float:
    """A bound on the digits of any number in an expression: the longest times all exponents; infinite for a tower."""
    digits = float(max(map(len, re.findall(r"\d+", expression)), default=0))
    digits = max(digits, _of_factorials(expression), _of_binomials(expression))
    if _SERIES.search(expression):
        largest = max((int(number) for number in re.findall(r"\d{1,18}", expression)), default=0)
        if largest > MAX_TERMS or "!" in expression and largest > 100:
            return math.inf
    for match in _POWER.finditer(expression):
        exponent = _exponent(expression[match.end() :])
        if _POWER.search(exponent) or "!" in exponent or "binom" in exponent:
            return math.inf
        digits *= math.prod(max(1.0, float(number)) for number in re.findall(r"\d+", exponent))
    return digits


def _of_factorials(expression: str) -> float:
    """Digits of the largest factorial; infinite for one of more than a plain number, as `(9!)!`."""
    found = list(_FACTORIAL.finditer(expression))
    digits = 0.0
    for match in found:
        number, marks = match.groups()
        if number is None:
            # `n!` of a variable is no number; brackets may hold anything, unless they hold small sums alone.
            if match.group()[0].isalpha():
                continue
            inside = re.search(r"\(([\d\s+-]{1,12})\)\s*!$", expression[: match.end()])
            if inside is None:
                return math.inf
            number = str(sum(int(n) for n in re.findall(r"\d+", inside.group(1))))
        if len(number) > 6 or int(number) > MAX_FACTORIAL or (len(marks) > 1 and int(number) > 5):
            return math.inf
        digits += math.lgamma(int(number) + 1) / math.log(10) + 1
    return digits


def _of_binomials(expression: str) -> float:
    digits = 0.0
    for match in _BINOMIAL.finditer(expression):
        number = match.group(1) or match.group(2) or match.group(3)
        if not number:
            if re.search(r"\d{5}", match.group()):
                return math.inf
            continue
        if len(number) > 6:
            return math.inf
        digits += int(number) * math.log10(2) + 1
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
