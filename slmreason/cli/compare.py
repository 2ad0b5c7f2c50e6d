"""`slmreason compare`: the method beside its controls, the same budget of tokens for every run.

With `curriculum.budgets`, each run is measured at several budgets on its way, and the curves are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from slmreason.cli.arms import ARMS, Run, prepare_arm, slots, work_through
from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser
from slmreason.cli.errors import ConfigError
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.evaluate.compare import Outcome, save_comparison, summarise
from slmreason.evaluate.curves import Curves, compare_curves, read_curve, save_curves, tell_early_ends
from slmreason.report.terminal import arms_tables, curves_tables, print_tables

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    parser.add_argument("--arms", type=list[str], default=list(ARMS), help="Names of packaged arms, or YAML files.")
    parser.add_argument("--seeds", type=int, default=3, help="How many, from seed_everything on.")
    parser.add_argument("--jobs", type=int | None, default=None, help="Runs side by side; one a GPU, else one.")
    parser.add_argument("--out", type=str, default="runs/compare", help="Folder of the comparison.")


def prepare(request: Request) -> Job:
    config = request.config
    settings = check(config)
    budget = settings.max_tokens or (settings.budgets or [0])[-1]
    request = replace(request, args=(*request.args, f"--curriculum.max_tokens={budget}"))
    out = Path(config.out)
    seeds = range(config.seed_everything, config.seed_everything + config.seeds)
    folders = {name: prepare_arm(request, arm, out / name) for arm in config.arms if (name := Path(arm).stem)}
    runs = [Run(name, seed, folder) for seed in seeds for name, folder in folders.items()]

    def job() -> int:
        faults = work_through([run for run in runs if run.outcome() is None], slots(config))
        outcomes = [outcome for run in runs if (outcome := run.outcome()) is not None]
        show(out, outcomes, list(folders), budget, tuple(settings.budgets or ()))
        for run, status in faults:
            log.error(
                "%s, seed %d ended with %d: see %s; the same command tries again", run.arm, run.seed, status, run.log
            )
        return 1 if faults else 0

    return Job(job, lambda: "the same command goes on")


COMMAND = Command(name="compare", options=options, prepare=prepare)


def check(config: Namespace) -> CurriculumSettings:
    """The budgets of every run, and nothing else of its curriculum.

    Raises:
        ConfigError: there would be nothing to compare, or no budget to compare it at.
        ValueError: the budgets do not ascend to that of the run.
    """
    if min(config.seeds, config.jobs or 1) < 1 or not config.arms:
        raise ConfigError("compare: seeds and jobs must be at least 1, and there must be an arm")
    limit, budgets = config.curriculum.max_tokens, config.curriculum.budgets
    if not budgets if limit is None else limit < 1:
        raise ConfigError("compare needs --curriculum.max_tokens N, the budget of every run (the last of "
                          "curriculum.budgets where those are given); what a run by this config takes stands in the "
                          "summary.json of `slmreason fit`")  # fmt: skip
    if not config.benchmarks:
        raise ConfigError("compare: benchmarks is empty: there is nothing to compare on")
    return CurriculumSettings(max_tokens=limit, budgets=budgets)


def show(out: Path, outcomes: Sequence[Outcome], arms: Sequence[str], budget: int, budgets: Sequence[int] = ()) -> None:
    """Prints and writes the comparison, as far as it goes.

    Args:
        budget: tokens of a run.
        budgets: at which the runs were measured on their way; none where there is no curve.
    """
    try:
        results = summarise(outcomes, arms)
    except ValueError as error:
        log.warning("nothing to compare: %s", error)
        return
    curves = compared_curves(out, outcomes, arms, budgets) if budgets else []
    from slmreason.report.page import write_comparison  # plotting takes a second that no other command needs

    seeds = results[0].seeds
    title = f"greedy pass@1 in % at {budget / 1e6:.2f} M tokens, {len(seeds)} seeds, [95 % interval]"
    print_tables(Console(), *arms_tables(results, title), *curves_tables(curves))
    save_comparison(out, outcomes, results)
    if curves:
        save_curves(out / "curves.json", curves)
    write_comparison(out, results, outcomes, budget, curves)
    files = ["report.html", "arms.png", "arms.csv", "runs.csv", *(["curves.png", "curves.json"] if curves else [])]
    log.info("%s: %s", ", ".join(files), out)


def compared_curves(
    out: Path, outcomes: Sequence[Outcome], arms: Sequence[str], budgets: Sequence[int]
) -> list[Curves]:
    """The curves of all runs that have come to their end; none, and a line that says why, where they cannot be had."""
    try:
        curves = [read_curve(Run(each.arm, each.seed, out / each.arm).run_dir, each, budgets) for each in outcomes]
        compared = compare_curves(curves, arms)
    except ValueError as error:
        log.warning("no curves: %s", error)
        return []
    tell_early_ends(curves)
    return compared
