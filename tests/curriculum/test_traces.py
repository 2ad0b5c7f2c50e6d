"""Which traces of a run's files GRPO may rescue with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from slmreason.curriculum.traces import TraceMaker
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import BridgeResult, Place, Problem, Trace
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import append_records
from slmreason.run.folder import RunFolder
from slmreason.student import Student
from slmreason.supervision.bridge import Bridge
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.dataset import TraceTeacher
from slmreason.verify.rewards import AnswerReward

PROBLEMS = tuple(Problem(name, f"What is {number} + 1?", str(number + 1)) for number, name in enumerate("abcde"))


def trace(problem: Problem, text: str) -> Trace:
    return Trace(problem.id, f"{text}\nThe answer is \\boxed{{{problem.answer}}}.", "bridged")


def maker(student: Student, given: dict[str, Trace]) -> TraceMaker:
    data = ReasoningDataModule("embedded:chain/train?count=1")
    data.problems = PROBLEMS
    bridge = Bridge(student, HFEngine(), TraceTeacher(), AnswerReward(), BridgeSettings())
    nothing = cast(Any, None)
    return TraceMaker(nothing, data, GRPOSettings(), bridge, nothing, given)


def test_the_newest_chosen_trace_up_to_the_place_comes_before_the_given_one(student: Student, tmp_path: Path) -> None:
    files = RunFolder(tmp_path)
    a, b, c, d, e = PROBLEMS
    of_rounds = [
        [BridgeResult(a, (), trace(a, "first")), BridgeResult(b, (), trace(b, "first"))],
        [BridgeResult(a, (), trace(a, "second")), BridgeResult(b, (), None), BridgeResult(c, (), None)],
        [BridgeResult(a, (), trace(a, "third"))],
    ]
    for number, results in enumerate(of_rounds, start=1):
        append_records(files.stage(Place(number, "sft")).bridge, results)
    wrong = replace(trace(e, "given"), text="The answer is \\boxed{-5}.")
    given = {each.problem_id: each for each in (trace(a, "given"), trace(d, "given"), wrong)}
    found = maker(student, given).chosen(files, Place(2, "grpo"))
    assert found == {"a": trace(a, "second").text, "b": trace(b, "first").text, "d": trace(d, "given").text}


def test_without_sft_and_given_traces_there_is_none(student: Student, tmp_path: Path) -> None:
    assert maker(student, {}).chosen(RunFolder(tmp_path), Place(1, "grpo")) == {}
