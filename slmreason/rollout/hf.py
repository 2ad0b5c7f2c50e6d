"""Rollouts on the student's own transformers model: nothing is copied, so there is nothing to synchronise.

A plain decode loop, for three reasons over `model.generate`: a group's shared prompt is prefilled once, a finished row
leaves the batch at once, and the sampler's log-prob of each token is kept without holding any logits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from slmreason.rollout.decoding import decoding_of, generate
from slmreason.rollout.engine import Completion, Progress, RolloutEngine, Sampling, prompt_seed, stable_seed
from slmreason.rollout.steps import prefill
from slmreason.student import Student

SHRINK = 0.05
"""Finished rows leave the batch when they are at least this share of it."""


class HFEngine(RolloutEngine):
    """Batched sampling with transformers, prompts sorted by length."""

    def __init__(self, max_sequences: int = 256, max_cache_tokens: int = 131_072) -> None:
        """
        Args:
            max_sequences: Completions that are decoded side by side.
            max_cache_tokens: Bound on cached tokens (sequences times their longest possible length).
        """
        if max_sequences < 1 or max_cache_tokens < 1:
            raise ValueError("rollout: max_sequences and max_cache_tokens must be at least 1")
        self.max_sequences = max_sequences
        self.max_cache_tokens = max_cache_tokens

    def check(self, student: Student) -> None:
        decoding_of(student)

    def sync(self, student: Student) -> None:
        """Nothing to do: the student's own weights are read."""

    @torch.no_grad()
    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        with student.evaluating(), student.whole():
            return self._generate(student, prompts, group_size, sampling, progress)

    def _generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None,
    ) -> list[list[Completion]]:
        results: list[list[Completion]] = [[] for _ in prompts]
        if not prompts:
            return results
        apart = decoding_of(student).equal_lengths
        for chunk, copies in self._plan(
            [len(prompt) for prompt in prompts], group_size, sampling.max_new_tokens, apart
        ):
            draws = torch.cat([
                uniforms(sampling, prompts[i], len(results[i]), copies) for i in chunk
            ])  # fmt: skip
            completions = decode(student, [prompts[i] for i in chunk], copies, sampling, draws)
            for position, index in enumerate(chunk):
                results[index].extend(completions[position * copies : (position + 1) * copies])
            done = sum(len(results[index]) == group_size for index in chunk)
            if progress is not None and done:
                progress(done)
        return results

    def _plan(
        self, lengths: list[int], group_size: int, max_new_tokens: int, apart: bool = False
    ) -> list[tuple[list[int], int]]:
        """Chunks of prompts of similar length, longest first, with the completions a prompt has in the chunk.

        Args:
            apart: a chunk's prompts all have the same length.
        """
        chunks: list[tuple[list[int], int]] = []
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        while order:
            longest = lengths[order[0]] + max_new_tokens
            room = max(1, min(self.max_sequences, self.max_cache_tokens // longest))
            if group_size <= room:
                take = room // group_size
                if apart:
                    take = sum(lengths[index] == lengths[order[0]] for index in order[:take])
                chunks.append((order[:take], group_size))
            else:
                take = 1
                full, rest = divmod(group_size, room)
                chunks.extend([([order[0]], room)] * full + ([([order[0]], rest)] if rest else []))
            order = order[take:]
        return chunks


def decode(
    student: Student,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    draws: Tensor,
) -> list[Completion]:
    """Decodes `copies` completions of each prompt side by side: `len(prompts) * copies` completions, prompt-major.

    Args:
        draws: a uniform number for each completion and step. [completions, max_new_tokens], float64.
    """
    device = student.device
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    num_rows, way = len(prompts) * copies, decoding_of(student)
    rows = torch.arange(num_rows, device=device)  # of the batch as it was, those that are still in it
    if way.by == "generate":
        choose = lambda logits, step: sample(logits, sampling, draws[:, step])  # noqa: E731
        chosen = generate(student, prompts, copies, sampling.max_new_tokens, choose, sorted(student.eos_ids))
        return _completions([(rows, *step) for step in chosen], num_rows, student.eos_ids)
    steps, logits = prefill(student, prompts, copies, sampling.max_new_tokens, way.by == "lean")
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)  # of those, the ones that have not stopped
    eos = torch.tensor(sorted(student.eos_ids), device=device)
    taken: list[tuple[Tensor, Tensor, Tensor]] = []  # (rows, tokens, log-probs) of each step
    for step in range(sampling.max_new_tokens):
        token, log_prob = sample(logits, sampling, draws[:, step])
        taken.append((rows, token, log_prob))
        alive = alive & (token[:, None] != eos).all(-1)
        left = int(alive.sum())
        if left == 0 or step + 1 == sampling.max_new_tokens:
            break
        # Dropping rows copies the cache of the others: not for every single one.
        if left <= len(rows) * (1 - SHRINK):
            stay = _without_gaps(alive)
            rows, token, draws, alive = rows[stay], token[stay], draws[stay], alive[stay]
            steps.keep(stay)
        logits = steps.step(token)
    return _completions(taken, num_rows, student.eos_ids)


def _completions(
    taken: Sequence[tuple[Tensor, Tensor, Tensor]], num_rows: int, eos_ids: Collection[int]
) -> list[Completion]:
    """What each row drew up to its first end-of-sequence token.

    Args:
        taken: (rows that were still in the batch, their tokens, their log-probs) of each step.
    """
    tokens: list[list[int]] = [[] for _ in range(num_rows)]
    log_probs: list[list[float]] = [[] for _ in range(num_rows)]
    columns = (torch.cat(column).tolist() for column in zip(*taken, strict=True))
    stopped = [False] * num_rows
    for row, token, log_prob in zip(*columns, strict=True):
        if not stopped[row]:
            tokens[row].append(token)
            log_probs[row].append(log_prob)
            stopped[row] = token in eos_ids
    return [Completion(tuple(tokens[row]), tuple(log_probs[row]), not stopped[row]) for row in range(num_rows)]


def _without_gaps(alive: Tensor) -> Tensor:
    """The rows that are alive, those at the end in the places of those that are not: few rows move. [B] -> [alive]"""
    stay = torch.arange(int(alive.sum()), device=alive.device)
    stay[~alive[: len(stay)]] = alive[len(stay) :].nonzero().squeeze(1) + len(stay)
    return stay


def uniforms(sampling: Sampling, prompt: Sequence[int], first: int, copies: int) -> Tensor:
    """The uniform numbers of a prompt's completions from the `first` on. [copies, max_new_tokens], float64.

    They are the same in any batch, on any device, in any process. Each completion has a generator of its own, so the
    global RNG is neither read nor moved. Greedy decoding draws nothing.
    """
    numbers = torch.zeros((copies, sampling.max_new_tokens), dtype=torch.float64)
    if sampling.temperature > 0:
        seed = prompt_seed(sampling, prompt)
        for copy in range(copies):
            generator = torch.Generator().manual_seed(stable_seed(seed, first + copy))
            torch.rand(sampling.max_new_tokens, generator=generator, out=numbers[copy])
    return numbers


def sample(logits: Tensor, sampling: Sampling, draws: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row and its log-prob under the whole distribution. [B, V] -> [B], [B].

    A nucleus says which tokens can be drawn; log-probs are not normalised to it, since the trainer scores the whole
    distribution and the two are compared. Greedy decoding (temperature 0) reports log-probs at temperature 1.

    Args:
        draws: a uniform number for each row. [B]
    """
    logits = logits.float()
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    log_probs = logits.log_softmax(-1)
    if sampling.temperature == 0:
        token = log_probs.argmax(-1)
    else:
        drawn_from = _nucleus(log_probs, sampling.top_p) if sampling.top_p < 1 else log_probs
        # Inverse of the cumulative distribution: one random number a row. torch.multinomial draws one for each entry.
        cumulative = drawn_from.exp().cumsum(-1, dtype=draws.dtype)
        point = draws[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    return token, log_probs.gather(1, token[:, None]).squeeze(1)


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Renormalised to the smallest set of tokens whose probability reaches `top_p`. [B, V] -> [B, V]."""
    ordered, index = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(log_probs).scatter(1, index, ordered).log_softmax(-1)
