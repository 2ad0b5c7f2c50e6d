"""What a run will need of its device's memory, said before it starts: an estimate from the model's shape.

What a layer keeps for the backward pass is counted as transformers' Llama and Qwen2 compute it: two norms in float32,
rotated queries and keys, values, what attention gives, and four tensors of the MLP's width. tests/curriculum has it
measured against peaks. Other architectures come out about right, a mixture of experts by the experts that a token sees.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from slmreason.rollout.engine import RolloutEngine
from slmreason.rollout.projections import packed_bytes
from slmreason.rollout.steps import is_lean
from slmreason.rollout.transformers import HFEngine
from slmreason.rollout.vllm import VLLMEngine
from slmreason.student import Student
from slmreason.student.logprobs import CHUNK_ELEMENTS, chunk_elements
from slmreason.student.optimizer import HALF
from slmreason.student.scoring import has_plain_head

log = logging.getLogger(__name__)
GIB = 2**30
LOGIT_BYTES = 3 * 4
"""Of a logit while a token is drawn: its own float32 and two that come of it."""
ROOM = 0.9
"""Share of a device's memory that tensors can have: the rest goes to libraries and to gaps between tensors."""


@dataclass(frozen=True)
class Shape:
    """What of a student decides how much memory a step takes. Sizes in numbers, not bytes, unless said."""

    layers: int
    hidden: int
    queries: int
    """Query heads times their size."""
    keys: int
    """Key heads times their size; values have as many."""
    mlp: int
    """Width of the MLP, over all experts that a token sees."""
    vocabulary: int
    weight_bytes: int
    """Of all weights."""
    trained: int
    """Weights that are trained."""
    trained_bytes: int
    optimizer_bytes: int
    """Moments of AdamW, and float32 copies of what is trained in half precision."""
    adapter_width: int
    """What a token's adapters hold between their two matrices, over all layers; 0 without adapters."""
    width: int
    """Bytes of a number in the layers."""
    mixed: bool
    """Layers multiply in half precision by autocast: norms and what goes on past them stay float32."""
    checkpointing: bool
    plain_head: bool
    """Logits are made a chunk at a time."""
    trains_head: bool
    chunk_elements: int = CHUNK_ELEMENTS
    """How many logits a chunk has."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in a training step, but for `sampling`, which is what rollouts take in its place."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reference: float
    sampling: float

    @property
    def in_training(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)) - self.sampling

    @property
    def in_sampling(self) -> float:
        return self.weights + self.optimizer + self.reference + self.sampling


def shape_of(student: Student, precision: str = "32-true") -> Shape:
    """The shape of a student that is in the precision that it will be trained in.

    Args:
        precision: the Trainer's.
    """
    config = student.base_model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", None) or 1
    mlp = getattr(config, "moe_intermediate_size", None) if experts > 1 else None
    parameters, trained = list(student.network.parameters()), student.trained.parameters()
    mixed = precision.endswith("mixed")
    head = student.network.get_output_embeddings()
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        mlp=experts * (mlp or getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=config.vocab_size,
        weight_bytes=sum(p.nbytes for p in parameters),
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=sum(p.numel() * (12 if p.dtype in HALF else 8) for p in trained),
        adapter_width=sum(p.shape[0] for n, p in student.network.named_parameters() if "lora_A" in n),
        width=2 if mixed else student.base_model.dtype.itemsize,
        mixed=mixed,
        checkpointing=bool(student.base_model.is_gradient_checkpointing),
        plain_head=has_plain_head(student.network),
        trains_head=any(p.requires_grad for p in head.parameters()),
        chunk_elements=chunk_elements(next(head.parameters())),
    )


def layer_bytes(shape: Shape, row_length: int = 0) -> float:
    """What one layer keeps of one token for the backward pass.

    Args:
        row_length: of rows that several sequences share, whose mask is given; 0 where each row has one sequence.
    """
    width, hidden = shape.width, shape.hidden
    stream = 4 if shape.mixed else width
    norm = 4 * hidden + width * hidden  # its input in float32, and what the products after it take
    if shape.mixed:
        norm += 4 * hidden
    if not shape.adapter_width:  # the weights' own gradient needs what they multiply
        norm += stream * hidden
    attention = width * 2 * (shape.queries + shape.keys) + 4 * shape.queries / 64
    if row_length:  # keys and values are repeated for each query head, and the mask is kept as numbers
        attention += width * 2 * (shape.queries - shape.keys) + width * row_length
    return 2 * norm + attention + width * (4 * shape.mlp + shape.adapter_width / shape.layers)


def estimate(
    shape: Shape, tokens: int, row_length: int = 0, shards: int = 1, reference: bool = False, sampling: float = 0.0
) -> Memory:
    """Memory of a step whose micro-batches have so many tokens; gradients are there from the micro-batch before.

    Args:
        tokens: of a micro-batch, padding included; two thirds of them are taken for targets.
        row_length: see `layer_bytes`.
        shards: processes that the weights are spread over (FSDP2).
        reference: whether a frozen copy of all weights is kept.
        sampling: bytes that the rollout engine takes while it samples.
    """
    elements = tokens * 2 / 3 * shape.vocabulary
    if not shape.plain_head or elements <= shape.chunk_elements:
        logits = 3 * 4 * elements
    else:
        logits = 2 * 4 * shape.chunk_elements + (4 * shape.vocabulary * shape.hidden if shape.trains_head else 0)
    layer = layer_bytes(shape, row_length) * tokens
    activations = layer * shape.layers
    if shape.checkpointing:  # each layer's input, and one layer that is made again once the logits are gone
        inputs = shape.layers * (4 if shape.mixed else shape.width) * shape.hidden * tokens
        activations = inputs + max(0.0, 1.3 * layer - logits)
    gathered = 0.0 if shards == 1 else 2 * shape.weight_bytes / shape.layers
    return Memory(
        weights=shape.weight_bytes / shards + gathered,
        gradients=shape.trained_bytes / shards,
        optimizer=shape.optimizer_bytes / shards,
        activations=activations,
        logits=logits,
        reference=shape.weight_bytes / shards if reference else 0.0,
        sampling=sampling,
    )


def sampling_bytes(engine: RolloutEngine, student: Student, shape: Shape, longest: int, device_bytes: float) -> float:
    """What a rollout engine takes while it samples: cached keys and values and logits, or vLLM's share of the device.

    Args:
        longest: tokens of a prompt with its completion.
    """
    if isinstance(engine, VLLMEngine):
        return engine.options.gpu_memory_utilization * device_bytes
    if isinstance(engine, HFEngine):
        max_sequences, max_cache_tokens = engine.limits(student)
        tokens = min(max_cache_tokens, max_sequences * longest)
        rows = min(max_sequences, max(1, max_cache_tokens // longest))
        cache = tokens * 2 * shape.keys * shape.layers * shape.width
        copies = packed_bytes(student) if engine.fast_weights and is_lean(student) else 0
        return cache + LOGIT_BYTES * rows * shape.vocabulary + copies
    return 0.0


def device_bytes(device: torch.device) -> float:
    """What a device has for this process: a GPU's free memory and what the process holds already, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def largest_budget(need: Callable[[int], Memory], tokens: int, device: float) -> int:
    """Tokens of a micro-batch that fit, in hundreds, at most `tokens`; 0 where none do.

    Args:
        need: tokens -> memory.
    """
    room = ROOM * device
    return next((budget for budget in range(tokens // 100 * 100, 0, -100) if need(budget).in_training <= room), 0)


def report_memory(
    student: Student,
    engine: RolloutEngine,
    device: torch.device,
    precision: str,
    token_budget: int,
    longest: int,
    shards: int,
    reference: bool,
) -> None:
    """Says in one line what a run needs and what the device has, and warns with the keys to change if it needs more.

    Args:
        longest: tokens of a prompt with its completion; a sequence beyond the budget is a micro-batch of its own.
    """  # fmt: skip
    shape, has = shape_of(student, precision), device_bytes(device)
    tokens, sampling = max(token_budget, longest), sampling_bytes(engine, student, shape, longest, has)

    def needed(budget: int) -> Memory:
        return estimate(shape, budget, longest, shards, reference, sampling)

    need = needed(tokens)
    beside = sampling if isinstance(engine, VLLMEngine) and not engine.options.sleep else 0.0
    parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer,
             f"activations of {tokens} tokens": need.activations, "logits": need.logits,
             "reference": need.reference, "vLLM, which does not sleep": beside}  # fmt: skip
    detail = ", ".join(f"{name} {gib(value)}" for name, value in parts.items() if value)
    in_training = need.in_training + beside
    line = f"memory: training takes about {gib(in_training)} GiB ({detail}), sampling {gib(need.in_sampling)} GiB"
    log.info("%s; %s has %s GiB", line, device, gib(has))
    if in_training > ROOM * has:
        fits = largest_budget(needed, tokens, has - beside / ROOM)
        lower = f"lower data.token_budget to {fits}"
        if fits < longest:  # a sequence is never cut in two
            lower = "lower grpo.max_completion_tokens, or train adapters (student.lora.r 32)"
        more = "" if shape.checkpointing else ", or set student.gradient_checkpointing true"
        log.warning("memory: training may not fit: %s%s", lower, more)
    if need.in_sampling > has:
        key = "gpu_memory_utilization" if isinstance(engine, VLLMEngine) else "max_cache_tokens"
        log.warning("memory: sampling may not fit: lower rollout.%s", key)


def gib(value: float) -> str:
    """Bytes as GiB, with two digits below one."""
    return f"{value / GIB:.2f}" if value < GIB else f"{value / GIB:.1f}"
