"""What the student samples with help: who is served, what is rejected, what it costs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slmreason.embedded.families import make_problems
from slmreason.records import BridgeCandidate, BridgeResult, Problem, Tokens, Trace
from slmreason.rollout.engine import PromptLimit, Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run.journal import Journal
from slmreason.run.progress import Watch
from slmreason.student import Student
from slmreason.supervision.bridge import Bridge, Material
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.rewards import AnswerReward
from tests.supervision.scripted import ScriptedEngine
from tests.supervision.solutions import true_solution

SHOWN = "Here is a worked solution"
SAMPLING = Sampling(80, temperature=0.0, seed=5)


def dataset(count: int, steps: int = 4) -> list[Problem]:
    """Problems whose solution came with them: so many steps and the answer."""
    problems = make_problems("chain", "train", count, (steps,))
    return [replace(problem, trace=true_solution(problem)) for problem in problems]


def spelled_out(problem: Problem) -> Problem:
    """The problem with a solution that says as much in another way than the embedded student's."""
    *steps, last = true_solution(problem).splitlines()
    return replace(problem, trace="\n".join([*(f"So {step}" for step in steps), last]))


def settings(**values: Any) -> BridgeSettings:
    return BridgeSettings(max_trace_tokens=400, handover_search=True, **values)


def bridge_of(student: Student, engine: Any, chosen: BridgeSettings) -> Bridge:
    return Bridge(student, engine, TraceTeacher(), AnswerReward(), chosen)


def reworded(problem: Problem) -> str:
    """A right solution in other words than the dataset's."""
    return f"We go step by step.\nThe answer is \\boxed{{{problem.answer}}}."


def handed(problem: Problem, prompt: str) -> int | None:
    """Steps of its solution with which the prompt of a problem ends; None where it is another's, or shows all."""
    if problem.question not in prompt or SHOWN in prompt:
        return None
    lines = true_solution(problem).splitlines()
    answer = prompt.rpartition(problem.question)[2]
    return sum(line in answer for line in lines)


def asked(problems: list[Problem], texts: list[str]) -> list[tuple[Problem, str]]:
    """Each prompt with its problem."""
    return [(problem, text) for text in texts for problem in problems if problem.question in text]


class Says:
    """A student that ends right behind so many steps of its problem, and else goes wrong; `alone` when it is shown."""

    def __init__(self, problems: list[Problem], needs: list[int], alone: str = "The answer is \\boxed{-1}.") -> None:
        self.problems, self.needs, self.alone = problems, needs, alone

    def __call__(self, prompt: str, number: int) -> str:
        [(problem, need)] = [pair for pair in zip(self.problems, self.needs, strict=True) if pair[0].question in prompt]
        if SHOWN in prompt:
            return self.alone.replace("ANSWER", problem.answer)
        steps = handed(problem, prompt)
        assert steps is not None
        return reworded(problem) if steps >= need else f"So {number}.\nThe answer is \\boxed{{-1}}."


def kept(result: BridgeResult, provenance: str) -> list[BridgeCandidate]:
    return [c for c in result.candidates if c.trace.provenance == provenance]


def test_the_least_help_that_ends_right_is_found_for_all_problems_side_by_side(student: Student) -> None:
    problems = dataset(3)
    lines = len(true_solution(problems[0]).splitlines())
    assert lines == 5
    engine = ScriptedEngine(Says(problems, [1, 2, 3]))
    results = bridge_of(student, engine, settings(handover_samples=2)).make(problems, SAMPLING)
    steps = [[handed(problem, text) for problem, text in asked(problems, texts)] for texts, *_ in engine.calls]
    # 3 ends right for all, 2 for two of them, so the third is sampled again; then 1 for the first alone.
    assert steps == [[3, 3, 3], [2, 2, 2], [2], [1, 1], [1]]
    assert {samples for _, samples, _ in engine.calls} == {1}
    assert {(sampling.temperature, sampling.seed) for *_, sampling in engine.calls} == {(0.7, 5)}
    assert [sampling.first for *_, sampling in engine.calls] == [0, 0, 1, 0, 1]
    for result, need in zip(results, [1, 2, 3], strict=True):
        passed = [c.trace.text for c in kept(result, "handover") if c.rejected is None]
        first = true_solution(result.problem).splitlines()[:need]
        assert "\n".join([*first, reworded(result.problem)]) in passed
        assert all("boxed{-1}" not in text for text in passed)


def test_only_a_problem_without_a_verified_trace_but_the_raw_one_is_sampled_for(student: Student) -> None:
    problems = dataset(2)
    own = Trace(problems[0].id, reworded(problems[0]), "self")
    engine = ScriptedEngine(Says(problems, [1, 1]))
    bridge = bridge_of(student, engine, settings(rationalise=2))
    results = bridge.make(problems, SAMPLING, Material(traces=[own]))
    assert all(problems[1].question in text for texts, *_ in engine.calls for text in texts)
    assert [c.trace.provenance for c in results[0].candidates] == ["teacher", "self"]
    assert kept(results[1], "handover")
    assert not kept(results[1], "rationalised")  # a hand-over ended right


def test_who_no_hand_over_serves_is_shown_the_solution_and_trained_on_the_plain_question(student: Student) -> None:
    problems = dataset(2)
    engine = ScriptedEngine(Says(problems, [1, 9], alone="We go step by step.\nThe answer is \\boxed{ANSWER}."))
    results = bridge_of(student, engine, settings(rationalise=3)).make(problems, SAMPLING)
    [(texts, samples, _)] = [call for call in engine.calls if SHOWN in call[0][0]]  # its first passes: no second
    assert samples == 1
    [text] = texts
    assert problems[1].question in text
    assert true_solution(problems[1]) in text
    [candidate] = kept(results[1], "rationalised")
    assert candidate.rejected is None
    assert candidate.trace.text == reworded(problems[1])
    assert candidate.trace.learnability is not None
    scored = bridge_of(student, engine, BridgeSettings(max_trace_tokens=400, handover=False))
    again = scored.make(problems[1:], SAMPLING, Material(traces=[replace(candidate.trace, learnability=None)]))
    assert kept(again[0], "rationalised")[0].trace.learnability == candidate.trace.learnability


def test_a_continuation_that_says_what_the_solution_says_ended_right_and_is_no_candidate(student: Student) -> None:
    [problem] = dataset(1, steps=6)
    lines = true_solution(problem).splitlines()
    tried: list[int] = []

    def says(prompt: str, number: int) -> str:
        steps = handed(problem, prompt)
        assert steps is not None
        tried.append(steps)
        return "\n".join(lines[steps:])

    [result] = bridge_of(student, ScriptedEngine(says), settings(handover_samples=1)).make([problem], SAMPLING)
    assert tried == [5, 3, 2, 1]  # less and less help
    assert [c.trace.provenance for c in result.candidates] == ["teacher"]


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("COPY", "copies the solution it was shown"),
        ("Let us see.\nCOPY", "copies the solution it was shown"),
        ("As the given solution says:\nThe answer is \\boxed{ANSWER}.", "speaks of the solution it was shown"),
        ("In my own words:\nThe answer is \\boxed{ANSWER}.", "speaks of the solution it was shown"),
        ("2 + 2 = 5\nThe answer is \\boxed{ANSWER}.", "false equation"),
        ("The answer is \\boxed{-1}.", "final answer does not verify"),
    ],
)
def test_what_a_student_says_of_a_shown_solution_is_rejected_with_its_fault(
    student: Student, said: str, fault: str
) -> None:
    problems = dataset(1)
    script = Says(problems, [9], alone=said.replace("COPY", true_solution(problems[0]).replace("\n", "\n\n")))
    results = bridge_of(student, ScriptedEngine(script), settings(rationalise=1)).make(problems, SAMPLING)
    [candidate] = kept(results[0], "rationalised")
    assert candidate.rejected is not None
    assert candidate.rejected.kind == fault
    assert results[0].chosen is not None
    assert results[0].chosen.provenance == "teacher"


def test_a_completion_that_does_not_end_is_no_candidate(student: Student) -> None:
    problems = dataset(1)
    engine = ScriptedEngine(lambda prompt, number: "")
    [result] = bridge_of(student, engine, settings(rationalise=1)).make(problems, SAMPLING)
    assert [c.trace.provenance for c in result.candidates] == ["teacher"]
    assert student.tokens.sampled == 80 * (4 + 1 + 4)  # behind 3 steps, shown the solution, behind 2 steps


def test_of_what_passed_the_lowest_rank_surprisal_ratio_is_chosen(student: Student) -> None:
    problems = [spelled_out(problem) for problem in dataset(6)]
    results = bridge_of(student, HFEngine(), settings(handover_samples=4, temperature=1.0)).make(problems, SAMPLING)
    several = [r for r in results if sum(c.rejected is None for c in r.candidates) > 1]
    assert several
    for result in several:
        scores = {c.trace: c.trace.learnability for c in result.candidates if c.rejected is None}
        ratio = {t: s.rank_surprisal_ratio for t, s in scores.items() if s is not None and s.mean_nll <= 3}
        assert len(scores) == sum(s is not None for s in scores.values())
        assert result.chosen == min(ratio, key=lambda trace: ratio[trace])
    assert any(r.chosen is not None and r.chosen.provenance == "handover" for r in several)


def test_the_budget_ends_the_sampling_and_says_so(
    student: Student, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmreason.supervision.sampled.log.parent.propagate", True)
    problems = dataset(8)
    wanted = settings(handover_samples=1, rationalise=2)
    free = ScriptedEngine(Says(problems, [9] * 8))
    bridge_of(student, free, wanted).make(problems, SAMPLING)
    whole = student.tokens.sampled
    assert len(free.calls) == 4  # without a budget each kind and try is one batch
    assert "max_sampled_tokens" not in caplog.text
    student.tokens = Tokens()
    capped = ScriptedEngine(Says(problems, [9] * 8))
    caplog.set_level("INFO", logger="slmreason")
    bridge_of(student, capped, replace(wanted, max_sampled_tokens=20)).make(problems, SAMPLING)
    longest = max(len(student.encode_target("So 1.\nThe answer is \\boxed{-1}.")), 1)
    assert 160 <= student.tokens.sampled <= 160 + 2 * longest < whole
    said = f"bridge.max_sampled_tokens, 20 a problem, ended the sampling after {student.tokens.sampled} tokens; 8 of 8"
    assert said in caplog.text


@pytest.mark.parametrize(("passes_at", "tried"), [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_a_solution_is_rationalised_until_one_passes(student: Student, passes_at: int, tried: int) -> None:
    [problem] = dataset(1, steps=1)  # too short to hand over
    engine = ScriptedEngine(lambda prompt, number: "")
    said = iter(["The answer is \\boxed{-1}."] * passes_at + [reworded(problem)] * 3)
    engine.script = lambda prompt, number: next(said)
    [result] = bridge_of(student, engine, settings(rationalise=3)).make([problem], SAMPLING)
    assert [sampling.first for *_, sampling in engine.calls] == list(range(tried))
    assert result.chosen is not None
    assert any(each.rejected is None for each in kept(result, "rationalised")) == (passes_at < 3)


def test_all_that_can_be_served_are_before_less_help_is_looked_for(student: Student) -> None:
    problems = dataset(4, steps=6)
    needs = [1, 4, 9, 9]
    engine = ScriptedEngine(Says(problems, needs, alone="We go step by step.\nThe answer is \\boxed{ANSWER}."))
    bridge_of(student, engine, settings(handover_samples=1, rationalise=1)).make(problems, SAMPLING)
    steps = [[handed(problem, text) for problem, text in asked(problems, texts)] for texts, *_ in engine.calls]
    assert steps == [[5, 5, 5, 5], [None, None], [3, 3], [2, 4], [1]]  # what was rationalised needs no help


def test_what_is_not_served_yet_has_the_next_tokens(student: Student) -> None:
    served, confused = problems = dataset(2, steps=6)

    def says(prompt: str, number: int) -> str:
        [(problem, _)] = asked(problems, [prompt])
        return reworded(problem) if problem is served or handed(problem, prompt) == 3 else "So.\nThe answer is 0."

    engine = ScriptedEngine(says)
    bridge_of(student, engine, settings(handover_samples=1)).make(problems, SAMPLING)
    assert [problem.id for problem, _ in asked(problems, engine.calls[0][0])] == [served.id, confused.id]
    assert [problem.id for problem, _ in asked(problems, engine.calls[1][0])] == [confused.id, served.id]


def test_help_that_is_too_long_is_said_once_and_less_is_tried(
    student: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("slmreason.supervision.sampled.log.warning", lambda text, *args: said.append(text % args))
    problems = dataset(2, steps=6)
    lines = [true_solution(problem).splitlines() for problem in problems]
    longest = max(
        len(student.encode_problem(problem) + student.chat.text("\n".join(mine[:3]) + "\n"))
        for problem, mine in zip(problems, lines, strict=True)
    )
    limit = PromptLimit(longest, "rollout.max_tokens = 96")
    monkeypatch.setattr("slmreason.supervision.sampled.prompt_limit", lambda *args: limit)
    engine = ScriptedEngine(Says(problems, [1, 9]))
    bridge_of(student, engine, settings(handover_samples=2)).make(problems, SAMPLING)
    assert said == [
        "bridge: some hand-overs of 2 of 2 problems are not tried, the steps are too long: "
        "rollout.max_tokens = 96; lower bridge.max_trace_tokens"
    ]
    assert [handed(problem, text) for problem, text in asked(problems, engine.calls[0][0])] == [3, 3]


def test_a_student_that_the_most_help_confuses_is_given_less(student: Student) -> None:
    [problem] = dataset(1, steps=6)
    tried: list[int] = []

    def says(prompt: str, number: int) -> str:
        steps = handed(problem, prompt)
        assert steps is not None
        tried.append(steps)
        return reworded(problem) if steps == 3 else ""

    [result] = bridge_of(student, ScriptedEngine(says), settings(handover_samples=1)).make([problem], SAMPLING)
    assert tried == [5, 3, 2]
    assert any(each.rejected is None for each in kept(result, "handover"))


def test_a_problem_is_watched_once_with_all_its_tokens(student: Student) -> None:
    problems = dataset(3)
    watch = Watch("traces", 3, 80)
    bridge_of(student, ScriptedEngine(Says(problems, [9] * 3)), settings(rationalise=2)).make(
        problems, SAMPLING, watch=watch
    )
    assert (watch.completions, watch.tokens) == (3, student.tokens.sampled)


def test_a_run_that_goes_on_makes_the_same(student: Student, tmp_path: Path) -> None:
    problems = [spelled_out(problem) for problem in dataset(6)]
    wanted = settings(handover_samples=2, rationalise=2, temperature=1.0, max_sampled_tokens=150)

    def traces(folder: Path, dies_after: int | None = None) -> tuple[list[BridgeResult], int]:
        student.tokens = Tokens()
        journal = Journal(folder, list, lambda: student.tokens)
        journal.open()
        made: list[int] = []

        def make(chunk: list[Problem]) -> list[BridgeResult]:
            if len(made) == dies_after:
                raise KeyboardInterrupt
            made.append(len(chunk))
            return bridge_of(student, HFEngine(), wanted).make(chunk, SAMPLING)

        return journal.chunks("key", problems, make, BridgeResult, size=2), student.tokens.sampled

    whole = traces(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        traces(tmp_path / "cut", dies_after=2)
    assert traces(tmp_path / "cut") == whole
    assert whole[1] > 0
    assert any(kept(result, "handover") for result in whole[0])


def test_what_is_drawn_does_not_depend_on_who_else_is_asked(student: Student) -> None:
    problems = [spelled_out(problem) for problem in dataset(4)]
    bridge = bridge_of(student, HFEngine(), settings(handover_samples=2, rationalise=2, temperature=1.0))
    together = bridge.make(problems, SAMPLING)
    apart = [bridge.make([problem], SAMPLING)[0] for problem in problems]
    texts = [[[c.trace.text for c in result.candidates] for result in results] for results in (together, apart)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("values", [{}, {"raw": "last"}, {"rationalise": 2}, {"raw": "last", "max_sampled_tokens": 9}])
def test_what_is_not_bridged_has_its_raw_trace_under_all_settings(student: Student, values: dict[str, Any]) -> None:
    problems = dataset(2)
    engine = ScriptedEngine(Says(problems, [1, 1]))
    results = bridge_of(student, engine, settings(**values)).raw().make(problems, SAMPLING)
    assert [[c.trace.provenance for c in result.candidates] for result in results] == [["teacher"], ["teacher"]]
    assert all(result.chosen is not None for result in results)
    assert not engine.calls


def test_the_prompt_has_the_turns_before_the_question_and_the_students_instruction() -> None:
    student = Student("embedded:qwen2", instruction="Answer in a box.")
    [problem] = dataset(1)
    engine = ScriptedEngine(Says([problem], [9]))
    bridge_of(student, engine, settings(rationalise=1)).make([problem], SAMPLING)
    [text] = next(texts for texts, *_ in engine.calls if SHOWN in texts[0])
    assert re.search(r"do not copy its sentences\.\s*Answer in a box\.", text)
