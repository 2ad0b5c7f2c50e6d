"""Whether decoding on the device gives what it should: beside `generate`, the CPU, the plain steps and the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu_sections.lab import Lab, Outcome, Skip, empty, products_in, worst
from benchmarks.gpu_sections.speed import ours_ms
from benchmarks.real import EndlessStudent
from slmreason.embedded.families import make_problems
from slmreason.records import Example
from slmreason.rollout.decoding import Decoding
from slmreason.rollout.engine import Completion, Sampling
from slmreason.rollout.steps import padded_prompts
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Student
from slmreason.student.layout import build_of
from slmreason.student.packing import collate

GROUP = 4
SAME = 0.95
"""Share of sampled completions that must be the same on both devices: a rounded sum may flip one token in thousands."""
Groups = list[list[Completion]]


def decode(lab: Lab) -> Outcome:
    figures: dict[str, Any] = {}
    passed = True
    shares = ("same_as_cpu", "lean_as_plain", "fast_weights_as_modules")
    for family in ("qwen2", "llama"):
        with products_in("highest"):
            student, on_cpu = lab.small(family), Student(f"embedded:{family}", instruction="")
            figures[family] = row = one_family(lab, student, on_cpu)
        passed &= row["greedy_as_generate"] == 1 and all(row[share] >= SAME for share in shares)
        passed &= row["sampler_to_score"] < 1e-4
    same = min(row["greedy_as_generate"] for row in figures.values())
    gap = max(row["sampler_to_score"] for row in figures.values())
    return Outcome(f"greedy {same:.0%} as generate, sampler to score {gap:.1g}", passed, figures)


def one_family(lab: Lab, student: Student, on_cpu: Student) -> dict[str, float]:
    prompts = [student.encode_question(p.question) for p in make_problems("chain", "train", lab.sizes.problems)]
    greedy = Sampling(lab.sizes.completion, temperature=0.0)
    drawn = Sampling(lab.sizes.completion, seed=3)
    engine = HFEngine()
    ours = engine.generate(student, prompts, GROUP, drawn)
    theirs = engine.generate(on_cpu, prompts, GROUP, drawn)
    decodings, build = student.findings.decodings, build_of(student)
    lean = decodings[build]
    decodings[build] = Decoding("steps")
    plain = engine.generate(student, prompts, GROUP, drawn)
    decodings[build] = lean
    return {
        "greedy_as_generate": as_generate(student, prompts, engine.generate(student, prompts, 1, greedy)),
        "same_as_cpu": same_share(ours, theirs),
        "lean_as_plain": same_share(ours, plain),
        "fast_weights_as_modules": same_share(
            ours, HFEngine(fast_weights=False).generate(student, prompts, GROUP, drawn)
        ),
        "sampler_to_score": to_score(student, prompts, ours),
        "tokens": sum(len(completion.token_ids) for group in ours for completion in group),
    }


def same_share(ours: Groups, theirs: Groups) -> float:
    """Share of completions that have the same tokens."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return sum(a.token_ids == b.token_ids for a, b in pairs) / len(pairs)


@torch.no_grad()
def as_generate(student: Student, prompts: Sequence[tuple[int, ...]], ours: Groups) -> float:
    """Share of prompts whose greedy completion is that of transformers' `generate`."""
    input_ids, attention_mask = padded_prompts(student, prompts)
    network: Any = student.network
    most = max(len(group[0].token_ids) for group in ours)
    output = network.generate(
        input_ids, attention_mask=attention_mask, do_sample=False, max_new_tokens=most,
        pad_token_id=student.pad_token_id,
    )  # fmt: skip
    rows = output[:, input_ids.shape[1] :].tolist()
    same = [tuple(row[: len(group[0].token_ids)]) == group[0].token_ids for row, group in zip(rows, ours, strict=True)]
    return sum(same) / len(same)


@torch.no_grad()
def to_score(student: Student, prompts: Sequence[tuple[int, ...]], groups: Groups) -> float:
    """The largest difference between the sampler's log-probs and the trainer's, in nats."""
    pairs = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    examples = [Example(tuple(prompt), c.token_ids, "p", "rollout") for prompt, c in pairs]
    batch = collate(examples, student.pad_token_id, hidden_size=student.hidden_size).to(student.device)
    parts = student.score(batch).log_probs.split(batch.target_lengths.tolist())
    return max(worst(part, torch.tensor(pairs[i][1].log_probs)) for i, part in zip(batch.order, parts, strict=True))


def graphs(lab: Lab) -> Outcome:
    """Recorded decoding steps beside plain ones: the same tokens in float32, and milliseconds of a step in bfloat16."""
    if not lab.cuda:
        raise Skip("steps are recorded on a CUDA device")
    return beside_plain(lab, "recorded", cuda_graphs=True)


def beside_plain(lab: Lab, name: str, **options: bool) -> Outcome:
    """HFEngine with some options beside HFEngine as it is."""
    sides: dict[str, dict[str, bool]] = {name: options, "plain": {}}
    drawn = Sampling(lab.sizes.completion, seed=3)
    with products_in("highest"):
        student = lab.small()
        prompts = [student.encode_question(p.question) for p in make_problems("chain", "train", lab.sizes.problems)]
        ours, theirs = (HFEngine(**side).generate(student, prompts, GROUP, drawn) for side in sides.values())
    figures: dict[str, Any] = {"same": same_share(ours, theirs)}
    for lora in (False, True):
        large = lab.large(lora, EndlessStudent)
        for rows in lab.sizes.decode_rows:
            found = {f"{side}_ms": ours_ms(lab, large, rows, **sides[side]) for side in sides}
            figures[f"{'lora' if lora else 'full'}, {rows} rows"] = found
        del large
        empty(lab)
    first = figures[f"full, {lab.sizes.decode_rows[0]} rows"]
    figure = f"{figures['same']:.0%} the same; " + ", ".join(f"{side} {ms:.3g}" for side, ms in first.items())
    return Outcome(figure, figures["same"] >= SAME, figures)
