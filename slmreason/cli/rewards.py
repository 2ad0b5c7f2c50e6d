"""`reward` as a list of terms: the verifier by its class, and plain functions by where they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmreason.cli.errors import ConfigError
from slmreason.cli.parser import Parser
from slmreason.cli.words import in_words
from slmreason.verify.loading import load_function
from slmreason.verify.rewards import AnswerReward, RewardFn
from slmreason.verify.terms import RewardTerms, WeightedFunction

log = logging.getLogger(__name__)
KEYS = {"fn": ("fn", "weight", "name", "messages"), "class_path": ("class_path", "init_args", "weight", "name")}
"""What may stand in a term, by what tells its kind."""
KINDS: dict[str, Any] = {
    "fn": str, "class_path": str, "weight": int | float, "name": str, "messages": bool, "init_args": Mapping,
}  # fmt: skip


@dataclass(frozen=True)
class _Verifier:
    reward: RewardFn
    weight: float = 1.0
    name: str | None = None


def reward_from(given: Any, normalize: bool) -> RewardFn:
    """The reward that a config asks for.

    Args:
        given: a reward, or a list of terms: `{fn, weight, name, messages}`, the name of a class, or
            `{class_path, init_args, weight, name}`.
        normalize: whether terms are normalised within a group before they are weighted.

    Raises:
        ConfigError: a term is none, or several say what is correct.
        RewardError: a function is not found.
    """
    if not isinstance(given, list):
        if normalize:
            raise ConfigError("normalize_rewards: reward is a single class; a list of terms can be normalised")
        return given  # type: ignore[no-any-return]
    if not given:
        raise ConfigError("reward: an empty list has no term")
    terms = [_term(each) for each in given]
    verifiers = [term for term in terms if isinstance(term, _Verifier)]
    if len(verifiers) > 1:
        names = " and ".join(type(each.reward).__name__ for each in verifiers)
        raise ConfigError(f"reward: {names} both say what is correct; one term of the list may be a class")
    functions = [term for term in terms if isinstance(term, WeightedFunction)]
    verifier = verifiers[0] if verifiers else _Verifier(AnswerReward(), weight=0.0)
    if not verifiers:
        log.info("reward: no term says what is correct: AnswerReward does, with weight 0")
    try:
        return RewardTerms(verifier.reward, functions, verifier.weight, normalize, verifier.name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _term(given: str | Mapping[str, Any]) -> _Verifier | WeightedFunction:
    entry: dict[str, Any] = {"class_path": given} if isinstance(given, str) else dict(given)
    kind = "fn" if "fn" in entry else "class_path"
    shapes = " and ".join("{" + ", ".join(keys) + "}" for keys in KEYS.values())
    if kind not in entry:  # a flag that the class refuses ends up here
        keys = ", ".join(sorted(map(str, entry)))
        raise ConfigError(f"reward: {keys} is no argument of its class, or has a value that it does not take; a term "
                          f"of a list is the name of a class, and else there are {shapes}")  # fmt: skip
    if unknown := sorted(set(entry) - set(KEYS[kind])):
        raise ConfigError(f"reward: the term {entry[kind]} does not accept {', '.join(unknown)}; there are {shapes}")
    for key, value in entry.items():
        if not isinstance(value, KINDS[key]) or (isinstance(value, bool) and key != "messages"):
            raise ConfigError(f"reward: {key} of the term {entry[kind]} takes {in_words(KINDS[key])}")
    weight = float(entry.get("weight", 1.0))
    if kind == "fn":
        function = load_function(entry["fn"], entry.get("name"), entry.get("messages", False))
        return WeightedFunction(function, weight)
    return _Verifier(_made(entry), weight, entry.get("name"))


def _made(entry: Mapping[str, Any]) -> RewardFn:
    """A class with its arguments, as a config gives one anywhere."""
    named = {key: entry[key] for key in ("class_path", "init_args") if key in entry}
    parser = Parser()
    parser.add_subclass_arguments(RewardFn, "reward", required=True)
    made = parser.instantiate_classes(parser.parse_object({"reward": named})).reward
    assert isinstance(made, RewardFn)
    return made
