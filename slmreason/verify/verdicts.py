"""What a reward gave, as verdicts that can be counted, trained on and written down; else an error that names it.

A reward is often a user's own class: its numbers come from numpy or torch, or are missing.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch

from slmreason.records import Problem
from slmreason.verify.rewards import AnswerReward, RewardFn, Verdict, read_answer

WANTED = "a slmreason.verify.rewards.Verdict(reward, correct) is needed: a finite number, and True or False"


class RewardError(ValueError):
    """A reward that gives what is no verdict; the message names its class and the key `reward`."""


def graded(reward: RewardFn, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """The verdict on each (problem, completion), in their order, in plain Python numbers.

    Numbers of numpy and torch are converted, and a bare True or False is a verdict that is worth 1 or 0.

    Raises:
        RewardError: there are too few or too many, or one is no verdict.
    """
    given = reward.grade(pairs)
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise _error(reward, f"grade gave {kind_of(given)}, where a list with a verdict for each completion is needed")
    verdicts = list(islice(given, len(pairs) + 1))  # a generator may never end
    if len(verdicts) != len(pairs):
        many = f"more than {len(pairs)}" if len(verdicts) > len(pairs) else len(verdicts)
        raise _error(reward, f"grade gave {many} verdicts for {len(pairs)} completions")
    return [_verdict(reward, verdict) for verdict in verdicts]


def graded_completions(
    reward: RewardFn, pairs: Sequence[tuple[Problem, str]], truncated: Sequence[bool]
) -> list[Verdict]:
    """The verdict on each completion; one that was cut off before it gave its answer is wrong.

    A completion that ran into the token limit and has no finished answer (box, tag or marker) may end in the gold
    number by accident. It earns what no answer earns.

    Args:
        truncated: whether the token limit cut a completion off, in the order of `pairs`.
    """
    verdicts = graded(reward, pairs)
    unfinished = [
        at
        for at, ((problem, text), was_cut) in enumerate(zip(pairs, truncated, strict=True))
        if was_cut and verdicts[at].correct and reward.reward_for(problem).wants_finished_answer
        and not _is_finished(problem, text)
    ]  # fmt: skip
    if unfinished:
        silent = graded(reward, [(pairs[at][0], "") for at in unfinished])
        for at, verdict in zip(unfinished, silent, strict=True):
            verdicts[at] = Verdict(verdict.reward, correct=False)
    return verdicts


def _is_finished(problem: Problem, text: str) -> bool:
    answer = read_answer(problem, text, truncated=True)
    return answer is not None and answer == read_answer(problem, text)


def verdict_on(reward: RewardFn, problem: Problem, text: str) -> Verdict:
    """The verdict on one completion, in plain Python numbers.

    Raises:
        RewardError: what the reward gave is no verdict.
    """
    return _verdict(reward, reward(problem, text))


def try_rewards(reward: RewardFn, problems: Iterable[Problem]) -> None:
    """Tries every reward that grades answers to some problems, each on the first problem that is its own.

    Raises:
        RewardError: as `try_reward`.
    """
    tried: set[int] = set()
    for problem in problems:
        chosen = reward.reward_for(problem)
        if id(chosen) not in tried:
            tried.add(id(chosen))
            try_reward(chosen, problem)
    reward.try_terms(problems)


def try_reward(reward: RewardFn, problem: Problem) -> None:
    """Grades two completions of a problem, a right one and a wrong one, to see that what comes are verdicts.

    The built-in reward is not tried: its processes start when there is something to compare.

    Raises:
        RewardError: they are none, or grading fails; the message says where.
    """
    if type(reward) is AnswerReward:
        return
    texts = (f"The answer is \\boxed{{{problem.answer}}}.", "I do not know.")
    try:
        graded(reward, [(problem, text) for text in texts])
        verdict_on(reward, problem, texts[0])
        reward.drain_rejects()
    except RewardError:
        raise
    except Exception as error:
        location = traceback.extract_tb(error.__traceback__)[-1]
        raise _error(
            reward,
            f"grading {texts} of problem {problem.id} failed with {type(error).__name__}: {error} "
            f"({location.filename}, line {location.lineno})",
        ) from error


def _verdict(reward: RewardFn, given: Any) -> Verdict:
    if type(given) is Verdict and type(given.reward) is float and type(given.correct) is bool:
        if not math.isfinite(given.reward):
            raise _error(reward, f"the reward of a completion is {given.reward}; {WANTED}")
        return given
    if not isinstance(given, Verdict):
        correct = plain(given)
        if not isinstance(correct, bool):
            raise _error(reward, f"the verdict on a completion is {kind_of(given)}; {WANTED}")
        return Verdict(float(correct), correct)
    number, correct = plain(given.reward), plain(given.correct)
    try:
        value = float(number) if isinstance(number, Real) else math.nan
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        shown = number if isinstance(number, float) else kind_of(given.reward)
        raise _error(reward, f"the reward of a completion is {shown}; {WANTED}")
    if not isinstance(correct, Real) or correct not in (0, 1):
        raise _error(reward, f"`correct` of a completion is {kind_of(given.correct)}; {WANTED}")
    return Verdict(value, bool(correct))


def plain(value: Any) -> Any:
    """A number of numpy or torch, or an array of one, as Python's own; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and math.prod(value.shape) == 1):
        return value.item()
    return value


def kind_of(value: Any) -> str:
    """A value with its type, for an error."""
    return "None" if value is None else f"{value!r:.50} ({type(value).__module__}.{type(value).__qualname__})"


def _error(reward: RewardFn, says: str) -> RewardError:
    return RewardError(f"reward: {type(reward).__module__}.{type(reward).__qualname__}: {says}")
