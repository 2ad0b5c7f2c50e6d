"""A config is the constructors' signatures: one parser, typed by the classes it builds, made with Lightning's own."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import lightning as L
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from slmreason.cli.command import Command
from slmreason.cli.errors import ConfigError, in_a_line, tidy
from slmreason.cli.parser import Parser as Parser
from slmreason.cli.parser import refuse_secrets
from slmreason.cli.recipes import find_recipe
from slmreason.cli.rewards import reward_from
from slmreason.curriculum import CurriculumSettings
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.data.mixture import Entry, entries_of, reward_of
from slmreason.evaluate.benchmarks import EvaluationSettings
from slmreason.modules.settings import CFTSettings, GRPOSettings, SFTSettings, ValidationSettings
from slmreason.rollout.engine import RolloutEngine
from slmreason.rollout.transformers import HFEngine  # noqa: F401 - so that `--rollout HFEngine` is found by its short name
from slmreason.rollout.vllm import VLLMEngine  # noqa: F401
from slmreason.runtime.backend import BackendSettings
from slmreason.student import Student
from slmreason.supervision.critique import CritiqueSettings
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.base import Teacher
from slmreason.teacher.dataset import TraceTeacher  # noqa: F401
from slmreason.teacher.openai import APITeacher  # noqa: F401
from slmreason.teacher.procedural import ProceduralTeacher  # noqa: F401
from slmreason.teacher.vllm import VLLMTeacher  # noqa: F401
from slmreason.verify.rewards import RewardFn

EMBEDDED_BENCHMARKS = [
    f"embedded:{family}/test?count=100" for family in ("chain", "one_step", "distractor", "expression", "logic")
]


CLASS_KEYS: dict[str, type] = {"rollout": RolloutEngine, "teacher": Teacher, "reward": RewardFn}
"""Keys whose value is a class with its arguments."""


LOGGER_PACKAGES = {
    "TensorBoardLogger": "tensorboard",
    "WandbLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "NeptuneLogger": "neptune",
    "LitLogger": "litlogger",
}
"""The module that a logger needs."""
EXTRAS = ("tensorboard", "wandb", "mlflow")
"""Those of them that an extra of the same name brings."""
MLFLOW_HOME = "sqlite:///mlflow.db"
"""Where MLflow itself keeps what it is told, where nothing is said; Lightning's `./mlruns` it takes no more."""


def command_parser(command: Command) -> Parser:
    """The parser of a command: the config, where it reads one, and the options that it alone has."""
    parser = (build_parser if command.reads_config else bare_parser)(command.name, command.help)
    shared = {action.dest for action in parser._actions}
    command.options(parser)
    parser.own_options = tuple(action.dest for action in parser._actions if action.dest not in shared)
    return parser


def bare_parser(command: str, description: str) -> Parser:
    """A parser that knows no option yet."""
    return Parser(prog=f"slmreason {command}", description=description, allow_abbrev=False)


def build_parser(command: str, description: str) -> Parser:
    """The parser of the config, which all commands read that read one."""
    parser = bare_parser(command, description)
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="A recipe's name or a YAML file; several are stacked in order."
    )
    parser.add_argument("--seed_everything", type=int, default=42, help="Seed of every random number generator.")
    parser.add_argument("--run_dir", type=str, default="runs/run", help="Folder of the run; a free name is found.")
    parser.add_class_arguments(Student, "student", sub_configs=True)
    # By itself: a file of rows is not to be read as a config that stands in a file of its own.
    parser.add_argument(
        "--data.train", type=str | list[str | Entry], help="The pool: see data.train in docs/config.md."
    )
    parser.add_class_arguments(ReasoningDataModule, "data", sub_configs=True, skip={"train"})
    parser.add_class_arguments(CurriculumSettings, "curriculum", sub_configs=True)
    # Not made by the parser: a command that does not fit takes what a fit would not.
    parser.add_class_arguments(SFTSettings, "sft", instantiate=False)
    parser.add_class_arguments(GRPOSettings, "grpo", instantiate=False)
    parser.add_class_arguments(CFTSettings, "cft", instantiate=False)
    parser.add_class_arguments(BridgeSettings, "bridge")
    parser.add_class_arguments(CritiqueSettings, "critique")
    parser.add_subclass_arguments(
        RolloutEngine, "rollout", default={"class_path": "slmreason.rollout.HFEngine"},
        help="Who samples: a class with its arguments.",
    )  # fmt: skip
    parser.add_argument(
        "--reward", type=RewardFn | list[str | dict[str, Any]], default={"class_path": "slmreason.verify.AnswerReward"},
        help="What a completion earns: a class with its arguments, or a list of terms: {fn, weight, name, messages} "
        "and one class.",
    )  # fmt: skip
    parser.add_argument(
        "--normalize_rewards", type=bool, default=False,
        help="Bring each term of a list of rewards to mean 0 and standard deviation 1 within a group before it is "
        "weighted, as TRL's normalize_then_sum.",
    )  # fmt: skip
    parser.add_argument(
        "--teacher", type=Teacher | None, default=None, help="Who gives traces, rewrites and critiques."
    )
    parser.add_argument(
        "--benchmarks", type=list[str | Entry], default=EMBEDDED_BENCHMARKS,
        help="Known names, NAME=FILE, files, hub names, or embedded:FAMILY/test?count=N; each may be {path, columns, "
        "reward, limit, split}.",
    )  # fmt: skip
    parser.add_class_arguments(EvaluationSettings, "evaluation")
    parser.add_class_arguments(ValidationSettings, "validation")
    parser.add_class_arguments(BackendSettings, "backend")
    parser.add_lightning_class_args(L.Trainer, "trainer")
    for key in ("data.seed", "grpo.seed", "evaluation.seed"):
        parser.link_arguments("seed_everything", key)
    parser.set_defaults({"student.model": "embedded:qwen2", "data.train": "embedded:chain/train?count=240"})
    return parser


def parse(parser: Parser, args: Sequence[str]) -> Namespace:
    """Parses arguments; recipe names become files, and a logger without a folder writes beside the run.

    Raises:
        ConfigError: anything is wrong; the message names the key and what is accepted.
    """
    config = parser.parse_args(expand(args))
    refuse_secrets(config)
    with_homes(config)
    return config


def expand(args: Sequence[str]) -> list[str]:
    """`--config quickstart` to the packaged recipe, and `--trainer.logger CSVLogger` to one that knows its folder."""
    result: list[str] = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if result and result[-1] in ("--config", "-c"):
            result.append(find_recipe(arg))
        elif flag == "--config" and equals:
            result.append(f"{flag}={find_recipe(value)}")
        else:
            result.append(arg)
    folderless = {cls.__name__ for cls in (CSVLogger, TensorBoardLogger)}
    chosen = _option(result, "--trainer.logger")
    given = any(re.match(r"--trainer\.logger\.(init_args\.)?save_dir\b", arg) for arg in result)
    if chosen is not None and chosen.rpartition(".")[2] in folderless and not given:
        result.append(f"--trainer.logger.save_dir={_option(result, '--run_dir') or 'runs'}/loggers")
    has_home = given or "MLFLOW_TRACKING_URI" in os.environ or any("tracking_uri" in arg for arg in result)
    if chosen is not None and chosen.rpartition(".")[2] == "MLFlowLogger" and not has_home:
        result.append(f"--trainer.logger.tracking_uri={MLFLOW_HOME}")
    return result


def _option(args: Sequence[str], flag: str) -> str | None:
    """The last value of an option given as `--flag value` or `--flag=value`."""
    values = [after for before, after in zip(args, args[1:], strict=False) if before == flag]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"{flag}=")]
    return values[-1] if values else None


def with_homes(tree: Any) -> Any:
    """The config with the home folder in the place of `~` in its paths: a shell puts it there in some places alone.

    Namespaces, dicts and lists are changed in place.
    """
    if isinstance(tree, str) and (path := _HOME.fullmatch(tree)):
        return f"{path[1]}{os.path.expanduser(path[2])}"
    branches = vars(tree) if isinstance(tree, Namespace) else tree
    if isinstance(branches, dict):
        for name, branch in branches.items():
            branches[name] = branch if name in _TEXTS else with_homes(branch)
    elif isinstance(branches, list):
        branches[:] = map(with_homes, branches)
    return tree


_HOME = re.compile(r"((?:[\w.-]+=)?)(~[\w.-]*(?:/[^\n]*)?)")
"""`~/pool.jsonl`, and `gsm8k=~/pool.jsonl` as the name of a dataset in a file."""
_TEXTS = ("instruction", "class_path")
"""Keys whose texts are no paths."""


def trainer_of_run(config: Namespace) -> Callable[[], dict[str, Any]]:
    """Gives keyword arguments for a Trainer: each has callbacks and plugins of its own, and all have the same loggers.

    Some loggers begin an experiment as soon as they are made, and a run has one.

    Raises:
        ConfigError: a logger cannot be made; the message says why, and names the package where that is missing.
    """
    rest = config.clone()
    rest.trainer.logger = None
    loggers = fresh_trainer_config(config)["logger"]
    return lambda: {**fresh_trainer_config(rest), "logger": loggers}


def fresh_trainer_config(config: Namespace) -> dict[str, Any]:
    """Keyword arguments for a Trainer, with callbacks, loggers and plugins newly made: each fit has its own.

    Raises:
        ConfigError: a logger cannot be made; the message says why, and names the package where that is missing.
    """
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(L.Trainer, "trainer")
    try:
        made = parser.instantiate_classes(Namespace(trainer=config.trainer.clone()))
    except Exception as error:
        refuse_logger(error)
        raise
    return dict(vars(made.trainer))


def refuse_logger(error: Exception) -> None:
    """
    Raises:
        ConfigError: a logger could not be made, for want of a package or since what it talks to says no.
    """
    for logger, module in LOGGER_PACKAGES.items():
        if f".{logger}'" in str(error) and find_spec(module) is None:
            package = f"'slmreason[{module}]'" if module in EXTRAS else module.replace("_", "-")
            raise ConfigError(
                f"trainer.logger: {logger} needs {module}, which is not installed: pip install {package}"
            ) from error
    if type(error).__name__ == "MlflowException":
        why = " ".join(str(error).split())
        raise ConfigError(
            f"trainer.logger: MLflow takes no trainer.logger.tracking_uri such as this one, try {MLFLOW_HOME}: {why}"
        ) from error


def instantiate(parser: Parser, config: Namespace, sections: Sequence[str] | None = None) -> Namespace:
    """Every object of the config but the trainer, which each fit makes anew.

    Args:
        sections: those alone that are needed; None takes all.

    Raises:
        ConfigError: a constructor refused its arguments.
    """
    kept = config.clone()
    for name in list(vars(kept)):
        if name == "trainer" or (sections is not None and name not in sections):
            del kept[name]
    try:
        made = parser.instantiate_classes(kept)
        if "reward" in made:
            benchmarks = entries_of(made.benchmarks, "benchmarks") if made.benchmarks else ()
            reward = reward_from(made.reward, made.normalize_rewards)
            made.reward = reward_of(reward, [*made.data.entries, *made.data.validated_on, *benchmarks])
            made.data.wants_column = made.reward.wants_column
        return made
    except (ValueError, TypeError) as error:
        raise ConfigError(in_a_line(tidy(str(error)), parser.choices_of)) from error
