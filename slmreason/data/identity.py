"""Which problem of the pool a line of another file is about: told by question and gold, never by its place in a file.

An id says where a row stood (`pool.jsonl-000012`). When rows were removed, sorted or the path is spelled otherwise, it
names another problem, or none. So evidence, traces and critiques are matched by the problem's key, take the pool's id,
and what matches nothing is rejected and counted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from slmreason.data.rows import readable
from slmreason.embedded.families import is_embedded_id
from slmreason.records import BridgeResult, Critique, Problem, Reject, Trace, Turn, from_json, problem_key

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Matched(Generic[T]):
    """What lines of a file are about which problems of the pool."""

    found: tuple[tuple[Problem, T], ...]
    """In the order of the file; a line about a problem that the pool holds twice stands twice."""
    rejects: tuple[Reject, ...]
    lines: int

    def describe(self, what: str, pool_size: int) -> str:
        """How many lines matched, how many problems of the pool have one, and why the others did not match."""
        problems = len({problem.id for problem, _ in self.found})
        matched = self.lines - len(self.rejects)
        said = f"{what}: {matched} of {self.lines} lines match, {problems} of {pool_size} problems have one"
        if self.rejects:
            kinds = dict.fromkeys(reject.fault.kind for reject in self.rejects)
            said += f"; {len(self.rejects)} are rejected: {'; '.join(kinds)}"
        return said


class Pool:
    """The problems of a pool by their key."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems
        self._by_key: dict[str, list[Problem]] = {}
        for problem in problems:
            self._by_key.setdefault(problem.key, []).append(problem)
        self._embedded = {p.id: p for p in problems if p.source.startswith("embedded:") and is_embedded_id(p.id)}

    def of(self, key: str) -> list[Problem]:
        """The problems with this key; several where the pool holds a row twice."""
        return self._by_key.get(key, [])

    def match(self, rows: Iterable[T], location: str, identity: Callable[[T], Identity]) -> Matched[T]:
        """Finds the problem of each row.

        Args:
            location: the file that the rows are of.
            identity: what a row says of its problem.
        """
        found: list[tuple[Problem, T]] = []
        rejects = []
        lines = 0
        for lines, row in enumerate(rows, start=1):  # noqa: B007 - counted
            said = identity(row)
            if said.key is not None:
                problems = self.of(said.key)
                reason = f"not in data.train: no row of it has this question and gold: {said.question[:80]!r}"
            else:  # an embedded problem is made from its id, so the id is the problem
                problems = [self._embedded[said.id]] if said.id in self._embedded else []
                reason = f"without question and gold: by its id alone ({said.id}) it could be another problem"
            found += [(problem, row) for problem in problems]
            if not problems:
                rejects.append(Reject(said.id, location, reason))
        return Matched(tuple(found), tuple(rejects), lines)


@dataclass(frozen=True)
class Identity:
    """What a line says of its problem."""

    id: str
    key: str | None
    """None where it holds no question and gold."""
    question: str = ""


def identity_of(problem: Problem) -> Identity:
    """A line that holds its whole problem."""
    return Identity(problem.id, problem.key, problem.question)


def identity_in(row: Mapping[str, Any], key_of: Mapping[str, str] | None = None) -> Identity:
    """A line of evidence: its question and answer tell the problem, not the id or a key that might be of another.

    Args:
        key_of: keys by id, of the run that the line was written in.
    """
    identifier = str(row.get("problem_id"))
    question, answer = row.get("question"), row.get("answer")
    if isinstance(question, str) and isinstance(answer, str):
        try:
            turns = tuple(from_json(Turn, turn) for turn in row.get("turns", ()))
        except (ValueError, TypeError):  # somebody edited them: the line is of no problem that is known
            return Identity(identifier, None, question)
        return Identity(identifier, problem_key(question, answer, turns), question)
    key = row.get("key", (key_of or {}).get(identifier))
    return Identity(identifier, key if isinstance(key, str) else None)


def refuse_no_match(matched: Matched[Any], key: str, file: str | Path) -> None:
    """Refuses a file of which no line is about the pool.

    Raises:
        ValueError: it has lines, and none matches.
    """
    if matched.lines and not matched.found:
        raise ValueError(f"{key}: {readable(file)}: none of its {matched.lines} lines is about a problem of "
                         f"data.train; the first: {matched.rejects[0].reason}")  # fmt: skip


def given_traces(
    results: Sequence[BridgeResult], problems: Sequence[Problem], file: str
) -> tuple[dict[str, Trace], tuple[Reject, ...]]:
    """The chosen trace of each problem of the pool in a file of `slmreason bridge`, by the pool's ids.

    Raises:
        ValueError: no line is about the pool.
    """
    matched = Pool(problems).match(results, readable(file), lambda result: identity_of(result.problem))
    refuse_no_match(matched, "bridge.traces", file)
    log.info(matched.describe(f"bridge.traces {readable(file)}", len(problems)))
    traces = {p.id: replace(r.chosen, problem_id=p.id) for p, r in matched.found if r.chosen}
    return traces, matched.rejects


def given_critiques(
    records: Sequence[Critique], problems: Sequence[Problem], file: str
) -> tuple[list[Critique], tuple[Reject, ...]]:
    """The records of a file of `slmreason critique` that are about the pool, with the pool's problems in them.

    Raises:
        ValueError: no line is about the pool.
    """
    matched = Pool(problems).match(records, readable(file), lambda record: identity_of(record.problem))
    refuse_no_match(matched, "critique.records", file)
    log.info(matched.describe(f"critique.records {readable(file)}", len(problems)))
    return [replace(record, problem=problem) for problem, record in matched.found], matched.rejects


# -- the pool of a run ----------------------------------------------------------------------------------------------


def pool_text(problems: Iterable[Problem]) -> str:
    """What a run folder keeps of its pool: id and key of each problem in order."""
    return json.dumps({"problems": [[problem.id, problem.key] for problem in problems]}, separators=(",", ":")) + "\n"


def read_pool(path: Path) -> list[tuple[str, str]]:
    """(id, key) of each problem that a run was begun with.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return [(str(i), str(key)) for i, key in json.loads(path.read_text(encoding="utf-8"))["problems"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); it names the problems that a run was begun with"
        ) from error


def check_pool(path: Path, problems: Sequence[Problem]) -> None:
    """Refuses to go on with a run whose pool is not the one that it was begun with: its ledger is by id.

    Raises:
        ValueError: the pool differs, or the file cannot be read; the message counts what matches and names the first
            problem that does not.
    """
    before = read_pool(path)
    now = [(problem.id, problem.key) for problem in problems]
    if before == now:
        log.info("pool: %d of %d problems match those that the run was begun with", len(now), len(now))
        return
    known = dict(before)
    same = sum(known.get(i) == key for i, key in now)
    gone = len(set(known.values()) - {key for _, key in now})
    raise ValueError(f"{path}: data.train is not as the run was begun with: {same} of {len(before)} problems match, "
                     f"{gone} are gone or changed, {len(now)} are there now; {_first_difference(before, now)}. Give "
                     "the run its data back, or begin a new one (another run_dir, without --resume)")  # fmt: skip


def _first_difference(before: Sequence[tuple[str, str]], now: Sequence[tuple[str, str]]) -> str:
    pairs: Iterator[tuple[tuple[str, str], tuple[str, str]]] = zip(before, now, strict=False)
    different = next((old[0] for old, new in pairs if old != new), None)
    if different is not None:
        return f"the first that differs: {different}"
    longer = before if len(before) > len(now) else now
    return f"the first that is {'gone' if longer is before else 'new'}: {longer[min(len(before), len(now))][0]}"
