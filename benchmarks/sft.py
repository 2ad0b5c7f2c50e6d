"""Training tokens a second of SFT, ours and TRL's SFTTrainer with packing: same model, examples, optimizer, batch size.

    python -m benchmarks.sft --data gsm8k/train.jsonl.gz --out benchmarks/results/sft.json

`--data` is GSM8K's own file; without it the lengths are those of the embedded families. A token counts once, however
often it is padded, and whether it is a prompt's or a target's; both sides train on the targets alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
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
    meter_trl,
    model_folder,
    peft_adapters,
    plain_model,
    quiet,
    save,
)
from slmreason.data.batches import PackedDataset
from slmreason.data.sources import load_problems
from slmreason.embedded.families import make_problems, rebuild, write_solution
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.records import Example
from slmreason.student import Student
from slmreason.student.packing import plan_batches

LEARNING_RATE = 1e-5
BATCH_TOKENS = 8192
DType = Literal["float32", "bfloat16"]


def conversations(data: str | None, count: int) -> list[tuple[str, str]]:
    """(question, solution) pairs."""
    if data is not None:
        problems = load_problems(f"gsm8k={data}", limit=count).problems
        return [(problem.question, problem.trace or problem.answer) for problem in problems]
    return [
        (p.question, write_solution([step.text for step in rebuild(p.id).steps], p.answer))
        for p in make_problems("chain", "train", count)
    ]


class Ours:
    """Our module in Lightning, a token budget a step."""

    def __init__(
        self, folder: str, pairs: Sequence[tuple[str, str]], steps: int, device: str, meter: type[Meter],
        dtype: DType = "float32", batch_tokens: int = BATCH_TOKENS, lora: int = 0,
    ) -> None:  # fmt: skip
        self.student = Student(folder, instruction="", dtype=dtype, lora=adapters(lora))
        self.device, self.meter = device, meter
        encode = self.student
        self.examples = [
            Example(encode.encode_question(question), encode.encode_target(solution), "", "teacher")
            for question, solution in pairs
        ]
        self.plan = plan_batches([len(example) for example in self.examples], batch_tokens)[:steps]

    def __call__(self) -> Sequence[float]:
        meter = self.meter()
        trainer = L.Trainer(
            max_epochs=1, accelerator=self.device, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[MeterSteps(meter)], gradient_clip_val=1.0,
        )  # fmt: skip
        dataset = PackedDataset(
            self.examples, self.plan, 1, self.student.pad_token_id, hidden_size=self.student.hidden_size
        )
        trainer.fit(SFTModule(self.student, SFTSettings(LEARNING_RATE)), DataLoader(dataset, batch_size=None))  # type: ignore[arg-type]
        tokens = [sum(len(self.examples[i]) for i in members) for members in self.plan]
        return _per(tokens, meter)


class Theirs:
    """TRL's trainer with packing: as many rows of 1,024 tokens a step as hold the same number of tokens."""

    def __init__(
        self, folder: str, pairs: Sequence[tuple[str, str]], steps: int, device: str, meter: type[Meter],
        dtype: DType = "float32", batch_tokens: int = BATCH_TOKENS, lora: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer = plain_model(folder)
        self.model.to(getattr(torch, dtype))
        self.pairs, self.steps, self.device, self.meter = pairs, steps, device, meter
        self.lora = lora
        self.row_tokens = min(1024, batch_tokens)
        self.rows = batch_tokens // self.row_tokens

    def __call__(self) -> Sequence[float]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        meter = self.meter()
        rows = [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": s}]}
            for q, s in self.pairs
        ]
        counts: list[int] = []
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, packing=True, max_length=self.row_tokens, per_device_train_batch_size=self.rows,
                learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=self.steps, save_strategy="no",
                gradient_checkpointing=False, use_cpu=self.device == "cpu", report_to="none", disable_tqdm=True,
                bf16=False, logging_steps=1000, completion_only_loss=True, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=self.model, args=config, train_dataset=Dataset.from_list(rows),
                processing_class=self.tokenizer, callbacks=[meter_trl(meter)],
                peft_config=peft_adapters(self.lora),
            )  # fmt: skip
            collator = trainer.data_collator

            def counted(features: Any) -> Any:
                counts.append(sum(len(feature["input_ids"]) for feature in features))
                return collator(features)

            trainer.data_collator = counted
            trainer.train()
        return _per(counts, meter)


def _per(tokens: Sequence[int], meter: Meter) -> Sequence[float]:
    """Tokens a second of each step but the first; of a meter of memory what it found."""
    if not isinstance(meter, Stopwatch):
        return meter.found[1:]
    return [count / seconds for count, seconds in zip(tokens, meter.found, strict=False)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", help="GSM8K's train.jsonl or train.jsonl.gz")
    parser.add_argument("--shapes", nargs="+", default=["0.8M", "10M"], help="or folders of models")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn; the first is not counted")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    rows = []
    pairs = conversations(options.data, 400 * options.steps)
    makers: dict[str, Callable[..., Callable[[], Sequence[float]]]] = {"ours": Ours, "trl": Theirs}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            folder = model_folder(shape, Path(scratch))
            sides = {
                name: make(
                    folder,
                    pairs,
                    options.steps,
                    options.device,
                    Stopwatch,
                    options.dtype,
                    options.batch_tokens,
                    options.lora,
                )  # fmt: skip
                for name, make in makers.items()
            }
            data = "gsm8k" if options.data else "embedded chain"
            row = {"model": Path(shape).name, "lora": options.lora, "data": data,
                   **compared(alternate(sides, options.rounds), more_is_better=True)}  # fmt: skip
            rows.append(row)
            print(shape, row["median"], row["ratio"], flush=True)
    save(options.out, rows)


if __name__ == "__main__":
    main()
