"""Prompts that leave no room for a completion, in the student or in the engine: rejected before anything is sampled."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmreason.cli import main
from slmreason.data.datamodule import ReasoningDataModule
from slmreason.embedded.families import make_problems
from slmreason.evaluate.benchmarks import EvaluationSettings, evaluate, load_benchmarks
from slmreason.records import Trace
from slmreason.rollout.engine import PromptLimit, Sampling, prompt_limit
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.supervision.bridge import Bridge
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.rewards import AnswerReward
from tests.runs import ONE, SMALL, Run

SHORT = 96
"""Tokens that the engine of these tests takes, prompt and completion."""


class ShortEngine(HFEngine):
    """An engine that takes fewer tokens than the student, as vLLM does with rollout.max_model_len."""

    length_key = "rollout.max_tokens"

    def max_length(self, student: Student) -> int:
        return SHORT

    def generate(self, student, prompts, group_size, sampling, progress=None):  # type: ignore[no-untyped-def]
        assert all(len(prompt) + sampling.max_new_tokens <= SHORT for prompt in prompts)
        return super().generate(student, prompts, group_size, sampling, progress)


def test_the_shorter_of_student_and_engine_sets_the_limit_and_says_which_key(student: Student) -> None:
    assert prompt_limit(student, HFEngine(), 24, "evaluation.max_new_tokens") == PromptLimit(
        1000, "the student's 1024 positions less evaluation.max_new_tokens leave 1000"
    )
    assert prompt_limit(student, ShortEngine(), 24, "evaluation.max_new_tokens") == PromptLimit(
        72, "rollout.max_tokens = 96 less evaluation.max_new_tokens leave 72"
    )


@pytest.fixture
def mixed(tmp_path: Path, student: Student) -> tuple[Path, int]:
    """A file with questions of which some fit `SHORT` less 60 new tokens, and how many do not."""
    problems = make_problems("chain", "test", 20, (1, 3, 5))
    file = tmp_path / "mixed.jsonl"
    rows = [f'{{"question": "{problem.question}", "answer": "{problem.answer}"}}\n' for problem in problems]
    file.write_text("".join(rows))
    too_long = sum(student.prompt_length(problem) > SHORT - 60 for problem in problems)
    assert 0 < too_long < 20
    return file, too_long


def test_benchmarks_reject_what_the_engine_cannot_hold_and_sample_the_rest(
    mixed: tuple[Path, int], student: Student, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmreason.evaluate.benchmarks.log.parent.propagate", True)
    (file, too_long), engine = mixed, ShortEngine()
    settings = EvaluationSettings(1, 0.0, 1.0, (1,), max_new_tokens=60)
    why = "rollout.max_tokens = 96 less evaluation.max_new_tokens leave 36"
    benchmarks = load_benchmarks([str(file)], settings, student, engine)
    assert f"{too_long} of 20 prompts are too long: {why}" in caplog.text
    assert [reject.reason.endswith(why) for reject in benchmarks[0].rejects] == [True] * too_long
    [score] = evaluate(student, engine, AnswerReward(), benchmarks, settings)
    assert score.problems == 20 - too_long
    assert len(load_benchmarks([str(file)], settings, student, HFEngine())[0].problems) == 20


def test_the_pool_rejects_what_leaves_no_room_for_a_rollout(
    mixed: tuple[Path, int], student: Student, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmreason.data.datamodule.log.parent.propagate", True)
    file, too_long = mixed
    data = ReasoningDataModule(str(file))
    limit = prompt_limit(student, ShortEngine(), 60, "grpo.max_completion_tokens")
    data.load(student.prompt_length, {}, limit)
    assert len(data.problems) == 20 - too_long
    assert f"{too_long} of 20 prompts are too long: rollout.max_tokens = 96" in caplog.text
    assert {reject.reason.partition(", ")[2] for reject in data.rejects} == {limit.why}
    with pytest.raises(ValueError, match=r"every problem was rejected: .* rollout\.max_tokens = 96 less .* leave -4"):
        data.load(student.prompt_length, {}, prompt_limit(student, ShortEngine(), 100, "grpo.max_completion_tokens"))


def test_the_tighter_of_two_limits_on_prompts_is_named(mixed: tuple[Path, int], student: Student) -> None:
    data = ReasoningDataModule(str(mixed[0]), max_prompt_tokens=36)
    data.load(student.prompt_length, {}, prompt_limit(student, ShortEngine(), 60, "grpo.max_completion_tokens"))
    assert {reject.reason.partition(", ")[2] for reject in data.rejects} == {"data.max_prompt_tokens is 36"}


def test_a_hand_over_that_leaves_no_room_is_not_tried_and_counted(
    student: Student, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmreason.supervision.handover.log.parent.propagate", True)
    problems = make_problems("chain", "train", 12, (2, 5))
    settings = BridgeSettings(max_trace_tokens=400)
    bridge = Bridge(student, ShortEngine(), ProceduralTeacher(), AnswerReward(), settings)
    results = bridge.make(problems, Sampling(40, temperature=0.0))
    handed = [c.trace for result in results for c in result.candidates if c.trace.provenance == "handover"]
    assert all(isinstance(trace, Trace) for trace in handed)
    assert "hand-overs are not tried, the teacher's steps are too long: rollout.max_tokens = 96" in caplog.text
    assert all(result.chosen is not None for result in results)


def test_a_run_rejects_what_the_engine_cannot_hold_before_it_starts(
    mixed: tuple[Path, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: benchmarks and pool by one file, with an engine from outside."""
    file, too_long = mixed
    folder = tmp_path / "run"
    args = ["fit", *SMALL, *ONE, f"--run_dir={folder}", "--rollout=tests.rollout.test_engine_limits.ShortEngine",
            "--curriculum.stages=[]", f"--data.train={file}", f"--benchmarks=[{file}]", "--data.decontaminate=false",
            "--grpo.max_completion_tokens=60", "--evaluation.max_new_tokens=60"]  # fmt: skip
    assert main(args) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{too_long} of 20 prompts are too long: rollout.max_tokens = 96 less evaluation.max_new_tokens" in shown
    assert f"{too_long} of 20 prompts are too long: rollout.max_tokens = 96 less grpo.max_completion_tokens" in shown
    assert len(Run(folder, "").rows("rejects.jsonl")) == 2 * too_long
