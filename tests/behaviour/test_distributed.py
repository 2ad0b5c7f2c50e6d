"""Two real processes on gloo against one: the same weights, losses, ledger and harvest, replicated and sharded."""

from __future__ import annotations

import csv
import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slmreason.cli import main
from slmreason.curriculum.resume import checkpoints
from slmreason.data.batches import PackedDataset
from slmreason.records import Example
from slmreason.run.tree import load_tree
from slmreason.student import EMBEDDED, Student
from slmreason.student.packing import collate, without_targets
from tests.runs import LORA, ONE, SMALL, TWO, Run, command, long


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs by name, each made once."""
    made: dict[str, Run] = {}

    def run(name: str, *args: str) -> Run:
        if name not in made:
            folder = tmp_path_factory.mktemp("runs") / name
            done = command("fit", *SMALL, f"--run_dir={folder}", *args)
            assert done.returncode == 0, done.stdout[-3000:]
            made[name] = Run(folder, done.stdout)
        return made[name]

    return run


def assert_same_run(ours: Run, theirs: Run, atol: float) -> None:
    base = load_file(EMBEDDED / "qwen2" / "model.safetensors")
    assert ours.weights.keys() == theirs.weights.keys() == base.keys()
    for name, tensor in ours.weights.items():
        torch.testing.assert_close(tensor, theirs.weights[name], rtol=0, atol=atol)
    assert max(float((ours.weights[name] - base[name]).abs().max()) for name in base) > 1e-3  # something was learnt
    # Every rollout is the same, generated once, recorded once, by one writer.
    assert ours.rows("ledger.jsonl") == theirs.rows("ledger.jsonl")
    assert [row["group"]["problem"]["id"] for row in ours.rows("harvest.jsonl")] == [
        row["group"]["problem"]["id"] for row in theirs.rows("harvest.jsonl")
    ]
    assert ours.rows("harvest.jsonl")
    for stage in ("sft", "grpo", "cft"):
        assert ours.epoch_losses(stage) == pytest.approx(theirs.epoch_losses(stage), rel=1e-3, abs=1e-5)
        strata = f"round-01/{stage}/strata.jsonl"
        assert ours.rows(strata) == theirs.rows(strata)
        drawn = f"round-01/{stage}/set-epoch-1.jsonl"
        assert ours.rows(drawn) == theirs.rows(drawn)
    assert ours.rows("benchmarks.jsonl") == theirs.rows("benchmarks.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [long("ddp"), "fsdp"])
def test_two_processes_equal_one_with_the_same_global_batch(runs: Any, strategy: str) -> None:
    one = runs("one", *ONE)
    two = runs(
        strategy, *TWO, f"--trainer.strategy={strategy}", "--trainer.callbacks+=tests.plugins.SameEverywhere"
    )  # fmt: skip
    # Adam turns float noise in near-zero gradients into steps of the learning rate's size; 1e-3 was learnt at least.
    assert_same_run(two, one, atol=5e-5)
    assert "run folder" in two.output
    assert two.output.count("run folder") == 1  # the other processes are silent
    assert two.output.count("greedy pass@1") == 1
    assert all(path.is_file() for path in (two.folder / "resume").glob("*.ckpt"))  # whole, sharded or not


@pytest.mark.long
@pytest.mark.slow
def test_lora_with_a_kl_term_and_model_parallel_strategy_equal_one_process(runs: Any) -> None:
    one = runs("one-lora", *ONE, *LORA)
    two = runs("fsdp-lora", *TWO, *LORA, "--trainer.strategy=ModelParallelStrategy")
    assert_same_run(two, one, atol=1e-4)


@pytest.mark.slow
def test_two_processes_draw_and_refill_as_one_does(runs: Any) -> None:
    flags = ["--curriculum.stages=[grpo]", "--grpo.order=informative", "--benchmarks=[]"]
    one = runs("one-drawn", *ONE, *flags, "--grpo.max_sampled_groups=6")
    two = runs("ddp-drawn", *TWO, *flags, "--grpo.max_sampled_groups=12", "--trainer.strategy=ddp")
    assert one.rows("ledger.jsonl") == two.rows("ledger.jsonl")
    assert two.epoch_losses("grpo") == pytest.approx(one.epoch_losses("grpo"), rel=1e-3, abs=1e-5)
    for name, tensor in two.weights.items():
        torch.testing.assert_close(tensor, one.weights[name], rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["handover", long("sft_gate"), long("chord")])
def test_two_processes_rescue_as_one_does(runs: Any, kind: str) -> None:
    """Some steps have fewer hand-overs or traces than processes, and each process has another number of them."""
    flags = ["--curriculum.stages=[sft, grpo]", "--sft.epochs=1", "--sft.learning_rate=1e-5", "--data.routing=all",
             "--benchmarks=[]", f"--grpo.rescue.kind={kind}"]  # fmt: skip
    one = runs(f"one-{kind}", *ONE, *flags)
    two = runs(f"ddp-{kind}", *TWO, *flags, "--trainer.strategy=ddp")
    assert max(rescued_shares(one)) > 0
    assert rescued_shares(two) == pytest.approx(rescued_shares(one))
    assert one.rows("ledger.jsonl") == two.rows("ledger.jsonl")
    assert two.epoch_losses("grpo") == pytest.approx(one.epoch_losses("grpo"), rel=1e-3, abs=1e-5)
    for name, tensor in two.weights.items():
        torch.testing.assert_close(tensor, one.weights[name], rtol=0, atol=5e-5)


def rescued_shares(run: Run) -> list[float]:
    """Of each step in which somebody failed."""
    with open(run.folder / "round-01" / "grpo" / "metrics.csv") as file:
        return [float(row["grpo/rescue/rescued"]) for row in csv.DictReader(file) if row.get("grpo/rescue/rescued")]


@pytest.mark.long
@pytest.mark.slow
def test_a_frozen_reference_is_sharded_too(runs: Any) -> None:
    stages = ["--curriculum.stages=[grpo]", "--grpo.kl=0.5", "--grpo.updates_per_batch=2"]
    one, two = runs("one-kl", *ONE, *stages), runs("fsdp-kl", *TWO, *stages, "--trainer.strategy=fsdp")
    assert one.rows("ledger.jsonl") == two.rows("ledger.jsonl")
    assert two.epoch_losses("grpo") == pytest.approx(one.epoch_losses("grpo"), rel=1e-3, abs=1e-5)
    for name, tensor in two.weights.items():
        torch.testing.assert_close(tensor, one.weights[name], rtol=0, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kept_in"), [("bf16-true", torch.bfloat16), long("bf16-mixed", torch.float32)])
def test_sharded_low_precision_accumulation_clipping_and_checkpointing_run_together(
    runs: Any, precision: str, kept_in: torch.dtype
) -> None:
    run = runs(
        f"fsdp-{precision}", *TWO, *LORA, "--trainer.strategy=fsdp", f"--trainer.precision={precision}",
        "--student.gradient_checkpointing=true", "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=0.5", "--curriculum.stages=[sft, grpo]",
    )  # fmt: skip
    outcomes = {row["stage"]: row["outcome"] for row in json.loads((run.folder / "summary.json").read_text())}
    assert outcomes["round 1 sft"] == outcomes["round 1 grpo"] == "done"
    assert {tensor.dtype for tensor in run.weights.values()} == {kept_in}
    base = load_file(EMBEDDED / "qwen2" / "model.safetensors")
    moved = [float((tensor.float() - base[name]).abs().max()) for name, tensor in run.weights.items()]
    assert 1e-3 < max(moved) < 0.5


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_equal_one_in_half_precision_too(runs: Any) -> None:
    """A rate at which bfloat16 weights without float32 copies hardly move."""
    flags = ["--trainer.precision=bf16-true", "--sft.learning_rate=1e-5", "--curriculum.stages=[sft]",
             "--benchmarks=[]", "--data.routing=all", "--curriculum.probe.refresh=never",
             "--curriculum.probe.epoch_share=0"]  # fmt: skip # what is sampled in bfloat16 depends on the batch
    one = trained(runs("one-bf16", *ONE, *flags))
    replicated = trained(runs("ddp-bf16", *TWO, *flags, "--trainer.strategy=ddp"))
    sharded = trained(runs("fsdp-bf16", *TWO, *flags, "--trainer.strategy=fsdp"))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    for name, tensor in one.items():
        assert torch.equal(replicated[name], tensor)
        # The norm of the gradient, to which it is clipped, is summed up shard by shard: within a few steps of the rate.
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=3e-5)


def trained(run: Run) -> dict[str, torch.Tensor]:
    """What a run has trained, as its newest checkpoint has it: adapters, or the float32 copies of the weights."""
    state: dict[str, torch.Tensor] = load_tree(checkpoints(run.folder)[-1])["state_dict"]
    return state


@pytest.mark.long
@pytest.mark.slow
def test_stratify_and_test_share_the_work(tmp_path: Path) -> None:
    results = []
    for devices in (1, 2):
        bands, scores = tmp_path / f"bands-{devices}.jsonl", tmp_path / f"scores-{devices}.jsonl"
        common = [*SMALL, f"--trainer.devices={devices}"]
        samples = ["--evaluation.samples=4", "--evaluation.k=[1,4]"]
        for args in (["stratify", *common, f"--out={bands}"], ["test", *common, *samples, f"--out={scores}"]):
            done = command(*args)
            assert done.returncode == 0, done.stdout[-2000:]
        results.append((bands.read_text(), scores.read_text()))
    assert results[0] == results[1]
    assert Counter(len(json.loads(line)["band"]) > 0 for line in results[1][0].splitlines()) == {True: 32}


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ("ddp_spawn", "forks or spawns"),
        ("ModelParallelStrategy --trainer.strategy.tensor_parallel_size=2", "tensor_parallel_size must be 1"),
        ("deepspeed", "deepspeed"),
    ],
)
def test_a_strategy_that_cannot_work_is_refused_before_anything_starts(
    strategy: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        [
            "fit",
            *SMALL,
            "--trainer.devices=2",
            f"--run_dir={tmp_path / 'run'}",
            *f"--trainer.strategy={strategy}".split(),
        ]
    )
    assert status == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES_IN", "sft")
    monkeypatch.setenv("DIES_RANK", "1")
    dies = "--trainer.callbacks+=tests.plugins.Dies"
    done = command("fit", *SMALL, *TWO, "--trainer.strategy=ddp", f"--run_dir={tmp_path / 'run'}", dies)
    assert done.returncode != 0
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "run")], capture_output=True, text=True)
    assert left.stdout == ""


def test_a_batch_without_targets_has_zero_loss_and_zero_gradient_for_every_weight(student: Student) -> None:
    batch = without_targets(student.pad_token_id, 10)
    loss = -student.score(batch).log_probs.sum() / batch.global_target_tokens
    loss.backward()
    assert float(loss) == 0.0
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) == 0.0


def test_shares_of_a_plan_are_disjoint_complete_and_normalised_together() -> None:
    examples = [Example((1, 2), tuple(range(3, 4 + i)), f"p{i}", "teacher") for i in range(7)]
    plan = [[0], [1, 2], [3], [4], [5]]
    shares = [PackedDataset(examples, plan, 2, 0, rank, 2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]  # 5 micro-batches: the last one of the second is empty
    tokens = [[batch.num_target_tokens for batch in share] for share in shares]
    assert tokens[1][-1] == 0
    assert sum(map(sum, tokens)) == sum(len(examples[i].target_ids) for row in plan for i in row)
    for share in shares:
        first, second, third = (batch.global_target_tokens for batch in share)
        assert first == second == sum(len(examples[i].target_ids) for row in plan[:4] for i in row)
        assert third == sum(len(examples[i].target_ids) for i in plan[4])
    whole = collate([examples[0]], 0)
    assert torch.equal(shares[0][0].input_ids, whole.input_ids)
