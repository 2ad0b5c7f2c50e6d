"""What the config has made, before it is worked with: the data read, the student in its place, each tried."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from jsonargparse import Namespace

from slmreason.cli.errors import ConfigError
from slmreason.curriculum.predictor import scorable
from slmreason.curriculum.trainer import Processes
from slmreason.evaluate.benchmarks import Benchmark, load_benchmarks
from slmreason.records import Trace
from slmreason.rollout.engine import RolloutEngine, prompt_limit
from slmreason.student import Student
from slmreason.student.layout import checking, layout_of
from slmreason.student.saving import try_saving
from slmreason.verify.verdicts import try_rewards

log = logging.getLogger(__name__)


def load_data(made: Namespace, config: Namespace) -> list[Benchmark]:
    """Loads the benchmarks, and the pool without what stands in them.

    Raises:
        ValueError: a source cannot be read or gives no problem.
    """
    student, engine = made.student, made.rollout
    made.curriculum.probe.check(made.data.bands)
    benchmarks = load_benchmarks(made.benchmarks, made.evaluation, student, engine)
    held_out = {benchmark.name: benchmark.problems for benchmark in benchmarks}
    longest = prompt_limit(student, engine, config.grpo.max_completion_tokens, "grpo.max_completion_tokens")
    made.data.load(student.prompt_length, held_out, longest)
    check_positions(made, config)
    try_rewards(made.reward, made.data.problems)
    return benchmarks


def place(student: Student, engine: RolloutEngine, processes: Processes) -> None:
    """Puts the student where it will run, and tries there what the run will do with it.

    Raises:
        ConfigError: the model cannot be scored, sampled from or saved.
    """
    processes.place(student)
    try:
        with checking(student):
            layout_of(student)
            engine.check(student)
        try_saving(student)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def traces_to_score(made: Namespace, given: Mapping[str, Trace], measures: bool = True) -> dict[str, str]:
    """The traces that `curriculum.probe.predictor` reads, by problem; none where it is off.

    Args:
        given: of `slmreason bridge`.
        measures: rho is measured at all.

    Raises:
        ValueError: there are too few.
    """
    if made.curriculum.probe.predictor == "none":
        return {}
    if not measures:
        log.info("curriculum.probe.predictor: not used, nothing is measured (curriculum.probe.refresh is never)")
        return {}
    return scorable(made.data.problems, given, made.student, made.bridge.max_trace_tokens)


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
