"""Scores of a trace that rho is predicted from: as the Bridge scores it, and its final answer apart."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from slmreason.embedded.families import make_problems, rebuild, write_solution
from slmreason.student import Student
from slmreason.supervision.learnability import answer_span, score_traces, trace_scores


@pytest.fixture(scope="module")
def student() -> Student:
    return Student("embedded:qwen2", instruction="")


def test_scores_are_those_of_the_bridge_and_the_answers_are_its_tokens_alone(student: Student) -> None:
    problems = make_problems("chain", "train", 8)
    texts = [write_solution([step.text for step in rebuild(p.id).steps], p.answer) for p in problems]
    ours = trace_scores(problems, texts, student, token_budget=300)
    theirs = score_traces(problems, texts, student, token_budget=300)
    for problem, text, mine, other in zip(problems, texts, ours, theirs, strict=True):
        prompt, target = student.encode_problem(problem), student.encode_target(text)
        assert (mine.problem_id, mine.num_tokens, mine.cost) == (problem.id, len(target), len(prompt) + len(target))
        assert (mine.mean_nll, mine.rank_surprisal_ratio) == (other.mean_nll, other.rank_surprisal_ratio)
        start, end = answer_span(target, problem.answer, student.decode)
        assert student.decode(target[start:end]) == problem.answer
        with torch.no_grad():
            logits = student.network(torch.tensor([[*prompt, *target]])).logits[0].float().log_softmax(-1)
        each = [-float(logits[len(prompt) + place - 1, target[place]]) for place in range(start, end)]
        assert mine.answer_nll == pytest.approx(sum(each), rel=1e-4, abs=1e-4)


WORDS = ("The", "sum", "is", "12", "\n", "So", "1", "2", "dollars", ".")


def text_of(ids: Sequence[int]) -> str:
    return " ".join(WORDS[i] for i in ids).replace("1 2", "12").replace(" \n ", "\n").strip()


@pytest.mark.parametrize(
    ("answer", "span"),
    [("12", (6, 8)), ("dollars", (8, 9)), ("sum", (1, 2)), ("seven", (5, 10)), ("", (5, 10))],
    ids=["its last mention", "one token", "far from the end", "the last line where it is not there", "no answer"],
)
def test_the_answers_tokens_are_found_by_their_text(answer: str, span: tuple[int, int]) -> None:
    assert answer_span(range(len(WORDS)), answer, text_of) == span
