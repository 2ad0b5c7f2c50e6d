r"""Inequalities in one variable as intervals: `x < 2 \text{ or } x > 3` is `(-\infty, 2) \cup (3, \infty)`."""

from __future__ import annotations

import re

from slmreason.verify.quantities import list_items

_OPERATOR = r"(\\le(?![a-z])|\\ge(?![a-z])|<|>)"
_VARIABLE = r"([a-zA-Z]|\\[a-z]+)"
_TWO_SIDED = re.compile(rf"(.+?)\s*{_OPERATOR}\s*{_VARIABLE}\s*{_OPERATOR}\s*(.+)")
_VARIABLE_FIRST = re.compile(rf"{_VARIABLE}\s*{_OPERATOR}\s*([^<>]+)")
_VARIABLE_LAST = re.compile(rf"([^<>]+?)\s*{_OPERATOR}\s*{_VARIABLE}")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def as_intervals(answer: str) -> str | None:
    """The set of numbers that inequalities joined by `or` or commas allow; None for anything else."""
    found: list[str] = []
    variables: set[str] = set()
    for item in list_items(answer):
        read = _interval(item.strip())
        if read is None:
            return None
        variables.add(read[0])
        found.append(read[1])
    return r" \cup ".join(found) if len(variables) == 1 else None


def _interval(relation: str) -> tuple[str, str] | None:
    """(variable, interval) of an inequality."""
    both = _TWO_SIDED.fullmatch(relation)
    if both:
        low, first, variable, second, high = both.groups()
        if ("<" in first or "le" in first) != ("<" in second or "le" in second):
            return None
        if first in (">", "\\ge"):
            low, first, second, high = high, _TURNED[second], _TURNED[first], low
        opening = "[" if first == "\\le" else "("
        closing = "]" if second == "\\le" else ")"
        return variable, f"{opening}{low}, {high}{closing}"
    first_form, last_form = _VARIABLE_FIRST.fullmatch(relation), _VARIABLE_LAST.fullmatch(relation)
    if first_form:
        variable, operator, bound = first_form.groups()
    elif last_form:
        bound, operator, variable = last_form.groups()
        operator = _TURNED[operator]
    else:
        return None
    if operator in ("<", "\\le"):
        return variable, rf"(-\infty, {bound}" + ("]" if operator == "\\le" else ")")
    return variable, ("[" if operator == "\\ge" else "(") + rf"{bound}, \infty)"
