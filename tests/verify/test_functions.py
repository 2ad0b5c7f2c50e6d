"""Reward functions with TRL's signature: called as its trainer calls them, summed as it sums, refused by name."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slmreason.data.sources import load_problems
from slmreason.records import Problem, Turn, from_json, to_json
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.verify.functions import RewardFunction
from slmreason.verify.loading import load_function
from slmreason.verify.rewards import Answer, AnswerReward, RewardFn, Step, Verdict
from slmreason.verify.terms import RewardTerms, WeightedFunction, totals
from slmreason.verify.verdicts import RewardError, try_rewards

ONE = Problem("p1", "1 + 1 = ?", "2", columns={"task": "math"})
TWO = Problem("p2", "Sort 3, 1.", "1, 3", columns={"task": "code"})


# Three of TRL's documentation ("Using a custom reward function"): length, format, and comparison with a column.


def longer(completion_ids, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(ids)) for ids in completion_ids]


def tagged(completions, **kwargs):  # type: ignore[no-untyped-def]
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", text) else 0.0 for text in texts]


def accurate(completions, ground_truth, **kwargs):  # type: ignore[no-untyped-def]
    boxes = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [1.0 if box and box[1] == truth else 0.0 for box, truth in zip(boxes, ground_truth, strict=True)]


def of_math(prompts, completions, task, **kwargs):  # type: ignore[no-untyped-def]
    return [len(text) / 10 if kind == "math" else None for text, kind in zip(completions, task, strict=True)]


def of_code(prompts, completions, task, **kwargs):  # type: ignore[no-untyped-def]
    return [len(text) / 5 if kind == "code" else None for text, kind in zip(completions, task, strict=True)]


async def judged(prompts, completions, **kwargs):  # type: ignore[no-untyped-def]
    await asyncio.sleep(0)
    return [0.5 * len(prompt) for prompt in prompts]


class Coin(RewardFn):
    """A verifier that takes every completion with a 2 in it."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        return Verdict(float("2" in text), "2" in text)


def function(of: Callable[..., Any], messages: bool = False) -> RewardFunction:
    return RewardFunction(of, of.__name__, f"tests.{of.__name__}", messages)


def terms(*functions: Callable[..., Any], weight: float = 1.0, normalize: bool = False) -> RewardTerms:
    return RewardTerms(Coin(), [WeightedFunction(function(each)) for each in functions], weight, normalize)


def answers(*texts: str, problem: Problem = ONE) -> list[Answer]:
    return [Answer(problem, text, tuple(range(len(text)))) for text in texts]


def settled(reward: RewardTerms, given: list[Answer], group_size: int = 2) -> list[Verdict]:
    return reward.with_terms(given, reward.grade([(each.problem, each.text) for each in given]), group_size)


def scores(of: Callable[..., Any], given: list[Answer], messages: bool = False) -> list[float | None]:
    reward = RewardTerms(Coin(), [WeightedFunction(function(of, messages))])
    return [verdict.scores[of.__name__] for verdict in settled(reward, given)]


def test_the_functions_of_trls_documentation_run_unchanged() -> None:
    assert scores(longer, answers("abc", "")) == [3.0, 0.0]
    assert scores(tagged, answers("<think>a</think><answer>2</answer>", "2"), messages=True) == [1.0, 0.0]
    assert scores(accurate, answers(r"\boxed{2}", r"\boxed{3}")) == [1.0, 0.0]
    assert scores(judged, answers("a", "b")) == [4.5, 4.5]
    mixed = [*answers("abcde", "a"), *answers("abcde", "a", problem=TWO)]
    assert scores(of_math, mixed) == [0.5, 0.1, None, None]


def test_a_function_that_trl_ships_runs_from_its_module() -> None:
    pytest.importorskip("trl")
    shipped = load_function("trl.rewards.think_format_reward", messages=True)
    reward = RewardTerms(Coin(), [WeightedFunction(shipped)])
    found = [verdict.scores["think_format_reward"] for verdict in settled(reward, answers("<think>a</think>b", "b"))]
    assert found == [1.0, 0.0]


def trls_rewards(functions: list[Any], weights: list[float], given: list[Answer], normalize: bool) -> torch.Tensor:
    """What TRL's own trainer makes of these functions: its method, on a stand-in for the trainer."""
    trainer_of = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    loop = asyncio.new_event_loop()
    stand_in = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda value: value), state=None, environments=None,
        reward_funcs=functions, reward_processing_classes=[None] * len(functions), async_loop=loop,
        reward_func_names=[each.__name__ for each in functions], _log_completion_extra=None, _log_metric=None,
    )  # fmt: skip
    rows = [{"task": each.problem.columns["task"], "ground_truth": each.problem.answer} for each in given]  # type: ignore[index]
    calculate = trainer_of._calculate_rewards
    while hasattr(calculate, "__wrapped__"):
        calculate = calculate.__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["trl.trainer.grpo_trainer"]
        patch.setattr(module, "gather", lambda value: value)
        patch.setattr(module, "profiling_context", lambda *_: __import__("contextlib").nullcontext())
        prompts, texts = [each.problem.question for each in given], [each.text for each in given]
        found = calculate(stand_in, rows, prompts, texts, [list(each.token_ids) for each in given])
    loop.close()
    if normalize:
        grouped = found.view(-1, 4, len(functions))
        spread = module.nanstd(grouped, dim=1, keepdim=True)
        found = ((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (spread + 1e-4)).view(-1, len(functions))
    summed: torch.Tensor = (found * torch.tensor(weights)).nansum(dim=1)
    return summed


@pytest.mark.parametrize("normalize", [False, True])
def test_the_sum_is_that_of_trls_trainer(normalize: bool) -> None:
    functions, weights = [longer, accurate, of_math, of_code], [0.2, 1.0, 0.5, -0.3]
    given = [*answers("abc", r"\boxed{2}", "ab", "z"), *answers("a", "abc", r"\boxed{1, 3}", "", problem=TWO)]
    weighted = [WeightedFunction(function(each), weight) for each, weight in zip(functions, weights, strict=True)]
    reward = RewardTerms(Coin(), weighted, verifier_weight=0.0, normalize=normalize)
    ours = [verdict.reward for verdict in settled(reward, given, group_size=4)]
    assert ours == pytest.approx(trls_rewards(functions, weights, given, normalize).tolist(), rel=1e-5, abs=1e-6)
    assert len(set(ours)) > 4


def test_what_is_correct_is_the_verifiers_whatever_functions_give() -> None:
    verdicts = settled(terms(longer, weight=0.0), answers("2", "1234567"))
    assert [verdict.correct for verdict in verdicts] == [True, True]
    assert [verdict.reward for verdict in verdicts] == [1.0, 7.0]
    assert [verdict.scores["Coin"] for verdict in verdicts] == [1.0, 1.0]
    assert terms(longer).grade([(ONE, "333")]) == [Verdict(0.0, False)]


def test_a_completion_that_no_term_applies_to_has_no_advantage() -> None:
    assert totals([[1.0, 4.0, None]], [1.0], 3, False) == [1.0, 4.0, 2.5]
    assert totals([[0.1, 0.1, None]], [1.0], 3, False) == [0.1, 0.1, 0.1]
    assert totals([[None, None]], [1.0], 2, False) == [0.0, 0.0]
    assert totals([[0.0, 0.0], [None, 3.0]], [0.0, 1.0], 2, False) == [3.0, 3.0]


def test_a_normalised_term_without_differences_adds_none() -> None:
    assert totals([[0.1] * 3], [1.0], 3, True) == [0.0] * 3
    assert totals([[5.0]], [1.0], 1, True) == [0.0]


def test_a_function_notes_metrics_and_columns() -> None:
    def notes(completions: Any, log_extra: Any, log_metric: Any, trainer_state: Any) -> list[float]:
        log_extra("half", [text[: len(text) // 2] for text in completions])
        log_metric("step", trainer_state.global_step)
        return [0.0] * len(completions)

    reward = terms(notes)
    reward.at_step(Step(global_step=7))
    first, second = settled(reward, answers("abcd", "xy"))
    assert (first.extra, second.extra) == ({"half": "ab"}, {"half": "x"})
    assert first.scores["step"] == 7.0


def test_async_functions_run_side_by_side_and_inside_a_running_loop() -> None:
    met: list[str] = []

    async def waits(completions: Any) -> list[float]:
        while "other" not in met:
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def other(completions: Any) -> list[float]:
        met.append("other")
        return [2.0] * len(completions)

    async def notebook() -> list[Verdict]:
        return settled(terms(waits, other), answers("a", "b"))

    assert [verdict.reward for verdict in asyncio.run(asyncio.wait_for(notebook(), 20))] == [3.0, 3.0]


# -- columns -----------------------------------------------------------------------------------------------------------


def test_a_function_gets_columns_as_they_stand_in_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "it is #### 2", "task": "math", "unread": "x"}\n')

    def reads(completions: Any, task: Any, answer: Any, solution: Any, level: Any = None) -> list[float]:
        assert (task, answer, solution, level) == (["math"], ["it is #### 2"], ["2"], None)
        return [1.0]

    [problem] = load_problems(str(path), wants=terms(reads).wants_column).problems
    assert problem.columns == {"task": "math", "answer": "it is #### 2"}
    assert scores(reads, answers("a", problem=problem)) == [1.0]
    assert from_json(Problem, to_json(problem)).columns == problem.columns


def test_problems_keep_nothing_that_no_function_reads(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2", "task": "math"}\n')
    [problem] = load_problems(str(path), wants=terms(longer, tagged).wants_column).problems
    assert problem.columns is None
    assert "columns" not in to_json(problem)


def test_a_function_that_reads_its_kwargs_gets_every_column() -> None:
    def reads(completions: Any, **columns: Any) -> list[float]:
        return [float(columns["task"][0] == "math") for _ in completions]

    assert terms(reads).wants_column("task")
    assert not terms(reads).wants_column("prompt")
    assert scores(reads, answers("a", "b")) == [1.0, 1.0]


def test_messages_hold_the_earlier_turns() -> None:
    problem = Problem(
        "p", "And 3?", "3", turns=(Turn("system", "Be brief."), Turn("user", "2?"), Turn("assistant", "2"))
    )

    def asked(prompts: Any, completions: Any) -> list[float]:
        assert [turn["role"] for turn in prompts[0]] == ["system", "user", "assistant", "user"]
        assert completions == [[{"role": "assistant", "content": "3"}]]
        return [1.0]

    assert scores(asked, answers("3", problem=problem), messages=True) == [1.0]


def test_a_column_that_no_row_has_is_named_before_anything_is_sampled() -> None:
    with pytest.raises(RewardError, match=r"^reward: tests\.of_math: it needs the column task, which no row"):
        try_rewards(terms(of_math), [Problem("p", "?", "1")])
    try_rewards(terms(of_math), [Problem("p", "?", "1"), ONE])


# -- bad functions -----------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "None": (lambda n: None, "it gave None, where a list with a number or None for each completion is needed"),
    "a number": (lambda n: 1.0, "where a list with a number"),
    "too few": (lambda n: [1.0] * (n - 1), "it gave 1 values for 2 completions"),
    "too many": (lambda n: [1.0] * (n + 1), "it gave more than 2 values for 2 completions"),
    "text": (lambda n: ["1"] * n, "the value of a completion of p1 is '1' (builtins.str); a finite number or None"),
    "nan": (lambda n: [math.nan] * n, "the value of a completion of p1 is nan"),
    "inf": (lambda n: [0.0, torch.tensor(math.inf)], "the value of a completion of p1 is inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_list_of_numbers_is_refused_by_the_function(name: str) -> None:
    make, says = BAD[name]

    def bad(completions: Any) -> Any:
        return make(len(completions))

    async def later(completions: Any) -> Any:
        return make(len(completions))

    for each in (bad, later):
        with pytest.raises(RewardError, match=rf"^reward: tests\.{each.__name__}: ") as caught:
            settled(terms(each), answers("a", "b"))
        assert says in str(caught.value)
        with pytest.raises(RewardError):
            try_rewards(terms(each), [ONE])


def test_numbers_of_torch_and_numpy_count() -> None:
    assert scores(lambda completions: torch.tensor([0.5, 2.0]), answers("a", "b")) == [0.5, 2.0]  # type: ignore[arg-type]
    assert scores(lambda completions: [True, None], answers("a", "b")) == [1.0, None]  # type: ignore[arg-type]


def test_a_function_that_fails_is_named_with_the_problem_and_the_line() -> None:
    def fails(completions: Any) -> list[float]:
        raise KeyError("gold")

    async def fails_later(completions: Any) -> list[float]:
        raise KeyError("gold")

    for each in (fails, fails_later):
        with pytest.raises(
            RewardError, match=rf"tests\.{each.__name__}: .* of p1 failed with KeyError: 'gold' \(.*test_f"
        ):
            settled(terms(judged, each), answers("a", "b"))


def test_a_function_for_messages_says_which_key_gives_them() -> None:
    with pytest.raises(RewardError, match="takes messages: true"):
        try_rewards(terms(tagged), [ONE])


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("brevity", "is no function: module.function or path/to/file.py:function"),
        ("nowhere.brevity", "No module named 'nowhere'"),
        ("nowhere.py:brevity", "FileNotFoundError"),
        ("tests.verify.test_functions.nothing", "has no attribute 'nothing'"),
        ("tests.verify.test_functions.ONE", "is Problem("),
        ("tests.verify.test_functions.Coin", "a class that grades stands under class_path"),
    ],
)
def test_a_place_without_a_function_is_named(place: str, says: str) -> None:
    with pytest.raises(RewardError) as caught:
        load_function(place)
    assert str(caught.value).startswith("reward: fn: ")
    assert says in str(caught.value)


def test_a_file_is_run_once_for_all_its_functions(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("runs = []\ndef a(completions): return runs\ndef b(completions): return runs\n")
    a, b = (load_function(f"{path}:{name}").function for name in "ab")
    assert a([]) is b([])


def test_terms_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two terms are named longer"):
        terms(longer, longer)


def test_rollouts_hold_what_each_term_gave(student: Student) -> None:
    [group] = collect(student, HFEngine(), terms(longer), [ONE], 2, Sampling(4, 1.0, 1.0, 0))
    for rollout in group.rollouts:
        assert rollout.scores == {"Coin": float(rollout.correct), "longer": float(len(rollout.completion_ids))}
        assert rollout.reward == sum(rollout.scores.values())  # type: ignore[arg-type]
    [plain] = collect(student, HFEngine(), AnswerReward(), [ONE], 2, Sampling(4, 1.0, 1.0, 0))
    assert "scores" not in to_json(plain.rollouts[0])
