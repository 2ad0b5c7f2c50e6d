"""Critique records: a group whose rollouts all failed becomes diagnosis, repair and a new trace.

Written against the teacher protocol; what the teacher says is verified here, and what falls is kept with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from slmreason.records import Critique, CritiqueKind, Diagnosis, Example, Problem, RolloutGroup
from slmreason.student import Student
from slmreason.supervision.bridge import check_trace
from slmreason.teacher.base import Teacher
from slmreason.verify.rewards import RewardFn, read_answer


@dataclass
class CritiqueSettings:
    """Which failures are critiqued, and into what."""

    attempts_per_problem: int = 2
    """At most this many failed attempts of a problem, each with a different wrong answer."""
    kinds: tuple[CritiqueKind, ...] = ("diagnosis", "repair", "new_trace")
    """The kinds of record that are made."""
    max_trace_tokens: int = 512
    """A longer repair or new trace is refused and counted."""
    records: str | None = None
    """File of `slmreason critique`, perhaps edited: its records are verified again and trained on by the next CFT."""
    max_per_kind: int | None = None
    """At most so many records of each kind in a CFT fit, the same number of each problem as far as it goes."""


def pick_attempts(group: RolloutGroup, limit: int) -> list[str]:
    """Failed, finished attempts of a group with different wrong answers, shortest first.

    An attempt that ran into the token limit is taken only when nothing else is there: its first wrong step is
    usually that it never ends.
    """
    by_answer: dict[str, str] = {}
    for rollout in sorted(group.rollouts, key=lambda r: (r.truncated, len(r.completion_ids), r.text)):
        if not rollout.correct and rollout.text.strip():
            by_answer.setdefault(read_answer(group.problem, rollout.text) or "", rollout.text)
    return list(by_answer.values())[:limit]


def prefix_before(attempt: str, wrong_step: int) -> str | None:
    """The attempt's own text before its `wrong_step`-th non-blank line, to the letter; None if there is none."""
    position, seen = 0, 0
    for line in attempt.splitlines(keepends=True):
        if line.strip():
            seen += 1
            if seen == wrong_step:
                return attempt[:position]
        position += len(line)
    return None


def critique(
    groups: Sequence[RolloutGroup],
    teacher: Teacher,
    student: Student,
    reward: RewardFn,
    settings: CritiqueSettings,
) -> list[Critique]:
    """Builds and verifies the critique of every picked attempt; one teacher call a kind for all of them."""
    pairs = [(g.problem, text) for g in groups for text in pick_attempts(g, settings.attempts_per_problem)]
    if not pairs:
        return []
    problems, attempts = [p for p, _ in pairs], [a for _, a in pairs]
    traces = teacher.new_trace(problems)
    diagnoses = teacher.locate(problems, attempts)
    prefixes = [
        prefix_before(attempt, d.wrong_step) if d else None for attempt, d in zip(attempts, diagnoses, strict=True)
    ]
    sound = [i for i, d in enumerate(diagnoses) if _diagnosis_fault(d, prefixes[i]) is None]
    answers = teacher.repair(
        [problems[i] for i in sound],
        [prefixes[i] or "" for i in sound],
        [d for i in sound if (d := diagnoses[i]) is not None],
    )
    student.count_written([*traces, *(d.explanation for d in diagnoses if d), *answers])
    repairs = dict(zip(sound, answers, strict=True))
    return [
        _assemble(
            problems[i], attempts[i], diagnoses[i], prefixes[i], repairs.get(i), traces[i], student, reward, settings
        )
        for i in range(len(pairs))
    ]


def recheck(record: Critique, student: Student, reward: RewardFn, settings: CritiqueSettings) -> Critique:
    """A record that a person may have edited, verified as if a teacher had said it."""
    prefix = record.prefix if record.attempt.startswith(record.prefix) else None
    return _assemble(
        record.problem, record.attempt, record.diagnosis, prefix, record.repair, record.new_trace, student, reward,
        settings,
    )  # fmt: skip


def _diagnosis_fault(diagnosis: Diagnosis | None, prefix: str | None) -> str | None:
    if diagnosis is None:
        return "no diagnosis"
    if diagnosis.verdict == "right":
        return "the diagnosis calls a wrong answer right"
    return "the diagnosis names a step that does not exist" if prefix is None else None


def _assemble(
    problem: Problem,
    attempt: str,
    diagnosis: Diagnosis | None,
    prefix: str | None,
    repair: str | None,
    new_trace: str | None,
    student: Student,
    reward: RewardFn,
    settings: CritiqueSettings,
) -> Critique:
    """Keeps what passes its check and notes why the rest fell."""

    def fault(text: str) -> str | None:
        return check_trace(problem, text, len(student.encode_target(text)), settings.max_trace_tokens, reward)

    faults: list[str] = []
    diagnosis_fault = _diagnosis_fault(diagnosis, prefix)
    if diagnosis_fault:
        faults.append(f"diagnosis: {diagnosis_fault}")
    repair_fault = None if diagnosis_fault else (fault((prefix or "") + repair) if repair else "no repair")
    if repair_fault:
        faults.append(f"repair: {repair_fault}")
    trace_fault = fault(new_trace) if new_trace else "no new trace"
    if trace_fault:
        faults.append(f"new_trace: {trace_fault}")
    return Critique(
        problem=problem,
        attempt=attempt,
        diagnosis=None if diagnosis_fault else diagnosis,
        prefix=prefix or "",
        repair=None if repair_fault else repair,
        new_trace=None if trace_fault else new_trace,
        rejected=tuple(faults),
    )


def critique_examples(record: Critique, student: Student, kinds: Sequence[CritiqueKind]) -> list[Example]:
    """The supervised examples of a critique record; the loss is on the targets alone."""
    examples = []
    for kind in record.kinds:
        if kind not in kinds:
            continue
        prompt, target = _render(kind, record, student)
        examples.append(Example(prompt, student.encode_target(target), record.problem.id, kind))
    return examples


def capped(examples: Sequence[Example], max_per_kind: int | None) -> list[Example]:
    """At most so many examples of each kind: first one of every problem, then a second of every problem, and so on."""
    if max_per_kind is None:
        return list(examples)
    turn: Counter[tuple[str, str]] = Counter()
    turns = []
    for index, example in enumerate(examples):
        turns.append((turn[example.origin, example.problem_id], index))
        turn[example.origin, example.problem_id] += 1
    kept: Counter[str] = Counter()
    chosen = []
    for _, index in sorted(turns):
        kept[examples[index].origin] += 1
        if kept[examples[index].origin] <= max_per_kind:
            chosen.append(index)
    return [examples[index] for index in sorted(chosen)]


def _render(kind: CritiqueKind, record: Critique, student: Student) -> tuple[tuple[int, ...], str]:
    problem = record.problem
    if kind == "new_trace" or record.diagnosis is None:
        return student.encode_problem(problem), record.new_trace or ""
    fields = {
        "question": problem.whole_question,
        "attempt": record.attempt,
        "prefix": record.prefix.rstrip(),
        "wrong_step": record.diagnosis.wrong_step,
        "explanation": record.diagnosis.explanation,
        "verdict": record.diagnosis.verdict,
    }
    if kind == "diagnosis":
        return student.encode_prompt(_template("diagnosis").render(fields)), _template("diagnosis_target").render(
            fields
        )
    return student.encode_prompt(_template("repair").render(fields)), record.repair or ""


@cache
def _environment() -> Environment:
    # Plain text for a language model, not HTML: nothing is escaped.
    loader = FileSystemLoader(Path(__file__).parent / "prompts")
    return Environment(loader=loader, undefined=StrictUndefined, autoescape=False)  # noqa: S701


def _template(name: str) -> Template:
    return _environment().get_template(f"{name}.jinja")
