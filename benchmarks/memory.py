"""Peak memory of a GRPO step and of an SFT step under a vocabulary of 151,936 tokens, ours and TRL's.

    python -m benchmarks.memory --out benchmarks/results/memory.json

TRL's fused head, which makes no full logits either, is on (it always is). Measured is what a step needs beyond the
weights and the optimizer's state, as PyTorch counts tensors: activations, logits, gradients, the cache while sampling.
`LoRA` has the head frozen on both sides.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import grpo, sft
from benchmarks.common import VOCABULARY, PeakMeter, compared, quiet, random_model, save


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="0.8M", help="or the folder of a model")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", nargs="+", choices=["GRPO", "SFT"], default=["GRPO", "SFT"])
    parser.add_argument("--tokens", type=int, default=256, help="completion tokens of GRPO")
    parser.add_argument("--sides", nargs="+", choices=["ours", "trl"], default=["ours", "trl"])
    parser.add_argument("--data", help="GSM8K's train.jsonl or train.jsonl.gz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        real = (Path(options.shape) / "config.json").is_file()
        folder = options.shape if real else random_model(Path(scratch) / "model", options.shape, VOCABULARY)
        setting = grpo.Setting(
            options.tokens, False, 2, options.prompts, options.device, options.dtype, options.lora
        )  # fmt: skip
        pairs = sft.conversations(options.data, 400)
        kinds: dict[str, Callable[[Any], Callable[[], Sequence[float]]]] = {
            "GRPO": lambda side: side(folder, setting, PeakMeter),
            "SFT": lambda side: side(folder, pairs, 2, options.device, PeakMeter, options.dtype, lora=options.lora),
        }
        sources = {"GRPO": grpo, "SFT": sft}
        for kind in options.steps:
            make = kinds[kind]
            makers: dict[str, Any] = {"ours": sources[kind].Ours, "trl": sources[kind].Theirs}
            found = {name: list(make(makers[name])()) for name in options.sides}
            model = f"{Path(options.shape).name}, vocabulary {VOCABULARY}"
            row = {"step": kind, "model": model, "lora": options.lora, "unit": "bytes",
                   **compared(found)}  # fmt: skip
            rows.append(row)
            print(kind, {name: f"{value / 2**20:.0f} MiB" for name, value in row["median"].items()}, row["ratio"],
                  flush=True)  # fmt: skip
    save(options.out, rows)


if __name__ == "__main__":
    main()
