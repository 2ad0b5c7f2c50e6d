"""Seconds of a GRPO step, ours and TRL's GRPOTrainer: the same model, prompts, rewards, sampling settings and loss.

    python -m benchmarks.grpo --out benchmarks/results/grpo.json
    python -m benchmarks.grpo --device cuda --dtype bfloat16 --shapes '0.5B random' --prompts 16 --tokens 256 --half 0

Both sample with transformers on the same device: 8 completions of each prompt. `half` gives half of the groups the
same reward throughout, so that they carry no gradient.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.common import (
    Meter,
    MeterSteps,
    Stopwatch,
    adapters,
    alternate,
    compared,
    counted_tokens,
    meter_trl,
    model_folder,
    peft_adapters,
    plain_model,
    product_rate,
    products,
    quiet,
    save,
)
from slmreason.callbacks import RecordRollouts
from slmreason.data.ledger import Ledger
from slmreason.embedded.families import make_problems
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Place, Problem
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.student.packing import PromptBatch
from slmreason.verify.rewards import RewardFn, Verdict

GROUP = 8
LEARNING_RATE = 1e-6


def reward_of(question: str, text: str, half: bool) -> float:
    """By the text alone, so that both sides reward alike; with `half`, every other question always gives 1."""
    if half and zlib.crc32(question.encode()) % 2:
        return 1.0
    return float(zlib.crc32((question + text).encode()) % 2)


def questions(count: int, half: bool) -> list[Problem]:
    """Problems, half of which have rewards without variance if `half`."""
    pool = make_problems("chain", "train", 16 * count)
    if not half:
        return pool[:count]
    odd = [zlib.crc32(problem.question.encode()) % 2 == 1 for problem in pool]
    silent, other = ([p for p, o in zip(pool, odd, strict=True) if o is which] for which in (True, False))
    return silent[: count // 2] + other[: count // 2]


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    tokens: int
    half: bool
    steps: int
    prompts: int = 8
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: int = 0
    """Rank of adapters; 0 trains all weights."""


class TextReward(RewardFn):
    """`reward_of`, as our module takes it."""

    def __init__(self, half: bool) -> None:
        self.half = half

    def __call__(self, problem: Problem, text: str) -> Verdict:
        value = reward_of(problem.question, text, self.half)
        return Verdict(value, value == 1.0)


class Ours:
    """Our module in Lightning."""

    def __init__(self, folder: str, setting: Setting, meter: type[Meter]) -> None:
        self.student = Student(folder, instruction="", dtype=setting.dtype, lora=adapters(setting.lora))
        self.setting, self.meter = setting, meter
        self.problems = questions(setting.prompts, setting.half)
        self.tokens: Counter[str] = Counter()
        """Of the last turn, all steps together: `decoded` and `trained`."""

    def __call__(self) -> Sequence[float]:
        settings = GRPOSettings(
            group_size=GROUP, prompts_per_step=self.setting.prompts, max_completion_tokens=self.setting.tokens,
            loss="grpo", kl=0.0, learning_rate=LEARNING_RATE, mask_truncated=False,  # as TRL has it
        )  # fmt: skip
        module = GRPOModule(self.student, HFEngine(), TextReward(self.setting.half), settings)
        module.token_budget = 32_768
        module.gradient_clip_val = 1.0
        meter = self.meter()
        batches = [PromptBatch(tuple(self.problems))] * self.setting.steps
        trainer = L.Trainer(
            max_epochs=1, accelerator=self.setting.device, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[RecordRollouts(Ledger(None), Place(1, "grpo")), MeterSteps(meter)],
        )  # fmt: skip
        with counted_tokens() as self.tokens:
            trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
        return meter.found[1:]


class Theirs:
    """TRL's trainer, its memory savers off where they cost time."""

    def __init__(self, folder: str, setting: Setting, meter: type[Meter]) -> None:
        self.model, self.tokenizer = plain_model(folder)
        self.model.to(getattr(torch, setting.dtype))
        self.setting, self.meter = setting, meter
        self.problems = questions(setting.prompts, setting.half)

    def __call__(self) -> Sequence[float]:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        meter = self.meter()

        def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
            return [
                reward_of(prompt[-1]["content"], completion[-1]["content"].strip(), self.setting.half)
                for prompt, completion in zip(prompts, completions, strict=True)
            ]

        rows = [{"prompt": [{"role": "user", "content": problem.question}]} for problem in self.problems]
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder, per_device_train_batch_size=self.setting.prompts * GROUP, num_generations=GROUP,
                max_completion_length=self.setting.tokens, loss_type="grpo", beta=0.0, temperature=1.0, top_k=0,
                learning_rate=LEARNING_RATE, lr_scheduler_type="constant", save_strategy="no",
                max_steps=self.setting.steps,
                gradient_checkpointing=False, use_cpu=self.setting.device == "cpu", report_to="none", disable_tqdm=True,
                bf16=False, logging_steps=1, log_completions=False, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = GRPOTrainer(
                model=self.model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer, callbacks=[meter_trl(meter)],
                peft_config=peft_adapters(self.setting.lora),
            )  # fmt: skip
            trainer.train()
        return meter.found[1:]


def floor(ours: Ours) -> float:
    """Seconds that the products of a step of ours alone would take at the rate of a large one, a mean over its steps.

    That is 2 operations a weight for each token that is read or decoded, and 6 for each that is trained on: 4 where
    adapters are trained, since no weight beside them has a gradient. Prompts are not projected onto the vocabulary.
    """
    setting, student = ours.setting, ours.student
    weights = products(student.base_model)
    head = student.base_model.get_output_embeddings().weight.numel()
    read = sum(len(student.encode_question(problem.question)) for problem in ours.problems)
    decoded = ours.tokens["decoded"] / setting.steps
    trained = ours.tokens["trained"] / setting.steps
    completions = min(decoded + setting.prompts * GROUP, trained)
    sampling = 2 * (decoded * weights + read * (weights - head))
    training = (4 if setting.lora else 6) * (trained * (weights - head) + completions * head)
    return (sampling + training) / product_rate(getattr(torch, setting.dtype), setting.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["0.8M", "10M", "10M random"], help="or folders of models")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--half", nargs="+", type=int, default=[0, 1], help="1: half of the groups without variance")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn; the first is not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    rows = []
    makers: dict[str, Callable[..., Callable[[], Sequence[float]]]] = {"ours": Ours, "trl": Theirs}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = model_folder(shape, Path(scratch))
            for tokens in options.tokens:
                for half in options.half:
                    setting = Setting(
                        tokens, bool(half), options.steps, options.prompts, options.device, options.dtype, options.lora
                    )  # fmt: skip
                    sides = {name: makers[name](folder, setting, Stopwatch) for name in options.sides}
                    found = alternate(sides, options.rounds)
                    ours = sides.get("ours")
                    row = {
                        "model": Path(shape).name,
                        "lora": options.lora,
                        "completion tokens": tokens,
                        "half silent": bool(half),
                        "floor": floor(ours) if isinstance(ours, Ours) else None,
                        **compared(found),
                    }
                    rows.append(row)
                    print(shape, tokens, "half" if half else "all", row["median"], row["ratio"], flush=True)
    save(options.out, rows)


if __name__ == "__main__":
    main()
