"""Real solutions: which equations in them are false, where attempts first slip, what long thoughts leave behind.

The counts are what this code finds; who changes it looks at the rows that a count lost or gained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from slmreason.data.files import local_rows
from slmreason.data.sources import as_set, load_problems
from slmreason.records import Diagnosis, Problem, Rollout, RolloutGroup
from slmreason.student import Student
from slmreason.supervision.critique import Critic, CritiqueSettings
from slmreason.teacher.dataset import TraceTeacher, tidy_trace, without_thoughts
from slmreason.teacher.rules import first_false_step
from slmreason.verify.answers import as_number, final_answer, is_correct
from slmreason.verify.equations import false_equations, read_equations
from slmreason.verify.rewards import AnswerReward

THOUGHT = "<|begin_of_thought|>\nHmm, 2 + 2 = 5? No.\n<|end_of_thought|>\n\n"
SOLUTION = "<|begin_of_solution|>\n2 + 2 = \\boxed{4}\n<|end_of_solution|>"


@lru_cache
def rows_of(file: Path) -> tuple[dict[str, Any], ...]:
    return tuple(row for _, row in local_rows(file))


# Equations ------------------------------------------------------------------------------------------------------------

SLIPS = [
    167, 168, 198, 224, 502, 1817, 2416, 3002, 3334, 3409, 4691, 4973,
    5195, 5350, 5781, 6157, 6256, 6700, 6713, 6760, 6812, 6842, 7178, 7444,
]  # fmt: skip
"""Rows of GSM8K's training set that miscalculate, such as `3/1=1` and `7+9+1+2 = $19.50`."""
RUN_ON = [3411]
"""`7 minutes x 60 seconds per minute = 420 seconds + 23 seconds = 443`: the sum goes on, and the sign is not true."""
LOST_UNIT = [716, 3859]
"""`5 * 3 = $15,000`, where 5 is in thousands, and `100 * 0.75 = $0.75`."""


def test_false_equations_of_gsm8k_are_real(real_data: Path) -> None:
    traces = [row["answer"] for row in rows_of(real_data / "gsm8k" / "train.jsonl.gz")]
    found = {i: [e.fault for e in read_equations(trace) if not e.holds] for i, trace in enumerate(traces)}
    assert [i for i, faults in found.items() if faults] == sorted([*SLIPS, *RUN_ON, *LOST_UNIT])
    assert found[502] == ["3/1 is 3, not 1 dollar."]
    assert found[5781] == ["7+9+1+2 is 19, not $19.50."]


def test_a_result_that_is_off_by_one_is_refused(real_data: Path) -> None:
    verdicts: Counter[bool] = Counter()
    for row in rows_of(real_data / "gsm8k" / "train.jsonl.gz")[::5]:
        for line in row["answer"].splitlines():
            for result in re.finditer(r">>(\d+)(?![\d.,/ ]*\d)", line):
                spoiled = line[: result.start(1)] + str(int(result[1]) + 1) + line[result.end() :]
                verdicts[bool(false_equations(tidy_trace(spoiled, "")))] += 1
    assert verdicts == {True: 4390, False: 167}  # the 35 more sum different things: `4 boys + 2 girls = 7 people`


@pytest.mark.parametrize(
    ("file", "column", "equations", "refused"),
    [
        ("gsm8k/test.jsonl.gz", "answer", 8588, 4),
        ("math500/test.jsonl.gz", "solution", 312, 0),
        ("teacher_traces/long_thought_math500.jsonl.gz", "response", 3742, 16),
    ],
)
def test_few_other_solutions_have_a_false_equation(
    real_data: Path, file: str, column: str, equations: int, refused: int
) -> None:
    found = [read_equations(row[column]) for row in rows_of(real_data / file)]
    assert sum(map(len, found)) == equations
    assert sum(any(not e.holds for e in one) for one in found) == refused


def test_right_and_wrong_model_solutions_differ_in_false_equations(real_data: Path) -> None:
    counts: Counter[tuple[bool, bool]] = Counter()
    for row in rows_of(real_data / "model_solutions" / "gsm8k_gpt3_4x1319.jsonl.gz"):
        counts[row["correct"], bool(false_equations(row["response"]))] += 1
    # The right ones that fall mostly round down (`11 / 5 = 2`), or say `$4.20 + $9.45 + $1.35 = $14.99`.
    assert counts == {(True, False): 1978, (True, True): 23, (False, False): 2983, (False, True): 292}


def test_the_solutions_of_math500_verify_and_hold(real_data: Path) -> None:
    problems = load_problems(f"math500={real_data / 'math500' / 'test.jsonl.gz'}").problems
    traces = TraceTeacher().solve(problems)
    assert sum(is_correct(t or "", p.answer) for t, p in zip(traces, problems, strict=True)) == 500
    assert [t for t in traces if false_equations(t or "")] == []


# First false steps ----------------------------------------------------------------------------------------------------


def test_the_first_false_step_is_named_and_explained() -> None:
    steps = ["There are 48 clips.", "Half of them: 48/2 = 25.", "48 + 25 = 74"]
    assert first_false_step(steps) == Diagnosis(2, "48/2 is 24, not 25.")
    assert first_false_step(steps[:1]) is None
    problem = Problem("p", "q", "72")
    assert TraceTeacher().locate([problem] * 2, ["\n\n".join(steps), "48 + 24 = 72"]) == [
        Diagnosis(2, "48/2 is 24, not 25."),
        None,
    ]


def test_slips_are_located_where_people_saw_the_first_error(real_data: Path) -> None:
    counts: Counter[str] = Counter()
    for row in rows_of(real_data / "processbench" / "gsm8k.jsonl.gz"):
        found, label = first_false_step(row["response"].split("\n\n")), row["first_error_step"] + 1
        is_right = "right" if label == 0 else "wrong"
        if found is None:
            counts[f"{is_right}, nothing found"] += 1
        else:
            place = "before" if found.wrong_step < label else "after" if found.wrong_step > label else "at"
            counts[f"{is_right}, found" + (f" {place} the label" if label else "")] += 1
    # Precision 17 of 19, recall 17 of 207: most errors are not of arithmetic. Both finds after the label are slips too.
    assert counts == {
        "right, nothing found": 193,
        "wrong, nothing found": 188,
        "wrong, found at the label": 17,
        "wrong, found after the label": 2,
    }


# Long thoughts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "solution"),
    [
        ("2 + 2 = 4", None),
        ("<think>Hmm.</think>\n4", "4"),
        ("Hmm.\n</think>\n4", "4"),
        ("<THINK>a</THINK><think>b</think> 4 ", "4"),
        (THOUGHT + SOLUTION, "2 + 2 = \\boxed{4}"),
        ("first: " + THOUGHT + "Or so.\n" + SOLUTION + "\nBye.", "2 + 2 = \\boxed{4}"),
        (THOUGHT + "4", "4"),
        (SOLUTION, "2 + 2 = \\boxed{4}"),
    ],
)
def test_the_solution_is_what_follows_the_thoughts(trace: str, solution: str | None) -> None:
    assert without_thoughts(trace) == solution


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        ("<think>2 + 2 = 4, so \\boxed{4}", "the block of thoughts never closes"),
        (THOUGHT + SOLUTION + "<think>Wait", "the block of thoughts never closes"),
        (THOUGHT + "<|begin_of_solution|>\n2 + 2", "the solution never closes"),
        (THOUGHT, "no solution follows the thoughts"),
    ],
)
def test_a_trace_that_was_cut_off_is_none_and_is_counted(trace: str, reason: str) -> None:
    for thoughts in ("drop", "keep"):
        teacher = TraceTeacher(thoughts)  # type: ignore[arg-type]
        assert teacher.solve([Problem("p", "q", "4", trace)]) == [None]
        assert [(r.id, r.reason, r.detail) for r in teacher.drain_rejects()] == [
            ("p", reason, {"characters": len(trace)})
        ]
        assert teacher.drain_rejects() == []


def test_thoughts_are_dropped_or_kept() -> None:
    problem = Problem("p", "q", "4", THOUGHT + SOLUTION)
    assert TraceTeacher().solve([problem]) == ["2 + 2 = \\boxed{4}"]
    assert TraceTeacher("keep").solve([problem]) == [THOUGHT + SOLUTION]
    # A model that gives no answer behind its thoughts is given none; a dataset's own solution is.
    assert TraceTeacher().solve([Problem("p", "q", "4", "<think>4</think>\nSo.")]) == ["So."]
    assert TraceTeacher().solve([Problem("p", "q", "4", "So.")]) == ["So.\nThe answer is \\boxed{4}."]
    assert tidy_trace("2+2=<<2+2=4>>4\n#### 4\nThe answer is: 4", "4") == "2+2=4\nThe answer is \\boxed{4}."
    with pytest.raises(ValueError, match="thoughts must be drop or keep, not 'cut'"):
        TraceTeacher("cut")  # type: ignore[arg-type]


def test_long_thoughts_verify_as_they_were_labelled(real_data: Path) -> None:
    rows = rows_of(real_data / "teacher_traces" / "long_thought_math500.jsonl.gz")
    # As in MATH-500 itself, gold answers that are lists count in any order.
    problems = [Problem(str(i), row["problem"], as_set(row["gold"]), row["response"]) for i, row in enumerate(rows)]
    dropping, keeping = TraceTeacher(), TraceTeacher("keep")
    solutions, whole = dropping.solve(problems), keeping.solve(problems)
    reasons = Counter(reject.reason for reject in dropping.drain_rejects())
    assert reasons == {"the block of thoughts never closes": 12}
    assert len(keeping.drain_rejects()) == 12

    marked = [i for i, row in enumerate(rows) if solutions[i] is not None and "<|" in row["response"]]
    assert len(marked) == 483  # five have no mark at all, and cannot be told from a plain solution
    verified = {i: is_correct(solutions[i] or "", problems[i].answer) for i in marked}
    assert sum(verified.values()) == 396
    # The label wants the same text: here it is `10080` for `10,\!080`, a matrix, a base or an `x \in` left out.
    disagree = {i: final_answer(solutions[i] or "") for i in marked if verified[i] != rows[i]["correct"]}
    assert sorted(disagree) == [175, 196, 309, 475, 476, 490, 496, 498]
    assert all(verified[i] for i in disagree)

    lengths = sorted((len(solutions[i] or ""), len(whole[i] or "")) for i in marked)
    assert lengths[len(lengths) // 2][0] == 10  # most solutions are the box alone
    assert sorted(long for _, long in lengths)[len(lengths) // 2] == 1557
    assert sum(bool(false_equations(solutions[i] or "")) for i in marked) == 0
    assert sum(bool(false_equations(whole[i] or "")) for i in marked) == 12


# Critiques by people --------------------------------------------------------------------------------------------------


class Person(TraceTeacher):
    """Knows where people saw the first error of an attempt; goes on with the gold solution's lines from there."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        super().__init__()
        self.rows = rows

    def locate(self, problems: Sequence[Problem], attempts: Sequence[str]) -> list[Diagnosis | None]:
        rows = [self.rows[int(problem.id)] for problem in problems]
        return [Diagnosis(row["human_first_error_step"], row["human_first_error_reason"]) for row in rows]

    def repair(
        self, problems: Sequence[Problem], prefixes: Sequence[str], diagnoses: Sequence[Diagnosis]
    ) -> list[str | None]:
        return [
            "\n".join((trace or "").splitlines()[diagnosis.wrong_step - 1 :]) or None
            for trace, diagnosis in zip(self.solve(problems), diagnoses, strict=True)
        ]


def failed_group(number: int, row: dict[str, Any]) -> RolloutGroup:
    problem = Problem(str(number), row["problem"], str(row["gold"]), row["gold_solution"])
    attempt = "\n".join(row["student_steps"])
    verdict = AnswerReward()(problem, attempt)
    rollout = Rollout((1,), (1,), (), attempt, verdict.reward, verdict.correct, False, 0)
    return RolloutGroup(problem, (rollout,))


def test_critiques_by_people_pass_or_are_rejected_with_a_fault(real_data: Path, student: Student) -> None:
    rows = rows_of(real_data / "mr_gsm8k" / "critiques.jsonl.gz")
    groups = [failed_group(number, row) for number, row in enumerate(rows)]
    # Others have `Let's think step by step.` for a gold answer.
    usable = [group for group in groups if as_number(group.problem.answer) is not None]
    # Of these, 23 attempts have the right answer by a wrong way: nothing that a harvest would hold.
    wrong = [group for group in usable if group.all_zero]
    assert (len(groups), len(usable), len(wrong)) == (851, 761, 738)
    critic = Critic(Person(rows), student, AnswerReward(), CritiqueSettings(max_trace_tokens=4096))
    records = critic.make(wrong)
    assert [record.problem.id for record in records] == [group.problem.id for group in wrong]
    kinds = Counter(kind for record in records for kind in record.kinds)
    assert kinds == {"diagnosis": 738, "new_trace": 722, "repair": 605}
    assert Counter(str(fault) for record in records for fault in record.rejected) == {
        "repair: no repair": 129,  # the gold solution has fewer lines than the attempt has steps before the error
        "repair: false equation: 900 - 100 = $8": 2,  # an attempt's own slips, before the error that people saw
        "repair: false equation: 74 - 5 = 70 inches": 1,
        "repair: false equation: $80 * 2 * 0.75 = $24": 1,
        "new_trace: no new trace": 16,  # the gold solution is empty
    }
    for record in records:
        assert len(record.kinds) + len(record.rejected) == 3
        assert record.attempt.startswith(record.prefix)


def test_slips_in_attempts_that_people_corrected(real_data: Path) -> None:
    places: Counter[str] = Counter()
    for row in rows_of(real_data / "mr_gsm8k" / "critiques.jsonl.gz"):
        found, label = first_false_step(row["student_steps"]), row["human_first_error_step"]
        step = found.wrong_step if found else None
        places["none" if step is None else "at" if step == label else "before" if step < label else "after"] += 1
    # The four before the label are slips that people overlooked, such as `74 - 5 = 70`.
    assert places == {"none": 647, "at": 153, "after": 47, "before": 4}
