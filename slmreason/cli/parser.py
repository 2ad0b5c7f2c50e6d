"""The parser of a command: Lightning's, whose help and errors speak in words, and whose configs hold no secret."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from slmreason.cli.errors import ConfigError, explain, in_a_line
from slmreason.cli.words import in_words
from slmreason.runtime.redact import is_secret


class HelpInWords(DefaultHelpFormatter):
    """Tells what a key takes as choices in words, and a default that is a class by its name."""

    def _get_type_str(self, action: Action) -> str | None:
        plain, hint = super()._get_type_str(action), getattr(action, "_typehint", None)
        return plain if plain is None or hint is None else in_words(hint)

    def _get_help_string(self, action: Action) -> str:
        text = re.sub(r", known subclasses: .*(?=\)$)", "", super()._get_help_string(action))
        if isinstance(action.default, dict | Namespace) and "class_path" in action.default:
            text = text.replace("%(default)s", str(action.default["class_path"]).rpartition(".")[2])
        if isinstance(action.default, bool):
            text = text.replace("%(default)s", str(action.default).lower())
        return text.replace("type: %(type)s", "%(type)s").replace("%(type)s, default: ", "%(type)s; default: ")


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors say which key is wrong and what is accepted, without the wall of usage."""

    own_options: tuple[str, ...] = ()
    """Those that belong to the command at hand and to no config."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpInWords} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(explain(in_a_line(str(message), self.choices_of), self.known_keys())) from ex

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """Without the options that this command alone has: any command takes the config that another wrote.

        Raises:
            ConfigError: it holds a secret, which would be printed or saved.
        """
        shared = cfg.clone()
        for name in self.own_options:
            shared.pop(name, None)
        refuse_secrets(shared)
        return super().dump(shared, *args, **kwargs)

    def known_keys(self) -> list[str]:
        named = {action.dest for action in self._actions if "." in action.dest or action.option_strings}
        return sorted(named - {"help"})

    def choices_of(self, key: str) -> str | None:
        """What a key takes, in words; None where it is none of this parser."""
        hints = (getattr(action, "_typehint", None) for action in self._actions if action.dest == key)
        return next((in_words(hint) for hint in hints if hint is not None), None)

    def add_out(self, command: str) -> None:
        """The option of commands that write one file."""
        self.add_argument("--out", type=str, default=SUPPRESS, help=f"Where the results are written; {command}.jsonl.")


def refuse_secrets(config: Namespace) -> None:
    """A config is saved with the run and printed, and its flags stand in the list of processes: no place for a key.

    Raises:
        ConfigError: a value is a key, a token or a password; the message names the key of the config and not the value.
    """
    for key, value in _leaves(config.as_dict()):
        if is_secret(key.rpartition(".")[2], value):
            raise ConfigError(
                f"{key}: a key, token or password does not belong in a config or on the command line, where others can "
                "read it; put it into an environment variable (WANDB_API_KEY, COMET_API_KEY, ...; for a teacher the "
                "one that teacher.api_key_env names)"
            )


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(`trainer.callbacks.0.class_path`, value) of every value in a config, those within lists too."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if branches is None:
        yield key, tree
        return
    for name, branch in branches:
        yield from _leaves(branch, f"{key}.{name}" if key else str(name))
