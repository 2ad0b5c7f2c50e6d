"""Rollouts of a pool in its order, kept in a file for the benchmarks that need the same ones.

A probe of a real student on a CPU takes longer than whatever is done with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slmreason.records import Evidence, Problem
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import append_records, record_of, written_rows
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward

AT_A_TIME = 16
"""Problems that are sampled together."""


def add_arguments(parser: argparse.ArgumentParser, attempts: int) -> None:
    """What a probe depends on, and the file that keeps it.

    Args:
        attempts: the default.
    """
    parser.add_argument("--attempts", type=int, default=attempts, help="rollouts of a problem")
    parser.add_argument("--tokens", type=int, default=300, help="of a completion, at most")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--probe", type=Path, help="file of rollouts' results: read, and what is missing is added")


def probed(
    student: Student,
    pool: Sequence[Problem],
    options: argparse.Namespace,
    enough: Callable[[Sequence[Evidence]], bool] = lambda found: False,
) -> list[Evidence]:
    """What rollouts show of the first problems of a pool, in its order.

    Args:
        enough: asked after each `AT_A_TIME` problems with all that is found; where it says yes, no more are sampled.

    Raises:
        ValueError: the file is of another student or other settings.
    """
    file: Path | None = options.probe
    settings = _settings(options)
    known: dict[str, Evidence] = {}
    if file is not None and file.exists():
        known = _read(file, settings)
    elif file is not None:
        append_records(file, [settings])
    sampling = Sampling(options.tokens, seed=options.seed, with_log_probs=False)
    found: list[Evidence] = []
    for start in range(0, len(pool), AT_A_TIME):
        chunk = pool[start : start + AT_A_TIME]
        missing = [problem for problem in chunk if problem.id not in known]
        groups = collect(student, HFEngine(), AnswerReward(), missing, options.attempts, sampling) if missing else []
        new = [Evidence.of(group) for group in groups]
        if file is not None:
            append_records(file, new)
        known |= {each.problem_id: each for each in new}
        found += [known[problem.id] for problem in chunk]
        if missing:
            print(f"probed {len(found)} of {len(pool)}, {sum(each.tokens for each in found)} tokens", flush=True)
        if enough(found):
            break
    return found


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the results of a rollout depend on."""
    student = Path(options.student).name
    return {"student": student, "dtype": options.dtype, "tokens": options.tokens, "attempts": options.attempts,
            "seed": options.seed}  # fmt: skip


def _read(file: Path, settings: dict[str, Any]) -> dict[str, Evidence]:
    rows = list(written_rows(file))
    if rows and rows[0][1] != settings:
        raise ValueError(f"--probe: {file} is of {rows[0][1]}, not of {settings}")
    found = [record_of(Evidence, row, location) for location, row in rows[1:]]
    return {each.problem_id: each for each in found}
