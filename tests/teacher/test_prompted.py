"""What a language model is asked, and how its answers are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from slmreason.embedded.families import make_problems
from slmreason.records import Diagnosis, Exemplar, Problem, Reject
from slmreason.teacher.prompted import (
    Answer,
    Conversation,
    Failure,
    LLMTeacher,
    Unusable,
    answer_text,
    read_diagnosis,
    read_repair,
    read_trace,
    without_prefix,
)

PROBLEM = Problem("p1", "Ann has 3 pens and gets 4. How many has she?", "7")
CHOICE = Problem("p2", "Who is tall? A) Ann B) Bob", "B", choices=("Ann", "Bob"))
SOLVED = "3 + 4 = 7\nThe answer is \\boxed{7}."


class Puppet(LLMTeacher):
    """Says what it is told to, and remembers what it was asked."""

    def __init__(
        self, say: Callable[[Conversation], str | Answer | Failure], prompts: dict[str, str] | None = None
    ) -> None:
        super().__init__(prompts)
        self.say = say
        self.asked: list[tuple[str, Conversation]] = []

    def chat(self, kind: str, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        self.asked += [(kind, conversation) for conversation in conversations]
        said = [self.say(conversation) for conversation in conversations]
        return [Answer(answer) if isinstance(answer, str) else answer for answer in said]

    @property
    def prompts(self) -> list[str]:
        return [conversation[0]["content"] for _, conversation in self.asked]


# -- what is asked --------------------------------------------------------------------------------------------------


def test_the_teacher_is_told_the_answer_where_it_is_needed_and_solves_without_it() -> None:
    teacher = Puppet(lambda _: SOLVED)
    problem = Problem("p", "A question of which the number does not tell.", "4711")
    teacher.solve([problem])
    teacher.new_trace([problem])
    teacher.rewrite([problem], ["raw"], [])
    teacher.locate([problem], ["a step"])
    teacher.repair([problem], [""], [Diagnosis(1, "No.")])
    assert [kind for kind, _ in teacher.asked if kind != "locate"] == ["solve", "new_trace", "bridge", "repair"]
    for kind, [message, *_] in teacher.asked:
        assert message["role"] == "user"
        assert problem.question in message["content"]
        assert ("JSON" if kind == "locate" else "\\boxed{") in message["content"]
    assert ["4711" in prompt for prompt in teacher.prompts] == [False, *[True] * (len(teacher.prompts) - 1)]


def test_a_rewrite_shows_the_raw_trace_and_the_students_own_solutions() -> None:
    teacher = Puppet(lambda _: SOLVED)
    exemplars = [Exemplar(CHOICE, " Ann > Bob\n\\boxed{A}\n")]
    assert teacher.rewrite([PROBLEM, PROBLEM], ["raw one", "raw two"], exemplars) == [SOLVED, SOLVED]
    for prompt, raw in zip(teacher.prompts, ("raw one", "raw two"), strict=True):
        assert prompt.index("Ann > Bob\n\\boxed{A}") < prompt.index(PROBLEM.question) < prompt.index(raw)
    teacher.rewrite([PROBLEM], ["raw"], [])
    assert "small model's own solutions" not in teacher.prompts[-1]


def test_steps_are_the_lines_that_are_not_blank_counted_from_one() -> None:
    teacher = Puppet(lambda _: '{"wrong_step": 2, "explanation": "3 + 4 is 7.", "verdict": "wrong"}')
    assert teacher.locate([PROBLEM], ["\n3 pens \n\n  3 + 4 = 8\nThe answer is \\boxed{8}.\n"]) == [
        Diagnosis(2, "3 + 4 is 7.", "wrong")
    ]
    assert "Step 1: 3 pens\nStep 2: 3 + 4 = 8\nStep 3: The answer is \\boxed{8}." in teacher.prompts[0]
    assert "3 steps" in teacher.prompts[0]


def test_a_repair_is_asked_with_the_prefix_and_the_explanation() -> None:
    teacher = Puppet(lambda _: SOLVED)
    teacher.repair([PROBLEM, PROBLEM], ["First 3.\n", ""], [Diagnosis(2, "4 is missing."), Diagnosis(1, "Begin!")])
    assert "Steps so far:\nFirst 3.\n\n" in teacher.prompts[0]
    assert "4 is missing." in teacher.prompts[0]
    assert "Steps so far:\n(none)\n\n" in teacher.prompts[1]


def test_options_are_answered_by_their_letter() -> None:
    teacher = Puppet(lambda _: "\\boxed{B}")
    assert teacher.solve([CHOICE, PROBLEM]) == ["\\boxed{B}"] * 2
    assert ["letter" in prompt for prompt in teacher.prompts] == [True, False]


def test_no_problem_is_no_question() -> None:
    teacher = Puppet(lambda _: SOLVED)
    assert (
        teacher.solve([]) == teacher.rewrite([], [], []) == teacher.locate([], []) == teacher.repair([], [], []) == []
    )
    assert teacher.asked == []


def test_a_question_of_broken_unicode_can_be_sent() -> None:
    [message] = Puppet(lambda _: SOLVED).conversation("solve", Problem("p", "half \ud83d a pair", "1"))
    assert "half ? a pair" in message["content"].encode("utf-8").decode()


# -- prompts of one's own -------------------------------------------------------------------------------------------


def test_a_prompt_is_replaced_by_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for step in steps %}[{{ loop.index }}] {{ step }}\n{% endfor %}{{ answer }}")
    teacher = Puppet(lambda _: '{"wrong_step": 1, "explanation": "x"}', {"locate": str(path)})
    teacher.locate([PROBLEM], ["a\nb"])
    teacher.solve([PROBLEM])
    assert teacher.prompts[0] == "[1] a\n[2] b\n7"
    assert teacher.prompts[1].startswith("Solve this problem.")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("locate", "{{ question }} {{ stepz }}", "locate: .*mine.jinja: .*'stepz'; there are answer, attempt"),
        ("solve", "{{ trace }}", "solve: .*'trace'; there are answer, choices, question"),
        ("solve", "{% if choices %}{{ nowhere }}{% endif %}", "solve: .*'nowhere'"),
        ("bridge", "{{ exemplars[0].text }}", "bridge: .*has no attribute 'text'"),
        ("bridge", "{{ exemplars[0].question }}", "bridge: .*no element 0"),
        ("repair", "{% for %}", "repair: "),
        ("solve", "{{ question.__class__.__mro__ }}", "solve: .*unsafe"),
        ("solve", None, "solve: .*mine.jinja.*No such file"),
        ("sove", "x", "there is no prompt 'sove'; there are solve, bridge, locate, repair, new_trace"),
    ],
)
def test_a_wrong_prompt_is_refused_at_once(tmp_path: Path, kind: str, text: str | None, words: str) -> None:
    path = tmp_path / "mine.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"teacher.prompts.*{words}"):
        Puppet(lambda _: "", {kind: str(path)})


def test_what_would_be_asked_is_known_before_it_is() -> None:
    teacher = Puppet(lambda _: SOLVED)
    teacher.solve([PROBLEM])
    assert teacher.expected("solve", [PROBLEM]) == [teacher.asked[0][1]]
    for method in ("rewrite", "locate", "repair", "new_trace"):
        assert all(PROBLEM.question in c[0]["content"] for c in teacher.expected(method, [PROBLEM, PROBLEM]))
    with pytest.raises(ValueError, match="no method 'bridge'; there are solve, locate, repair, new_trace, rewrite"):
        teacher.expected("bridge", [])


# -- what cannot be used is asked for once more ---------------------------------------------------------------------


def test_what_cannot_be_read_is_asked_for_once_more_with_the_reason() -> None:
    answers = iter(["no box", SOLVED])
    teacher = Puppet(lambda _: next(answers))
    assert teacher.solve([PROBLEM]) == [SOLVED]
    assert teacher.drain_rejects() == []
    _, again = teacher.asked[1]
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "no box"
    assert "no final answer in \\boxed{}" in again[2]["content"]


def test_every_problem_is_answered_or_set_aside_in_order() -> None:
    problems = make_problems("chain", "train", 60)
    fates = {p.question: ("good", "bad", "bad then good", "failed", "cut off", "empty")[i % 6]
             for i, p in enumerate(problems)}  # fmt: skip

    def say(conversation: Conversation) -> str | Answer | Failure:
        [(question, fate)] = [(q, f) for q, f in fates.items() if q in conversation[0]["content"]]
        good = f"{question} \\boxed{{1}}"
        if fate == "failed":
            return Failure("the line is dead")
        if fate == "cut off":
            return Answer(good, truncated=True)
        return {"bad": "?", "empty": " "}.get(fate, good if fate == "good" or len(conversation) > 1 else "?")

    teacher = Puppet(say)
    answers = teacher.new_trace(problems)
    for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
        assert answer == (f"{problem.question} \\boxed{{1}}" if i % 6 in (0, 2) else None)
    rejects = teacher.drain_rejects()
    assert [reject.id for reject in rejects] == [p.id for p, a in zip(problems, answers, strict=True) if a is None]
    assert {reject.where for reject in rejects} == {"teacher new_trace"}
    assert {reject.reason for reject in rejects} == {
        "there is no final answer in \\boxed{}", "the line is dead", "the answer was cut off at the token limit",
        "the answer is empty",
    }  # fmt: skip
    assert rejects[0] == Reject(problems[1].id, "teacher new_trace", rejects[0].reason, {"answer": "?"})
    assert teacher.drain_rejects() == []
    assert len(teacher.asked) == 60 + 30  # bad, bad then good and empty once more; failed and cut off not


# -- thoughts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "answer",
        "<think>hm</think>answer",
        "<think>\nhm\n</think>\n\nanswer\n",
        "opened by the template </think> answer",
        "<think>a<think>b</think>c</think>answer",
        "<think>one</think><thinking>two</thinking>answer",
        "<Reasoning>hm</Reasoning>answer",
        "<|begin_of_thought|>hm<|end_of_thought|>\n<|begin_of_solution|>answer<|end_of_solution|>",
    ],
)
def test_thoughts_are_dropped(text: str) -> None:
    assert answer_text(Answer(text)) == "answer"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<think>it is 7, \\boxed{7}", "never closes"),
        ("<think>a</think>b <think>c", "never closes"),
        ("<|begin_of_thought|>hm", "never closes"),
        ("<think>all of it</think>", "no solution follows"),
        ("  \n", "empty"),
    ],
)
def test_thoughts_alone_are_no_answer(text: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        answer_text(Answer(text))


# -- traces and repairs ---------------------------------------------------------------------------------------------


def test_a_trace_needs_a_final_answer_and_loses_its_fence() -> None:
    assert read_trace(f"```text\n{SOLVED}\n```") == SOLVED
    for text in ("it is 7", "\\boxed{7", "\\boxed{ }"):
        with pytest.raises(Unusable, match="boxed"):
            read_trace(text)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("c\n\\boxed{1}", "c\n\\boxed{1}"),
        ("a = 1\nb = 2\nc\n\\boxed{1}", "c\n\\boxed{1}"),
        ("a=1\n\n  b  = 2\n\nc\n\\boxed{1}", "c\n\\boxed{1}"),
        ("Step 1: a = 1\nStep 2: b = 2\nStep 3: c\n\\boxed{1}", "Step 3: c\n\\boxed{1}"),
        ("1. a = 1\n2. b = 2\nc\n\\boxed{1}", "c\n\\boxed{1}"),
        ("b = 2\nc\n\\boxed{1}", "c\n\\boxed{1}"),
        ("a = 1\nc\n\\boxed{1}", "a = 1\nc\n\\boxed{1}"),
    ],
)
def test_a_repair_loses_the_steps_that_it_repeats(said: str, kept: str) -> None:
    assert read_repair(said, "a = 1\n\nb = 2\n") == kept
    assert read_repair(said, "") == said


def test_a_repair_that_only_repeats_is_none() -> None:
    with pytest.raises(Unusable, match="does not go on"):
        read_repair("a\n\\boxed{1}", "a\n\\boxed{1}\n")
    with pytest.raises(Unusable, match="no final answer"):
        read_repair("\\boxed{1}\nb", "\\boxed{1}\n")
    assert without_prefix("a\na\nb", "a\na\n") == "b"


# -- JSON as models write it ----------------------------------------------------------------------------------------

GOOD = {"wrong_step": 2, "explanation": "3 + 4 is 7.", "verdict": "wrong"}
TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        json.dumps(GOOD, indent=2),
        f"```json\n{TEXT}\n```",
        f"Let me see: {{the steps}}. The object is {TEXT}, I think. {{Done}}",
        f'First I thought {{"wrong_step": 1, "explanation": "no"}}, but no: {TEXT}',
        '{"wrong_step": 2, "explanation": "3 + 4 is 7.", "verdict": "wrong",}',
        '{"wrong_step": "2", "explanation": "3 + 4 is 7.", "verdict": "Wrong"}',
        '{"wrong_step": "Step 2", "explanation": "3 + 4 is 7.", "verdict": "incorrect"}',
        '{"wrong_step": 2.0, "explanation": " 3 + 4 is 7.\\n", "verdict": false}',
        '{"wrong_step": 2, "explanation": "3 + 4 is 7."}',
        f'{{"diagnosis": {TEXT}, "confidence": [0.9,],}}',
        f'[{TEXT}]',
    ],
)  # fmt: skip
def test_a_diagnosis_is_read_however_it_is_wrapped(text: str) -> None:
    assert read_diagnosis(text, 3) == Diagnosis(2, "3 + 4 is 7.", "wrong")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"it is \frac{1}{2}, not \boxed{3}", r"it is \frac{1}{2}, not \boxed{3}"),
        (r"2 \times 3 \neq 5, \(x\), 50\%", r"2 \times 3 \neq 5, \(x\), 50\%"),
        (r"\\frac{1}{2} and \"so\" on", '\\frac{1}{2} and "so" on'),
        (r"one\nTwo\tthree \u00e9 \underline{x}", "one\nTwo\tthree é \\underline{x}"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_latex_in_an_explanation_survives(written: str, meant: str) -> None:
    assert read_diagnosis(f'{{"wrong_step": 1, "explanation": "{written}"}}', 1).explanation == meant


def test_an_attempt_may_be_called_right() -> None:
    assert read_diagnosis('{"wrong_step": 0, "explanation": "", "verdict": "right"}', 3).verdict == "right"
    assert read_diagnosis('{"wrong_step": null, "verdict": true}', 3).verdict == "right"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Step 2 is wrong.", "no JSON object .* there is none"),
        ('{"wrong_step": 2, "explanation": "it is', "Unterminated string"),
        ("{'wrong_step': 2}", "property name enclosed in double quotes"),
        ('{"step": 2}', "no JSON object with the key wrong_step can be read$"),
        ('{"wrong_step": 4, "explanation": "x"}', "wrong_step is 4, where a step from 1 to 3"),
        ('{"wrong_step": 0, "explanation": "x", "verdict": "wrong"}', "wrong_step is 0"),
        ('{"wrong_step": -1, "explanation": "x"}', "wrong_step is -1"),
        ('{"wrong_step": 1.5, "explanation": "x"}', "wrong_step is 1.5"),
        ('{"wrong_step": true, "explanation": "x"}', "wrong_step is True"),
        ('{"wrong_step": null, "explanation": "x"}', "wrong_step is None"),
        ('{"wrong_step": [2], "explanation": "x"}', r"wrong_step is \[2\]"),
        ('{"wrong_step": "the second", "explanation": "x"}', "the second"),
        ('{"wrong_step": 1, "explanation": " "}', "explanation is missing"),
        ('{"wrong_step": 1}', "explanation is missing"),
        ('{"wrong_step": 1, "explanation": "x", "verdict": "maybe"}', "the verdict is 'maybe'"),
        ("{" * 5000, "no JSON object"),
        ('{"a":' * 5000, "no JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_diagnosis_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        read_diagnosis(text, 3)
