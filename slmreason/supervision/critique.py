"""Critique records: a group whose rollouts all failed becomes diagnosis, repair and a new trace.

Written against the teacher protocol; what the teacher says is verified here, and what is rejected is kept as a fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slmreason.records import Critique, CritiqueKind, Diagnosis, Example, Fault, Problem, RolloutGroup
from slmreason.student import Student
from slmreason.supervision.checks import NO_NEW_TRACE, NO_REPAIR, diagnosis_fault, trace_fault
from slmreason.supervision.templates import template
from slmreason.supervision.written import count_written
from slmreason.teacher.base import Teacher
from slmreason.teacher.procedural import split_steps
from slmreason.verify.rewards import RewardFn, read_answer

OWN_NUMBER = re.compile(r"[\W_]*(step\s*\d|\d+[.):](?!\d))", re.IGNORECASE)
"""How a line begins that has a number of its own: `3.`, `3)`, `**Step 3**`."""


@dataclass
class CritiqueSettings:
    """Which failures are critiqued, and into what."""

    attempts_per_problem: int = 2
    """At most this many failed attempts of a problem, each with a different wrong answer."""
    kinds: tuple[CritiqueKind, ...] = ("diagnosis", "repair", "new_trace")
    """The kinds of record that are made."""
    max_trace_tokens: int = 512
    """A longer repair or new trace is rejected and counted."""
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


def named_step(attempt: str, wrong_step: int) -> str:
    """What a diagnosis calls a step: `Step 3` where each line is a step, else `The step "34 - 24 = 20"`.

    A reader counts the steps of a list by the list's own numbers, and would take the fourth line for another step.
    """
    lines = split_steps(attempt)
    if any(OWN_NUMBER.match(line) or not re.search(r"\w", line) for line in lines):
        return f'The step "{lines[wrong_step - 1]}"'
    return f"Step {wrong_step}"


@dataclass
class Draft:
    """What a teacher says of one failed attempt, before it is verified."""

    problem: Problem
    attempt: str
    diagnosis: Diagnosis | None
    prefix: str | None
    """The attempt before the step that the diagnosis names; None where there is no such step."""
    new_trace: str | None
    repair: str | None = None


class Critic:
    """Has a teacher critique failed attempts, and verifies what it says."""

    def __init__(self, teacher: Teacher, student: Student, reward: RewardFn, settings: CritiqueSettings) -> None:
        self.teacher, self.student, self.reward, self.settings = teacher, student, reward, settings

    def make(self, groups: Sequence[RolloutGroup]) -> list[Critique]:
        """The verified critique of every picked attempt; one teacher call a kind for all of them."""
        drafts = self._drafts(groups)
        sound = [draft for draft in drafts if diagnosis_fault(draft.diagnosis, draft.prefix) is None]
        if sound:
            self._ask_for_repairs(sound)
        return [self.verify(draft) for draft in drafts]

    def recheck(self, record: Critique) -> Critique:
        """A record that a person may have edited, verified as if a teacher had said it."""
        return self.verify(
            Draft(
                problem=record.problem,
                attempt=record.attempt,
                diagnosis=record.diagnosis,
                prefix=record.prefix if record.attempt.startswith(record.prefix) else None,
                new_trace=record.new_trace,
                repair=record.repair,
            )
        )

    def verify(self, draft: Draft) -> Critique:
        """Keeps what passes its check, and notes the fault of the rest."""
        of_diagnosis = diagnosis_fault(draft.diagnosis, draft.prefix)
        of_repair = None if of_diagnosis else self._repair_fault(draft)
        of_trace = self._fault(draft.problem, draft.new_trace) if draft.new_trace else Fault(NO_NEW_TRACE)
        faults: dict[CritiqueKind, Fault | None] = {
            "diagnosis": of_diagnosis, "repair": of_repair, "new_trace": of_trace
        }  # fmt: skip
        return Critique(
            problem=draft.problem,
            attempt=draft.attempt,
            diagnosis=None if of_diagnosis else draft.diagnosis,
            prefix=draft.prefix or "",
            repair=None if of_repair else draft.repair,
            new_trace=None if of_trace else draft.new_trace,
            rejected=tuple(replace(fault, part=part) for part, fault in faults.items() if fault),
        )

    def _drafts(self, groups: Sequence[RolloutGroup]) -> list[Draft]:
        limit = self.settings.attempts_per_problem
        pairs = [(group.problem, text) for group in groups for text in pick_attempts(group, limit)]
        if not pairs:
            return []
        problems, attempts = [problem for problem, _ in pairs], [text for _, text in pairs]
        traces = self.teacher.new_trace(problems)
        diagnoses = self.teacher.locate(problems, attempts)
        count_written(self.student, [*traces, *(diagnosis.explanation for diagnosis in diagnoses if diagnosis)])
        drafts = []
        for problem, attempt, diagnosis, trace in zip(problems, attempts, diagnoses, traces, strict=True):
            prefix = prefix_before(attempt, diagnosis.wrong_step) if diagnosis else None
            drafts.append(Draft(problem, attempt, diagnosis, prefix, trace))
        return drafts

    def _ask_for_repairs(self, drafts: Sequence[Draft]) -> None:
        repairs = self.teacher.repair(
            [draft.problem for draft in drafts],
            [draft.prefix or "" for draft in drafts],
            [draft.diagnosis for draft in drafts if draft.diagnosis is not None],
        )
        count_written(self.student, repairs)
        for draft, repair in zip(drafts, repairs, strict=True):
            draft.repair = repair

    def _repair_fault(self, draft: Draft) -> Fault | None:
        if not draft.repair:
            return Fault(NO_REPAIR)
        return self._fault(draft.problem, (draft.prefix or "") + draft.repair)

    def _fault(self, problem: Problem, text: str) -> Fault | None:
        tokens = len(self.student.encode_target(text))
        return trace_fault(problem, text, tokens, self.settings.max_trace_tokens, self.reward)


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
        "step": named_step(record.attempt, record.diagnosis.wrong_step),
        "explanation": record.diagnosis.explanation,
        "verdict": record.diagnosis.verdict,
    }
    if kind == "diagnosis":
        target = template("diagnosis_target").render(fields)
        return student.chat.prompt(template("diagnosis").render(fields)), target
    return student.chat.prompt(template("repair").render(fields)), record.repair or ""
