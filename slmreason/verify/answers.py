"""Is this completion's final answer the gold answer? math-verify decides; plain numbers and letters take a short cut.

What a model wrote is hostile until shown otherwise: only the final answer is looked at, its length is bounded, powers
that could fill the memory are refused before any algebra runs, and math-verify's own time limit is set.
"""

from __future__ import annotations

import re
import threading
from decimal import Decimal, InvalidOperation
from functools import lru_cache

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

MAX_ANSWER_CHARS = 256
TIMEOUT_SECONDS = 2
_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*|\d*)(?:\.\d+)?")
_MARKER = re.compile(r"(?:####|\bA:|\b[Ff]inal [Aa]nswer(?: is)?:?|\b[Aa]nswer(?: is)?:?)\s*(.+)")
_LETTER = re.compile(r"\(?([A-Z])[).:]?(?:\s.*)?", re.DOTALL)
_HUGE_POWER = re.compile(r"(?:\^|\*\*)\s*\{?\s*(?:\d{4,}|[^{}]*(?:\^|\*\*))|\d\s*!|\\(?:binom|prod|sum|int)\b")


def is_correct(text: str, gold: str, is_choice: bool = False) -> bool:
    """True when the final answer of `text` equals `gold` in value.

    Args:
        text: a completion; its last boxed expression is its answer, else what follows its last `####`, `A:` or
            `answer is`, else its last number (as math-verify's own fallback).
        gold: the gold answer, with or without a box or dollar signs.
        is_choice: compare option letters and nothing else.
    """
    answer = final_answer(text)
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    if is_choice:
        return choice_letter(answer) == choice_letter(gold)
    return answers_match(answer, gold)


def final_answer(text: str) -> str | None:
    """The part of a completion that counts as its answer; None when there is none."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    marked = _MARKER.findall(text)
    if marked:
        return str(marked[-1]).strip().rstrip(".") or None
    numbers = [number for number in re.findall(r"-?\d[\d,]*(?:\.\d+)?", text) if number]
    return numbers[-1].rstrip(",") if numbers else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` whose braces close, else None."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth = 1
        for position in range(match.end(), min(len(text), match.end() + 4 * MAX_ANSWER_CHARS)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position]
    return None


def choice_letter(answer: str) -> str | None:
    r"""The option letter of `C`, `(C)`, `C) Ann`, `\text{C}`; None for anything else."""
    inner = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", answer).strip(" $.")
    match = _LETTER.fullmatch(inner)
    return match.group(1) if match else None


@lru_cache(maxsize=65_536)
def answers_match(answer: str, gold: str) -> bool:
    """True when two answers are equal in value. Numbers compare as decimals, all else as math-verify says."""
    mine, theirs = as_number(answer), as_number(gold)
    if mine is not None and theirs is not None:
        return mine == theirs
    if answer.strip() == gold.strip():
        return True
    if _HUGE_POWER.search(answer) and not _HUGE_POWER.search(gold):
        return False
    # math-verify's limit is a signal, which only the main thread may set.
    limit = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    settings = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        parsed_gold = parse(_as_latex(gold), settings, parsing_timeout=limit)
        parsed = parse(_as_latex(answer), settings, parsing_timeout=limit)
        return bool(verify(parsed_gold, parsed, timeout_seconds=limit))
    except (ValueError, TypeError, RecursionError, ArithmeticError, MemoryError):
        return False


def as_number(answer: str) -> Decimal | None:
    """The value of a plain decimal number (thousands separators, a currency sign or a unit-free `.0` allowed)."""
    plain = answer.strip().strip("$").rstrip(".").strip().removeprefix("\\$").replace("\\!", "")
    if len(plain) > 40 or not plain or not _NUMBER.fullmatch(plain):
        return None
    try:
        return Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None


def _as_latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
