"""Plain functions as terms of a reward, called as TRL's GRPOTrainer calls them (TRL 1.16, `_calculate_rewards`).

A function takes lists with one entry for each completion, by name, and gives a list of as many numbers; None says that
it does not apply to that completion. It may be async. It gets what its signature names, or everything where it takes
`**kwargs`: `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric`, and columns of the
dataset.
"""

from __future__ import annotations

import asyncio
import dis
import inspect
import math
import os
import reprlib
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from numbers import Real
from typing import Any

from slmreason.records import Problem
from slmreason.verify.rewards import Answer, Step
from slmreason.verify.verdicts import RewardError, kind_of, plain

OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What a function gets besides columns of the dataset."""
NO_COLUMNS = frozenset({*OURS, "prompt", "completion"})
"""Names that no column reaches a function under, as in TRL."""
GOLDS = ("answer", "solution", "ground_truth")
"""Names under which the gold answer is given where the rows have no such column."""
MAX_SHOWN_PROBLEMS = 3


@dataclass
class Given:
    """What a function gave for some completions."""

    values: list[float | None] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    """What it logged with `log_metric`."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """What it logged with `log_extra`: a value for each completion."""


class RewardFunction:
    """A function with TRL's signature, and what is known of it from its signature."""

    def __init__(self, function: Callable[..., Any], name: str, place: str, messages: bool = False) -> None:
        """
        Args:
            function: takes lists by name, gives numbers or None.
            name: under which it is logged.
            place: where it comes from, for errors.
            messages: prompts and completions are lists of messages, as TRL has them for conversational data, instead of
                texts.
        """
        self.function, self.name, self.place, self.messages = function, name, place, messages
        parameters = _parameters(function)
        self.required = tuple(p.name for p in parameters if p.default is p.empty and p.kind in _NAMED)
        self.accepted = frozenset(p.name for p in parameters if p.kind in _NAMED)
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._reads_any = _reads_any(function, parameters)

    def wants_column(self, column: str) -> bool:
        """Whether a column of the dataset has to be kept for it."""
        return column not in NO_COLUMNS and (self._reads_any or column in self.accepted)

    @property
    def may_log_metrics(self) -> bool:
        """Whether it may call `log_metric`, with any name."""
        return self._reads_any or "log_metric" in self.accepted

    def missing(self, problem: Problem) -> list[str]:
        """The columns that it cannot do without and that this problem has not."""
        return [name for name in self.required if name not in OURS and name not in _columns(problem)]

    def call(self, answers: Sequence[Answer], step: Step, given: Given) -> Any:
        """What the function returns, which is a list or something to await.

        Args:
            given: takes what the function logs.

        Raises:
            RewardError: it fails.
        """
        try:
            return self.function(**self._arguments(answers, step, given))
        except Exception as error:
            raise self.failed(error, answers) from error

    def check(self, returned: Any, given: Given, answers: Sequence[Answer]) -> Given:
        """`given` with the numbers that the function returned, in plain Python.

        Raises:
            RewardError: there are too few or too many, or one is no finite number and not None.
        """
        if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
            raise self.error(f"it gave {kind_of(returned)}, where a list with a number or None for each completion is "
                             "needed")  # fmt: skip
        values = list(islice(returned, len(answers) + 1))  # a generator may never end
        if len(values) != len(answers):
            many = f"more than {len(answers)}" if len(values) > len(answers) else len(values)
            raise self.error(f"it gave {many} values for {len(answers)} completions")
        given.values = [self._number(value, answer) for value, answer in zip(values, answers, strict=True)]
        for column, logged in given.extra.items():
            if len(logged) != len(answers):
                raise self.error(f"log_extra({column!r}) got {len(logged)} values for {len(answers)} completions")
        return given

    def failed(self, error: Exception, answers: Sequence[Answer]) -> RewardError:
        """An error of the function as one that names it, the problems and the line."""
        ids = list(dict.fromkeys(answer.problem.id for answer in answers))
        more = f" and {len(ids) - MAX_SHOWN_PROBLEMS} more" if len(ids) > MAX_SHOWN_PROBLEMS else ""
        where = traceback.extract_tb(error.__traceback__)[-1]
        hint = ""
        if isinstance(error, TypeError) and "string indices" in str(error):
            hint = "; a function for conversational data takes messages: true"
        return self.error(
            f"grading completions of {', '.join(ids[:MAX_SHOWN_PROBLEMS])}{more} failed with {type(error).__name__}: "
            f"{error} ({where.filename}, line {where.lineno}){hint}"
        )

    def error(self, says: str) -> RewardError:
        return RewardError(f"reward: {self.place}: {says}")

    def _number(self, value: Any, answer: Answer) -> float | None:
        number = plain(value)
        if number is None:
            return None
        try:
            result = float(number) if isinstance(number, Real) else math.nan
        except OverflowError:
            result = math.inf
        if not math.isfinite(result):
            shown = number if isinstance(number, float) else kind_of(value)
            raise self.error(f"the value of a completion of {answer.problem.id} is {shown}; a finite number or None is "
                             "needed")  # fmt: skip
        return result

    def _arguments(self, answers: Sequence[Answer], step: Step, given: Given) -> dict[str, Any]:
        problems = [answer.problem for answer in answers]
        prompts: list[Any] = [problem.whole_question for problem in problems]
        completions: list[Any] = [answer.text for answer in answers]
        if self.messages:
            prompts = [problem.messages for problem in problems]
            completions = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        ours = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(answer.token_ids) for answer in answers],
            "trainer_state": step,
            "log_extra": lambda column, values: given.extra.setdefault(str(column), []).extend(values),
            "log_metric": lambda name, value: given.metrics.update({str(name): self._metric(name, value)}),
        }
        columns = [_columns(problem) for problem in problems]
        names = dict.fromkeys(name for each in columns for name in each)
        names |= dict.fromkeys(name for name in self.required if name not in ours)
        everything = ours | {name: [each.get(name) for each in columns] for name in names if name not in ours}
        if self.takes_any:
            return everything
        return {name: value for name, value in everything.items() if name in self.accepted}

    def _metric(self, name: str, value: Any) -> float:
        number = plain(value)
        if not isinstance(number, Real) or not math.isfinite(number):
            raise ValueError(f"log_metric({name!r}) got {kind_of(value)}; a finite number is needed")
        return float(number)


def call_all(functions: Sequence[RewardFunction], answers: Sequence[Answer], step: Step) -> list[Given]:
    """What each function gives for these completions; async ones wait for what they wait for side by side.

    Raises:
        RewardError: one fails, or gives what is no list of numbers; the message names it.
    """
    if not answers:
        return [Given() for _ in functions]
    given = [Given() for _ in functions]
    returned: list[Any] = []
    try:
        for function, box in zip(functions, given, strict=True):
            returned.append(function.call(answers, step, box))
    except RewardError:
        for each in filter(inspect.iscoroutine, returned):
            each.close()
        raise
    waiting = {at: each for at, each in enumerate(returned) if inspect.isawaitable(each)}
    if waiting:
        for at, result in zip(waiting, _awaited(list(waiting.values())), strict=True):
            if isinstance(result, Exception):
                raise functions[at].failed(result, answers) from result
            if isinstance(result, BaseException):
                raise result
            returned[at] = result
    return [function.check(each, box, answers) for function, each, box in zip(functions, returned, given, strict=True)]


# -- what a function asks for ------------------------------------------------------------------------------------------

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ANYTHING = (inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),)


def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    try:
        return tuple(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # written in C
        return _ANYTHING


def _reads_any(function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether the function looks into its `**kwargs`: most have them only so that anything can be passed."""
    name = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if name is None:
        return False
    code = getattr(function if inspect.isfunction(function) else type(function).__call__, "__code__", None)
    if code is None or name not in code.co_varnames + code.co_cellvars or hasattr(function, "__wrapped__"):
        return True  # no code of its own to look at
    return any(instruction.argval == name for instruction in dis.get_instructions(code))


def _columns(problem: Problem) -> dict[str, Any]:
    """The columns of a problem's row that were kept, and what every problem has under names that are free."""
    own: dict[str, Any] = {"question": problem.question, **dict.fromkeys(GOLDS, problem.answer)}
    return own | {"id": problem.id, "source": problem.source} | (problem.columns or {})


# -- waiting -----------------------------------------------------------------------------------------------------------


def _awaited(waiting: Sequence[Awaitable[Any]]) -> list[Any]:
    """What each gives or raises. They run in a loop of our own thread: a notebook's runs already."""

    async def gathered() -> list[Any]:
        return await asyncio.gather(*waiting, return_exceptions=True)

    future = asyncio.run_coroutine_threadsafe(gathered(), _loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


@lru_cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of this process, the same for all calls: clients that a function keeps are bound to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="async reward functions", daemon=True).start()
    return loop


def storable(value: Any) -> Any:
    """A value of a row, or one that a function logged, as a file of JSON can hold it; what it cannot hold as text."""
    value = plain(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): storable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [storable(each) for each in value]
    return reprlib.repr(value) if isinstance(value, bytes) else str(value)
