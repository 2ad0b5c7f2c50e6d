"""What the data steps share: stratify, bridge and critique, each alone. JSONL in and out, so that a person can look and
edit between the steps.

What is written is kept row by row: a step that was cut off and is called again goes on where it was. `fit` reads the
files: data.evidence, bridge.traces and critique.records.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from slmreason.cli.command import Request
from slmreason.cli.config import Parser
from slmreason.cli.difference import differing_keys
from slmreason.cli.errors import ConfigError
from slmreason.data.identity import Identity, Pool
from slmreason.records import Problem, Reject, RolloutGroup
from slmreason.report.terminal import plan_table, print_tables
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling, stable_seed
from slmreason.run.files import append_records, placed_lines, write_text
from slmreason.run.progress import Watch, watching
from slmreason.runtime.distributed import barrier, is_first

log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]


def add_step_options(parser: Parser, step: str) -> None:
    """The options that every data step has."""
    parser.add_out(step)
    parser.add_argument("--dry_run", action="store_true", help="Print counts and estimated cost, and do nothing.")


def take_step_options(config: Namespace, step: str) -> tuple[Path, bool]:
    """Takes out of the config where a step writes, and whether it only says what it would do."""
    return Path(config.pop("out", f"{step}.jsonl")), config.pop("dry_run", False)


def done_before(
    out: Path,
    request: Request,
    inputs: dict[str, Any],
    problems: Sequence[Problem],
    identity: Callable[[dict[str, Any], str], Identity],
) -> set[str]:
    """Keys of the problems that an earlier call of the same step has done already; how many lines match is said.

    Args:
        problems: those that the step is for now.
        identity: what a row that stands somewhere says of its problem; a person may have edited the row.

    Raises:
        ConfigError: the file is there, but was made by another configuration or from other inputs.
        ValueError: a line of it is not of this step; the message names file and line.
    """
    note = out.with_name(f"{out.name}.config.yaml")
    now = {"config": yaml.safe_load(request.parser.dump(request.config, skip_none=False)), "inputs": inputs}
    if out.exists() and not note.exists():
        raise ConfigError(f"--out {out}: the file is there already, and not known to be of this step")
    if out.exists() and (keys := differing_keys(yaml.safe_load(note.read_text(encoding="utf-8")), now)):
        raise ConfigError(f"--out {out}: made with another {', '.join(keys)}; name another file, or remove it")
    found = [identity(row, where) for where, row in placed_lines(out)]
    matched = Pool(problems).match(found, str(out), lambda row: row)
    if found:
        log.info(matched.describe(f"--out {out}", len(problems)))
    write_text(note, yaml.safe_dump(now, sort_keys=False))
    return {problem.key for problem, _ in matched.found}


def in_chunks(
    out: Path,
    problems: Sequence[Problem],
    done: set[str],
    make: Callable[[list[Problem], Watch], Rows],
    size: int,
    work: tuple[str, int, int],
) -> None:
    """Makes the rows of the problems whose key is not done yet, and writes them chunk by chunk.

    Args:
        size: problems of a chunk.
        work: for those who watch: its name, completions of a problem, and tokens of a completion at most.
    """
    todo = [problem for problem in problems if problem.key not in done]
    if done:
        log.info("%d of %d problems are in %s already", len(problems) - len(todo), len(problems), out)
    append_records(out, [])
    label, completions, max_new_tokens = work
    with watched(label, len(todo) * completions, max_new_tokens) as watch:
        for start in range(0, len(todo), size):
            append_records(out, make(todo[start : start + size], watch))
    barrier()


def probe(made: Namespace, config: Namespace, problems: Sequence[Problem], watch: Watch) -> list[RolloutGroup]:
    """Rollouts of the student as it is, drawn as GRPO draws them."""
    grpo = config.grpo
    seed = stable_seed(grpo.seed, "probe", 0, "stratify", 0)
    sampling = Sampling(grpo.max_completion_tokens, grpo.temperature, grpo.top_p, seed, with_log_probs=False)
    made.rollout.sync(made.student)
    return collect(made.student, made.rollout, made.reward, problems, made.curriculum.probe.attempts, sampling, watch)


def watched(label: str, completions: int, max_new_tokens: int) -> AbstractContextManager[Watch]:
    """Shows on the first process how far some work is."""
    return watching(label, completions, max_new_tokens, Console(quiet=not is_first()))


def show(table: Table) -> None:
    """Prints a table, on the first process."""
    print_tables(Console(quiet=not is_first()), table)


def show_plan(step: str, counts: dict[str, int], cost: str | None) -> None:
    """What a step would do, and what it would cost."""
    show(plan_table(step, counts, cost))


def keep_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    """What the teacher had no answer for, counted on the screen and kept whole beside the file."""
    if rejects:
        append_records(path := out.with_name(f"{out.name}.rejects.jsonl"), rejects)
        counts = Counter(f"{reject.where}: {reject.reason}" for reject in rejects)
        most = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        log.warning("%d without an answer of the teacher: %s; all in %s", len(rejects), most, path)
