"""What the data steps share: stratify, bridge and critique, each alone. JSONL in and out, so that a person can look and
edit between the steps.

What is written is kept row by row: a step that was cut off and is called again goes on where it was. `fit` reads the
files: data.evidence, bridge.traces and critique.records.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from slmreason.cli.command import Request
from slmreason.cli.config import Parser
from slmreason.cli.difference import differing_keys
from slmreason.cli.errors import ConfigError
from slmreason.curriculum.predictor import Predictor
from slmreason.curriculum.prober import Prober
from slmreason.curriculum.work import Work
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.identity import Identity, Pool
from slmreason.evaluate.benchmarks import Benchmark
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Problem, Reject, RolloutGroup
from slmreason.report.terminal import plan_table, print_tables
from slmreason.run.bars import screen
from slmreason.run.files import append_records, placed_lines, write_records, write_text
from slmreason.run.journal import Notes, Size, Unnoted, spans
from slmreason.runtime.distributed import barrier, is_first

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


def add_step_options(parser: Parser, step: str) -> None:
    """The options that every data step has."""
    parser.add_out(step)
    parser.add_argument("--dry_run", action="store_true", help="Print counts and estimated cost, and do nothing.")


def take_step_options(config: Namespace, step: str) -> tuple[Path, bool]:
    """Takes out of the config where a step writes, and whether it only says what it would do."""
    return Path(config.pop("out", f"{step}.jsonl")), config.pop("dry_run", False)


class StepFile(Generic[R]):
    """The file that a data step writes, and the notes of its work: a problem that has a row is not worked on again."""

    def __init__(self, path: Path, rows: StepRows[R], request: Request, inputs: dict[str, Any]) -> None:
        """Reads what an earlier call of the same step has written; how many lines match is said.

        Args:
            inputs: of the step, beside its config.

        Raises:
            ConfigError: the file is there, but was made by another configuration or from other inputs.
            ValueError: a line of it is not of this step; the message names file and line.
        """
        note = path.with_name(f"{path.name}.config.yaml")
        now = {"config": yaml.safe_load(request.parser.dump(request.config, skip_none=False)), "inputs": inputs}
        if path.exists() and not note.exists():
            raise ConfigError(f"--out {path}: the file is there already, and not known to be of this step")
        if path.exists() and (keys := differing_keys(yaml.safe_load(note.read_text(encoding="utf-8")), now)):
            raise ConfigError(f"--out {path}: made with another {', '.join(keys)}; name another file, or remove it")
        lines = list(placed_lines(path))
        found = [rows.read(row, location) for location, row in lines]
        matched = Pool(rows.problems).match(found, str(path), lambda pair: pair[0])
        if found:
            log.info(matched.describe(f"--out {path}", len(rows.problems)))
        write_text(note, yaml.safe_dump(now, sort_keys=False))
        self.path, self.rows = path, rows
        of_pool = {id(pair) for _, pair in matched.found}
        self._others = [row for (_, row), pair in zip(lines, found, strict=True) if id(pair) not in of_pool]
        self._results: dict[tuple[str, str], list[R]] = {}
        for problem, (_, result) in matched.found:
            self._results.setdefault(_name(problem), []).append(rows.under(result, problem))

    def chunks(
        self,
        key: str,
        items: Sequence[T],
        make: Callable[[list[T]], Sequence[Any]],
        cls: type[Any],
        size: Size,
        noted: Callable[[int], None] = lambda items: None,
        part: int = 0,
        took: Callable[[float], None] = lambda seconds: None,
    ) -> list[Any]:
        """See `Notes.chunks`. An item is a problem, or has one; the n-th row of a problem is its n-th part."""
        todo = self.left(items, part)
        if len(todo) < len(items):
            log.info("%d of %d problems are in %s already", len(items) - len(todo), len(items), self.path)
            noted(len(items) - len(todo))
        append_records(self.path, [])
        for start, end in spans(len(todo), size):
            made = make(todo[start:end])
            append_records(self.path, [self.rows.write(result) for result in made])
            for result in made:
                self._results.setdefault(_name(self.rows.problem_of(result)), []).append(result)
        barrier()
        return [result for item in items for result in self._made(item, part)]

    def left(self, items: Sequence[T], part: int = 0) -> list[T]:
        """Those that have no row yet."""
        return [item for item in items if not self._made(item, part)]

    def _made(self, item: Any, part: int) -> list[R]:
        results = self._results.get(_name(item), [])
        return results[part - 1 : part] if part else results

    def write_again(self, rows: Sequence[dict[str, Any]]) -> None:
        """Puts these rows in the place of all that match the pool: what they say is known only at the end."""
        write_records(self.path, [*rows, *self._others])
        barrier()


@dataclass(frozen=True)
class StepRows(Generic[R]):
    """What a data step writes of its problems."""

    problems: Sequence[Problem]
    """Those that the step is for now."""
    read: Callable[[dict[str, Any], str], tuple[Identity, R]]
    """(row, where it stands) -> what it says of its problem, and the result; a person may have edited it."""
    write: Callable[[R], dict[str, Any]]
    problem_of: Callable[[R], Problem]
    """The problem that a result is about."""
    under: Callable[[R, Problem], R] = lambda result, problem: result
    """A result that was read, as one of the pool's problem: its id may be another by now."""


def _name(item: Any) -> tuple[str, str]:
    """Tells a problem from every other: in files of several pools an id may stand for two."""
    problem = item.problem if isinstance(item, RolloutGroup) else item
    return problem.id, problem.key


def tell_pool(out: Path, data: ReasoningDataModule, benchmarks: Sequence[Benchmark]) -> None:
    """Says what the pool is, and keeps what was rejected of it and of the benchmarks beside the file."""
    log.info(data.describe_pool())
    of_benchmarks = [reject for benchmark in benchmarks for reject in benchmark.rejects]
    rejects = [*data.rejects, *data.unmatched, *of_benchmarks]
    if not rejects:
        return
    path = _rejects_of(out)
    if not (out.exists() and path.exists()):  # going on: they are there, and the teacher's too
        write_records(path, rejects)
    log.info("rejected rows: %s", path)


def _rejects_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejects.jsonl")


def work_of(made: Namespace, notes: Notes) -> Work:
    """How a step goes through its problems: in the order of the pool, so that its file has that order."""
    return Work(made.student, made.rollout, notes, made.curriculum.checkpoint, screen(), longest_first=False)


def prober_of(made: Namespace, config: Namespace, notes: Notes, traces: Mapping[str, str]) -> Prober:
    """What measures; the evidence comes into the ledger of the pool.

    Args:
        traces: that `curriculum.probe.predictor` reads. They are read again where a step is gone on with.
    """
    settings, grpo = made.curriculum.probe, GRPOSettings(**vars(config.grpo))
    work, predictor = work_of(made, notes), None
    if settings.predictor == "forward":
        predictor = Predictor(work, made.data, traces, settings.least_certainty, Unnoted())
    return Prober(work, made.data, grpo, made.reward.verifier, settings, max_tokens=None, predictor=predictor)


def show(table: Table) -> None:
    """Prints a table, on the first process."""
    print_tables(Console(quiet=not is_first()), table)


def show_plan(step: str, counts: dict[str, int], cost: str | None) -> None:
    """What a step would do, and what it would cost."""
    show(plan_table(step, counts, cost))


def keep_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    """What the teacher had no answer for, counted on the screen and kept whole beside the file."""
    if rejects:
        append_records(path := _rejects_of(out), rejects)
        counts = Counter(f"{reject.where}: {reject.reason}" for reject in rejects)
        most = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        log.warning("%d without an answer of the teacher: %s; all in %s", len(rejects), most, path)
