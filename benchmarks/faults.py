"""Kills a training run over and over, at chosen points and at random moments, and compares what it leaves in the end.

    python -m benchmarks.faults --kills 100 --out benchmarks/results/faults.json

A small curriculum with every stage is run once undisturbed. Then runs of the same configuration are killed by SIGKILL
and gone on with (`--resume auto`) until each has ended, and everything that they leave, the weights and the metrics
included, must be the same bytes. After a kill some files get a torn last record, as a machine without power leaves it.
The exit status is 1 if any run differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = [
    "--config=quickstart", "--data.train=embedded:chain/train?count=20", "--data.batch_size=3",
    "--data.token_budget=1000", "--curriculum.rounds=2", "--curriculum.probe.attempts=2",
    "--curriculum.probe.epoch_share=0.5", "--curriculum.checkpoint.chunk=6", "--sft.epochs=2",
    "--sft.learning_rate=1e-3", "--grpo.group_size=4", "--grpo.prompts_per_step=2", "--grpo.learning_rate=1e-4",
    "--grpo.kl=0.01", "--grpo.max_completion_tokens=48", "--cft.learning_rate=1e-4",
    "--benchmarks=[embedded:chain/test?count=6]", "--evaluation.max_new_tokens=48", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip
VARIANTS = {
    "full": ["--curriculum.checkpoint.every_n_steps=1"],
    "lora": ["--curriculum.checkpoint.every_n_steps=2", "--student.lora.r=4", "--student.lora.dropout=0.1",
             "--trainer.accumulate_grad_batches=2", "--data.num_workers=1"],
    "stages only": ["--curriculum.checkpoint.every_minutes=null"],
}  # fmt: skip
"""Checkpoints at every step; LoRA with dropout, accumulation and a dataloader worker; none within a stage."""
POINTS = {
    "generation": "slmreason.rollout.transformers.sample",
    "backward": "torch.Tensor.backward",
    "optimizer step": "torch.optim.adam.adam",
    "checkpoint write": "slmreason.run.tree.save_file",
    "rename": "slmreason.run.files.replace_synced",
    "append or sync": "os.fsync",
    "bridge": "slmreason.curriculum.traces.bridge",
    "critique": "slmreason.curriculum.traces.critique",
    "between stages": "slmreason.curriculum.curriculum.save_after_stage",
    "restart": "slmreason.curriculum.curriculum.load_run",
    "last save": "slmreason.student.Student.save",
}
"""Where a run is killed: at a call of each of these, or soon after."""
TORN = ("ledger.jsonl", "harvest.jsonl", "resume/journal.jsonl", "round-01/grpo/samples.jsonl")
VARIES = {"config.yaml", "lock", "resume"}
"""The folder's own name, the process, and checkpoints, which tell the time."""
LONGEST_S = 300.0


@dataclass
class Outcome:
    """What a run came to."""

    kills: Counter[str] = field(default_factory=Counter)
    digest: dict[str, str] = field(default_factory=dict)
    attempts: int = 0


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of every file that a run leaves, by its name."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if name.partition("/")[0] in VARIES:
            continue
        data = path.read_bytes()
        if name == "summary.json":
            data = json.dumps([{**row, "seconds": 0, "benchmark_seconds": 0} for row in json.loads(data)]).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def undisturbed(args: Sequence[str], folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """What a run leaves that nobody kills, and how often it passes each point."""
    passed: Counter[str] = Counter()
    status = _attempt(args, folder, passed.update, lambda: None)
    if status != 0:
        raise RuntimeError(f"the run failed with status {status}: {folder.with_suffix('.log')}")
    return digest(folder), passed


def killed(args: Sequence[str], folder: Path, calls: Counter[str], kills: int, rng: random.Random) -> Outcome:
    """One run, killed at most `kills` times and gone on with until it ends."""
    outcome, points = Outcome(), [point for point in POINTS if calls[point]]
    while True:
        outcome.attempts += 1
        # Moments without a name too: anything may be going on then.
        point = rng.choice([*points, "any moment"]) if outcome.kills.total() < kills else None
        number = rng.randint(1, max(1, calls[point] // 4)) if point is not None and point in calls else 0
        delay = rng.choice([0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.2)]) if point in calls else rng.uniform(0, 2)
        status = _attempt(args, folder, *_trigger(point, number, delay))
        if status == 0:
            outcome.digest = digest(folder)
            return outcome
        if status != -signal.SIGKILL or point is None:
            log = folder.with_suffix(".log")
            raise RuntimeError(f"the run failed with status {status} after {dict(outcome.kills)}: {log}")
        outcome.kills[point] += 1
        if rng.random() < 0.3:
            _tear(folder, rng)


def _trigger(
    point: str | None, number: int, delay: float
) -> tuple[Callable[[list[str]], object], Callable[[], float | None]]:
    """(takes the points that were passed, gives the moment to kill at): `delay` seconds after the n-th call."""
    moment = time.monotonic() + delay if point == "any moment" else None
    left = number

    def take(passed: list[str]) -> None:
        nonlocal left, moment
        if point is not None and moment is None:
            left -= passed.count(point)
            moment = time.monotonic() + delay if left <= 0 else None

    return take, lambda: moment


def _tear(folder: Path, rng: random.Random) -> None:
    for name in TORN:
        if (folder / name).exists() and rng.random() < 0.5:
            with open(folder / name, "ab") as file:
                file.write(b'{"problem_id": "embedded:chain/tr'[: rng.randint(1, 30)])


def _attempt(
    args: Sequence[str], folder: Path, take: Callable[[list[str]], object], moment: Callable[[], float | None]
) -> int:
    """Runs or goes on, in a forked process: it has everything imported already. Its status, negative for a signal."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child([*args, f"--run_dir={folder}", "--resume=auto"], writer, folder.with_suffix(".log"))
    os.close(writer)
    began = time.monotonic()
    try:
        for passed in _heard(reader, moment):
            if passed is None:
                os.kill(pid, signal.SIGKILL)
                break
            take(passed)
            if time.monotonic() - began > LONGEST_S:
                raise RuntimeError(f"the run did not end within {LONGEST_S:g} s: {folder.with_suffix('.log')}")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def _heard(reader: int, moment: Callable[[], float | None]) -> Iterator[list[str] | None]:
    """The points that the run passes, until it ends; None when it is time to kill it."""
    rest = b""
    while True:
        when = moment()
        wait = 1.0 if when is None else when - time.monotonic()
        if wait <= 0:
            yield None
            return
        ready, _, _ = select.select([reader], [], [], wait)
        data = os.read(reader, 65_536) if ready else None
        if data == b"":
            return
        *lines, rest = (rest + (data or b"")).split(b"\n")
        yield [line.decode() for line in lines]


def _child(args: Sequence[str], writer: int, log: Path) -> None:
    status = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        for point, place in POINTS.items():
            _announce(writer, point, place)
        from slmreason.cli import main

        status = main(["fit", *args])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _announce(writer: int, point: str, place: str) -> None:
    """Makes a function say that it is called."""
    import importlib

    module, _, name = place.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:  # the owner is a class
        outer, _, inner = module.rpartition(".")
        owner = getattr(importlib.import_module(outer), inner)
    plain = getattr(owner, name)

    def announced(*args: Any, **options: Any) -> Any:
        os.write(writer, f"{point}\n".encode())
        return plain(*args, **options)

    setattr(owner, name, announced)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kills in all, shared out among the variants")
    parser.add_argument("--kills-per-run", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    rng, rows = random.Random(options.seed), []
    began = time.monotonic()
    for variant, flags in VARIANTS.items():
        rows.append(row := _variant(variant, [*TINY, *flags], folder / variant.replace(" ", "-"), options, rng))
        differ = ", ".join(row["differing"]) or "nothing"
        print(f"{variant}: {row['kills']} kills in {row['runs']} runs, what differs: {differ}", flush=True)
    result = {
        "command": f"python -m benchmarks.faults --kills {options.kills} --seed {options.seed}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("slmreason", "torch", "lightning", "transformers")},
        "seconds": round(time.monotonic() - began),
        "variants": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["differing"] for row in rows))


def _variant(
    name: str, args: Sequence[str], folder: Path, options: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    """Enough killed runs of one variant for its share of the kills."""
    folder.mkdir(parents=True, exist_ok=True)
    expected, calls = undisturbed(args, folder / "undisturbed")
    wanted, kills, runs = -(-options.kills // len(VARIANTS)), Counter[str](), 0
    differ: list[str] = []
    while kills.total() < wanted:
        runs += 1
        most = min(options.kills_per_run, wanted - kills.total())
        outcome = killed(args, folder / f"run-{runs}", calls, most, rng)
        kills += outcome.kills
        differ += [f"run-{runs}/{file}" for file in differing(outcome.digest, expected)]
    return {
        "variant": name, "kills": kills.total(), "runs": runs, "at": dict(kills.most_common()),
        "weights": expected["student/model.safetensors"], "files": len(expected), "differing": differ,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    import slmreason.cli.fit  # noqa: F401 - once, before the processes are forked

    sys.exit(main())
