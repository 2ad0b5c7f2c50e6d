"""The recipes that come with slmreason, by name. Nothing heavy is imported: a misspelt name is answered at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from slmreason.cli.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "configs"


def find_recipe(name: str) -> str:
    """The file as given if it exists, else the packaged recipe of that name (`quickstart`, `configs/quickstart.yaml`).

    Raises:
        ConfigError: there is neither.
    """
    given = os.path.expanduser(name)
    if Path(given).is_file():
        return given
    for recipe in (RECIPES / f"{name}.yaml", RECIPES / Path(name).name):
        if recipe.is_file():
            return str(recipe)
    known = names()
    near = difflib.get_close_matches(Path(name).stem, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--config {name}: no such file, and no such recipe{hint}; recipes: {', '.join(known)}")


def names() -> list[str]:
    """Of all packaged recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def configs_in(args: Sequence[str]) -> Iterator[str]:
    """What is given to `--config`, each time."""
    for before, arg in zip(("", *args), args, strict=False):
        flag, equals, value = arg.partition("=")
        if before in ("--config", "-c"):
            yield arg
        elif flag in ("--config", "-c") and equals:
            yield value


def check_arguments(command: str, args: Sequence[str], takes_words: bool) -> None:
    """Finds the mistakes that need no parser: a recipe that there is not, and a config without its flag.

    Args:
        takes_words: the command has an argument without a flag, such as a file.

    Raises:
        ConfigError: there is one.
    """
    for name in configs_in(args):
        find_recipe(name)
    if args and not args[0].startswith("-") and not takes_words:
        known = args[0] in names() or Path(args[0]).suffix in (".yaml", ".yml")
        hint = f"did you mean: slmreason {command} --config {args[0]}?" if known else "options begin with --"
        raise ConfigError(f"{command} takes no word by itself, and was given {args[0]!r}; {hint}")
