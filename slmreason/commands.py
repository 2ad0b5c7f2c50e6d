"""What each command does, from a parsed config."""

from __future__ import annotations

import logging
import signal
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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

from slmreason import preemption
from slmreason.arms import compare
from slmreason.config import (
    ConfigError,
    Parser,
    build_parser,
    differing_keys,
    fail,
    fresh_trainer_config,
    instantiate,
    parse,
)
from slmreason.curriculum import Curriculum
from slmreason.datasteps import load_data, place, prepare_bridge, prepare_critique, prepare_stratify
from slmreason.distributed import first_only, is_first
from slmreason.evaluate.benchmarks import evaluate, load_benchmarks, save_scores
from slmreason.export.export import export
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Critique
from slmreason.redact import SafeFormatter, cell
from slmreason.resume import newest_checkpoint
from slmreason.rollout.worker import EngineError
from slmreason.runfolder import NO_ROOM, free_folder, lock_folder, read_records
from slmreason.teacher.llm import TeacherError
from slmreason.trainer import Processes

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
    if {"-h", "--help"} & set(args):  # what stands under the settings' fields, which takes a while to read
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
            help="A run's folder, or `auto`: run_dir if a run was begun there.",
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
        config = parse(parser, args)
        L.seed_everything(config.seed_everything, verbose=False)
        job = prepare(parser, config)
    except (ConfigError, ValueError, FileNotFoundError, MisconfigurationException) as error:
        return fail(error)
    preemption.listen()
    go_on = "go on with --resume auto" if command == "fit" else "run the same command again"
    try:
        job()
    except ConfigError as error:
        return fail(error)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code == preemption.EXIT_STATUS:
            log.warning("stopped by SIGTERM; what has been done is kept, %s", go_on)
            raise
        # Within a fit Lightning catches the key and leaves with a status of its own.
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        log.warning("stopped from the keyboard; what has been done is kept, %s", go_on)
        return 128 + signal.SIGINT
    except (TeacherError, EngineError) as error:
        return fail(f"{error}\nwhat has been done is kept, {go_on}", status=1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return fail(
            f"{error.strerror or error}{where}: what was written before is whole, the newest checkpoint too; make room "
            f"and {go_on}",
            status=1,
        )
    return 0


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
    from slmreason.report.report import write_report  # plotting takes a second that no other command needs

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
    made = instantiate(parser, config)
    student, engine, reward = made.student, made.rollout, made.reward
    sft = SFTModule(student, **vars(config.sft))
    grpo = GRPOModule(student, engine, reward, **vars(config.grpo))
    cft = CFTModule(student, **vars(config.cft))
    benchmarks = load_data(made, config)
    fresh = lambda: fresh_trainer_config(config)  # noqa: E731
    traces, critiques = made.bridge.traces, made.critique.records
    given_traces = read_records(Path(traces), BridgeResult) if traces else []
    given_critiques = read_records(Path(critiques), Critique) if critiques else []
    processes = Processes(fresh())
    going_on = run_to_resume(parser, config)

    def job() -> None:
        run_dir = going_on or first_only(lambda: new_run_folder(parser, config))
        log.info("run folder: %s", run_dir)
        with ExitStack() as held:
            first_only(lambda: held.enter_context(locked(run_dir)) and None)
            place(made, processes)
            ready = curriculum(run_dir)
            try:
                ready.prepare()
            except ValueError as error:
                raise ConfigError(str(error)) from error
            ready.run()

    def curriculum(run_dir: Path) -> Curriculum:
        return Curriculum(
            settings=made.curriculum,
            student=student,
            data=made.data,
            sft=sft,
            grpo=grpo,
            cft=cft,
            engine=engine,
            reward=reward,
            teacher=made.teacher,
            bridge_settings=made.bridge,
            critique_settings=made.critique,
            benchmarks=benchmarks,
            evaluation=made.evaluation,
            trainer_config=fresh,
            device=processes.device,
            run_dir=run_dir,
            seed=config.seed_everything,
            given_traces=given_traces,
            given_critiques=given_critiques,
        )

    return lambda: processes.run(job)


def new_run_folder(parser: Parser, config: Namespace) -> Path:
    """A free folder with the config in it."""
    run_dir = free_folder(Path(config.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    parser.save(config, str(run_dir / "config.yaml"), skip_none=False, overwrite=True)
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


def run_to_resume(parser: Parser, config: Namespace) -> Path | None:
    """The folder of the run to go on with, if `--resume` names one that was begun with this very config.

    Raises:
        ConfigError: the folder holds no run, or its config differs; the message names the keys.
        ValueError: none of its checkpoints can be read.
    """
    wanted = config.pop("resume", None)
    if wanted is None:
        return None
    run_dir = Path(config.run_dir if wanted == "auto" else wanted)
    saved = run_dir / "config.yaml"
    if not saved.exists():
        if wanted == "auto":
            return None
        raise ConfigError(f"--resume {wanted}: no run there ({saved} is missing)")
    before, now = (yaml.safe_load(text) for text in (saved.read_text(), parser.dump(config, skip_none=False)))
    if keys := differing_keys(before, now):
        raise ConfigError(f"--resume: {saved} differs in {', '.join(keys)}; a run goes on as it was begun")
    newest_checkpoint(run_dir)  # whether there is one to go on from is said before anything starts
    return run_dir


def prepare_test(parser: Parser, config: Namespace) -> Job:
    """pass@k and maj@k on the benchmarks."""
    out = Path(config.pop("out", "test.jsonl"))
    made = instantiate(parser, config)
    benchmarks = load_benchmarks(config.benchmarks, made.evaluation, made.student)
    processes = Processes(fresh_trainer_config(config))

    def job() -> None:
        student = made.student
        place(made, processes)
        scores = evaluate(student, made.rollout, made.reward, benchmarks, made.evaluation)
        metrics = list(dict.fromkeys(score.metric for score in scores))
        table = Table(title=f"{cell(config.student.model)}: {made.evaluation.samples} samples a problem, 95 % interval")
        for heading in ("benchmark", "problems", *metrics):
            table.add_column(heading, justify="left" if heading == "benchmark" else "right")
        for benchmark in benchmarks:
            mine = {score.metric: score for score in scores if score.benchmark == benchmark.name}
            table.add_row(
                cell(benchmark.name), str(len(benchmark.problems)), *(str(mine[metric]) for metric in metrics)
            )
        Console(quiet=not is_first()).print(table)
        save_scores(out, config.student.model, scores)
        log.info("scores: %s", out)

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
