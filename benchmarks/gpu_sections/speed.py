"""Speed of the random half a billion: a decoding step, a GRPO step and SFT, the latter two beside TRL."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import grpo, sft
from benchmarks.common import Stopwatch
from benchmarks.gpu_sections.lab import Lab, Outcome, empty
from benchmarks.real import GROUP, EndlessStudent, prompts_of
from slmreason.rollout.engine import Sampling
from slmreason.rollout.sampling import sample
from slmreason.rollout.steps import padded_prompts
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student

Side = Callable[[], Sequence[float]]


def decode_time(lab: Lab) -> Outcome:
    """Milliseconds of a decoding step by rows, with all weights and with adapters, and of what `sample` takes of it."""
    figures: dict[str, Any] = {}
    for lora in (False, True):
        student = lab.large(lora, EndlessStudent)
        rows = figures["lora" if lora else "full"] = {}
        for count in lab.sizes.decode_rows:
            rows[str(count)] = ours_ms(lab, student, count)
        fewest = lab.sizes.decode_rows[0]
        rows[f"{fewest} by modules"] = ours_ms(lab, student, fewest, fast_weights=False)
        figures[f"generate, {'lora' if lora else 'full'}, {fewest} rows"] = generate_ms(lab, student, fewest)
        del student
        empty(lab)
    figures["sample alone"] = {str(count): sample_ms(lab, count) for count in lab.sizes.decode_rows}
    fewest = lab.sizes.decode_rows[0]
    ours, theirs = figures["full"][str(fewest)], figures[f"generate, full, {fewest} rows"]
    figure = ", ".join(f"{count}: {figures['full'][str(count)]:.3g} ms" for count in lab.sizes.decode_rows)
    return Outcome(f"{figure}; generate {theirs:.3g} ms", ours < theirs if lab.cuda else None, figures)


def per_step(lab: Lab, decode: Callable[[int], object]) -> float:
    """Milliseconds of a step: a long decoding less a short one, so that reading the prompts drops out."""
    short, long = lab.sizes.decode_steps
    decode(short)
    taken = {tokens: lab.seconds(lambda tokens=tokens: decode(tokens), repeats=2, warm_up=0)  # type: ignore[misc]
             for tokens in (short, long)}  # fmt: skip
    return 1e3 * (taken[long] - taken[short]) / (long - short)


def ours_ms(lab: Lab, student: Student, rows: int, **options: bool) -> float:
    """Milliseconds of a step of HFEngine, with these options of it."""
    prompts = prompts_of(student, rows)
    engine = HFEngine(max_sequences=rows, max_cache_tokens=1 << 20, **options)
    return per_step(lab, lambda tokens: engine.generate(student, prompts, GROUP, Sampling(tokens)))


@torch.no_grad()
def generate_ms(lab: Lab, student: Student, rows: int) -> float:
    """The same of transformers' `generate`, with the same model, rows and sampling."""
    input_ids, attention_mask = (
        tensor.repeat_interleave(GROUP, dim=0) for tensor in padded_prompts(student, prompts_of(student, rows))
    )
    network: Any = student.network
    return per_step(
        lab,
        lambda tokens: network.generate(
            input_ids, attention_mask=attention_mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=student.pad_token_id,
        ),
    )  # fmt: skip


def sample_ms(lab: Lab, rows: int) -> float:
    logits = lab.drawn(rows, lab.sizes.vocabulary)
    draws = torch.rand(rows, device=lab.device, dtype=torch.float64)
    return 1e3 * lab.seconds(lambda: sample(logits, Sampling(1), draws), repeats=10)


def grpo_step(lab: Lab) -> Outcome:
    """Seconds of a GRPO step: groups of 8, so many new tokens, the student's own weights in bfloat16."""
    sizes = lab.sizes
    setting = grpo.Setting(
        sizes.grpo_tokens, False, sizes.grpo_steps + 1, sizes.grpo_prompts, lab.device.type, "bfloat16"
    )
    figures = beside_trl(
        lab,
        lambda: grpo.Ours(lab.model, setting, Stopwatch),
        lambda: grpo.Theirs(lab.model, setting, Stopwatch),
    )
    ours, trl = figures["ours"], figures["trl"]
    if not isinstance(trl, float):
        return Outcome(f"{ours:.3g} s, no TRL", None, figures)
    figures["ratio"] = trl / ours
    return Outcome(f"{ours:.3g} s, TRL {trl:.3g} s", trl > ours if lab.cuda else None, figures)


def sft_rate(lab: Lab) -> Outcome:
    """Tokens a second of SFT in bfloat16, and the share of the device's products that they are."""
    sizes = lab.sizes
    pairs = sft.conversations(None, 25 * (sizes.sft_steps + 1) * max(1, sizes.sft_tokens // 1024))
    settings = (lab.model, pairs, sizes.sft_steps + 1, lab.device.type, Stopwatch, "bfloat16", sizes.sft_tokens)
    figures = beside_trl(lab, lambda: sft.Ours(*settings), lambda: sft.Theirs(*settings))  # type: ignore[arg-type]
    ours, trl = figures["ours"], figures["trl"]
    figures["flops_per_token"] = flops = flops_per_token(lab.model)
    figures["share_of_product_rate"] = ours * flops / lab.product_rate
    if lab.peak_flops is not None:
        figures["mfu"] = ours * flops / lab.peak_flops
    share = figures.get("mfu", figures["share_of_product_rate"])
    if not isinstance(trl, float):
        return Outcome(f"{ours:,.0f} tokens/s ({share:.0%}), no TRL", None, figures)
    figures["ratio"] = ours / trl
    return Outcome(f"{ours:,.0f} tokens/s ({share:.0%}), TRL {trl:,.0f}", ours > trl if lab.cuda else None, figures)


def flops_per_token(folder: str) -> int:
    """Multiplications and additions of forward and backward pass: six a weight of every product, attention left out."""
    student = Student(folder, instruction="", dtype="bfloat16")
    model: Any = student.base_model
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    return 6 * (products - looked_up)


def beside_trl(lab: Lab, ours: Callable[[], Side], theirs: Callable[[], Side]) -> dict[str, Any]:
    """Medians of both sides, one after the other; of TRL's why there is none where there is none."""
    mine = list(ours()())
    figures: dict[str, Any] = {"ours": statistics.median(mine), "ours_each": mine}
    empty(lab)
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    if missing:
        return {**figures, "trl": f"not installed: {', '.join(missing)}"}
    try:
        with redirect_stdout(io.StringIO()):  # its log of each step
            peer = list(theirs()())
    except Exception as error:  # a peer that cannot run here is no fault of ours, and ours has been measured
        return {**figures, "trl": f"failed: {type(error).__name__}: {str(error)[:300]}"}
    return {**figures, "trl": statistics.median(peer), "trl_each": peer}
