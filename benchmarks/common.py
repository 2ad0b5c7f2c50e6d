"""What the benchmarks share: models of a given size, alternating measurements, and the form of a result."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from slmreason.embedded.families import make_problems, rebuild, write_solution
from slmreason.records import Example
from slmreason.rollout.lean import LeanSteps
from slmreason.student import Lora, Student

PACKAGES = ("slmreason", "torch", "transformers", "trl", "lightning", "peft", "math-verify", "datasets")
SHAPES: dict[str, dict[str, Any]] = {
    "0.8M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "10M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
}
"""Qwen2 shapes. The last is that of Qwen2.5-0.5B."""
VOCABULARY = 151_936
"""Of Qwen2.5."""


def embedded_folder() -> str:
    """The embedded Qwen2 student: 0.8M parameters, a vocabulary of 599, trained a little."""
    from slmreason.student import resolve_model

    return str(resolve_model("embedded:qwen2"))


def random_model(
    folder: Path, shape: str, vocab_size: int | None = None, positions: int = 2048, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> str:  # fmt: skip
    """Writes a Qwen2 with random weights and the embedded student's tokenizer; gives its folder.

    Args:
        device: where the weights are drawn; half a billion take seconds on a CPU.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    sizes = SHAPES[shape]
    heads = sizes["num_attention_heads"]
    config = Qwen2Config(
        **sizes, num_key_value_heads=2, vocab_size=vocab_size or len(tokenizer), max_position_embeddings=positions,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )  # fmt: skip
    assert sizes["hidden_size"] % heads == 0
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def model_folder(shape: str, folder: Path) -> str:
    """A model of that shape: the embedded student for 0.8M, else random weights.

    `10M` is trained for a minute on the embedded families, so that its completions end as a student's do. With random
    weights (`10M random`) hardly one ends before the limit. A folder in Hugging Face form is taken as it is.
    """
    if (Path(shape) / "config.json").is_file():
        return shape
    if shape == "0.8M":
        return embedded_folder()
    path = random_model(folder / shape, shape.removesuffix(" random"))
    if shape == "10M":
        from slmreason.embedded.pretrain import RECIPES, pretrain
        from slmreason.student import Student

        student = Student(path, instruction="")
        pretrain(student, RECIPES["qwen2"], steps=40, sequences=48, log_every=0)
        student.save(Path(path))
    return path


def solutions(student: Student, count: int) -> list[Example]:
    """Problems of the chain family with their worked solutions."""
    problems = make_problems("chain", "train", count)
    texts = [write_solution([step.text for step in rebuild(p.id).steps], p.answer) for p in problems]
    return [
        Example(student.encode_question(p.question), student.encode_target(text), p.id, "teacher")
        for p, text in zip(problems, texts, strict=True)
    ]


def adapters(rank: int) -> Lora | None:
    """Our adapters of that rank, scaled by two; None for rank 0."""
    return Lora(r=rank, alpha=2 * rank) if rank else None


def peft_adapters(rank: int) -> Any:
    """The same as peft's own settings, for TRL."""
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def plain_model(folder: str, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    return model, AutoTokenizer.from_pretrained(folder)


def alternate(sides: dict[str, Callable[[], Sequence[float]]], rounds: int) -> dict[str, list[float]]:
    """Runs the sides in turn, `rounds` times; each gives the measurements of one turn."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides) if turn % 2 == 0 else list(reversed(sides))
        for name in names:
            found[name] += sides[name]()
    return found


def compared(found: dict[str, list[float]], ours: str = "ours", more_is_better: bool = False) -> dict[str, Any]:
    """Medians, their spread, and how much better ours is than each of the others; no ratio where ours was left out."""
    medians = {name: statistics.median(values) for name, values in found.items()}
    others = {name: median for name, median in medians.items() if name != ours and ours in medians}
    ratios = {
        name: medians[ours] / median if more_is_better else median / medians[ours] for name, median in others.items()
    }
    spread = {name: [min(values), max(values)] for name, values in found.items()}
    return {"median": medians, "range": spread, "ratio": ratios, "measurements": {n: len(v) for n, v in found.items()}}


def quiet() -> None:
    """The libraries' warnings are not what one looks for in a benchmark."""
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "transformers", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations a second, multiplications and sums, of one large matrix product in a dtype: the best of ten."""
    left, right = (torch.randn(2048, 2048).to(device, dtype) for _ in range(2))
    stopwatch = Stopwatch()
    for _ in range(10):
        stopwatch.begin()
        left @ right
        stopwatch.end()
    return 2 * 2048**3 / min(stopwatch.found)


def products(model: Any) -> int:
    """Weights that a token is multiplied by: all matrices, without an input embedding that is not the output's too."""
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "lora_" not in n)
    return int(matrices - (0 if inputs is outputs else inputs.numel()))


@contextmanager
def counted_tokens() -> Iterator[Counter[str]]:
    """Within it, the tokens that our steps decode (`decoded`) and that a forward pass scores (`trained`)."""
    counts: Counter[str] = Counter()
    score, step = Student.score, LeanSteps.step

    def counted_score(student: Student, batch: Any, *args: Any, **more: Any) -> Any:
        counts["trained"] += batch.input_ids.numel()
        return score(student, batch, *args, **more)

    def counted_step(steps: LeanSteps, tokens: torch.Tensor) -> torch.Tensor:
        counts["decoded"] += len(tokens)
        return step(steps, tokens)

    Student.score, LeanSteps.step = counted_score, counted_step  # type: ignore[method-assign,assignment]
    try:
        yield counts
    finally:
        Student.score, LeanSteps.step = score, step  # type: ignore[method-assign]


class Stopwatch:
    """Seconds between `begin` and `end`, and until a GPU is done."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._began = time.perf_counter()

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.found.append(time.perf_counter() - self._began)


class PeakMeter:
    """The most bytes of tensors between `begin` and `end`, beyond what was there before, by PyTorch's own count."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
            self._profiler.start()

    def end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.found.append(torch.cuda.max_memory_allocated() - self._before)
            return
        self._profiler.stop()
        now = most = 0
        profiler: Any = self._profiler.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        self.found.append(most)


Meter = Stopwatch | PeakMeter


def peak_bytes(function: Callable[[], object]) -> int:
    """What `PeakMeter` finds of a call."""
    meter = PeakMeter()
    meter.begin()
    function()
    meter.end()
    return int(meter.found[0])


class MeterSteps(Callback):
    """Meters each batch of a Lightning fit."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_start(self, *_: Any) -> None:
        self.meter.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.meter.end()


def meter_trl(meter: Meter) -> Any:
    """The same as a callback of TRL's trainers."""
    from transformers import TrainerCallback

    class Metered(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

    return Metered()


def save(out: Path | None, rows: Any) -> None:
    """Prints a result and, if asked to, writes it with the command, the machine and the versions."""
    print(json.dumps(rows, indent=1))
    if out is not None:
        out.write_text(json.dumps({**about(), "rows": rows}, indent=1) + "\n")


def about() -> dict[str, Any]:
    """The command that made a result, the machine, and the versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(_shown(sys.argv[1:]))}".strip(),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu},
        "python": platform.python_version(),
        "versions": versions,
    }


def _shown(args: Sequence[str]) -> list[str]:
    """The arguments but for where the result goes; of a path its end, which is not this machine's alone."""
    shown, skip = [], False
    for arg in args:
        if not skip and not arg.startswith("--out"):
            shown.append(re.sub(r"(?<![^=,\[])(/[^/,\]]+)+", lambda path: "/".join(path.group().split("/")[-2:]), arg))
        skip = arg == "--out"
    return shown


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
