"""The short help of the commands that read a config: the keys that people set. Nothing heavy is imported.

The words are written here since the parser, which has those of every key, takes seconds to build. A test holds the keys
against the parser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from slmreason.cli.errors import ConfigError

Keys = tuple[tuple[str, str, str], ...]
"""(key, type in words, meaning)"""

COMMON: dict[str, Keys] = {
    "the config": (
        ("config", "recipe or file", "a recipe's name or a YAML file; several are stacked, later ones win"),
        ("run_dir", "folder", "where the run is written; a free name is found"),
        ("seed_everything", "whole number", "of every random number"),
    ),
    "student": (
        ("student.model", "name or folder", "a hub name, a folder, or embedded:qwen2, embedded:llama"),
        ("student.lora.r", "whole number", "rank of LoRA adapters; all weights are trained without it"),
        ("student.dtype", "choice", "of the weights: float32, bfloat16, float16, fastest"),
    ),
    "data": (
        ("data.train", "source or list", "a file, a hub name, NAME=FILE, embedded:FAMILY/train, or several"),
        ("data.columns.question", "column", "which column is asked; data.columns.answer has the gold answer"),
        ("data.limit", "whole number", "read no more than so many rows"),
        ("data.token_budget", "whole number", "tokens of a micro-batch: the bound on memory"),
        ("benchmarks", "list", "names, files or hub names; [] for none"),
    ),
    "method": (
        ("curriculum.rounds", "whole number", "rounds of the stages"),
        ("curriculum.stages", "list", "of sft, grpo, cft"),
        ("curriculum.max_tokens", "whole number", "the run ends when it has taken so many"),
        ("curriculum.budgets", "list", "the benchmarks are run when so many tokens are taken: a curve"),
        ("sft.learning_rate", "number", "grpo.learning_rate and cft.learning_rate likewise"),
        ("grpo.group_size", "whole number", "rollouts of a problem"),
        ("grpo.max_completion_tokens", "whole number", "a rollout is cut here"),
        ("grpo.loss", "choice", "grpo, dr_grpo, dapo, gspo, cispo, sapo, gmpo"),
        ("grpo.rescue.kind", "choice or null", "for what no rollout solved: handover, sft_gate, chord"),
    ),
    "classes": (
        ("rollout", "class", "HFEngine or VLLMEngine; --rollout.help CLASS lists its options"),
        ("teacher", "class or null", "TraceTeacher, APITeacher, VLLMTeacher, ProceduralTeacher"),
        ("reward", "class or list", "or terms such as {fn: my.py:brevity, weight: 0.2}"),
    ),
    "Lightning": (
        ("trainer.devices", "number", "and trainer.strategy ddp or fsdp; any other flag of its Trainer too"),
        ("trainer.max_time", "DD:HH:MM:SS", "of the whole run"),
        ("trainer.logger", "class", "TensorBoardLogger, WandbLogger, MLFlowLogger: one experiment over all stages"),
    ),
}  # fmt: skip


OWN: dict[str, tuple[tuple[str, str], ...]] = {
    "fit": (("resume", "go on with a run: its folder, or auto for the newest unfinished run by this config"),),
    "test": (("out", "where the scores are written; test.jsonl"),),
    "data": (("rows", "so many rows are shown whole; 3"),),
    "stratify": (
        ("recorded", "JSONL of recorded rollouts to grade, in place of new ones"),
        ("out", "where the bands are written; stratify.jsonl"),
        ("dry_run", "print counts, and do nothing"),
    ),
    "bridge": (
        ("out", "where the traces are written; bridge.jsonl"),
        ("dry_run", "print counts and estimated cost, and do nothing"),
    ),
    "critique": (
        ("harvest", "the harvest.jsonl of a run"),
        ("out", "where the records are written; critique.jsonl"),
        ("dry_run", "print counts and estimated cost, and do nothing"),
    ),
}  # fmt: skip
"""Command that reads a config -> (option, meaning) of those that it alone has."""


def is_short(command: str, args: Sequence[str]) -> bool:
    """Whether the short help is wanted, rather than that of a group, of every key or of a class."""
    return command in OWN and bool({"-h", "--help"} & set(args)) and group_of(args) is None


def group_of(args: Sequence[str]) -> str | None:
    """`grpo` of `--help grpo`, `all` of `--help all`; None where no group is named."""
    for before, arg in zip(args, args[1:], strict=False):
        if before in ("-h", "--help") and not arg.startswith("-"):
            return arg
    return None


def short_help(command: str, meaning: str) -> str:
    """The page of `slmreason COMMAND --help`.

    Args:
        meaning: the command's line in `slmreason --help`.
    """
    lines = [f"usage: slmreason {command} [--config FILE ...] [--KEY VALUE ...]", "",
             f"{meaning[:1].upper()}{meaning[1:]}.", "", "of this command:"]  # fmt: skip
    lines += [f"  --{option:28s}{text}" for option, text in OWN[command]]
    for group, keys in COMMON.items():
        lines += ["", f"{group}:"]
        lines += [f"  --{key:28s}{text} ({kind})" for key, kind, text in keys]
    lines += ["", "more:",
              f"  slmreason {command} --help grpo      of a group: student, data, curriculum, sft, grpo, cft, bridge,",
              "                                 critique, evaluation, validation, backend, trainer",
              f"  slmreason {command} --help all       every key",
              f"  slmreason {command} --print_config   every key with its value"]  # fmt: skip
    return "\n".join(lines)


def group_help(page: str, group: str) -> str:
    """Of the page of every key, the blocks whose keys are of a group.

    Raises:
        ConfigError: there is no such group.
    """
    blocks = page.split("\n\n")
    chosen = [block for block in blocks if re.search(rf"(?m)^\s+--{re.escape(group)}[.\s]", block)]
    chosen = [block for block in chosen if not block.startswith("usage:")]
    if not chosen:
        known = sorted(set(re.findall(r"(?m)^\s+--(\w+)\.\w", page)))
        raise ConfigError(f"--help {group}: no such group; there are {', '.join(known)}, and all")
    return "\n\n".join(chosen)
