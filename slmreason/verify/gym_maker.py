"""A process that makes problems with reasoning-gym: `python -m slmreason.verify.gym_maker SOURCE [LIMIT]`.

Some generators go through sets, whose order depends on how Python hashes texts in a process. So problems are made, and
their answers scored, in processes that all hash alike, and this one says what it made: a line of JSON for each problem
`[id, question, answer, what failed]`, or one text where the source itself is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slmreason.verify.gym import GymFamily, dataset, families
from slmreason.verify.process_pool import environment


@dataclass(frozen=True)
class Made:
    """What a generator gave in one place."""

    id: str
    question: Any = None
    answer: Any = None
    fault: str | None = None


def made(source: str, limit: int | None) -> list[Made]:
    """The problems of a source, the difficulties in rotation, made in a process of their own.

    Raises:
        ValueError: the package is not installed, or knows no such generator or option.
    """
    families(source)  # what is wrong with it by itself is said at once
    asked = [source] if limit is None else [source, str(limit)]
    process = subprocess.run(
        [sys.executable, "-P", "-m", "slmreason.verify.gym_maker", *asked],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    if process.returncode:
        last = process.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"{source}: the process that makes its problems ended with {process.returncode}: {last}")
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    if rows and isinstance(rows[0], str):
        raise ValueError(rows[0])
    return [Made(*row) for row in rows]


def rows(source: str, limit: int | None) -> Iterator[tuple[str, Any, Any, str | None]]:
    """What is written of each problem.

    Raises:
        ValueError: as `made`.
    """
    found = families(source)
    for family in found:
        dataset(family)
    places = sorted(((family, at) for family in found for at in range(family.size)), key=lambda each: each[1])
    for family, at in places[:limit]:
        yield _row(family, at)


def _row(family: GymFamily, at: int) -> tuple[str, Any, Any, str | None]:
    identifier = f"{family.key}#{at}"
    try:
        entry = dataset(family)[at]
        question, answer = entry["question"], entry["answer"]
        json.dumps([question, answer])
    except Exception as error:  # whatever a generator does with its dials
        return identifier, None, None, f"the generator failed: {type(error).__name__}: {error}"
    return identifier, question, answer, None


def main(source: str, limit: int | None) -> None:
    """Writes the lines; what the generators print goes to the errors."""
    lines, sys.stdout = sys.stdout, sys.stderr
    try:
        for row in rows(source, limit):
            print(json.dumps(row), file=lines)
    except ValueError as error:
        print(json.dumps(str(error)), file=lines)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
