"""Same seed, same machine: the same run, byte for byte, whatever the workers, the folder and the hash seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmreason.cli import main
from tests.runs import command, long

pytestmark = pytest.mark.slow

# Dropout draws from the global generator, so a draw too many anywhere would be seen in the weights.
TINY = [
    "--config=quickstart", "--data.train=embedded:chain/train?count=24", "--data.batch_size=4",
    "--data.token_budget=1000", "--student.lora.r=4", "--student.lora.dropout=0.1", "--grpo.kl=0.01",
    "--curriculum.rounds=1", "--curriculum.evaluate=ends", "--curriculum.probe.attempts=2",
    "--curriculum.probe.epoch_share=0.5", "--sft.epochs=2", "--sft.learning_rate=1e-3", "--sft.warmup_steps=0",
    "--grpo.group_size=2", "--grpo.prompts_per_step=4", "--grpo.learning_rate=1e-4", "--grpo.warmup_steps=0",
    "--cft.learning_rate=1e-4", "--benchmarks=[embedded:chain/test?count=4]", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip
KEPT = ("*.jsonl", "strata.json", "round-*/*/*.jsonl", "round-*/*/metrics.csv", "student/*")
"""Everything a run leaves but its config, which names its folder, and what says how long it took."""
NEEDED = {
    "ledger.jsonl", "harvest.jsonl", "student/model.safetensors",
    *(f"round-01/{stage}/{name}" for stage in ("sft", "grpo", "cft") for name in ("strata.jsonl", "metrics.csv")),
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for kind in KEPT for path in sorted(folder.glob(kind))}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def run_with_hash_seed(hash_seed: int, folder: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", str(hash_seed))
        done = command("fit", *TINY, f"--run_dir={folder}")
    assert done.returncode == 0, done.stdout
    return contents(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that loads its data in the main process, of a process of its own."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    found = run_with_hash_seed(0, folder)
    assert found.keys() >= NEEDED
    return found


@pytest.mark.parametrize("workers", [0, long(1), 3])
def test_any_number_of_workers_gives_the_same_run(reference: dict[str, bytes], tmp_path: Path, workers: int) -> None:
    """And the process's own past does not matter: the tests before this one have drawn and trained in it."""
    folder = tmp_path / "elsewhere" / f"workers-{workers}"
    assert main(["fit", *TINY, f"--data.num_workers={workers}", f"--run_dir={folder}"]) == 0
    assert differing(contents(folder), reference) == []


def test_the_order_of_sets_and_hashes_does_not_matter(reference: dict[str, bytes], tmp_path: Path) -> None:
    assert differing(run_with_hash_seed(4711, tmp_path / "run"), reference) == []


def test_another_seed_gives_another_run(reference: dict[str, bytes], tmp_path: Path) -> None:
    """Or else the tests above would compare nothing."""
    assert main(["fit", *TINY, "--seed_everything=43", f"--run_dir={tmp_path / 'run'}"]) == 0
    assert {"ledger.jsonl", "student/model.safetensors"} <= set(differing(contents(tmp_path / "run"), reference))


def test_the_data_steps_write_the_same_files_twice(tmp_path: Path) -> None:
    written: dict[str, dict[str, bytes]] = {"a": {}, "b": {}}
    for name, files in written.items():
        folder = tmp_path / name
        bands, traces = folder / "bands.jsonl", folder / "traces.jsonl"
        assert main(["stratify", *TINY, f"--out={bands}"]) == 0
        assert main(["bridge", *TINY, f"--data.evidence={bands}", f"--out={traces}"]) == 0
        files |= {path.name: path.read_bytes() for path in (bands, traces)}
    assert written["a"] == written["b"]
    assert all(written["a"].values())
