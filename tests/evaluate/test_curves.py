"""Curves of accuracy against tokens: areas and intervals, files, and real runs that are measured on their way."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from slmreason.cli import compare, main
from slmreason.cli.compare import compared_curves, show
from slmreason.curriculum.settings import CurriculumSettings
from slmreason.evaluate.bootstrap import Estimate
from slmreason.evaluate.compare import Outcome, read_outcome, summarise
from slmreason.evaluate.curves import Curve, ahead_from, area, compare_curves, read_curve
from slmreason.report.page import write_report
from slmreason.report.terminal import curves_tables, print_tables
from slmreason.rollout.collect import collect
from slmreason.run.files import write_records
from slmreason.run.folder import RunFolder
from tests.runs import SMALL, Run, command


def verdicts(**right: list[bool]) -> dict[str, dict[str, bool]]:
    return {name: {f"p{i}": value for i, value in enumerate(values)} for name, values in right.items()}


def curve(arm: str, seed: int, heights: dict[int, float], problems: int = 200, spent: int | None = None) -> Curve:
    """A run that solves the first problems: so many of them at each budget."""
    correct = {
        budget: verdicts(x=[number < share * problems for number in range(problems)])
        for budget, share in heights.items()
    }
    return Curve(arm, seed, correct, {budget: min(budget, spent or budget) for budget in heights})


def test_the_area_is_that_of_the_trapezoidal_rule_over_the_width() -> None:
    budgets = [0, 100, 200, 800]
    heights = np.random.default_rng(0).random((5, 4))
    theirs = torch.trapezoid(torch.from_numpy(heights), torch.tensor(budgets, dtype=torch.float64)) / 800
    np.testing.assert_allclose(area(budgets, heights), theirs.numpy(), rtol=1e-12)
    # By hand: 100 wide at 0.1, 100 wide at 0.3, 600 wide at 0.4.
    assert float(area(budgets, np.array([0.0, 0.2, 0.4, 0.4]))) == pytest.approx((10 + 30 + 240) / 800)


@pytest.mark.parametrize(
    ("lows", "budget"),
    [([0, 1, 2, 3], 100), ([0, 1, 0, 3], 400), ([0, 1, 2, 0], None), ([0, -1, 2, 3], 200), ([0, 0, 0, 0], None)],
)
def test_the_first_arm_is_ahead_from_where_the_interval_stays_above_0(lows: list[float], budget: int | None) -> None:
    assert ahead_from([0, 100, 200, 400], [Estimate(low + 1, low, low + 2) for low in lows]) == budget


def test_the_last_point_is_what_the_table_says_and_the_difference_is_paired() -> None:
    rng = random.Random(0)
    curves, outcomes = [], []
    for seed in range(3):
        same = [rng.random() < 0.5 for _ in range(300)]
        for arm, ahead in (("a", True), ("b", False)):
            end = verdicts(x=[ahead] * 15 + same[15:], y=same[:40])
            curves.append(Curve(arm, seed, {0: verdicts(x=same, y=same[:40]), 500: end}, {0: 0, 500: 510}))
            outcomes.append(Outcome(arm, seed, end, {"sampled": 510}, 1.0))
    over_all, on_x, on_y = compare_curves(curves, ["a", "b"])
    for mine, theirs in zip(over_all.arms, summarise(outcomes, ["a", "b"]), strict=True):
        assert asdict(mine.accuracy[-1]) == pytest.approx(asdict(theirs.mean))
    lead = over_all.arms[1].lead
    assert lead is not None
    assert asdict(lead.points[-1]) == pytest.approx(asdict(summarise(outcomes, ["a", "b"])[1].ahead))  # type: ignore[arg-type]
    assert over_all.arms[0].lead is None
    assert [one.of for one in (over_all, on_x, on_y)] == ["mean", "x", "y"]
    lead_on_x = on_x.arms[1].lead
    assert lead_on_x is not None
    assert lead_on_x.points[-1].mean == pytest.approx(0.05)
    assert 0.02 < lead_on_x.points[-1].low < lead_on_x.points[-1].high < 0.08
    assert lead_on_x.area.mean == pytest.approx(0.025)  # from 0 at the base to 0.05
    assert lead_on_x.since == 500
    assert lead_on_x.points[0] == Estimate(0.0, 0.0, 0.0)  # the same base
    assert on_y.arms[1].lead.since is None  # type: ignore[union-attr]


def test_a_lead_that_is_lost_again_is_none() -> None:
    curves = [curve("a", s, {0: 0.2, 100: 0.8, 200: 0.5}) for s in (1, 2)]
    curves += [curve("b", s, {0: 0.2, 100: 0.4, 200: 0.5}) for s in (1, 2)]
    [over_all, _] = compare_curves(curves, ["a", "b"])
    lead = over_all.arms[1].lead
    assert lead is not None
    assert lead.points[1].low > 0
    assert lead.since is None
    assert lead.area.mean == pytest.approx(0.2)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(ValueError, match="same budgets"):
        compare_curves([curve("a", 1, {0: 0.1, 5: 0.2}), curve("b", 1, {0: 0.1, 6: 0.2})], ["a", "b"])
    with pytest.raises(ValueError, match="same benchmark problems"):
        compare_curves([curve("a", 1, {0: 0.1, 5: 0.2}), curve("b", 1, {0: 0.1, 5: 0.2}, problems=9)], ["a", "b"])


def test_the_tables_say_from_which_budget_on_or_never() -> None:
    def printed(first: float) -> str:
        curves = [curve("a", s, {0: 0.2, 100_000: first, 200_000: first}) for s in (1, 2)]
        curves += [curve("b", s, {0: 0.2, 100_000: 0.4, 200_000: 0.4}) for s in (1, 2)]
        console = Console(file=io.StringIO(), width=200)
        print_tables(console, *curves_tables(compare_curves(curves, ["a", "b"])))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert printed(0.8).count("+40.0 [+") == 2  # at both budgets
    assert printed(0.8).count("+30.0 [+") == 2  # the area: in the mean, and on the one benchmark
    leads = [line.rstrip() for line in printed(0.8).splitlines() if line.split()[:1] == ["b"]][1:]
    assert len(leads) == 2
    assert all(line.endswith(" 0.1 M") for line in leads)
    assert "never" not in printed(0.8)
    assert printed(0.4).count("never") == 2
    assert curves_tables([]) == []


# -- what a run leaves -------------------------------------------------------------------------------------------------


def answers(folder: Path, name: str, right: dict[str, dict[str, bool]]) -> str:
    path = RunFolder(folder).answers(name)
    rows = [{"benchmark": b, "problem_id": i, "correct": c} for b, each in right.items() for i, c in each.items()]
    write_records(path, rows)
    return str(path.relative_to(folder))


def point(budget: int, spent: int, file: str) -> dict[str, Any]:
    return {"budget": budget, "tokens": {"sampled": spent, "trained": 0, "written": 0}, "answers": file}


def test_a_curve_is_read_from_the_files_of_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, base, half, end = tmp_path / "a" / "seed-1", verdicts(x=[False]), verdicts(x=[True]), verdicts(x=[False])
    rows = [point(0, 0, answers(run, "base", base)), point(100, 130, answers(run, "100 tokens", half))]
    write_records(RunFolder(run).curve, rows)
    outcome = Outcome("a", 1, end, {"sampled": 150, "trained": 20, "written": 5}, 1.0)
    found = read_curve(run, outcome, [100, 200])
    assert found == Curve("a", 1, {0: base, 100: half, 200: end}, {0: 0, 100: 130, 200: 175})
    with pytest.raises(ValueError, match="took 175 tokens and was not measured at 150"):
        read_curve(run, outcome, [100, 150])
    caplog.set_level("INFO")
    [over_all, _] = compared_curves(tmp_path, [outcome], ["a"], [100, 200])
    assert over_all.arms[0].tokens == (0, 130, 175)
    assert "a: 1 of 1 runs ended before the last budget (the first at 175 tokens)" in caplog.text
    assert compared_curves(tmp_path, [outcome], ["a"], [100, 150]) == []
    assert "no curves: " in caplog.text


def test_files_of_a_comparison_with_curves(tmp_path: Path) -> None:
    outcomes = []
    for arm, share in (("a", 3), ("<b>", 1)):
        for seed in (1, 2):
            run = tmp_path / arm / f"seed-{seed}"
            later = verdicts(x=[i < share for i in range(4)], y=[True])
            files = [answers(run, name, right) for name, right in (("base", verdicts(x=[True] * 4, y=[True])),
                                                                   ("50 tokens", later), ("end", later))]  # fmt: skip
            write_records(RunFolder(run).curve, [point(b, b, f) for b, f in zip((0, 50, 90), files, strict=True)])
            outcomes.append(Outcome(arm, seed, later, {"sampled": 90, "trained": 0, "written": 0}, 1.0))
    show(tmp_path, outcomes, ["a", "<b>"], 90, (50, 90))
    tree = json.loads((tmp_path / "curves.json").read_text())
    assert (tree["budgets"], tree["seeds"], tree["first"]) == ([0, 50, 90], [1, 2], "a")
    assert list(tree["curves"]) == ["mean", "x", "y"]
    first, second = tree["curves"]["x"]
    assert [each["mean"] for each in first["accuracy"]] == [1.0, 0.75, 0.75]
    assert first["lead"] is None
    assert [each["mean"] for each in second["lead"]["points"]] == [0.0, 0.5, 0.5]
    assert second["lead"]["area"]["mean"] == pytest.approx((25 * 0.5 + 40 * 0.5) / 90)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1 + 3
    assert "<b>" not in page
    assert "mean of the benchmarks" in page


# -- the key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "says"),
    [([], "numbers of tokens"), ([0, 5], "from 1 on"), ([5, 5], "each above the last"), ([9, 5], "each above the last"),
     ([5, 11], r"ends at curriculum.max_tokens \(10\), before 11")],
)  # fmt: skip
def test_budgets_that_make_no_curve_are_refused(budgets: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=rf"curriculum.budgets: .*{says}"):
        CurriculumSettings(max_tokens=10, budgets=budgets)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--curriculum.budgets=[9,5]"], "each above the last"),
        (["--curriculum.budgets=[5,9]", "--curriculum.max_tokens=8"], "curriculum.max_tokens (8), before 9"),
        (["--curriculum.budgets=[5,9]", "--benchmarks=[]"], "benchmarks is empty"),
    ],
)
def test_mistakes_are_refused_before_a_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["compare", "--config=quickstart", f"--out={tmp_path / 'out'}", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    fit = ["fit", *SMALL, f"--run_dir={tmp_path / 'run'}", *args]
    assert main(fit) == 2
    assert message in capsys.readouterr().err


def test_the_last_budget_is_that_of_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(compare, "work_through", lambda runs, free: [])
    monkeypatch.setattr(compare, "show", lambda *args: shown.append(args[-2:]))
    args = ["compare", "--config=quickstart", f"--out={tmp_path}", "--arms=[base]", "--curriculum.budgets=[500,900]"]
    assert main(args) == 0
    assert shown == [(900, (500, 900))]
    assert "max_tokens: 900" in (tmp_path / "base" / "config.yaml").read_text()


# -- real runs ---------------------------------------------------------------------------------------------------------

FIT = [
    *SMALL, "--grpo.prompts_per_step=4", "--curriculum.checkpoint.every_minutes=null", "--seed_everything=3",
    "--curriculum.probe.attempts=2", "--curriculum.probe.epoch_share=0.5",
]  # fmt: skip
LIMIT = ["--curriculum.rounds=1000", "--curriculum.max_tokens=30000"]
BUDGETS = [1, 8000, 8001, 20000, 30000]
MEASURED = [*LIMIT, f"--curriculum.budgets={BUDGETS}"]


def spent(row: dict[str, Any]) -> int:
    return int(sum(row["tokens"].values()))


def summary(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run.folder / "summary.json").read_text())
    return rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("curves") / "run"
    done = command("fit", *FIT, *MEASURED, f"--run_dir={folder}")
    assert done.returncode == 0, done.stdout[-3000:]
    return Run(folder, done.stdout)


@pytest.mark.slow
def test_a_run_is_measured_where_its_tokens_pass_a_budget_and_trains_as_without(measured: Run, tmp_path: Path) -> None:
    points = measured.rows("curve.jsonl")
    assert [row["budget"] for row in points] == [0, *BUDGETS]
    assert spent(points[0]) == 0
    assert all(spent(row) >= row["budget"] for row in points)
    assert (
        points[2]["answers"] == points[3]["answers"] == "answers/8001-tokens.jsonl"
    )  # passed by one and the same step
    assert points[0]["answers"] == "answers/base.jsonl"
    assert (
        points[-1]["answers"] == f"answers/{points[-1]['stage'].replace(' ', '-')}.jsonl"
    )  # the benchmarks at the end
    for row in points:
        right = [each["correct"] for each in measured.rows(row["answers"])]
        assert row["scores"][0]["value"] == sum(right) / len(right)
    assert len({tuple(each["text"] for each in measured.rows(row["answers"])) for row in points}) > 2
    plain = Run(tmp_path / "plain", "")
    done = command("fit", *FIT, *LIMIT, f"--run_dir={plain.folder}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert not (plain.folder / "curve.jsonl").exists()
    for name, tensor in measured.weights.items():
        assert torch.equal(tensor, plain.weights[name]), name
    assert measured.rows("ledger.jsonl") == plain.rows("ledger.jsonl")
    assert [row["tokens"] for row in summary(measured)] == [row["tokens"] for row in summary(plain)]
    outcome = read_outcome(measured.folder, "a", 3)
    assert outcome is not None
    assert list(read_curve(measured.folder, outcome, BUDGETS).correct) == [0, *BUDGETS]
    page = write_report(measured.folder, tmp_path / "page.html").read_text()
    assert "Accuracy against tokens" in page
    assert "Accuracy against tokens" not in write_report(plain.folder).read_text()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("often", [[], ["--curriculum.checkpoint.every_n_steps=1"]], ids=["from-the-stage", "within"])
def test_a_run_that_is_cut_off_goes_on_to_the_same_curve(
    measured: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: list[str]
) -> None:
    args = ["fit", *FIT, *MEASURED, *often, f"--run_dir={tmp_path / 'cut'}", "--resume=auto",
            "--trainer.callbacks+=tests.plugins.Dies"]  # fmt: skip
    for stage, batch in (("sft", 1), ("grpo", 0)):
        monkeypatch.setenv("DIES_IN", stage)
        monkeypatch.setenv("DIES_AT", str(batch))
        assert command(*args).returncode != 0
    monkeypatch.delenv("DIES_IN")
    done = command(*args)
    assert done.returncode == 0, done.stdout[-3000:]
    cut = Run(tmp_path / "cut", "")
    assert cut.rows("curve.jsonl") == measured.rows("curve.jsonl")
    for row in measured.rows("curve.jsonl"):
        assert cut.rows(row["answers"]) == measured.rows(row["answers"])


@pytest.mark.slow
def test_what_was_measured_before_a_crash_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process measures the base, and the student before its first step; the second one the end alone."""
    asked = counted(monkeypatch)
    args = ["fit", *FIT, "--curriculum.stages=[sft]", "--curriculum.budgets=[1]", "--sft.epochs=1"]
    crash = ["--trainer.callbacks+=tests.plugins.Raises"]
    with pytest.raises(RuntimeError, match="as it was told to"):
        main([*args, *crash, f"--run_dir={tmp_path / 'run'}"])
    assert asked() == 2
    monkeypatch.setattr("tests.plugins.Raises.on_train_batch_end", lambda *_: None)
    assert main(["fit", f"--resume={tmp_path / 'run'}"]) == 0
    assert asked() == 1
    assert [row["budget"] for row in Run(tmp_path / "run", "").rows("curve.jsonl")] == [0, 1]


def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often the benchmarks have been sampled since it was last asked."""
    calls: list[int] = []

    def counting(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return collect(*args, **options)

    def asked() -> int:
        count = len(calls)
        calls.clear()
        return count

    monkeypatch.setattr("slmreason.evaluate.benchmarks.collect", counting)
    return asked


@pytest.mark.slow
def test_a_budget_that_is_not_reached_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", *FIT, "--curriculum.stages=[sft]", "--sft.epochs=1", "--curriculum.budgets=[1,90000000]"]
    assert main([*args, f"--run_dir={tmp_path / 'run'}"]) == 0
    assert "tokens, before 90000000" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_the_command_compares_curves(tmp_path: Path) -> None:
    args = ["compare", *FIT, "--curriculum.budgets=[2000,6000]", "--arms=[ours,base]", "--seeds=1",
            f"--out={tmp_path / 'out'}"]  # fmt: skip
    done = command(*args)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ours ahead by, at the same tokens" in done.stdout
    assert "base: 1 of 1 runs ended before the last budget (the first at 0 tokens)" in done.stdout
    tree = json.loads((tmp_path / "out" / "curves.json").read_text())
    ours, base = tree["curves"]["mean"]
    assert ours["tokens"][1] >= 2000
    assert [each["mean"] for each in base["accuracy"]] == [ours["accuracy"][0]["mean"]] * 3
