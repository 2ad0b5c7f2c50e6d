"""Decoding of a real student, tokens a second: HFEngine beside transformers' `generate`, in turn.

    SLMREASON_STUDENTS=FOLDER python -m benchmarks.real --student qwen2.5-coder-0.5b-instruct --rows 64 --tokens 32

`SLMREASON_STUDENTS` names a folder with students in Hugging Face form. Both sides sample the same number of tokens in
each row at temperature 1: no row ends before. A group of 8 completions shares a prompt, which ours reads once and
`generate` reads for each; reading is part of the time. `floor` is what the products of decoding alone would take at the
rate that one large product reaches here in the same dtype, `floor_with_prompts` those of reading each prompt once too.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import alternate, compared, product_rate, products, quiet, save
from slmreason.embedded.families import make_problems
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.rollout.vllm import VLLMEngine
from slmreason.student import Lora, Student

GROUP = 8


class EndlessStudent(Student):
    """A student whose completions end at the token limit alone."""

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({self.base_model.config.vocab_size - 1})  # vLLM wants a token that there is; nobody draws it


def prompts_of(student: Student, rows: int) -> list[tuple[int, ...]]:
    return [student.encode_question(problem.question) for problem in make_problems("chain", "train", rows // GROUP)]


def ours(student: Student, rows: int, tokens: int, **engine: Any) -> Callable[[], Sequence[float]]:
    """Tokens a second of HFEngine."""
    prompts = prompts_of(student, rows)

    def turn() -> Sequence[float]:
        began = time.perf_counter()
        HFEngine(max_sequences=rows, **engine).generate(student, prompts, GROUP, Sampling(tokens))
        return [rows * tokens / _since(began)]

    return turn


@torch.no_grad()
def theirs(student: Student, rows: int, tokens: int) -> Callable[[], Sequence[float]]:
    """Tokens a second of `generate` of the same model, adapters and all."""
    prompts = [prompt for prompt in prompts_of(student, rows) for _ in range(GROUP)]
    longest = max(map(len, prompts))
    padded = [(student.pad_token_id,) * (longest - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    network: Any = student.network
    inputs = {
        "input_ids": torch.tensor(padded).to(student.device),
        "attention_mask": torch.tensor(seen).to(student.device),
    }

    def turn() -> Sequence[float]:
        began = time.perf_counter()
        network.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens
        )
        return [rows * tokens / _since(began)]

    return turn


def with_vllm(student: Student, rows: int, tokens: int) -> Callable[[], Sequence[float]]:
    """Tokens a second of vLLM in a process of its own, which has been started before."""
    prompts = prompts_of(student, rows)
    engine = VLLMEngine(placement="worker", cache_gib=6, max_sequences=rows, timeout_s=600)
    engine.sync(student)
    engine.generate(student, prompts[:1], 1, Sampling(2))

    def turn() -> Sequence[float]:
        began = time.perf_counter()
        groups = engine.generate(student, prompts, GROUP, Sampling(tokens))
        seconds = _since(began)
        return [sum(len(completion.token_ids) for group in groups for completion in group) / seconds]

    return turn


def side_of(name: str, student: Student, rows: int, tokens: int) -> Callable[[], Sequence[float]]:
    """What measures a side by its name."""
    if name == "generate":
        return theirs(student, rows, tokens)
    if name == "vllm":
        return with_vllm(student, rows, tokens)
    options: dict[str, dict[str, bool]] = {
        "ours": {},
        "modules": {"fast_weights": False},
        "graphs": {"cuda_graphs": True},
    }
    return ours(student, rows, tokens, **options[name])


def floor(student: Student) -> float:
    """Tokens a second if decoding were its products, at the rate of a large one."""
    return product_rate(student.base_model.dtype, student.device.type) / (2 * products(student.base_model))


def floor_with_prompts(student: Student, rows: int, tokens: int) -> float:
    """The same with the products of reading each prompt once, which nothing is projected onto the vocabulary of."""
    read = sum(map(len, prompts_of(student, rows)))
    weights = products(student.base_model)
    head = student.base_model.get_output_embeddings().weight.numel()
    operations = 2 * (rows * tokens * weights + read * (weights - head))
    return rows * tokens * product_rate(student.base_model.dtype, student.device.type) / operations


def _since(began: float) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--student", default="qwen2.5-coder-0.5b-instruct", help="a folder in SLMREASON_STUDENTS")
    parser.add_argument("--rows", nargs="+", type=int, default=[64], help=f"completions side by side, {GROUP} a prompt")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--lora", nargs="+", type=int, default=[0], help="0: no adapters; else their rank")
    parser.add_argument("--device", default="cpu")
    sides = ["ours", "modules", "graphs", "generate", "vllm"]
    about = "modules: ours with rollout.fast_weights false; graphs: ours with rollout.cuda_graphs"
    parser.add_argument("--sides", nargs="+", choices=sides, default=["ours", "modules", "generate"], help=about)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "SLMREASON_STUDENTS" not in os.environ:
        parser.error("set SLMREASON_STUDENTS to a folder of students in Hugging Face form")
    quiet()
    folder = Path(os.environ["SLMREASON_STUDENTS"]) / options.student
    rows: list[dict[str, Any]] = []
    for rank in options.lora:
        lora = Lora(r=rank, alpha=2 * rank) if rank else None
        student = EndlessStudent(str(folder), dtype=options.dtype, lora=lora)
        student.to(options.device)
        for count in options.rows:
            turns = {side: side_of(side, student, count, options.tokens) for side in options.sides}
            found = alternate(turns, options.rounds)
            setting = {"student": options.student, "dtype": options.dtype, "lora": rank, "rows": count,
                       "tokens": options.tokens, "load": os.getloadavg()[0], "floor": floor(student),
                       "floor_with_prompts": floor_with_prompts(student, count, options.tokens)}  # fmt: skip
            rows.append({**setting, **compared(found, more_is_better=True)})
            print(rows[-1], flush=True)
    save(options.out, rows)


if __name__ == "__main__":
    main()
