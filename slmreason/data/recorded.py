"""Rollouts that somebody else sampled: JSONL with a question, a gold answer, a response, and perhaps a label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmreason.data.files import local_rows
from slmreason.data.golds import read_gold
from slmreason.data.rows import as_text, readable, value_of
from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.verify.answers import Claim, rule

QUESTION, GOLD, RESPONSE = "problem|question|prompt", "gold|answer|target", "response|completion|text"


Asked = tuple[str, str]
"""A question with its gold: with another gold it is another problem."""


def read_recorded(path: Path) -> tuple[list[RolloutGroup], list[str], int]:
    """Grades recorded rollouts with our own verifier and groups them by question and gold.

    Returns:
        (groups in the order of first appearance, a line for each rollout whose `correct` label differs from the
        verdict, how many rollouts had a label).

    Raises:
        ValueError: a row lacks the question, the gold answer or the response, or two questions have one id; the message
            names file and line. No row is left out: without all its rollouts a problem would be sorted wrongly.
    """
    rollouts: dict[Asked, list[Rollout]] = {}
    problems: dict[Asked, Problem] = {}
    ids: set[str] = set()
    disagreements: list[str] = []
    labelled = 0
    rows = [(location, row, *_fields(location, row)) for location, row in local_rows(path)]
    rulings = rule(_claim(location, row, gold, text) for location, row, _, gold, text in rows)
    for (location, row, question, gold, text), ruling in zip(rows, rulings, strict=True):
        correct = ruling.correct
        label = row.get("correct")
        if label is not None:
            labelled += 1
            if bool(label) != correct:
                disagreements.append(f"{location}: verdict {correct}, label {label}: {text[-80:]!r}")
        asked = question, gold
        if asked not in problems:
            problems[asked] = Problem(_identifier(location, row, path, ids), question, gold, source=readable(path))
        rollouts.setdefault(asked, []).append(_rollout(text, correct))
    groups = [RolloutGroup(problem, tuple(rollouts[asked])) for asked, problem in problems.items()]
    if not groups:
        raise ValueError(f"{path}: no recorded rollout")
    return groups, disagreements, labelled


def _claim(location: str, row: Mapping[str, Any], gold: str, text: str) -> Claim:
    """What a row claims; beside its columns it may have `choices` (texts, or how many), `tolerance` and `truncated`."""
    choices, tolerance = row.get("choices"), row.get("tolerance") or 0.0
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"{location}: column 'tolerance' must be a number that is not negative: it is {tolerance!r}")
    return Claim(
        text,
        gold,
        is_choice=bool(choices),
        tolerance=float(tolerance),
        options=tuple(map(str, choices)) if isinstance(choices, list) else (),
        truncated=row.get("truncated") is True,
    )


def _fields(location: str, row: Any) -> tuple[str, str, str]:
    try:
        question, gold, text = (as_text(value_of(row, c), f"column {c!r}") for c in (QUESTION, GOLD, RESPONSE))
        if "####" in gold or "boxed" in gold:  # a whole solution
            gold, _ = read_gold(gold)
        if not question.strip() or not gold.strip():
            raise ValueError("the question or the gold answer is empty")
        if row.get("correct") not in (None, True, False):
            raise ValueError(f"column 'correct' must be true, false or null: it is {row['correct']!r}")
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    return question, gold, text


def _identifier(location: str, row: dict[str, Any], path: Path, ids: set[str]) -> str:
    try:
        given = as_text(row.get("id", row.get("idx", len(ids))), "the id")
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    identifier = f"{readable(path.name).partition('.')[0]}-{given}"
    if identifier in ids:
        raise ValueError(f"{location}: another question has the id {given!r} already")
    ids.add(identifier)
    return identifier


def _rollout(text: str, correct: bool) -> Rollout:
    return Rollout((), (), (), text, float(correct), correct, False, 0)
