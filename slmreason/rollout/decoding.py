"""Which way of decoding gives the student's own log-probs, tried on the model itself, and decoding by transformers.

The steps of `slmreason.rollout.steps` are right for most architectures, and prompts of different lengths are decoded
side by side. Where that is off, transformers' `generate` decodes; where padding before a prompt is, prompts of one
length stand together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from slmreason.records import Example
from slmreason.rollout import steps as kinds
from slmreason.rollout.steps import padded_prompts, prefill
from slmreason.student import Student, selfcheck
from slmreason.student.layout import Build, build_of, checking
from slmreason.student.loading import kind_of

log = logging.getLogger(__name__)
FORCED = 3
"""Tokens that are decoded in the check."""
Choose = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(logits [rows, vocab], number of the step) -> (tokens [rows], their log-probs [rows])."""


@dataclass(frozen=True)
class Decoding:
    """How a model's completions are decoded."""

    by: Literal["lean", "steps", "generate"]
    """Steps of our own (`LeanSteps`), steps through the model's forward pass, or transformers' `generate`."""
    equal_lengths: bool = False
    """Only prompts of the same length are decoded side by side, so that there is no padding."""

    def __str__(self) -> str:
        names = {"lean": "the steps of Llama's shape", "steps": "steps through the model", "generate": "generate"}
        return names[self.by] + (", prompts of one length together" if self.equal_lengths else "")


def decoding_of(student: Student) -> Decoding:
    """How the student's completions are decoded, found by trying when it is first asked for.

    Raises:
        ValueError: no way gives the log-probs of a plain forward pass; the message names the model's type.
    """
    decodings: dict[Build, Decoding] = student.findings.decodings
    build = build_of(student)
    if build not in decodings:
        decodings[build] = _find(student)
    return decodings[build]


def _find(student: Student) -> Decoding:
    """Decodes given tokens in each way, and compares their log-probs with those of a plain forward pass."""
    ways = [Decoding("lean")] if kinds.is_lean(student) else []
    ways += [Decoding("steps"), Decoding("generate"), Decoding("steps", True), Decoding("generate", True)]
    kind = kind_of(student.base_model)
    with checking(student) as check:
        order = [0, 1, 2, 2]  # two rows for each of two prompts
        rows, theirs = [check.examples[i] for i in order], [check.log_probs[i][:FORCED] for i in order]
        way, off = selfcheck.first_right(ways, lambda way: _forced_in_batches(student, way, rows), theirs, check.dtype)
    if way is None:
        raise ValueError(
            f"student.model: {kind} cannot be sampled by HFEngine. Its log-probs are compared with those of a "
            f"forward pass over each sequence: {'; '.join(map(str, off))}; rollout.class_path VLLMEngine may know it"
        )
    if off:
        log.warning("student.model: %s: completions are decoded by %s, since log-probs are off otherwise (%s)",
                    kind, way, "; ".join(map(str, off)))  # fmt: skip
    return way


def _forced_in_batches(student: Student, way: Decoding, examples: Sequence[Example]) -> list[Tensor]:
    """Log-probs of the first tokens of the examples, which come in pairs with one prompt, as a way decodes them."""
    pairs = [examples[:2], examples[2:]]
    batches = [list(pair) for pair in pairs] if way.equal_lengths else [[*pairs[0], *pairs[1]]]
    return [row for batch in batches for row in _forced(student, way, batch)]


def _forced(student: Student, way: Decoding, examples: Sequence[Example]) -> list[Tensor]:
    prompts = [example.prompt_ids for example in examples[::2]]
    wanted = torch.tensor([example.target_ids[:FORCED] for example in examples], device=student.device)

    def choose(logits: Tensor, tokens: Tensor) -> Tensor:
        return logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)

    if way.by == "generate":
        taken = generate(
            student, prompts, 2, FORCED, lambda logits, step: (wanted[:, step], choose(logits, wanted[:, step])), ()
        )
        return list(torch.stack([log_probs for _, log_probs in taken], dim=1))
    steps, logits = prefill(student, prompts, 2, FORCED, way.by == "lean")
    rows = torch.arange(len(wanted), device=student.device)
    columns = []
    for step in range(FORCED):
        tokens = wanted[rows, step]
        columns.append(choose(logits, tokens)[rows.argsort()])
        if step + 1 == FORCED:
            break
        if step == 1:  # as when rows leave the batch, but that none does: they change places
            order = rows.flip(0)
            rows, tokens = rows[order], tokens[order]
            steps.keep(order)
        logits = steps.step(tokens)
    return list(torch.stack(columns, dim=1))


class _Chosen(LogitsProcessor):
    """Makes transformers' greedy search take the tokens that a function chooses, and keeps their log-probs."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.taken: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        tokens, log_probs = self.choose(scores, len(self.taken))
        self.taken.append((tokens, log_probs))
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)


def generate(
    student: Student,
    prompts: Sequence[Sequence[int]],
    copies: int,
    max_new_tokens: int,
    choose: Choose,
    eos_ids: Sequence[int],
) -> list[tuple[Tensor, Tensor]]:
    """Decodes by transformers' `generate`: (tokens, log-probs) of each step, for `len(prompts) * copies` rows.

    No setting of the model's own generation config applies, and no random number is drawn here.
    """
    input_ids, attention_mask = padded_prompts(student, prompts)
    chosen = _Chosen(choose)
    model: Any = student.base_model
    settings = {"do_sample": False, "eos_token_id": list(eos_ids) or None, "pad_token_id": student.pad_token_id}
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.generate(
            input_ids.repeat_interleave(copies, dim=0),
            attention_mask=attention_mask.repeat_interleave(copies, dim=0),
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **settings),
            logits_processor=LogitsProcessorList([chosen]),
        )
    finally:
        model.generation_config = kept
    return chosen.taken
