"""What can be said of an attempt by rule, without a teacher that understands it: its first false equation."""

from __future__ import annotations

from collections.abc import Sequence

from slmreason.records import Diagnosis
from slmreason.verify.equations import read_equations


def first_false_step(steps: Sequence[str]) -> Diagnosis | None:
    """The first step that holds a false equation, counted from 1, and what is true instead; None when there is none.

    It sees slips of arithmetic and nothing else: an attempt can be wrong in every step and have no false equation.
    """
    for number, step in enumerate(steps, start=1):
        for equation in read_equations(step):
            if equation.fault is not None:
                return Diagnosis(number, equation.fault)
    return None
