"""The file between `stratify` and `fit`: what rollouts showed of each problem, one readable line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slmreason.data.identity import Identity, Matched, Pool, identity_in, read_pool
from slmreason.data.posterior import Posterior, Prior
from slmreason.data.rows import readable
from slmreason.data.strata import Bands, likeliest
from slmreason.records import Evidence, Problem, to_json
from slmreason.run.files import record_of, written_rows
from slmreason.run.folder import RunFolder

KEPT = ("problem_id", "attempts", "successes", "solution")
"""What `fit` reads of a line: neither the tokens nor the policy version are of the run that reads it."""


def readable_row(
    evidence: Evidence,
    problem: Problem,
    bands: Bands,
    prior: Prior = Prior(),  # noqa: B008 - frozen
    is_predicted: bool = False,
) -> dict[str, Any]:
    """One problem's evidence, with its band for a person to read; `fit` reads the counts, so bands can be moved.

    Args:
        prior: of the problem, for a band that goes by the posterior: the probability of the band stands beside it.
        is_predicted: the prior is of this problem alone, and is shown too.
    """
    return {
        "problem_id": problem.id,
        "key": problem.key,
        **_band(evidence, bands, prior),
        **({"prior": [round(prior.a, 4), round(prior.b, 4)]} if is_predicted else {}),
        "attempts": evidence.attempts,
        "successes": evidence.successes,
        "solution": evidence.solution,
        "question": problem.question,
        "answer": problem.answer,
        **_turns_of(problem),
    }


def _band(evidence: Evidence, bands: Bands, prior: Prior) -> dict[str, Any]:
    if bands.fading is None:
        return {"band": bands.of(evidence.rho)}
    right, wrong = float(evidence.successes), float(evidence.attempts - evidence.successes)
    posterior = Posterior(np.array([right + prior.a]), np.array([wrong + prior.b]))
    [band], [certainty] = likeliest(posterior, bands)
    return {"band": band, "certainty": round(certainty, 4)}


def _turns_of(problem: Problem) -> dict[str, Any]:
    """The earlier turns of a problem, where it has any: without them its line would be of another problem."""
    return {"turns": [to_json(turn) for turn in problem.turns]} if problem.turns else {}


def read_evidence(path: Path) -> list[tuple[Identity, Evidence]]:
    """The rows of such a file, each with what it says of its problem.

    Raises:
        ValueError: the file is not there, or a row lacks a count or has an impossible one; the message names the line.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file; `slmreason stratify` makes one")
    found = [(row, evidence_in(row, location)) for location, row in written_rows(path)]
    of_run = RunFolder(path.parent).pool  # beside the ledger of a run, which may be given too
    key_of = dict(read_pool(of_run)) if of_run.exists() else {}
    return [(identity_in(row, key_of), evidence) for row, evidence in found]


def matched_evidence(path: Path, problems: Sequence[Problem]) -> Matched[tuple[Identity, Evidence]]:
    """The rows of such a file that are about these problems.

    Raises:
        ValueError: as `read_evidence`.
    """
    return Pool(problems).match(read_evidence(path), readable(path), lambda row: row[0])


def of_pool(matched: Matched[tuple[Identity, Evidence]]) -> list[Evidence]:
    """What matched, under the pool's ids."""
    return [replace(evidence, problem_id=problem.id) for problem, (_, evidence) in matched.found]


def evidence_in(row: Any, location: str) -> Evidence:
    """What a line shows of its problem.

    Raises:
        ValueError: it lacks a count or has an impossible one; the message says where it stands.
    """
    known = {key: row[key] for key in KEPT if key in row} if isinstance(row, dict) else row
    found = record_of(Evidence, known, location)
    if not 0 <= found.successes <= found.attempts or not found.attempts:
        raise ValueError(f"{location}: {found.successes} successes of {found.attempts} attempts cannot be")
    return found
