"""Mistakes of the user, in words: what is wrong and the nearest keys; never a value, which may be a secret."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence

from slmreason.runtime.redact import shown


class ConfigError(ValueError):
    """A mistake in the arguments or the configuration, in words for the user."""


def tidy(message: str) -> str:
    """A parser's message without colours, and without the values it was given: one may be a key in a wrong place."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", message).strip()
    pattern = r"\s*(?:Given value(?: type)?: .*|Got value: .*?(?=\n *- (?:Expected|Option) |\n *Given value|\Z))"
    return re.sub(pattern, "", message, flags=re.DOTALL) or message


def in_a_line(message: str, choices_of: Callable[[str], str | None]) -> str:
    """A parser's message about the value of a key as one line, with what the key takes in words.

    Args:
        choices_of: what a key takes; None where it is not known.

    Returns:
        `grpo.kl: takes a number`, or what is wrong within a value that is the right kind of thing; what a constructor
        says, alone, where its key may hold something else too; any other message as it is.
    """
    key, said = "", tidy(message)
    while about := re.match(r'Parser key "([\w.]+)"(?: element \d+)?:\s*', said):
        key, said = about[1], said[about.end() :].strip()
    choices = choices_of(key) if key else None
    within = _reasons(said)
    if choices is None:
        return within if within and said.startswith(_UNION) else message
    named = _NAMED.search(said)
    if re.match(r"[\w.]+: (?:takes|there is no class) ", within):  # the value is a class, and this one of its arguments
        return f"{key}.{within}"
    if within:
        return f"{key}: {within}"
    if named and "class" in choices and re.fullmatch(r"[A-Za-z_]\w{,60}", named[1]):
        return f"{key}: there is no class {named[1]}; it takes {choices}"
    return f"{key}: takes {choices}"


def _reasons(said: str) -> str:
    """What is wrong, in one line, without what says that a value is the wrong kind of thing."""
    lines = [re.sub(r"^\s*-?\s*", "", line) for line in _WRONG_KIND.sub("", said).splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))).replace(":; ", ": ")


_UNION = "Does not validate against any of the Union subtypes"
_NAMED = re.compile(r"Expected a dot import path string: (\S+)\s*$", flags=re.MULTILINE)
_WRONG_KIND = re.compile(
    rf"{_UNION}$|Subtypes: .*$|Errors:$"
    r"|Expected a path but [\s\S]*? either not accessible or invalid$"
    r"|Expected (?!an instantiatable|')(?:.*\n)*?.*(?=\n *- |\n *(?:Given|Subtypes)|\Z)"
    r"|Not a valid subclass of .*$|Subclass types expect one of:$"
    r"|- a class path \(str\)$|- a dict (?:with class_path|without class_path|with parameters).*$",
    flags=re.MULTILINE,
)
"""What jsonargparse says of a value that is the wrong kind of thing, in the syntax of Python's types."""


def explain(message: str, known: Sequence[str]) -> str:
    """A parser's message with, for a key that does not exist, the nearest keys that do, or those of its group."""
    message = tidy(message)
    unknown = re.match(r"(?P<head>[Uu]nrecognized arguments: ).*?(?P<flags>(?<!\S)--.*)", message, flags=re.DOTALL)
    if unknown:  # what was given with them may be a key
        message = unknown["head"] + " ".join(re.findall(r"(?<!\S)--[\w.+-]+", unknown["flags"]))
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    match = re.search(
        r"[Uu]nrecognized arguments?:? (?:--)?([\w.]+)"
        r"|(?:[Kk]ey|Option) ['\"]?([\w.]+)['\"]? is not (?:expected|accepted)",
        message,
    )
    if in_group:
        key = f"{in_group.group(1)}.{in_group.group(2)}"
    elif match:
        key = match.group(1) or match.group(2)
    else:
        return message
    group, _, last = key.rpartition(".")
    near = _called_otherwise(group, last, known) or difflib.get_close_matches(key, known, n=3, cutoff=0.6)
    if near:
        return f"{message}; did you mean: {', '.join(near)}?"
    if message.startswith("Option "):  # of a class, which has no group
        return f"{message}; there are {', '.join(known)}"
    siblings = [name[len(group) + 1 :] for name in known if group and name.rpartition(".")[0] == group]
    return f"{message}; keys of {group}: {', '.join(siblings)}" if siblings else message


OTHER_NAMES = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_generations": "group_size",
    "beta": "kl",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "loss_type": "loss",
    "scale_rewards": "advantage_scale",
    "num_iterations": "updates_per_batch",
    "max_completion_length": "max_completion_tokens",
    "max_new_tokens": "max_completion_tokens",
    "mask_truncated_completions": "mask_truncated",
    "max_prompt_length": "data.max_prompt_tokens",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_grad_norm": "trainer.gradient_clip_val",
    "per_device_train_batch_size": "data.token_budget",
    "model_name_or_path": "student.model",
    "model": "student.model",
    "torch_dtype": "student.dtype",
    "dataset_name": "data.train",
    "dataset": "data.train",
    "train": "data.train",
    "output_dir": "run_dir",
    "seed": "seed_everything",
    "report_to": "trainer.logger",
    "resume_from_checkpoint": "resume",
}
"""What other trainers call a key, TRL and transformers above all."""


def _called_otherwise(group: str, last: str, known: Sequence[str]) -> list[str]:
    """The key that is meant by another trainer's name for it."""
    ours = OTHER_NAMES.get(last)
    if ours is None:
        return []
    key = ours if "." in ours or not group else f"{group}.{ours}"
    found = [key] if key in known else [name for name in known if name.rpartition(".")[2] == ours]
    return found if found else []


def fail(error: Exception | str, status: int = 2) -> int:
    """Prints an error for a person and gives the exit status."""
    print(f"error: {shown(str(error))}", file=sys.stderr)
    return status
