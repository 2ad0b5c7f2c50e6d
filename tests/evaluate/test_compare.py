"""The comparison: its statistics against plain ones, its files, and the real command over real runs."""

from __future__ import annotations

import csv
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main
from slmreason.cli.arms import ARMS, RESCUE_ARMS, find_arm, slots
from slmreason.cli.config import build_parser, parse
from slmreason.cli.recipes import RECIPES
from slmreason.data.strata import Strata, acquisition_set, consolidation_set, routed
from slmreason.evaluate.compare import Outcome, read_outcome, save_comparison, summarise
from slmreason.records import Problem
from slmreason.report.page import write_comparison
from slmreason.student import Student
from tests.runs import SMALL, command


def outcome(arm: str, seed: int, right: dict[str, list[bool]]) -> Outcome:
    correct = {name: {f"p{i}": value for i, value in enumerate(values)} for name, values in right.items()}
    return Outcome(arm, seed, correct, {"sampled": 10, "trained": 20, "written": 5}, 1.5)


def test_the_mean_is_over_benchmarks_and_the_interval_that_of_a_share() -> None:
    """One seed, one benchmark: the bootstrap of a share is its normal approximation, within what 10,000 draws give."""
    right = [True] * 120 + [False] * 80
    result = summarise([outcome("a", 0, {"x": right})], ["a"])[0]
    margin = 1.96 * (0.6 * 0.4 / 200) ** 0.5
    assert result.mean.mean == pytest.approx(0.6)
    assert result.mean.low == pytest.approx(0.6 - margin, abs=0.008)
    assert result.mean.high == pytest.approx(0.6 + margin, abs=0.008)
    two = summarise([outcome("a", 0, {"x": right, "y": [True, False]})], ["a"])[0]
    assert two.mean.mean == pytest.approx((0.6 + 0.5) / 2)  # not 121 of 202
    assert two.tokens == 35


def test_a_difference_is_paired_in_problems_and_seeds() -> None:
    """Arms that differ in few problems differ surely, however uncertain each is alone."""
    rng = random.Random(0)
    runs = []
    for seed in range(3):
        base = [rng.random() < 0.5 for _ in range(300)]
        runs += [
            outcome("a", seed, {"x": [True] * 15 + base[15:]}),
            outcome("b", seed, {"x": [False] * 15 + base[15:]}),
        ]
    first, second = summarise(runs, ["a", "b"])
    assert first.ahead is None
    assert second.ahead is not None
    assert second.ahead.mean == pytest.approx(0.05)
    assert 0.02 < second.ahead.low < second.ahead.high < 0.08
    assert first.mean.high - first.mean.low > 0.08


def test_seeds_that_differ_widen_the_interval_and_unpaired_seeds_are_left_out() -> None:
    runs = [outcome("a", seed, {"x": [seed % 2 == 0] * 100}) for seed in range(4)]
    runs += [outcome("b", seed, {"x": [True] * 100}) for seed in range(3)]
    first, second = summarise(runs, ["a", "b"])
    assert first.seeds == second.seeds == (0, 1, 2)
    assert first.mean.low < 0.35 < 0.95 < first.mean.high
    assert (second.mean.low, second.mean.high) == pytest.approx((1, 1))
    assert second.ahead is not None
    assert second.ahead.mean == pytest.approx(-1 / 3)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(ValueError, match="no seed"):
        summarise([outcome("a", 0, {"x": [True]}), outcome("b", 1, {"x": [True]})], ["a", "b"])
    with pytest.raises(ValueError, match="same benchmark problems"):
        summarise([outcome("a", 0, {"x": [True]}), outcome("b", 0, {"x": [True, False]})], ["a", "b"])


def test_files_of_a_comparison(tmp_path: Path) -> None:
    runs = [outcome(arm, seed, {"x": [True, arm == "a"], "y": [False]}) for arm in ("a", "<b>") for seed in (0, 1)]
    results = summarise(runs, ["a", "<b>"])
    save_comparison(tmp_path, runs, results)
    write_comparison(tmp_path, results, runs, 12_000)
    with open(tmp_path / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], row["x"], row["mean"], row["trained"]) for row in rows] == [
        ("a", "0", "1.0000", "0.5000", "20"), ("a", "1", "1.0000", "0.5000", "20"),
        ("<b>", "0", "0.5000", "0.2500", "20"), ("<b>", "1", "0.5000", "0.2500", "20"),
    ]  # fmt: skip
    with open(tmp_path / "arms.csv") as file:
        arms = list(csv.DictReader(file))
    assert [row["ahead"] for row in arms] == ["", "0.2500"]
    assert float(arms[1]["ahead_low"]) == results[1].ahead.low  # type: ignore[union-attr]
    assert (tmp_path / "arms.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "+25.0 [" in page
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def strata(sizes: tuple[int, int, int, int]) -> Strata:
    names = iter(range(sum(sizes)))
    groups = [tuple(Problem(f"p{next(names):03d}", "q", "1") for _ in range(size)) for size in sizes]
    solved = [problem.id for problem in (*groups[0], *groups[1], *groups[2][:3])]
    return Strata(*groups, solved=frozenset(solved))


def test_routing_by_lot_keeps_the_sizes_and_forgets_the_difficulty() -> None:
    true = strata((40, 30, 20, 10))
    lot = routed(true, "random", random.Random("x"))
    assert lot.counts == true.counts
    assert len(lot.solved) == len(true.solved)
    assert len(acquisition_set(lot)) == len(acquisition_set(true))
    core = [consolidation_set(s, 0.0, random.Random(0)) for s in (true, lot)]
    assert len(core[0]) == len(core[1])
    shared = {p.id for p in true.hard} & {p.id for p in lot.hard}
    assert len(shared) < 12  # 4 of 20 by chance
    assert routed(true, "random", random.Random("x")) == lot
    # Who was cast for a place keeps it while nothing moves, and moves with the one he stands for.
    moved = Strata(true.simple, true.medium + true.hard, (), true.unknown, true.solved)
    assert set(routed(moved, "random", random.Random("x")).medium) == {*lot.medium, *lot.hard}


def test_routing_everybody_leaves_nobody_out() -> None:
    true = strata((40, 30, 20, 10))
    everybody = routed(true, "all", random.Random(0))
    assert len(acquisition_set(everybody)) == len(consolidation_set(everybody, 0.1, random.Random(0))) == 100
    assert routed(true, "difficulty", random.Random(0)) is true


def test_each_packaged_arm_is_listed_and_is_a_valid_overlay() -> None:
    assert {path.stem for path in (RECIPES / "arms").glob("*.yaml")} == {*ARMS, *RESCUE_ARMS}
    parser = build_parser("fit", "")
    packaged = ARMS + RESCUE_ARMS
    made = {arm: parse(parser, ["--config=quickstart", f"--config={find_arm(arm)}"]) for arm in packaged}
    kinds = {arm: made[arm].grpo.rescue.kind for arm in packaged}
    assert [kinds[arm] for arm in RESCUE_ARMS] == ["handover", "sft_gate", "chord"]
    assert {kinds[arm] for arm in ARMS} == {None}
    assert made["base"].curriculum.stages == []
    assert {arm for arm in packaged if made[arm].data.routing != "difficulty"} == {
        "sft_all", "distill_raw", "grpo_only", "sft_then_grpo", "raw_then_grpo", "random_routing",
    }  # fmt: skip


def test_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = build_parser("compare", "")
    parser.add_argument("--jobs", type=int | None, default=None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("slmreason.cli.arms.os.cpu_count", lambda: 8)
    config = parse(parser, ["--config=quickstart", "--trainer.accelerator=cpu", "--jobs=4"])
    assert slots(config) == [{"OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    on_gpus = parse(parser, ["--config=quickstart", "--trainer.devices=1"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(on_gpus)] == ["4", "5", "6", "7"]
    in_pairs = parse(parser, ["--config=quickstart", "--trainer.devices=2"])
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(in_pairs)] == ["4,5", "6,7"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms=[ours]"], "--curriculum.max_tokens N"),
        (["--arms=[none]", "--curriculum.max_tokens=9"], "no arm 'none'; there are ours, base"),
        (["--seeds=0", "--curriculum.max_tokens=9"], "seeds and jobs must be at least 1"),
        (["--arms=[ours]", "--curriculum.max_tokens=0"], "--curriculum.max_tokens N"),
    ],
)
def test_mistakes_are_refused_before_a_run_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert main(["compare", "--config=quickstart", f"--out={tmp_path / 'out'}", *args]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/seed*"))


SMALL_COMPARE = [
    *SMALL,
    "--curriculum.max_tokens=12000",
    "--seeds=2",
    "--seed_everything=3",
    "--grpo.prompts_per_step=4",
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compare") / "out"
    extra = out.parent / "mine.yaml"
    extra.write_text("curriculum: {stages: [sft], rounds: 1000}\n")
    result = command("compare", *SMALL_COMPARE, f"--arms=[ours,base,{extra}]", f"--out={out}")
    assert result.returncode == 0, result.stdout
    return out, result.stdout


@pytest.mark.long
@pytest.mark.slow
def test_every_arm_stops_at_the_budget(compared: tuple[Path, str]) -> None:
    out, printed = compared
    assert "mine, seed 4" in printed
    with open(out / "runs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for seed in "34" for arm in ("ours", "base", "mine")
    ]
    for row in rows:
        tokens = sum(int(row[kind]) for kind in ("sampled", "trained", "written"))
        stages = json.loads((out / row["arm"] / f"seed-{row['seed']}" / "summary.json").read_text())
        if row["arm"] == "base":
            assert tokens == 0
            assert len(stages) == 1
        else:
            assert 12000 <= tokens < 13500
            # The run ends with the stage that spent the rest, and is measured there.
            assert sum(stages[-2]["tokens"].values()) < 12000
            assert stages[-1]["scores"]
    with open(out / "mine" / "seed-3" / "round-01" / "sft" / "metrics.csv") as file:
        steps = [row for row in csv.DictReader(file) if row["sft/loss_step"]]
    assert steps


@pytest.mark.long
@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_was_cut_off_goes_on(compared: tuple[Path, str]) -> None:
    out, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed-*/student/model.safetensors")}
    assert len(before) == 6
    # As if the machine had gone down before the last run wrote its student.
    last = out / "ours" / "seed-4"
    gone = last / "student" / "model.safetensors"
    weights = gone.read_bytes()
    for path in (last / "student").iterdir():
        path.unlink()
    (last / "student").rmdir()
    extra = out.parent / "mine.yaml"
    result = command("compare", *SMALL_COMPARE, f"--arms=[ours,base,{extra}]", f"--out={out}")
    assert result.returncode == 0, result.stdout
    assert "1 runs to do" in result.stdout
    assert gone.read_bytes() == weights
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != gone)
    other = command("compare", *SMALL_COMPARE, "--arms=[ours]", f"--out={out}", "--sft.epochs=1")
    assert other.returncode == 2
    assert "differs in sft.epochs (2 then, 1 now)" in other.stdout


@pytest.mark.slow
def test_tokens_are_those_of_the_files(tmp_path: Path) -> None:
    """Trained: every sequence of every epoch's set. Sampled: what the ledger has seen."""
    run_dir = tmp_path / "run"
    args = ["fit", *SMALL, f"--run_dir={run_dir}", "--curriculum.stages=[sft]", "--bridge.handover=false"]
    assert main(args) == 0
    base, stage = json.loads((run_dir / "summary.json").read_text())
    assert base["tokens"] == {"sampled": 0, "trained": 0, "written": 0}
    rows = [row for path in sorted(run_dir.glob("round-01/sft/set-epoch-*.jsonl")) for row in lines(path)]
    assert stage["tokens"]["trained"] == sum(len(row["prompt_ids"]) + len(row["target_ids"]) for row in rows) > 0
    assert stage["tokens"]["sampled"] == sum(row["tokens"] for row in lines(run_dir / "ledger.jsonl")) > 0
    assert stage["tokens"]["written"] > 0
    found = read_outcome(run_dir, "a", 1)
    assert found is not None
    assert found.mean == statistics.mean(score["value"] for score in stage["scores"])


@pytest.mark.slow
def test_measuring_what_is_unsolved_and_asking_the_teacher_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = ["fit", *SMALL, f"--run_dir={run_dir}", "--curriculum.stages=[sft,grpo]", "--curriculum.rounds=2",
            "--curriculum.probe.refresh=unsolved", "--curriculum.probe.attempts=3",
            "--curriculum.probe.epoch_share=0", "--bridge.handover=false"]  # fmt: skip
    assert main(args) == 0
    newest: dict[str, int] = {}
    measured: dict[tuple[int, str], set[str]] = {}
    unsolved: dict[tuple[int, str], set[str]] = {}
    for row in lines(run_dir / "ledger.jsonl"):
        place = (row["round"], row["stage"])
        unsolved.setdefault(place, {i for i, successes in newest.items() if successes == 0})
        if row["attempts"] == 3:  # a group of GRPO has four
            measured.setdefault(place, set()).add(row["problem_id"])
        newest[row["problem_id"]] = row["successes"]
    assert len(measured.pop((1, "sft"))) == 32
    assert set(measured) == {(1, "grpo"), (2, "grpo")}  # before the SFT of round 2 nothing is
    assert all(measured[place] == unsolved[place] != set() for place in measured)
    before, after = (
        {r["problem"]["id"]: r for r in lines(run_dir / f"round-0{number}" / "sft" / "bridge.jsonl")}
        for number in (1, 2)
    )
    stages = {
        stage["stage"]: stage["tokens"]["written"] for stage in json.loads((run_dir / "summary.json").read_text())
    }
    student = Student("embedded:qwen2", instruction="")
    new = [c["trace"] for i in after.keys() - before.keys() for c in after[i]["candidates"]]
    cost = sum(len(student.encode_target(t["text"])) for t in new if t["provenance"] in ("teacher", "bridged"))
    assert before.keys() & after.keys()
    assert stages["round 2 sft"] - stages["round 1 grpo"] == cost


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
