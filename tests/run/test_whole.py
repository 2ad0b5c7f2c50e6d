"""What is left of a run: by kinds of work at their own speed, and nothing that nobody can know."""

from __future__ import annotations

import pytest

from slmreason.run.progress import Watch, within
from slmreason.run.whole import Part, Plan, Portion, WholeRun, duration


class Clock:
    """Stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


STAGES = ("base", "sft", "grpo")
PLANS: list[Plan] = [
    {"benchmarks": Portion(10, 100)},
    {"probe": Portion(40, 100), "traces": Portion(5), "fit": Portion(30), "again": Portion(20, 100),
     "benchmarks": Portion(10, 100)},
    {"fit": Portion(50, 100), "benchmarks": Portion(10, 100)},
]  # fmt: skip


@pytest.fixture
def clock() -> Clock:
    return Clock()


def whole_run(clock: Clock, plans: list[Plan] | None = PLANS) -> WholeRun:
    return WholeRun(clock, STAGES, lambda number: None if plans is None else plans[number:])


def do(run: WholeRun, clock: Clock, part: Part, units: int, seconds: float, tokens: int = 0) -> None:
    """Work of that many units from its beginning to its end."""
    watch = Watch(part, units, 100 if tokens else 0, run, run.kind_of(part), clock=clock)
    with within(run, part, watch):
        clock.now += seconds
        watch.advance(units, tokens)
        watch.settle()


def test_nothing_is_said_of_the_time_before_it_is_known_what_is_left(clock: Clock) -> None:
    run = whole_run(clock, plans=None)
    run.enter(0)
    do(run, clock, "benchmarks", 10, 20.0, tokens=500)
    assert run.said() == "before stage 1 of 2"
    run.enter(1)
    assert run.said() == "stage 1 of 2"
    assert WholeRun(clock).said() == ""


def test_nothing_is_said_of_the_time_before_anything_was_measured(clock: Clock) -> None:
    run = whole_run(clock)
    run.enter(1)
    assert run.left() is None


def test_a_kind_that_was_never_done_comes_on_top(clock: Clock) -> None:
    run = whole_run(clock)
    run.enter(0)
    do(run, clock, "benchmarks", 10, 20.0, tokens=500)
    run.enter(1)
    left = run.left()
    assert left is not None
    # 20 completions of benchmarks and 60 of measuring at 2 s; traces and the fits are of kinds that nobody knows.
    assert (left.seconds, left.is_all) == (pytest.approx(2.0 * (20 + 60)), False)
    assert run.said() == "stage 1 of 2, over 3 min left"


def test_every_kind_has_its_own_speed_and_grpo_is_sampling_with_a_row_of_sft(clock: Clock) -> None:
    run = whole_run(clock)
    run.enter(0)
    do(run, clock, "benchmarks", 10, 20.0, tokens=500)
    run.enter(1)
    do(run, clock, "probe", 40, 40.0, tokens=1500)  # 60 s for 2,000 tokens by now
    do(run, clock, "traces", 5, 1.0)
    do(run, clock, "fit", 30, 90.0, tokens=9000)  # tokens that are trained on say nothing of sampling
    left = run.left()
    assert left is not None
    rollout = 2000 / 50 * 60 / 2000 + 90 / 30
    assert (left.seconds, left.is_all) == (pytest.approx(20 * 1.0 + 20 * 2.0 + 50 * rollout), True)
    assert run.said() == "stage 1 of 2, about 4 min left"


def test_no_completion_is_taken_to_be_longer_than_its_limit(clock: Clock) -> None:
    run = whole_run(clock, [{"benchmarks": Portion(10, 100)}, {"probe": Portion(10, 20)}, {}])
    run.enter(0)
    do(run, clock, "benchmarks", 10, 100.0, tokens=1000)
    left = run.left()
    assert left is not None
    assert left.seconds == pytest.approx(10 * 20 * 0.1)


def test_work_that_is_under_way_counts_with_what_is_left_of_it(clock: Clock) -> None:
    run = whole_run(clock, [{"benchmarks": Portion(10, 100)}, {}, {}])
    run.enter(0)
    watch = Watch("x", 10, 100, run, "benchmarks", clock=clock)
    with within(run, "benchmarks", watch):
        clock.now += 8
        watch.advance(4, 200)
        assert run.left() is None  # no batch has ended yet: those that end first are short
        watch.settle()
        left = run.left()
        assert left is not None
        assert left.seconds == pytest.approx(6 * 2.0)
        watch.advance(0, 50)  # tokens of what has begun: as much as one
        left = run.left()
        assert left is not None
        assert left.seconds == pytest.approx(5 * 2.0)


def test_work_within_other_work_is_not_counted_twice(clock: Clock) -> None:
    run = whole_run(clock)
    run.enter(1)
    fit = Watch("fit", 30, 0, run, "sft", clock=clock)
    with within(run, "fit", fit):
        clock.now += 30
        fit.settle(10)
        do(run, clock, "again", 10, 100.0, tokens=500)
        assert fit.seconds == 30
        assert fit.wall_seconds == 130
        clock.now += 30
        fit.settle(20)
    assert fit.seconds_left() == pytest.approx(30)
    left = run.left()
    assert left is not None
    # 10 of 20 that are measured again are done; what comes before the fit is passed; a stage has one fit.
    measured = 500 / 10 * 100 / 500
    assert left.seconds == pytest.approx(10 * measured + 20 * measured + 50 * (measured + 3.0))


def test_more_work_than_was_foretold_is_no_debt(clock: Clock) -> None:
    run = whole_run(clock, [{"benchmarks": Portion(2, 100)}, {"benchmarks": Portion(10, 100)}, {}])
    run.enter(0)
    do(run, clock, "benchmarks", 10, 10.0, tokens=500)
    left = run.left()
    assert left is not None
    assert left.seconds == pytest.approx(10.0)


def test_a_run_does_not_go_beyond_its_deadline(clock: Clock) -> None:
    run = whole_run(clock)
    run.deadline = 60.0
    run.enter(0)
    do(run, clock, "benchmarks", 10, 20.0, tokens=500)
    run.enter(1)
    assert run.said() == "stage 1 of 2, about 40 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 0 min"), (8000, "2 h 13 min")]
)
def test_a_duration_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_of_cft_is_like_one_of_sft_and_a_critique_like_a_trace(clock: Clock) -> None:
    plans: list[Plan] = [{}, {"traces": Portion(4), "fit": Portion(10)}, {"critiques": Portion(3), "fit": Portion(5)}]
    run = WholeRun(clock, ("base", "sft", "cft"), lambda number: plans[number:])
    run.enter(1)
    do(run, clock, "traces", 4, 8.0)
    left = run.left()
    assert left is not None
    assert (left.seconds, left.is_all) == (3 * 2.0, False)
    do(run, clock, "fit", 10, 30.0)
    left = run.left()
    assert left is not None
    assert (left.seconds, left.is_all) == (3 * 2.0 + 5 * 3.0, True)


def test_benchmarks_at_a_budget_come_at_any_time(clock: Clock) -> None:
    """Within a fit they are no end of the stage; what is foreseen of them grows less by itself."""
    ahead = [20]
    plans: list[Plan] = [{}, {"fit": Portion(10), "again": Portion(10, 100), "benchmarks": Portion(10, 100)}]
    run = WholeRun(clock, ("base", "sft"), lambda number: [{**plans[1], "curve": Portion(ahead[0], 100)}])
    run.enter(1)
    fit = Watch("fit", 10, 0, run, "sft", clock=clock)
    with within(run, "fit", fit):
        clock.now += 5
        fit.settle(5)
        do(run, clock, "curve", 10, 20.0, tokens=500)
        ahead[0] = 10
        do(run, clock, "again", 4, 4.0, tokens=40)
        left = run.left()
        assert left is not None
        assert left.seconds == pytest.approx(5 * 1.0 + 6 * 1.0 + 10 * 2.0 + 10 * 2.0)


def test_a_probe_in_parts_is_foreseen_less_what_the_ledger_has(clock: Clock) -> None:
    missing = [30]
    run = WholeRun(clock, ("base", "sft"), lambda number: [{"probe": Portion(missing[0], 100)}])
    run.enter(1)
    do(run, clock, "probe", 10, 10.0, tokens=100)
    missing[0] = 20
    watch = Watch("x", 10, 100, run, "probe", clock=clock)
    with within(run, "probe", watch):
        left = run.left()
        assert left is not None
        assert left.seconds == pytest.approx(20)  # 10 under way, and 10 after them


def test_a_run_ends_with_its_tokens(clock: Clock) -> None:
    share = [0.01]
    run = whole_run(clock)
    run.spent = lambda: share[0]
    run.enter(0)
    do(run, clock, "benchmarks", 10, 20.0, tokens=500)
    run.enter(1)
    assert run.said() == "stage 1 of at most 2, over 3 min left"
    share[0] = 0.5  # in 20 seconds
    assert run.said() == "stage 1 of at most 2, about 20 s left"
