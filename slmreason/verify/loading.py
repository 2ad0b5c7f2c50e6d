"""Reward functions by where they are: in a module, or in a file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from slmreason.verify.functions import RewardFunction
from slmreason.verify.verdicts import RewardError, kind_of


def load_function(place: str, name: str | None = None, messages: bool = False) -> RewardFunction:
    """The function at `module.function` or `path/to/file.py:function`.

    Args:
        name: under which it is logged; its own where this is None.

    Raises:
        RewardError: there is none, or its file cannot be run.
    """
    file, colon, attribute = place.rpartition(":")
    if not colon:
        file, _, attribute = place.rpartition(".")
    if not file or not attribute.isidentifier():
        raise RewardError(f"reward: fn: {place!r} is no function: module.function or path/to/file.py:function")
    try:
        module = _run_file(str(Path(file).resolve())) if colon else importlib.import_module(file)
        found = getattr(module, attribute)
    except Exception as error:  # the user's own code
        raise RewardError(f"reward: fn: {place}: {type(error).__name__}: {error}") from error
    if not callable(found) or isinstance(found, type):
        raise RewardError(f"reward: fn: {place} is {kind_of(found)} and no function; a class that grades stands under "
                          "class_path")  # fmt: skip
    return RewardFunction(found, name or attribute, place, messages)


def _run_file(path: str) -> ModuleType:
    """The module in a file, which is run once however many functions of it are named, and anew when it has changed."""
    known = hashlib.sha256(path.encode() + Path(path).read_bytes()).hexdigest()
    name = f"reward_functions_{known[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a file with Python code")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
