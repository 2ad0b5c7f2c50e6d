"""Tokens, generated and trained, until the student reaches an accuracy: ours against TRL's SFT then GRPO on all data.

    python -m benchmarks.tokens --seeds 1 2 3 --out benchmarks/results/tokens.json

Both start from the embedded student with the same pool, teacher, learning rates, group size and batch sizes: those of
the quickstart. Theirs is SFT on a trace of every problem, for as many epochs, then GRPO on all problems until the
accuracy is reached or its tokens are three times those that ours took to reach it. The traces are the teacher's raw
ones, which is what TRL has without a Bridge, or those that the teacher rewrote for the student. A token that is
sampled, or written by the teacher, counts once, and once again each time it is trained on; prompts count where they are
computed for training. Measuring the benchmark is counted on neither side.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import plain_model, quiet, save
from slmreason.cli import main as slmreason
from slmreason.cli.config import build_parser, parse
from slmreason.embedded.families import make_problems
from slmreason.evaluate.benchmarks import EvaluationSettings, evaluate, load_benchmarks
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.verify.rewards import AnswerReward

POOL = 600
BENCHMARK = "embedded:chain/test?count={}"


@dataclass
class Curve:
    """What a side had spent, and where it stood, at each measurement."""

    tokens: int = 0
    points: list[tuple[int, float]] = field(default_factory=list)

    def note(self, accuracy: float) -> None:
        self.points.append((self.tokens, accuracy))

    def tokens_to(self, accuracy: float) -> int | None:
        """Tokens at the first measurement that reaches it; None if none does."""
        return next((tokens for tokens, reached in self.points if reached >= accuracy), None)


def ours(model: str, seed: int, problems: int, folder: Path) -> Curve:
    """The quickstart, with its own benchmarks replaced by one; what it cost by each stage stands in its summary."""
    status = slmreason([
        "fit", "--config=quickstart", f"--student.model={model}", f"--seed_everything={seed}",
        f"--data.train=embedded:chain/train?count={POOL}", f"--benchmarks=[{BENCHMARK.format(problems)}]",
        f"--run_dir={folder / 'run'}", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    assert status == 0
    curve = Curve()
    for stage in json.loads((folder / "run" / "summary.json").read_text()):
        curve.tokens = sum(stage["tokens"].values())
        if stage["scores"]:
            curve.note(stage["scores"][0]["value"])
    return curve


def theirs(model: str, seed: int, problems: int, folder: Path, budget: int, traces: str, target: float) -> Curve:
    """TRL's two trainers one after the other, until the target is reached or the budget of tokens is spent."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    shared = parse(build_parser("fit", ""), ["--config=quickstart"])
    sft, grpo, rows_per_step = shared.sft, shared.grpo, shared.data.batch_size
    rollouts_per_step = grpo.prompts_per_step * grpo.group_size
    curve, pool = Curve(), make_problems("chain", "train", POOL)
    student = Student(model, instruction="")
    path = str(student.base_model.config._name_or_path)
    network, tokenizer = plain_model(path)
    student.network = network
    settings = EvaluationSettings(1, 0.0, 1.0, (1,), 80)
    benchmarks = load_benchmarks([BENCHMARK.format(problems)], settings, student, HFEngine())

    def measure() -> None:
        was_training = network.training
        curve.note(evaluate(student, HFEngine(), AnswerReward(), benchmarks, settings)[0].value)
        network.train(was_training)

    class Measures(TrainerCallback):
        def __init__(self, every: int) -> None:
            self.every = every

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step % self.every == 0:
                measure()
            control.should_training_stop = curve.tokens >= budget or curve.tokens_to(target) is not None
            return control

    def counting(collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def count(features: Any) -> Any:
            batch = collator(features)
            computed = batch.get("attention_mask")
            curve.tokens += batch["input_ids"].numel() if computed is None else int(computed.sum())
            return batch

        return count

    measure()
    quiet_options: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
                                     "bf16": False, "gradient_checkpointing": False, "seed": seed,
                                     "logging_steps": 10_000, "dataloader_pin_memory": False}  # fmt: skip
    teacher = ProceduralTeacher()
    raw = teacher.solve(pool)
    written = raw if traces == "raw" else teacher.rewrite(pool, [trace or "" for trace in raw], [])
    curve.tokens += sum(len(student.encode_target(text)) for text in {*raw, *written} if text)
    rows = [
        {"prompt": [{"role": "user", "content": p.question}], "completion": [{"role": "assistant", "content": t}]}
        for p, t in zip(pool, written, strict=True) if t
    ]  # fmt: skip
    supervised = SFTTrainer(
        model=network, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=SFTConfig(output_dir=str(folder / "sft"), per_device_train_batch_size=rows_per_step,
                       num_train_epochs=sft.epochs, learning_rate=sft.learning_rate, lr_scheduler_type=sft.decay,
                       warmup_steps=sft.warmup_steps, max_length=None, completion_only_loss=True, **quiet_options),
        callbacks=[Measures(-(-len(rows) // rows_per_step))],
    )  # fmt: skip
    supervised.data_collator = counting(supervised.data_collator)
    supervised.train()
    if curve.tokens_to(target) is not None:
        return curve

    reward, by_question = AnswerReward(), {problem.question: problem for problem in pool}

    def verify(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        curve.tokens += sum(map(len, completion_ids))
        lengths = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
        curve.tokens += sum(map(len, completion_ids)) + sum(lengths)
        pairs = [(by_question[p[-1]["content"]], c[-1]["content"]) for p, c in zip(prompts, completions, strict=True)]
        return [verdict.reward for verdict in reward.grade(pairs)]

    prompts = [{"prompt": [{"role": "user", "content": problem.question}]} for problem in pool]
    GRPOTrainer(
        model=network, processing_class=tokenizer, reward_funcs=verify, train_dataset=Dataset.from_list(prompts),
        args=GRPOConfig(output_dir=str(folder / "grpo"), per_device_train_batch_size=rollouts_per_step,
                        num_generations=grpo.group_size, max_completion_length=grpo.max_completion_tokens,
                        loss_type=grpo.loss, beta=0.0, temperature=grpo.temperature, top_k=0,
                        learning_rate=grpo.learning_rate, lr_scheduler_type="constant",
                        warmup_steps=grpo.warmup_steps, max_steps=100_000, max_grad_norm=1.0, **quiet_options),
        callbacks=[Measures(-(-160 // grpo.prompts_per_step))],
    ).train()  # fmt: skip
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="embedded:qwen2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--problems", type=int, default=1000, help="problems of the benchmark")
    parser.add_argument("--gain", type=float, default=0.05, help="the accuracy to reach, above the base")
    parser.add_argument("--traces", nargs="+", choices=["raw", "rewritten"], default=["raw", "rewritten"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            mine = ours(options.model, seed, options.problems, Path(scratch))
            target = mine.points[0][1] + options.gain
            sides = {"ours": mine}
            budget = 3 * (mine.tokens_to(target) or mine.tokens)
            for traces in options.traces:
                sides[f"trl, {traces} traces"] = theirs(
                    options.model, seed, options.problems, Path(scratch), budget, traces, target
                )
        reached = {name: curve.tokens_to(target) for name, curve in sides.items()}
        print(seed, target, reached, flush=True)
        rows.append({
            "seed": seed, "target": target, "budget of trl": budget,
            **{name: {"tokens to target": reached[name], "tokens": curve.tokens, "points": curve.points}
               for name, curve in sides.items()},
        })  # fmt: skip
    save(options.out, rows)


if __name__ == "__main__":
    main()
