"""`slmreason fit`: the whole method."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import yaml
from jsonargparse import Namespace

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, instantiate, trainer_of_run
from slmreason.cli.difference import GROWS, differing_keys
from slmreason.cli.errors import ConfigError
from slmreason.cli.parts import load_data, place, traces_to_score
from slmreason.cli.runs import GoingOn, newest_unfinished, program, read_config, with_saved_config
from slmreason.cli.screen import tell
from slmreason.curriculum.choice import check_choice
from slmreason.curriculum.curriculum import Curriculum
from slmreason.curriculum.memory import report_memory
from slmreason.curriculum.parts import Parts
from slmreason.curriculum.resume import newest_checkpoint
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.curriculum.trainer import Processes, run_time, try_trainers
from slmreason.data import identity
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import StudentModule
from slmreason.modules.cft import CFTModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.modules.validation import Validation
from slmreason.records import BridgeResult, Critique, Trace
from slmreason.rollout.engine import stable_seed
from slmreason.run.files import NO_ROOM, read_records, write_file
from slmreason.run.folder import RunFolder, checked_folder, free_folder, lock_folder
from slmreason.runtime.distributed import first_only
from slmreason.student import Student

log = logging.getLogger(__name__)


def options(parser: Parser) -> None:
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="Go on with a run: its folder, or `auto` for the newest unfinished run by this config at run_dir.",
    )


def prepare(request: Request) -> Job:
    fit = Fit.of(request)
    return Job(fit.run, lambda: str(fit.going_on))


COMMAND = Command(name="fit", options=options, prepare=prepare, arguments=with_saved_config)


@dataclass
class Fit:
    """A run as a config asks for it, begun anew or gone on with."""

    request: Request
    settings: CurriculumSettings
    parts: Parts
    processes: Processes
    going_on: GoingOn
    curriculum: Curriculum | None = field(default=None, init=False)
    """What runs it, once it has a folder."""

    @classmethod
    def of(cls, request: Request) -> Fit:
        """Makes every part of the run, and tries what can be tried of it.

        Raises:
            ConfigError, ValueError, MisconfigurationException: the config or the data it names are wrong.
        """
        config = request.config
        going_on = run_to_resume(request.parser, config)
        if going_on.folder is None:
            checked_folder("run_dir", config.run_dir)
        made = instantiate(request.parser, config)
        modules = modules_of(made, config)
        benchmarks = load_data(made, config)
        if made.curriculum.budgets and not benchmarks:
            raise ConfigError("curriculum.budgets: benchmarks is empty, so there is nothing to measure at them")
        check_choice(made.curriculum, made.validation.samples, bool(made.data.holdout))
        validate_on_holdout(modules.values(), made, config)
        fresh = trainer_of_run(config)
        traces, critiques = given_files(made.data, made.bridge.traces, made.critique.records)
        scored = traces_to_score(made, traces, measures=made.curriculum.probe.refresh != "never")
        stages = [modules[stage] for stage in dict.fromkeys(made.curriculum.stages)]
        budget, validation = made.curriculum.max_tokens is not None, modules["sft"].validation
        try_trainers(fresh, stages, Path(config.run_dir), budget, validation)
        processes = Processes(fresh(), made.backend)
        if processes.shards > 1:
            refuse_sharding(made.student, stages)
        parts = Parts(
            student=made.student,
            data=made.data,
            **modules,  # type: ignore[arg-type]
            engine=made.rollout,
            reward=made.reward.verifier,
            teacher=made.teacher,
            bridge=made.bridge,
            critique=made.critique,
            benchmarks=benchmarks,
            evaluation=made.evaluation,
            trainer_config=fresh,
            device=processes.device,
            given_traces=traces,
            scored_traces=scored,
            given_critiques=critiques,
        )
        return cls(request, made.curriculum, parts, processes, going_on)

    def run(self) -> None:
        """The run from where it stands to its end, in every process that the Trainer wants.

        Raises:
            ConfigError: the student cannot be used, the run's files cannot be read, or another process works on it.
        """
        self.processes.run(self._run)

    def _run(self) -> None:
        run_dir = self.going_on.folder or first_only(lambda: new_run_folder(self.request))
        self.going_on.folder = run_dir
        log.info("run folder: %s", run_dir)
        with ExitStack() as held:
            first_only(lambda: held.enter_context(locked(run_dir)) and None)
            place(self.parts.student, self.parts.engine, self.processes)
            self._report_memory()
            run = Curriculum(self.settings, self.parts, run_dir, seed=self.request.config.seed_everything)
            self.curriculum = run
            try:
                run.prepare()
            except ValueError as error:
                raise ConfigError(str(error)) from error
            run.check_teacher()
            tell(f"if it is cut off, {self.going_on}")
            run.run()
        if run.stopped:
            tell(self.going_on.after(run.stopped, timedelta(seconds=run.clock.seconds)))
        else:
            folder = shlex.quote(str(run_dir))
            tell(f"next: {program()} report {folder}, or {program()} export {folder} my-student")

    def _report_memory(self) -> None:
        parts, processes = self.parts, self.processes
        report_memory(
            parts.student, parts.engine, processes.device, processes.precision, parts.data.token_budget,
            parts.data.max_prompt_tokens + parts.grpo.settings.max_completion_tokens, processes.shards,
            reference=parts.grpo.settings.kl > 0 and parts.student.lora is None,
        )  # fmt: skip


def modules_of(made: Namespace, config: Namespace) -> dict[str, SFTModule | GRPOModule | CFTModule]:
    """The LightningModules of all stages, each for the same student."""
    student = made.student
    return {
        "sft": SFTModule(student, SFTSettings(**vars(config.sft))),
        "grpo": GRPOModule(student, made.rollout, made.reward, GRPOSettings(**vars(made.grpo))),
        "cft": CFTModule(student, CFTSettings(**vars(config.cft))),
    }


def refuse_sharding(student: Student, modules: Sequence[StudentModule]) -> None:
    """
    Raises:
        ConfigError: a key does not go with sharded weights.
    """
    keys = [f"{module.stage}.optimizer" for module in modules if module.settings.optimizer is not None]
    if getattr(student.base_model, "hf_quantizer", None) is not None:
        keys.append("student.quantization")
    if keys:
        raise ConfigError(f"{keys[0]}: does not go with sharded weights; leave it out, or use trainer.strategy ddp")


def validate_on_holdout(modules: Iterable[StudentModule], made: Namespace, config: Namespace) -> None:
    """Has the fits validated, where there are problems that are never trained on."""
    if not made.data.holdout:
        return
    tokens, seed = config.grpo.max_completion_tokens, stable_seed("validation", made.data.seed)
    for module in modules:
        module.validation = Validation.of(made.rollout, made.reward, tokens, made.validation, seed)


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


def new_run_folder(request: Request) -> Path:
    """A free folder with the config in it.

    Raises:
        ConfigError: it cannot be made.
    """
    run_dir = free_folder(Path(request.config.run_dir))
    try:
        write_file(RunFolder(run_dir).config, lambda path: _save(request, path))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigError(f"run_dir: {run_dir} cannot be made ({error.strerror})") from error
    return run_dir


def _save(request: Request, path: Path) -> None:
    request.parser.save(request.config, str(path), skip_none=False, overwrite=True)


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
