"""Lines about long work: when they come, and what they say."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from slmreason.cli import main
from slmreason.embedded.families import make_problems
from slmreason.records import Rollout, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run import progress
from slmreason.run.progress import LINE_EVERY_S, Pace, Watch, counting, duration, watching
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.runs import SMALL


class Clock:
    """Stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "slmreason.run.progress")
    return caplog


def group(*correct: bool) -> RolloutGroup:
    rollouts = [Rollout((1,), (2,), (), "", float(right), right, False, 0) for right in correct]
    return RolloutGroup(make_problems("chain", "train", 1)[0], tuple(rollouts))


def test_a_line_comes_every_half_minute_and_no_more_often(clock: Clock, said: pytest.LogCaptureFixture) -> None:
    watch = Watch("probe", 1000, 300, clock=clock)
    for second in range(1, 100):
        clock.now = second
        watch.advance(1, 100)
    assert [line.partition(" of")[0] for line in said.messages] == ["probe: 30", "probe: 60", "probe: 90"]
    assert said.messages[0] == "probe: 30 of 1,000 completions (3 %), 100 tokens/s, about 16 min left"


def test_short_work_says_nothing(clock: Clock, said: pytest.LogCaptureFixture) -> None:
    watch = Watch("probe", 100, 300, clock=clock)
    for second in range(int(LINE_EVERY_S)):
        clock.now = second
        watch.advance(2, 100)
    assert said.messages == []


def test_the_time_left_counts_the_tokens_of_what_has_not_ended(clock: Clock) -> None:
    watch = Watch("x", 100, 50, clock=clock)
    clock.now = 10
    watch.advance(0, 1000)
    assert watch.seconds_left() is None  # no completion has ended: their length is not known
    watch.advance(10, 0)  # 100 tokens for each that ended, but none can be longer than 50
    assert watch.seconds_left() == pytest.approx((100 * 50 - 1000) / (1000 / 10))
    watch.advance(90, 1000)
    assert watch.seconds_left() == 0


def test_what_an_earlier_process_did_counts_as_done_and_not_as_speed(clock: Clock) -> None:
    watch = Watch("x", 100, 50, clock=clock)
    watch.skip(60)
    clock.now = 10
    watch.advance(20, 400)
    assert watch.line() == "x: 80 of 100 completions (80 %), 40 tokens/s, about 10 s left"


def test_rho_so_far_and_the_rest_of_the_run_are_said(clock: Clock) -> None:
    pace = Pace(completions=100, tokens=2000, seconds=100, ahead=220)
    watch = Watch("x", 40, 50, pace, clock=clock)
    clock.now = 20
    watch.grade([group(True, False, False, False)])
    watch.advance(20, 400)
    # 120 completions of 20 tokens in 120 s: one a second.
    expected = "x: 20 of 40 completions (50 %), 20 tokens/s, rho 0.25 of 4, about 20 s left, the whole run"
    assert watch.line() == expected + " about 4 min, counting sampling alone"


def test_a_bar_is_moved_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    pace = Pace()
    with watching("a probe", 4, 10, Console(file=screen, force_terminal=True, width=80), pace) as watch:
        watch.advance(3, 30)
    assert "a probe" in screen.getvalue()
    assert pace.completions == 3
    assert pace.seconds > 0
    quiet = io.StringIO()
    with watching("a probe", 4, 10, Console(file=quiet, force_terminal=True), bar=False) as watch:
        watch.advance(4, 40)
    assert quiet.getvalue().strip("\x1b[?25hl\n") == ""


def test_a_teachers_requests_are_counted_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with counting("teacher solve", 4, Console(file=io.StringIO())) as advance:
        advance(1, "2.0 requests/s")
        advance(3, "")
    assert said.messages[0].startswith("teacher solve: 1 of 4, 2.0 requests/s, about ")
    assert said.messages[1] == "teacher solve: 4 of 4, about 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (8000, "2 h 13 min")]
)
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_engine_tells_completions_tokens_and_verdicts() -> None:
    student = Student("embedded:qwen2")
    watch = Watch("x", 24, 60)
    groups = collect(
        student, HFEngine(max_sequences=10), AnswerReward(), make_problems("chain", "train", 3), 8, Sampling(60), watch
    )
    assert watch.completions == watch.graded == 24
    assert watch.tokens == sum(one.num_tokens for one in groups)
    assert watch.correct == sum(one.num_correct for one in groups)


@pytest.mark.slow
def test_every_part_of_a_run_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    args = [*SMALL, "--curriculum.evaluate=stage", "--trainer.enable_progress_bar=true", "--evaluation.limit=4"]
    assert main(["fit", *args, f"--run_dir={tmp_path / 'run'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for start in ("benchmarks after base: ", "round 1 probe: ", "round 1 sft traces: ", "round 1 sft: step ",
                  "round 1 sft re-measure: ", "round 1 grpo: ", "benchmarks after round 1 grpo: "):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert any("the whole run about" in line for line in lines)
    base = next(line for line in lines if line.startswith("base: done"))
    assert " | benchmarks " in base  # what measuring took
    assert base.endswith(" tokens")
