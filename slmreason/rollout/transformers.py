"""Rollouts on the student's own transformers model: nothing is copied, so there is nothing to synchronise.

A plain decode loop, for three reasons over `model.generate`: a group's shared prompt is prefilled once, a finished row
leaves the batch at once, and the sampler's log-prob of each token is kept without holding any logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slmreason.rollout.decoding import decoding_of, generate
from slmreason.rollout.engine import Completion, EngineError, Progress, RolloutEngine, Sampling
from slmreason.rollout.projections import Projections, fast, folded, free_bytes
from slmreason.rollout.sampling import sample, uniforms
from slmreason.rollout.steps import is_lean, prefill
from slmreason.student import PLAIN_ATTENTION, Student

LIMITS = 256, 131_072
"""Completions side by side, and cached tokens."""
LIMITS_GPU = 1024, 1 << 20
"""The same on a GPU that has the room."""
SHRINK = 0.05
"""Finished rows leave the batch when they are at least this share of it."""
LOOK_EVERY = {"cpu": 1}
"""Steps after which the host looks who has finished, by device type; a GPU would have to wait for it each time."""
LOOK_EVERY_ELSEWHERE = 8


class HFEngine(RolloutEngine):
    """Batched sampling with transformers, prompts sorted by length."""

    def __init__(
        self,
        max_sequences: int | None = None,
        max_cache_tokens: int | None = None,
        fast_weights: bool = True,
        cuda_graphs: bool = False,
    ) -> None:
        """
        Args:
            max_sequences: Completions that are decoded side by side. When not given 256, and on a GPU 1,024 or what
                its free memory holds.
            max_cache_tokens: Bound on cached tokens (sequences times their longest possible length). When not given
                131,072, and on a GPU 1,048,576 or what its free memory holds.
            fast_weights: Hold the weights in the form that decodes fastest while sampling. On a CPU that takes a copy
                of large matrices (for 32 tokens or more), and float32 adapters take one of the weights they adapt;
                where that would be more than half of the free memory it is left out, and a warning says so.
            cuda_graphs: On a GPU, record decoding steps and replay them, for models of the kinds llama, mistral, qwen2
                and qwen3. Not yet measured on a GPU.
        """
        if any(bound is not None and bound < 1 for bound in (max_sequences, max_cache_tokens)):
            raise ValueError("rollout: max_sequences and max_cache_tokens must be at least 1")
        self.max_sequences = max_sequences
        self.max_cache_tokens = max_cache_tokens
        self.fast_weights, self.cuda_graphs = fast_weights, cuda_graphs

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
        if self.cuda_graphs and not (student.device.type == "cuda" and is_lean(student)):
            raise EngineError(
                f"rollout.cuda_graphs: steps are recorded on a CUDA device, for {', '.join(PLAIN_ATTENTION)} with "
                f"sdpa; the student is a {student.base_model.config.model_type} on {student.device.type}"
            )
        decoding_of(student)  # found before the weights take another form, and by every process
        steps = sampling.max_new_tokens if prompts else 0
        # A process without prompts gathers weights too: others wait for it.
        with student.evaluating(), student.whole(), self._fast(student, steps) as projections:
            return self._generate(student, prompts, group_size, sampling, projections, progress)

    @contextmanager
    def _fast(self, student: Student, steps: int) -> Iterator[Projections | None]:
        """Within it, the student's weights are in the form that decodes that many steps fastest."""
        if not self.fast_weights or steps == 0:
            yield None
            return
        with folded(student):
            yield fast(student, steps) if is_lean(student) else None

    def _generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        projections: Projections | None,
        progress: Progress | None,
    ) -> list[list[Completion]]:
        results: list[list[Completion]] = [[] for _ in prompts]
        if not prompts:
            return results
        apart = decoding_of(student).equal_lengths
        lengths = [len(prompt) for prompt in prompts]
        for chunk, copies in self._plan(lengths, group_size, sampling.max_new_tokens, self.limits(student), apart):
            draws = torch.cat([
                uniforms(sampling, prompts[i], sampling.first + len(results[i]), copies) for i in chunk
            ])  # fmt: skip
            completions = decode(
                student, [prompts[i] for i in chunk], copies, sampling, draws, projections, self.cuda_graphs, progress
            )
            for position, index in enumerate(chunk):
                results[index].extend(completions[position * copies : (position + 1) * copies])
        return results

    def batch_size(self, student: Student) -> int:
        return self.limits(student)[0]

    def limits(self, student: Student) -> tuple[int, int]:
        """(completions side by side, cached tokens)"""
        sequences, tokens = LIMITS
        if student.device.type == "cuda":
            sequences, tokens = limits_within(free_bytes(student.device) or 0, *bytes_of(student))
        return self.max_sequences or sequences, self.max_cache_tokens or tokens

    def _plan(
        self, lengths: list[int], group_size: int, max_new_tokens: int, limits: tuple[int, int], apart: bool = False
    ) -> list[tuple[list[int], int]]:
        """Chunks of prompts of similar length, longest first, with the completions a prompt has in the chunk.

        Args:
            limits: completions side by side, and cached tokens.
            apart: a chunk's prompts all have the same length.
        """
        max_sequences, max_cache_tokens = limits
        chunks: list[tuple[list[int], int]] = []
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        while order:
            longest = lengths[order[0]] + max_new_tokens
            room = max(1, min(max_sequences, max_cache_tokens // longest))
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


def bytes_of(student: Student) -> tuple[int, int]:
    """(of a token in the cache, of a row's logits with what sampling makes of them)"""
    config = student.base_model.config.get_text_config()
    weight = next(student.base_model.parameters())
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * size
    return cached * weight.element_size(), config.vocab_size * (weight.element_size() + 12)


def limits_within(free: int, token_bytes: int, row_bytes: int) -> tuple[int, int]:
    """(completions side by side, cached tokens) that a GPU has the room for.

    The cache gets half of the free memory, logits a quarter; the rest is for prompts while they are read.
    """
    sequences, tokens = LIMITS_GPU
    return max(1, min(sequences, free // 4 // row_bytes)), max(1, min(tokens, free // 2 // token_bytes))


def decode(
    student: Student,
    prompts: Sequence[Sequence[int]],
    copies: int,
    sampling: Sampling,
    draws: Tensor,
    projections: Projections | None = None,
    cuda_graphs: bool = False,
    progress: Progress | None = None,
) -> list[Completion]:
    """Decodes `copies` completions of each prompt side by side: `len(prompts) * copies` completions, prompt-major.

    Args:
        draws: a uniform number for each completion and step. [completions, max_new_tokens], float64.
        projections, cuda_graphs: see `prefill`.
        progress: see `RolloutEngine.generate`.

    Raises:
        EngineError: logits are NaN or infinite.
    """
    device = student.device
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    num_rows, way = len(prompts) * copies, decoding_of(student)
    rows = torch.arange(num_rows, device=device)  # of the batch as it was, those that are still in it
    if way.by == "generate":
        choose = lambda logits, step: sample(logits, sampling, draws[:, step])  # noqa: E731
        chosen = generate(student, prompts, copies, sampling.max_new_tokens, choose, sorted(student.eos_ids))
        completions = _completions([(rows, *step) for step in chosen], num_rows, student.eos_ids)
        if progress is not None:
            progress(num_rows, sum(len(completion.token_ids) for completion in completions))
        return completions
    is_lean_way = way.by == "lean"
    steps, logits = prefill(
        student, prompts, copies, sampling.max_new_tokens, lean=is_lean_way,
        projections=projections if is_lean_way else None, cuda_graphs=cuda_graphs and is_lean_way,
    )  # fmt: skip
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)  # of those, the ones that have not stopped
    eos = torch.tensor(sorted(student.eos_ids), device=device)
    finite = torch.ones_like(alive)  # the ones whose log-probs since the last look were
    taken: list[tuple[Tensor, Tensor, Tensor]] = []  # (rows, tokens, log-probs) of each step
    every = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE)
    unfinished, told = num_rows, 0
    for step in range(sampling.max_new_tokens):
        token, log_prob = sample(logits, sampling, draws[:, step])
        taken.append((rows, token, log_prob))
        alive = alive & (token[:, None] != eos).all(-1)
        finite = finite & log_prob.isfinite()
        is_last = step + 1 == sampling.max_new_tokens
        if is_last or step % every == every - 1:
            left, sound = torch.stack([alive.sum(), finite.sum()]).tolist()  # the one wait for the device
            _refuse_non_finite(len(rows) - sound, len(rows), step + 1)
            if progress is not None:
                ended = unfinished if is_last else unfinished - left
                progress(ended, unfinished * (step + 1 - told))
                unfinished, told = unfinished - ended, step + 1
            if left == 0 or is_last:
                break
            # Dropping rows copies the cache of the others: not for every single one.
            if left <= len(rows) * (1 - SHRINK):
                stay = without_gaps(alive)
                rows, token, draws, alive, finite = (each[stay] for each in (rows, token, draws, alive, finite))
                steps.keep(stay)
        logits = steps.step(token)
    return _completions(taken, num_rows, student.eos_ids)


def _refuse_non_finite(broken: int, rows: int, tokens: int) -> None:
    """
    Raises:
        EngineError: there are rows whose logits were not finite.
    """
    if broken:
        raise EngineError(
            f"rollout: the student's logits are NaN or infinite in {broken} of {rows} completions, by their new token "
            f"{tokens}: its weights are broken, or its numbers overflow. Start from a sound student, lower the "
            "learning rate of the stage before, or use bfloat16 or float32 in place of float16 (student.dtype, "
            "trainer.precision)"
        )


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


def without_gaps(alive: Tensor) -> Tensor:
    """The rows that are alive, those at the end in the places of those that are not: few rows move. [B] -> [alive]"""
    stay = torch.arange(int(alive.sum()), device=alive.device)
    stay[~alive[: len(stay)]] = alive[len(stay) :].nonzero().squeeze(1) + len(stay)
    return stay
