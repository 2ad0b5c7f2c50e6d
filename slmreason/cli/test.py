"""`slmreason test`: pass@k and maj@k on the benchmarks."""

from __future__ import annotations

import logging
from pathlib import Path

from rich.console import Console

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, fresh_trainer_config, instantiate
from slmreason.cli.errors import ConfigError
from slmreason.cli.parts import place
from slmreason.curriculum.trainer import Processes
from slmreason.evaluate.benchmarks import evaluate, load_benchmarks, save_scores
from slmreason.report.terminal import print_tables, samples_table
from slmreason.run.bars import screen
from slmreason.run.progress import watching
from slmreason.runtime.distributed import is_first
from slmreason.verify.verdicts import try_rewards

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    parser.add_out("test")


def prepare(request: Request) -> Job:
    config = request.config
    out = Path(config.pop("out", "test.jsonl"))
    if not config.benchmarks:
        raise ConfigError("benchmarks is empty: there is nothing to test; name one, such as --benchmarks '[gsm8k]'")
    made = instantiate(request.parser, config)
    settings, model = made.evaluation, config.student.model
    benchmarks = load_benchmarks(made.benchmarks, settings, made.student, made.rollout)
    try_rewards(made.reward.verifier, (benchmark.problems[0] for benchmark in benchmarks))
    processes = Processes(fresh_trainer_config(config), made.backend)

    def job() -> None:
        place(made.student, made.rollout, processes)
        console = Console(quiet=not is_first())
        completions = sum(len(benchmark.problems) for benchmark in benchmarks) * settings.samples
        answers = out.with_name(f"{out.stem}.answers.jsonl")
        with watching("benchmarks", completions, settings.max_new_tokens, screen()) as watch:
            scores = evaluate(made.student, made.rollout, made.reward.verifier, benchmarks, settings, watch, answers)
        problems = {benchmark.name: len(benchmark.problems) for benchmark in benchmarks}
        print_tables(console, samples_table(model, settings.samples, problems, scores))
        save_scores(out, model, scores)
        log.info("scores: %s, every answer: %s", out, answers)

    return Job(lambda: processes.run(job))


COMMAND = Command(name="test", options=options, prepare=prepare)
