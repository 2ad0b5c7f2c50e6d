"""Lines about long work: when they come, and what they say."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from slmreason.cli import main
from slmreason.embedded.families import make_problems
from slmreason.records import Rollout, RolloutGroup
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run import bars, progress
from slmreason.run.progress import LINE_EVERY_S, Watch, counting, watching
from slmreason.run.whole import Portion, WholeRun
from slmreason.student import Student
from slmreason.verify.rewards import AnswerReward
from tests.runs import ROOT, SMALL


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


def test_a_batch_that_has_ended_tells_the_mean_length_from_then_on(clock: Clock) -> None:
    watch = Watch("x", 100, 50, clock=clock)
    clock.now = 10
    watch.advance(10, 100)
    watch.settle()
    watch.advance(0, 50)  # of the next batch none has ended, and its tokens are as many as five have
    assert watch.left == pytest.approx(85)
    assert watch.share == pytest.approx(0.15)
    assert watch.seconds_left() == pytest.approx(85 * 10 / 15)
    watch.settle(10)  # they were of completions that nobody wants
    assert watch.left == pytest.approx(90)
    assert watch.share == pytest.approx(0.15)  # what is shown does not go back


def test_a_bar_moves_by_tokens_before_a_completion_has_ended(clock: Clock) -> None:
    watch = Watch("x", 10, 50, clock=clock)
    clock.now = 10
    watch.advance(0, 250)
    assert watch.share == pytest.approx(0.5)
    assert watch.beside_bar() == "0 of 10 completions, 25 tokens/s"
    watch.notes = ["epoch 1 of 2"]
    watch.advance(5, 0)
    assert watch.beside_bar() == "10 s left, 5 of 10 completions, epoch 1 of 2, 25 tokens/s"


def test_rho_so_far_and_where_the_run_stands_are_said(clock: Clock) -> None:
    plans = [{}, {"probe": Portion(40, 50), "again": Portion(220, 50)}]
    whole = WholeRun(clock, ("base", "sft"), lambda number: plans[number:])  # type: ignore[arg-type]
    whole.enter(1)
    watch = Watch("x", 40, 50, whole, "probe", clock=clock)
    whole.begin("probe", watch)
    clock.now = 20
    watch.grade([group(True, False, False, False)])
    watch.advance(20, 400)
    said = "x: 20 of 40 completions (50 %), 20 tokens/s, rho 0.25 of 4, about 20 s left; the run: stage 1 of 1"
    assert watch.line() == said
    watch.settle()
    assert watch.line() == f"{said}, about 4 min left"  # 20 and 220 completions at one a second


def test_a_bar_is_moved_on_a_terminal_and_no_line_is_said(said: pytest.LogCaptureFixture, clock: Clock) -> None:
    screen = io.StringIO()
    with watching("a probe", 4, 10, Console(file=screen, force_terminal=True, width=80)) as watch:
        watch._lines._said = -LINE_EVERY_S
        watch.advance(3, 30)
        assert bars._display is not None
        bars._display.refresh()  # at once: it is drawn a few times a second
    assert "a probe" in screen.getvalue()
    assert "3 of 4 completions" in screen.getvalue()
    assert said.messages == []
    quiet = io.StringIO()
    with watching("a probe", 4, 10, Console(file=quiet, force_terminal=True), bar=False) as watch:
        watch.advance(4, 40)
    assert quiet.getvalue() == ""


def test_a_teachers_requests_are_counted_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with counting("teacher solve", 4, Console(file=io.StringIO())) as advance:
        advance(1, "2.0 requests/s")
        advance(3, "")
    assert said.messages[0].startswith("teacher solve: 1 of 4, 2.0 requests/s, about ")
    assert said.messages[1] == "teacher solve: 4 of 4, about 0 s left"


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
    for start in ("benchmarks after base: ", "round 1 probe: ", "round 1 sft traces: ",
                  "round 1 sft re-measure: ", "round 1 grpo: ", "benchmarks after round 1 grpo: "):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert any(re.match(r"round 1 sft: .* rows \(\d+ %\), step \d+ of \d+, epoch 1 of 2, ", line) for line in lines)
    assert any("; the run: before stage 1 of 3" in line for line in lines)
    assert any(re.search("; the run: stage [23] of 3, about ", line) for line in lines)
    for line in lines:
        assert "epoch 0" not in line
    assert any(
        line.startswith("round 1 grpo: ") and " rollouts (" in line and ", epoch 1 of 1" in line for line in lines
    )
    base = next(line for line in lines if line.startswith("base: done"))
    assert " | benchmarks " in base  # what measuring took
    assert base.endswith(" tokens")


@pytest.mark.slow
def test_a_terminal_shows_the_run_beside_the_work_at_hand(tmp_path: Path) -> None:
    """A real command on a real pseudo-terminal, 100 columns wide."""
    pty = pytest.importorskip("pty")
    args = [
        *SMALL,
        "--curriculum.evaluate=stage",
        "--trainer.enable_progress_bar=true",
        f"--run_dir={tmp_path / 'run'}",
    ]
    ours, theirs = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    running = subprocess.Popen([sys.executable, "-m", "slmreason.cli", "fit", *args], env=env, stdin=theirs,
                               stdout=theirs, stderr=theirs)  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        shown += some
    assert running.wait(60) == 0, shown[-3000:].decode()
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", uncoloured)
    rows = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert any(re.fullmatch(r"run +\S+ before stage 1 of 3", row) for row in rows)
    assert any(re.fullmatch(r"run +\S+ +stage [23] of 3, about \d+ s left", row) for row in rows)
    for label in (
        "benchmarks after base",
        "round 1 probe",
        "round 1 sft traces",
        "round 1 sft re-measure",
        "critiques",
    ):
        assert any(row.startswith(f"{label} ") or row == label for row in rows), label  # short ones stay without words
    for label, unit in (("round 1 sft", "rows"), ("round 1 grpo", "rollouts")):
        assert any(row.startswith(f"{label} ") and f" {unit}, step" in row for row in rows), label
    assert any(row.startswith("round 1 sft: done") for row in rows)  # lines stand whole above the rows
    assert "epoch 0" not in text
