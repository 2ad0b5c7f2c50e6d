"""What each command does, from a parsed config."""

from __future__ import annotations

import logging
import signal
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import lightning as L
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only
from rich import get_console
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from slmreason.cli.arms import compare
from slmreason.cli.config import (
    GROWS,
    ConfigError,
    Parser,
    build_parser,
    differing_keys,
    fail,
    fresh_trainer_config,
    instantiate,
    parse,
)
from slmreason.cli.datasteps import load_data, place, prepare_bridge, prepare_critique, prepare_stratify
from slmreason.cli.runs import GoingOn, newest_unfinished, read_config, with_saved_config
from slmreason.curriculum.curriculum import Curriculum, Parts
from slmreason.curriculum.memory import report_memory
from slmreason.curriculum.resume import newest_checkpoint
from slmreason.curriculum.trainer import Processes, run_time, try_trainers
from slmreason.data import identity
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.evaluate.benchmarks import evaluate, load_benchmarks, save_scores
from slmreason.export.export import export
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Critique, Trace
from slmreason.report.terminal import print_tables
from slmreason.rollout.engine import EngineError
from slmreason.run.files import NO_ROOM, read_records
from slmreason.run.folder import RunFolder, checked_folder, free_folder, lock_folder
from slmreason.run.progress import watching
from slmreason.runtime import preemption
from slmreason.runtime.distributed import first_only, is_first
from slmreason.runtime.redact import SafeFormatter, cell, shown
from slmreason.teacher.prompted import TeacherError
from slmreason.verify.verdicts import RewardError, try_reward

log = logging.getLogger(__name__)


Job = Callable[[], object]
"""The long part of a command: what fails in it is not a mistake in the arguments, and shows its traceback."""


def run(command: str, args: Sequence[str], description: str) -> int:
    """Parses the arguments of a command and runs it. `description` heads its help.

    Returns:
        0; 2 with one clear message when the arguments, the config or the data they name are wrong; 1 with one when the
        disk is full, the teacher cannot be asked or the rollout engine failed; 130 after Ctrl-C.
    """
    _quiet()
    if any(
        arg == "-h" or arg.partition("=")[0].endswith("help") for arg in args
    ):  # what stands under the settings' fields, which takes a while to read
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    if command == "export":
        return run_export(args, description)
    if command == "report":
        return run_report(args, description)
    if command == "compare":
        return run_compare(args, description)
    parser = build_parser(command, description)
    if command == "stratify":
        parser.add_argument("--recorded", type=str, default=SUPPRESS, help="JSONL of recorded rollouts to grade.")
    # Options of one command alone are no part of a config that another could be given.
    if command == "fit":
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Go on with a run: its folder, or `auto` for the newest unfinished run by this config at run_dir.",
        )
    else:
        parser.add_argument(
            "--out", type=str, default=SUPPRESS, help=f"Where the results are written; {command}.jsonl."
        )
    if command == "critique":
        parser.add_argument("--harvest", type=str, default=SUPPRESS, help="The harvest.jsonl of a run.")
    if command in ("stratify", "bridge", "critique"):
        parser.add_argument("--dry_run", action="store_true", help="Print counts and estimated cost, and do nothing.")
    prepare = PREPARE[command]
    try:
        config = parse(parser, with_saved_config(args) if command == "fit" else args)
        L.seed_everything(config.seed_everything, verbose=False)
        job = prepare(parser, config)
    except (ConfigError, ValueError, FileNotFoundError, MisconfigurationException) as error:
        return fail(error)
    preemption.listen()
    go_on = job.going_on if isinstance(job, FitJob) else "run the same command again"
    try:
        job()
    except (ConfigError, MisconfigurationException, RewardError) as error:
        return fail(error)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code == preemption.EXIT_STATUS:
            tell(f"stopped by SIGTERM; what has been done is kept, {go_on}")
            raise
        # Within a fit Lightning catches the key and leaves with a status of its own.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        tell(f"stopped from the keyboard; what has been done is kept, {go_on}")
        return 128 + signal.SIGINT
    except (TeacherError, EngineError) as error:
        return fail(f"{error}\nwhat has been done is kept, {go_on}", status=1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            error.add_note(f"what has been done is kept, {go_on}")
            raise
        where = f" ({error.filename})" if error.filename else ""
        return fail(
            f"{error.strerror or error}{where}: what was written before is whole, the newest checkpoint too; make room "
            f"and {go_on}",
            status=1,
        )
    except Exception as error:
        error.add_note(f"what has been done is kept, {go_on}")  # stands below the traceback
        raise
    return 0


def tell(line: str) -> None:
    """Prints a line that a person may copy a command from: nothing breaks it, however narrow the terminal is."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(shown(line), flush=True)


def run_export(args: Sequence[str], description: str) -> int:
    """Writes a run's student for other tools; it has options of its own and no config."""
    parser = Parser(prog="slmreason export", description=description, allow_abbrev=False)
    parser.add_function_arguments(export, sub_configs=False, as_positional=True)
    try:
        config = parser.parse_args(list(args))
        export(**vars(config))
    except (ConfigError, ValueError) as error:
        return fail(error)
    print(f"student: {config.out}")
    return 0


def run_report(args: Sequence[str], description: str) -> int:
    """Shows what a run did, from its files alone."""
    from slmreason.report.page import write_report  # plotting takes a second that no other command needs

    parser = Parser(prog="slmreason report", description=description, allow_abbrev=False)
    parser.add_function_arguments(write_report, sub_configs=False, as_positional=True)
    try:
        config = parser.parse_args(list(args))
        print(f"report: {write_report(**vars(config))}")
    except (ConfigError, ValueError, OSError) as error:
        return fail(error)
    return 0


def run_compare(args: Sequence[str], description: str) -> int:
    """The method beside its controls; each run is a process of its own, so nothing is built here."""
    preemption.listen()
    try:
        return compare(args, description)
    except (ConfigError, ValueError) as error:
        return fail(error)
    except KeyboardInterrupt:
        log.warning("stopped from the keyboard; the same command goes on")
        return 128 + signal.SIGINT


def prepare_fit(parser: Parser, config: Namespace) -> Job:
    """The whole method."""
    going_on = run_to_resume(parser, config)
    if going_on.folder is None:
        checked_folder("run_dir", config.run_dir)
    made = instantiate(parser, config)
    student, engine, reward = made.student, made.rollout, made.reward
    sft = SFTModule(student, **vars(config.sft))
    grpo = GRPOModule(student, engine, reward, **vars(config.grpo))
    cft = CFTModule(student, **vars(config.cft))
    benchmarks = load_data(made, config)
    fresh = lambda: fresh_trainer_config(config)  # noqa: E731
    traces, critiques = made.bridge.traces, made.critique.records
    given_traces, given_critiques = given_files(made.data, traces, critiques)
    modules = {"sft": sft, "grpo": grpo, "cft": cft}
    stages = [modules[stage] for stage in dict.fromkeys(made.curriculum.stages)]
    try_trainers(fresh, stages, Path(config.run_dir), made.curriculum.max_tokens is not None)
    processes = Processes(fresh(), made.backend)

    def job() -> None:
        run_dir = going_on.folder or first_only(lambda: new_run_folder(parser, config))
        going_on.folder = run_dir
        log.info("run folder: %s", run_dir)
        with ExitStack() as held:
            first_only(lambda: held.enter_context(locked(run_dir)) and None)
            place(made, processes)
            report_memory(
                student, engine, processes.device, processes.precision, config.data.token_budget,
                config.data.max_prompt_tokens + grpo.max_completion_tokens, processes.shards,
                reference=grpo.kl > 0 and student.lora is None,
            )  # fmt: skip
            ready = curriculum(run_dir)
            try:
                ready.prepare()
            except ValueError as error:
                raise ConfigError(str(error)) from error
            tell(f"if it is cut off, {going_on}")
            ready.run()
        if ready.stopped:
            tell(going_on.after(ready.stopped, timedelta(seconds=ready.clock.seconds)))

    def curriculum(run_dir: Path) -> Curriculum:
        parts = Parts(
            student=student,
            data=made.data,
            sft=sft,
            grpo=grpo,
            cft=cft,
            engine=engine,
            reward=reward,
            teacher=made.teacher,
            bridge=made.bridge,
            critique=made.critique,
            benchmarks=benchmarks,
            evaluation=made.evaluation,
            trainer_config=fresh,
            device=processes.device,
            given_traces=given_traces,
            given_critiques=given_critiques,
        )
        return Curriculum(made.curriculum, parts, run_dir, seed=config.seed_everything)

    return FitJob(lambda: processes.run(job), going_on)


@dataclass
class FitJob:
    """The long part of `fit`, which knows how the run is gone on with."""

    do: Job
    going_on: GoingOn

    def __call__(self) -> object:
        return self.do()


def given_files(
    data: ReasoningDataModule, traces: str | None, critiques: str | None
) -> tuple[dict[str, Trace], list[Critique]]:
    """What the files of earlier steps hold of the pool's problems; what is of no problem of it goes to the rejects.

    Raises:
        ValueError: a file cannot be read, or none of its lines is about the pool.
    """
    chosen: dict[str, Trace] = {}
    records: list[Critique] = []
    if traces:
        chosen, others = identity.given_traces(read_records(Path(traces), BridgeResult), data.problems, traces)
        data.unmatched += others
    if critiques:
        records, others = identity.given_critiques(read_records(Path(critiques), Critique), data.problems, critiques)
        data.unmatched += others
    return chosen, records


def new_run_folder(parser: Parser, config: Namespace) -> Path:
    """A free folder with the config in it.

    Raises:
        ConfigError: it cannot be made.
    """
    run_dir = free_folder(Path(config.run_dir))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        parser.save(config, str(RunFolder(run_dir).config), skip_none=False, overwrite=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigError(f"run_dir: {run_dir} cannot be made ({error.strerror})") from error
    return run_dir


def locked(run_dir: Path) -> TextIO:
    """The run folder's lock.

    Raises:
        ConfigError: another process has it.
    """
    try:
        return lock_folder(run_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run_to_resume(parser: Parser, config: Namespace) -> GoingOn:
    """The run to go on with, if `--resume` names one that was begun with this very config; else one that has no folder.

    Raises:
        ConfigError: the folder holds no run, or its config differs; the message names the keys.
        ValueError: none of its checkpoints can be read.
    """
    wanted = config.pop("resume", None)
    now = yaml.safe_load(parser.dump(config, skip_none=False))
    going_on = GoingOn(now, run_time(lambda: {"max_time": config.trainer.max_time}))
    if wanted == "auto":
        going_on.folder = newest_unfinished(Path(config.run_dir), now)
    elif wanted is not None:
        folder = Path(wanted)
        if keys := differing_keys(read_config(folder), now, GROWS):
            raise ConfigError(
                f"--resume: {RunFolder(folder).config} differs in {', '.join(keys)}; a run goes on as it was begun, "
                "which it does without --config"
            )
        going_on.folder = folder
    if going_on.folder is not None:
        newest_checkpoint(going_on.folder)  # whether there is one to go on from is said before anything starts
    return going_on


def prepare_test(parser: Parser, config: Namespace) -> Job:
    """pass@k and maj@k on the benchmarks."""
    out = Path(config.pop("out", "test.jsonl"))
    made = instantiate(parser, config)
    benchmarks = load_benchmarks(config.benchmarks, made.evaluation, made.student, made.rollout)
    for benchmark in benchmarks[:1]:
        try_reward(made.reward, benchmark.problems[0])
    processes = Processes(fresh_trainer_config(config), made.backend)

    def job() -> None:
        student = made.student
        place(made, processes)
        settings = made.evaluation
        total = sum(len(benchmark.problems) for benchmark in benchmarks) * settings.samples
        answers = out.with_name(f"{out.stem}.answers.jsonl")
        with watching("benchmarks", total, settings.max_new_tokens, Console(quiet=not is_first())) as watch:
            scores = evaluate(student, made.rollout, made.reward, benchmarks, settings, watch, answers)
        metrics = list(dict.fromkeys(score.metric for score in scores))
        table = Table(title=f"{cell(config.student.model)}: {made.evaluation.samples} samples a problem, 95 % interval")
        for heading in ("benchmark", "problems", *metrics):
            table.add_column(heading, justify="left" if heading == "benchmark" else "right")
        for benchmark in benchmarks:
            mine = {score.metric: score for score in scores if score.benchmark == benchmark.name}
            table.add_row(
                cell(benchmark.name), str(len(benchmark.problems)), *(str(mine[metric]) for metric in metrics)
            )
        print_tables(Console(quiet=not is_first()), table)
        save_scores(out, config.student.model, scores)
        log.info("scores: %s, every answer: %s", out, answers)

    return lambda: processes.run(job)


class LineHandler(logging.Handler):
    """Prints a message as one line, which rich would break at 80 columns where there is no terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), flush=True)
        except Exception:
            self.handleError(record)


def _quiet() -> None:
    """Our own lines on the screen, and of the libraries' only what a user can act on."""
    handler: logging.Handler = LineHandler()
    if get_console().is_terminal:
        handler = RichHandler(show_path=False, show_level=False, show_time=False, markup=False, highlighter=None,
                              keywords=[])  # fmt: skip
    handler.setFormatter(SafeFormatter())
    ours = logging.getLogger("slmreason")
    ours.handlers[:] = [handler]
    ours.propagate = False
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "httpx2", "openai", "transformers"):
        library = logging.getLogger(name)
        library.setLevel(logging.ERROR)
        library.handlers[:] = [handler]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # The planned batches are made in memory; workers would only add copies.
    for known in (
        "does not have many workers",
        "Checkpoint directory",
        "number of training batches",
        "Experiment logs directory",  # the stage's folder holds its set before the logger comes
        "You have overridden `transfer_batch_to_device`",
        "isinstance.treespec, LeafSpec",
        "`is_gradient_checkpointing` is deprecated",  # peft's, not ours
        "It is recommended to use `self.log.*sync_dist=True",  # what is logged is summed over the processes already
    ):
        warnings.filterwarnings("ignore", message=f".*{known}.*")


PREPARE: dict[str, Callable[[Parser, Namespace], Job]] = {
    "fit": prepare_fit,
    "test": prepare_test,
    "stratify": prepare_stratify,
    "bridge": prepare_bridge,
    "critique": prepare_critique,
}
