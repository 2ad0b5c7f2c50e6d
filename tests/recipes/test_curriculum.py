"""The whole curriculum at a small size, through the real command, with asserted facts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmreason.cli import fit, main
from slmreason.curriculum import Curriculum
from slmreason.curriculum.state import StageReport
from slmreason.records import Critique, RolloutGroup, from_json

pytestmark = pytest.mark.slow

SMALL = [
    "--data.train=embedded:chain/train?count=48",
    "--grpo.prompts_per_step=8",
    "--curriculum.probe.attempts=4",
    "--curriculum.probe.epoch_share=1",
    "--grpo.group_size=4",
    "--sft.epochs=2",
    "--grpo.epochs=2",
    "--benchmarks=[embedded:chain/test?count=12, embedded:logic/test?count=12]",
    "--trainer.enable_progress_bar=false",
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Curriculum, list[int]]:
    """A run of two rounds, the curriculum object, and the id of the student's weights at each fit."""
    run_dir = tmp_path_factory.mktemp("run") / "small"
    seen: list[Curriculum] = []
    weights: list[int] = []
    patch = pytest.MonkeyPatch()

    class Spy(Curriculum):
        def run(self) -> list[StageReport]:
            seen.append(self)
            return super().run()

        def _fit(self, place: Any, stage: Any, *args: Any) -> None:
            assert stage.module.student is self.student
            weights.append(self.student.network.get_input_embeddings().weight.data_ptr())
            super()._fit(place, stage, *args)

    patch.setattr(fit, "Curriculum", Spy)
    status = main(["fit", "--config", "quickstart", f"--run_dir={run_dir}", *SMALL])
    patch.undo()
    assert status == 0
    return run_dir, seen[0], weights


def stage_dirs(run_dir: Path, stage: str) -> list[Path]:
    return sorted(path for path in run_dir.glob(f"round-*/{stage}") if (path / "metrics.csv").exists())


def test_one_student_goes_through_all_stages_without_a_copy(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    _, run, weights = small_run
    assert len({id(stage.module.student) for stage in run.stages.values()} | {id(run.student)}) == 1
    assert len(weights) >= 5
    assert len(set(weights)) == 1


def test_the_run_folder_holds_what_it_should(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    run_dir, *_ = small_run
    for name in ("config.yaml", "ledger.jsonl", "harvest.jsonl", "rejects.jsonl", "summary.json", "benchmarks.jsonl"):
        assert (run_dir / name).exists(), name
    for stage in ("sft", "grpo", "cft"):
        for folder in stage_dirs(run_dir, stage):
            assert (folder / "set-epoch-1.jsonl").stat().st_size
            assert (folder / "strata.jsonl").stat().st_size
    assert list((run_dir / "resume").glob("*-after-round-2-cft.ckpt"))
    assert rows(stage_dirs(run_dir, "grpo")[0] / "samples.jsonl")
    assert rows(stage_dirs(run_dir, "sft")[0] / "bridge.jsonl")


def test_the_student_folder_loads_with_plain_transformers(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    run_dir, run, _ = small_run
    model = AutoModelForCausalLM.from_pretrained(run_dir / "student")
    for mine, theirs in zip(run.student.network.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_strata_change_at_an_epoch_boundary_and_the_set_with_them(
    small_run: tuple[Path, Curriculum, list[int]],
) -> None:
    run_dir, *_ = small_run
    moved = 0
    for stage in ("sft", "grpo"):
        for folder in stage_dirs(run_dir, stage):
            history = rows(folder / "strata.jsonl")
            assert [change["place"]["epoch"] for change in history] == list(range(len(history)))
            moved += sum(sum(change["moves"].values()) for change in history[1:])
    assert moved > 0
    folder = stage_dirs(run_dir, "sft")[0]
    sets = [{row["problem_id"] for row in rows(folder / f"set-epoch-{epoch}.jsonl")} for epoch in (1, 2)]
    assert sets[0] != sets[1]


def test_sft_trains_on_medium_and_hard_problems_only(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    run_dir, *_ = small_run
    ledger = rows(run_dir / "ledger.jsonl")
    first = stage_dirs(run_dir, "sft")[0]
    probe = {row["problem_id"]: row for row in ledger if row["policy_version"] == 0}
    unmastered = {name for name, row in probe.items() if row["successes"] / row["attempts"] < 0.75}
    assert {row["problem_id"] for row in rows(first / "set-epoch-1.jsonl")} == unmastered


def test_every_all_zero_group_is_in_the_next_critique_set_and_no_other(
    small_run: tuple[Path, Curriculum, list[int]],
) -> None:
    run_dir, *_ = small_run
    ledger = rows(run_dir / "ledger.jsonl")
    harvest = [(row["place"], from_json(RolloutGroup, row["group"])) for row in rows(run_dir / "harvest.jsonl")]
    checked = 0
    for number in (1, 2):
        zero = [
            r
            for r in ledger
            if r["round"] == number and r["stage"] == "grpo" and r["successes"] == 0 and r["attempts"] == 4
        ]
        # The probe before GRPO is recorded under its name too, without an informative fit behind it.
        groups = [g for place, g in harvest if place["round"] == number]
        assert {g.problem.id for g in groups} <= {r["problem_id"] for r in zero}
        assert all(g.all_zero for g in groups)
        path = run_dir / f"round-{number:02d}" / "cft" / "critiques.jsonl"
        if groups:
            critiques = [from_json(Critique, row) for row in rows(path)]
            assert {c.problem.id for c in critiques} == {g.problem.id for g in groups}
            texts = {r.text for g in groups for r in g.rollouts}
            assert all(c.attempt in texts for c in critiques)
            checked += 1
    assert checked


def test_grpo_rollouts_and_harvest_agree_exactly(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    """Of the groups that GRPO sampled for its steps, exactly the all-zero ones were harvested."""
    run_dir, *_ = small_run
    ledger = rows(run_dir / "ledger.jsonl")
    harvested = {
        (r["place"]["round"], r["place"]["epoch"], r["group"]["problem"]["id"]) for r in rows(run_dir / "harvest.jsonl")
    }
    expected = set()
    for number in (1, 2):
        for epoch in (0, 1):
            drawn = run_dir / f"round-{number:02d}" / "grpo" / f"set-epoch-{epoch + 1}.jsonl"
            members = {row["id"] for row in rows(drawn)} if drawn.exists() else set()
            steps = [r for r in ledger if (r["round"], r["stage"], r["epoch"]) == (number, "grpo", epoch)]
            last = {r["problem_id"]: r for r in steps if r["problem_id"] in members}  # the newest: after any probe
            expected |= {(number, epoch, name) for name, r in last.items() if r["successes"] == 0}
    assert harvested == expected


def test_metrics_show_what_a_user_looks_for(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    run_dir, *_ = small_run
    with open(stage_dirs(run_dir, "grpo")[0] / "metrics.csv") as file:
        columns = csv.DictReader(file).fieldnames or []
    for name in (
        "grpo/reward_step",
        "grpo/informative_step",
        "grpo/all_zero_step",
        "grpo/entropy",
        "grpo/sampler_mismatch",
    ):
        assert name in columns
    with open(stage_dirs(run_dir, "sft")[0] / "metrics.csv") as file:
        assert "sft/loss_step" in (csv.DictReader(file).fieldnames or [])


def test_summary_has_the_base_and_each_stage(small_run: tuple[Path, Curriculum, list[int]]) -> None:
    run_dir, *_ = small_run
    stages = [entry["stage"] for entry in json.loads((run_dir / "summary.json").read_text())]
    assert stages == ["base"] + [f"round {n} {s}" for n in (1, 2) for s in ("sft", "grpo", "cft")]


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    options = [*SMALL, "--curriculum.rounds=1", "--data.train=embedded:chain/train?count=16", "--benchmarks=[]"]
    for name in ("a", "b"):
        assert main(["fit", "--config", "quickstart", f"--run_dir={tmp_path / name}", *options]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "student") for n in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == (tmp_path / "b" / "ledger.jsonl").read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        ["--student.lora.r=8", "--grpo.kl=0.01"],
        ["--grpo.loss=gspo", "--trainer.accumulate_grad_batches=2"],
        ["--trainer.precision=bf16-true", "--grpo.loss=dapo"],
    ],
)
def test_other_configurations_run_to_their_end(tmp_path: Path, extra: list[str]) -> None:
    options = [*SMALL, "--curriculum.rounds=1", "--data.train=embedded:chain/train?count=24", "--benchmarks=[]"]
    assert main(["fit", "--config", "quickstart", f"--run_dir={tmp_path / 'run'}", *options, *extra]) == 0
    outcomes = [entry["outcome"] for entry in json.loads((tmp_path / "run" / "summary.json").read_text())]
    assert outcomes[:3] == ["done"] * 3
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_critiques_can_be_mixed_into_sft_without_a_fit_of_their_own(tmp_path: Path) -> None:
    options = [*SMALL, "--curriculum.stages=[sft, grpo]", "--curriculum.mix_critiques=true", "--benchmarks=[]"]
    assert main(["fit", "--config", "quickstart", f"--run_dir={tmp_path / 'run'}", *options]) == 0
    origins = {row["origin"] for row in rows(tmp_path / "run" / "round-02" / "sft" / "set-epoch-1.jsonl")}
    assert {"diagnosis", "repair"} <= origins


def test_max_time_is_the_budget_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--trainer.max_time=00:00:00:02", "--benchmarks=[embedded:chain/test?count=4]"]
    assert main(["fit", "--config", "quickstart", f"--run_dir={tmp_path / 'run'}", *options]) == 0
    outcomes = [entry["outcome"] for entry in json.loads((tmp_path / "run" / "summary.json").read_text())]
    assert outcomes[-1] == "skipped: trainer.max_time is used up"
    assert "max_time is used up" in capsys.readouterr().out
