"""Each data step alone: stratify, bridge, critique. JSONL in and out, so a person can look and edit between the steps.

What is written is kept row by row: a step that was cut off and is called again goes on where it was. `fit` reads the
files: data.evidence, bridge.traces and critique.records.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, get_args

import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from slmreason.cli.config import ConfigError, Parser, differing_keys, fresh_trainer_config, instantiate
from slmreason.curriculum.sets import without_trace
from slmreason.curriculum.trainer import Processes
from slmreason.data.evidence import as_ledger_rows, evidence_in, evidence_row, matched_evidence
from slmreason.data.identity import Identity, Pool, identity_in, identity_of
from slmreason.data.ledger import Ledger, given_harvest
from slmreason.data.recorded import read_recorded
from slmreason.data.strata import Bands, Strata, stratify
from slmreason.evaluate.benchmarks import Benchmark, load_benchmarks
from slmreason.records import (
    BAND_NAMES,
    BridgeResult,
    Critique,
    Place,
    Problem,
    Provenance,
    Reject,
    RolloutGroup,
    from_json,
    to_json,
)
from slmreason.report.terminal import print_tables
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling, prompt_limit, stable_seed
from slmreason.run.files import append_records, placed_lines, read_lines, record_of, write_text
from slmreason.run.progress import Watch, watching
from slmreason.runtime.distributed import barrier, first_only, is_first
from slmreason.runtime.redact import cell
from slmreason.supervision.bridge import BridgeSettings, bridge
from slmreason.supervision.critique import critique, pick_attempts
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.verdicts import try_reward

log = logging.getLogger(__name__)
T = TypeVar("T")
Job = Callable[[], object]
CHUNK = 64
"""Problems between two writes to the file, where none of them is sampled from."""


def load_data(made: Namespace, config: Namespace) -> list[Benchmark]:
    """Loads the benchmarks, and the pool without what stands in them.

    Raises:
        ValueError: a source cannot be read or gives no problem.
    """
    student, engine = made.student, made.rollout
    benchmarks = load_benchmarks(config.benchmarks, made.evaluation, student, engine)
    held_out = {benchmark.name: benchmark.problems for benchmark in benchmarks}
    longest = prompt_limit(student, engine, config.grpo.max_completion_tokens, "grpo.max_completion_tokens")
    made.data.load(student.prompt_length, held_out, longest)
    check_positions(made, config)
    try_reward(made.reward, made.data.problems[0])
    return benchmarks


def place(made: Namespace, processes: Processes) -> None:
    """Puts the student where it will run, and tries there what the run will do with it.

    Raises:
        ConfigError: the model cannot be scored, sampled from or saved.
    """
    student = made.student
    processes.place(student)
    try:
        with student.checking():
            student.layout  # noqa: B018 - found by trying when it is asked for
            made.rollout.check(student)
        student.try_saving()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_positions(made: Namespace, config: Namespace) -> None:
    """
    Raises:
        ValueError: a prompt of the pool with what follows it is longer than the student's positions.
    """
    student, positions = made.student, made.student.max_length
    longest = max(student.prompt_length(problem) for problem in made.data.problems)
    follows = {"grpo.max_completion_tokens": config.grpo.max_completion_tokens}
    if "sft" in made.curriculum.stages:
        follows["bridge.max_trace_tokens"] = made.bridge.max_trace_tokens
    for key, tokens in follows.items():
        if longest + tokens > positions:
            raise ValueError(
                f"{key}: the longest prompt of data.train has {longest} tokens, with {tokens} more it exceeds the "
                f"student's {positions} positions; lower it, or data.max_prompt_tokens"
            )


def prepare_stratify(parser: Parser, config: Namespace) -> Job:
    """Bands of a pool, from new rollouts of the student or from recorded ones."""
    out, dry_run = Path(config.pop("out", "stratify.jsonl")), config.pop("dry_run", False)
    recorded = config.pop("recorded", None)
    if recorded is not None:
        groups, disagreements, labelled = read_recorded(Path(recorded))
        log.info("%s: %d rollouts of %d problems", recorded, sum(len(g.rollouts) for g in groups), len(groups))
        if labelled:
            log.info("the verifier agrees with %d of %d recorded labels", labelled - len(disagreements), labelled)
            for row in disagreements[:10]:
                log.warning("differs from its label: %s", row)
        made, processes, problems = None, None, [group.problem for group in groups]
        by_key = {group.problem.key: group for group in groups}
        rollouts = 0
    else:
        made = instantiate(parser, config)
        processes = Processes(fresh_trainer_config(config), made.backend)
        load_data(made, config)
        problems = list(made.data.problems)
        rollouts = len(problems) * made.curriculum.probe.attempts
    bands = Bands(**vars(config.data.bands))
    if dry_run:
        return lambda: _show_plan("stratify", {"problems": len(problems), "rollouts to draw": rollouts}, None)

    def of_evidence(row: dict[str, Any], where: str) -> Identity:
        evidence_in(row, where)
        return identity_in(row)

    done = _go_on(out, parser, config, {"recorded": recorded}, problems, of_evidence)

    def sample(chunk: list[Problem], watch: Watch) -> list[dict[str, Any]]:
        if made is None:
            return [evidence_row(by_key[problem.key], bands) for problem in chunk]
        return [evidence_row(group, bands) for group in probe(made, config, chunk, watch)]

    def job() -> None:
        if made is not None and processes is not None:
            place(made, processes)
        attempts, limit = config.curriculum.probe.attempts, config.grpo.max_completion_tokens
        size = len(problems) if made is None else max(1, made.rollout.batch_size(made.student) // attempts)
        _in_chunks(out, problems, done, sample, size, ("stratify", attempts, limit))
        ledger = Ledger(None)
        ledger.take(as_ledger_rows(matched_evidence(out, problems)), Place(0, "stratify"))
        _print(strata_table(stratify(ledger, problems, bands), ledger))
        log.info("bands: %s; fit starts from them with --data.evidence %s", out, out)

    return job if processes is None else lambda: processes.run(job)


def probe(made: Namespace, config: Namespace, problems: Sequence[Problem], watch: Watch) -> list[RolloutGroup]:
    """Rollouts of the student as it is, drawn as GRPO draws them."""
    grpo = config.grpo
    seed = stable_seed(grpo.seed, "probe", 0, "stratify", 0)
    sampling = Sampling(grpo.max_completion_tokens, grpo.temperature, grpo.top_p, seed, with_log_probs=False)
    made.rollout.sync(made.student)
    return collect(made.student, made.rollout, made.reward, problems, made.curriculum.probe.attempts, sampling, watch)


def prepare_bridge(parser: Parser, config: Namespace) -> Job:
    """Traces for the problems that are not mastered: raw for the bands that are not bridged, bridged for the others."""
    out, dry_run = Path(config.pop("out", "bridge.jsonl")), config.pop("dry_run", False)
    made = instantiate(parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    load_data(made, config)
    teacher, ledger = FirstProcessTeacher(made.teacher or TraceTeacher()), Ledger(None)
    ledger.take(made.data.evidence_rows, Place(0, "stratify"))
    missing = [problem for problem in made.data.problems if problem.id not in ledger]
    if dry_run:
        return lambda: _show_bridge_plan(made, teacher, ledger, len(missing))

    def of_result(row: dict[str, Any], where: str) -> Identity:
        return identity_of(record_of(BridgeResult, row, where).problem)

    done = _go_on(out, parser, config, {}, made.data.problems, of_result)

    def job() -> None:
        place(made, processes)
        if missing:
            log.info("%d problems have no evidence yet (data.evidence): they are measured first", len(missing))
            limit = config.grpo.max_completion_tokens
            with _watching("probe", len(missing) * config.curriculum.probe.attempts, limit) as watch:
                ledger.record(probe(made, config, missing, watch), Place(0, "probe"))
        strata = stratify(ledger, made.data.problems, made.data.bands)
        wanted = [p for band in ("medium", "hard") for p in getattr(strata, band)]

        def make(chunk: list[Problem], watch: Watch) -> list[dict[str, Any]]:
            return _bridged(made, config, teacher, ledger, strata, chunk, watch)

        size = made.rollout.batch_size(made.student)
        _in_chunks(out, wanted, done, make, size, ("bridge", 1, made.bridge.max_trace_tokens))
        asked = {problem.key for problem in made.data.problems}
        results = [from_json(BridgeResult, row) for row in read_lines(out)]
        results = [result for result in results if result.problem.key in asked]
        _print(bridge_table(results))
        log.info(without_trace(results))
        _set_aside(out, teacher.drain_rejects())
        log.info("traces: %s; fit trains on them with --bridge.traces %s", out, out)

    return lambda: processes.run(job)


def _bridged(
    made: Namespace, config: Namespace, teacher: Any, ledger: Ledger, strata: Strata, chunk: list[Problem], watch: Watch
) -> list[dict[str, Any]]:
    settings: BridgeSettings = made.bridge
    sampling = Sampling(
        min(settings.max_trace_tokens, config.grpo.max_completion_tokens),
        0.0,
        1.0,
        stable_seed(config.grpo.seed, "handover"),
        with_log_probs=False,
    )
    exemplars, own = ledger.exemplars(made.data.problems, strata.band_of), ledger.own_traces(chunk)
    results: dict[str, BridgeResult] = {}
    for bridged in (True, False):
        part = [p for p in chunk if (strata.band_of[p.id] in settings.bands) == bridged]
        chosen = settings if bridged else settings.raw()
        if part:
            made_of = bridge(
                part, made.student, made.rollout, teacher, made.reward, chosen, sampling, exemplars, own,
                token_budget=made.data.token_budget, watch=watch,
            )  # fmt: skip
            results |= {result.problem.id: result for result in made_of}
    return [to_json(results[problem.id]) for problem in chunk]


def prepare_critique(parser: Parser, config: Namespace) -> Job:
    """Critique records of groups whose rollouts all failed, from a run's harvest."""
    out, dry_run = Path(config.pop("out", "critique.jsonl")), config.pop("dry_run", False)
    harvest = config.pop("harvest", None)
    if harvest is None:
        raise ConfigError("--harvest is needed: the harvest.jsonl of a run")
    lines = given_harvest(Path(harvest))
    groups = {group.problem.key: group for group in lines}
    if not groups:
        raise ConfigError(f"--harvest {harvest}: no group in it")
    log.info("--harvest %s: %d groups of %d problems, told apart by question and gold; the newest of each counts",
             harvest, len(lines), len(groups))  # fmt: skip
    made = instantiate(parser, config)
    processes = Processes(fresh_trainer_config(config), made.backend)
    teacher = made.teacher or TraceTeacher()
    problems = [group.problem for group in groups.values()]
    picked = lambda group: pick_attempts(group, made.critique.attempts_per_problem)  # noqa: E731
    if dry_run:
        asked = [group.problem for group in groups.values() for _ in picked(group)]
        cost = teacher.estimate({"locate": asked, "repair": asked, "new_trace": asked})
        return lambda: _show_plan("critique", {"harvested groups": len(groups), "failed attempts": len(asked)}, cost)
    inputs = {"harvest": str(harvest)}

    def of_record(row: dict[str, Any], where: str) -> Identity:
        return identity_of(record_of(Critique, row, where).problem)

    done = _go_on(out, parser, config, inputs, problems, of_record)

    def make(chunk: list[Problem]) -> list[dict[str, Any]]:
        records = critique([groups[p.key] for p in chunk], teacher, made.student, made.reward, made.critique)
        return [to_json(record) for record in records]

    def job() -> None:
        place(made, processes)
        _in_chunks(out, problems, done, lambda chunk, _: first_only(lambda: make(chunk)), CHUNK, ("critique", 1, 0))
        _print(critique_table([from_json(Critique, row) for row in read_lines(out)]))
        _set_aside(out, teacher.drain_rejects())
        log.info("records: %s; fit trains on them with --critique.records %s", out, out)

    return lambda: processes.run(job)


# -- what the steps share -------------------------------------------------------------------------------------------


def _go_on(
    out: Path,
    parser: Parser,
    config: Namespace,
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
    now = {"config": yaml.safe_load(parser.dump(config, skip_none=False)), "inputs": inputs}
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


def _in_chunks(
    out: Path,
    problems: Sequence[Problem],
    done: set[str],
    make: Callable[[list[Problem], Watch], list[dict[str, Any]]],
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
    with _watching(label, len(todo) * completions, max_new_tokens) as watch:
        for start in range(0, len(todo), size):
            append_records(out, make(todo[start : start + size], watch))
    barrier()


def _watching(label: str, completions: int, max_new_tokens: int) -> AbstractContextManager[Watch]:
    return watching(label, completions, max_new_tokens, Console(quiet=not is_first()))


def _show_plan(step: str, counts: dict[str, int], cost: str | None) -> None:
    table = Table(title=f"{step}: what would be done", show_header=False)
    for name, count in counts.items():
        table.add_row(name, str(count))
    table.add_row("paid for", cell(cost or "nothing"))
    _print(table)


def _show_bridge_plan(made: Namespace, teacher: Any, ledger: Ledger, missing: int) -> None:
    strata = stratify(ledger, made.data.problems, made.data.bands)
    asked = [p for band in ("medium", "hard") for p in getattr(strata, band)]
    bridged = [p for p in asked if strata.band_of[p.id] in made.bridge.bands]
    if missing:  # who of them is mastered is not known before they are measured
        asked, bridged = [*asked, *strata.unknown], [*bridged, *strata.unknown]
    counts = {"problems without evidence, to be measured": missing, "traces, at most": len(asked),
              "of them bridged, at most": len(bridged)}  # fmt: skip
    _show_plan("bridge", counts, teacher.estimate({"solve": asked, "rewrite": bridged}))


def _set_aside(out: Path, rejects: Sequence[Reject]) -> None:
    """What the teacher had no answer for, counted on the screen and kept whole beside the file."""
    if rejects:
        append_records(path := out.with_name(f"{out.name}.rejects.jsonl"), rejects)
        counts = Counter(f"{reject.where}: {reject.reason}" for reject in rejects)
        most = "; ".join(f"{reason} ({count})" for reason, count in counts.most_common(3))
        log.warning("%d without an answer of the teacher: %s; all in %s", len(rejects), most, path)


def _print(table: Table) -> None:
    print_tables(Console(quiet=not is_first()), table)


def strata_table(strata: Strata, ledger: Ledger) -> Table:
    """Problems in each band, with their share and mean rho."""
    table = Table(title="difficulty")
    for heading in ("band", "problems", "share", "mean rho"):
        table.add_column(heading, justify="left" if heading == "band" else "right")
    total = sum(strata.counts.values())
    for band in BAND_NAMES:
        members = getattr(strata, band)
        rhos = [difficulty.rho for p in members if (difficulty := ledger.get(p.id))]
        mean = f"{sum(rhos) / len(rhos):.2f}" if rhos else "-"
        table.add_row(band, str(len(members)), f"{100 * len(members) / total:.1f} %", mean)
    return table


def bridge_table(results: Sequence[BridgeResult]) -> Table:
    """For each kind of candidate: proposed, chosen, fallen by reason, and the median scores of the others."""
    table = Table(title=f"traces: {sum(r.chosen is not None for r in results)} of {len(results)} problems have one")
    for heading in ("candidate", "proposed", "chosen", "fell", "RSR", "nats/token", "most fell for"):
        table.add_column(heading, justify="right" if heading not in ("candidate", "most fell for") else "left")
    for kind in get_args(Provenance):
        mine = [c for r in results for c in r.candidates if c.trace.provenance == kind]
        if not mine:
            continue
        passed = [c.trace.learnability for c in mine if c.rejected is None and c.trace.learnability]
        fell = Counter((c.rejected or "").partition(":")[0] for c in mine if c.rejected)
        scores = (
            f"{median(s.rank_surprisal_ratio for s in passed):.2f}" if passed else "-",
            f"{median(s.mean_nll for s in passed):.2f}" if passed else "-",
        )
        chosen = sum(r.chosen is not None and r.chosen.provenance == kind for r in results)
        table.add_row(
            kind, str(len(mine)), str(chosen), str(sum(fell.values())), *scores,
            cell(", ".join(f"{reason} {count}" for reason, count in fell.most_common(2))),
        )  # fmt: skip
    return table


def critique_table(records: Sequence[Critique]) -> Table:
    """For each kind of record: how many passed their checks, and what the others fell for."""
    table = Table(title=f"critiques of {len(records)} failed attempts")
    for heading in ("record", "passed", "fell", "most fell for"):
        table.add_column(heading, justify="right" if heading in ("passed", "fell") else "left")
    for kind in ("diagnosis", "repair", "new_trace"):
        passed = sum(kind in record.kinds for record in records)
        reasons = Counter(
            fault.partition(": ")[2].partition(":")[0]
            for r in records
            for fault in r.rejected
            if fault.startswith(kind)
        )
        most = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(2))
        table.add_row(kind, str(passed), str(len(records) - passed), cell(most))
    return table
