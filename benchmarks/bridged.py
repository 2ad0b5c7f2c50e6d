"""SFT on what the Bridge chose beside SFT on the raw traces of the same problems: rho on held-out problems.

    python -m benchmarks.bridge --student FOLDER --data FILE --problems 64 --traces traces.jsonl
    python -m benchmarks.bridged --student FOLDER --data FILE --traces traces.jsonl --seeds 1 2

`chosen` is what the Bridge chooses with `bridge.raw: last`, or as `--raw` says. Trained are the problems of which there
is such a trace and whose raw one passes its checks, so both arms have the same problems; where the raw one is chosen
they have the same trace too (`differ` counts the others). Each arm and seed begins with the student as it is. Rho is
sampled on the last `--held_out` problems of the file, none of which was trained on, with the same draws for all arms.
Intervals are by a bootstrap over problems and seeds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from benchmarks.bridge import student_of, with_solution
from benchmarks.common import adapters, quiet, save
from slmreason.data.batches import PackedDataset
from slmreason.data.sources import load_problems
from slmreason.evaluate.bootstrap import Estimate, estimate, resampled
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.records import BridgeResult, Evidence, Example, Problem
from slmreason.rollout.collect import collect
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run.files import read_records
from slmreason.student import Student
from slmreason.student.packing import plan_batches
from slmreason.supervision.bridge import most_learnable
from slmreason.supervision.settings import BridgeSettings
from slmreason.verify.rewards import AnswerReward

ARMS = ("chosen", "raw")
Rates = NDArray[np.float64]
"""Rho of each held-out problem. [problems]"""


@dataclass(frozen=True)
class Pair:
    """A problem with the trace that came with it, and what is chosen."""

    problem: Problem
    raw: str
    chosen: str


def pairs_of(results: Sequence[BridgeResult], settings: BridgeSettings) -> list[Pair]:
    """Chosen anew among the candidates; a problem whose raw trace did not pass, or that has none, is left out."""
    pairs = []
    for result in results:
        raw = [c.trace.text for c in result.candidates if c.trace.provenance == "teacher" and c.rejected is None]
        chosen = most_learnable(result.candidates, settings)
        if raw and chosen is not None:
            pairs.append(Pair(result.problem, raw[0], chosen.text))
    return pairs


def rates_of(student: Student, problems: Sequence[Problem], options: argparse.Namespace) -> tuple[Rates, float]:
    """(rho of each problem, mean tokens of a completion)."""
    sampling = Sampling(options.tokens, seed=options.rollout_seed, with_log_probs=False)
    groups = collect(student, HFEngine(), AnswerReward(), problems, options.attempts, sampling)
    rates = np.array([Evidence.of(group).rho for group in groups])
    lengths = [len(rollout.completion_ids) for group in groups for rollout in group.rollouts]
    return rates, float(np.mean(lengths))


def train(
    student: Student, problems: Sequence[Problem], traces: Sequence[str], options: argparse.Namespace, seed: int
) -> None:
    """SFT with the warm-up, the decay and the clipping of `configs/gsm8k-cpu.yaml`."""
    L.seed_everything(seed, verbose=False)
    examples = [
        Example(student.encode_problem(problem), student.encode_target(trace), problem.id, "teacher")
        for problem, trace in zip(problems, traces, strict=True)
    ]
    lengths, rng = [len(example) for example in examples], random.Random(seed)
    plan = plan_batches(lengths, options.token_budget, rng=rng)
    dataset = PackedDataset(examples, plan, 1, student.pad_token_id, hidden_size=student.hidden_size)
    settings = SFTSettings(options.learning_rate, options.epochs, warmup_steps=3, decay="linear")
    trainer = L.Trainer(
        max_epochs=options.epochs, accelerator=options.device, devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(SFTModule(student, settings), DataLoader(dataset, batch_size=None))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", default="embedded:qwen2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="embedded:chain/train?count=64&difficulty=5,6")
    parser.add_argument("--traces", type=Path, required=True, help="what benchmarks.bridge kept")
    parser.add_argument("--raw", choices=["last", "compared"], default="last", help="bridge.raw")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--token_budget", type=int, default=2048)
    parser.add_argument("--held_out", type=int, default=64, help="the last problems of the file")
    parser.add_argument("--attempts", type=int, default=8, help="rollouts of a held-out problem")
    parser.add_argument("--tokens", type=int, default=300, help="of a completion, at most")
    parser.add_argument("--rollout_seed", type=int, default=42)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    pool = [with_solution(problem) for problem in load_problems(options.data).problems]
    pairs = pairs_of(read_records(options.traces, BridgeResult), BridgeSettings(raw=options.raw))
    held_out = pool[-options.held_out :]
    if both := {pair.problem.id for pair in pairs} & {problem.id for problem in held_out}:
        parser.error(f"--held_out: {len(both)} of the last {options.held_out} problems of --data are trained on")
    problems = [pair.problem for pair in pairs]
    texts = {"chosen": [pair.chosen for pair in pairs], "raw": [pair.raw for pair in pairs]}
    if not pairs:
        parser.error(f"--traces: no problem of {options.traces} has a raw trace that passed, and a chosen one")
    differ = sum(pair.raw != pair.chosen for pair in pairs)
    print(f"{len(pairs)} problems to train on, {differ} with another trace, {len(held_out)} held out", flush=True)

    def fresh() -> Student:
        student = student_of(options.student, options.dtype, adapters(options.lora))
        student.to(options.device)
        return student

    base, length = rates_of(fresh(), held_out, options)
    print(f"base: rho {base.mean():.3f}, {length:.0f} tokens", flush=True)
    runs: list[dict[str, Any]] = []
    rates: dict[str, list[Rates]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        for arm in ARMS:
            student, began = fresh(), time.perf_counter()
            train(student, problems, texts[arm], options, seed)
            seconds = time.perf_counter() - began
            found, length = rates_of(student, held_out, options)
            rates[arm].append(found)
            runs.append({"arm": arm, "seed": seed, "rho": float(found.mean()), "tokens": length, "seconds": seconds})
            print(runs[-1], flush=True)
    save(options.out, [{"problems": len(pairs), "differ": differ, "held_out": len(held_out), "runs": runs,
                        **intervals(rates, base)}])  # fmt: skip


def intervals(rates: dict[str, list[Rates]], base: Rates) -> dict[str, Any]:
    """Rho of each arm, and by how much the chosen traces are ahead of the raw ones and of the student as it was."""
    stacked = {arm: {"rho": np.stack(each)} for arm, each in rates.items()}
    stacked["base"] = {"rho": np.stack([base] * len(rates[ARMS[0]]))}
    draws = {arm: each["rho"] for arm, each in resampled(stacked).items()}
    means = {arm: float(each["rho"].mean()) for arm, each in stacked.items()}
    found: dict[str, Estimate] = {arm: estimate(means[arm], draws[arm]) for arm in draws}
    for first, second in (("chosen", "raw"), ("chosen", "base"), ("raw", "base")):
        found[f"{first} - {second}"] = estimate(means[first] - means[second], draws[first] - draws[second])
    for name, each in found.items():
        print(f"{name}: {each.signed() if '-' in name else each}")
    return {name: asdict(each) for name, each in found.items()}


if __name__ == "__main__":
    main()
