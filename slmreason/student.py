"""The student: one causal language model with its tokenizer and chat template, trained by every stage.

The modules, the rollout engine and the Bridge all hold this same object. Log-probabilities are computed for target
tokens alone: the hidden states of all other positions never reach the vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slmreason import weights
from slmreason.attention import VARLEN, packing_arguments
from slmreason.batching import PackedBatch
from slmreason.chat import Chat
from slmreason.distributed import barrier, is_first
from slmreason.head import scores_of_logits, token_scores
from slmreason.records import Tokens
from slmreason.runfolder import write_folder
from slmreason.weights import FrozenWeights

EMBEDDED = Path(__file__).parent / "embedded" / "students"
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")
"""Settings by which a model changes its logits after the projection (Gemma, Granite, Cohere)."""
PLAIN_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers attend by a mask and by position ids, and by nothing else."""


@dataclass
class Lora:
    """Low-rank adapters (peft). The base weights stay frozen and serve as the reference policy."""

    r: int = 32
    """Rank."""
    alpha: int = 64
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout on the adapters' input. GRPO's ratios want 0."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers to adapt; `all-linear` adapts all linear layers but the output embedding."""


@dataclass(frozen=True)
class TokenScores:
    """What a forward pass says of the target tokens, flat over the micro-batch."""

    log_probs: Tensor
    """[N], float32."""
    entropy: Tensor | None = None
    """[N], float32, in nats; no gradient."""
    ranks: Tensor | None = None
    """[N], int64; 1 = the most likely token; no gradient."""


class Student(nn.Module):
    """A causal language model of transformers with its tokenizer, chat template and optional LoRA adapters."""

    def __init__(
        self,
        model: str,
        lora: Lora | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        system_prompt: str | None = None,
        instruction: str = "Please reason step by step, and put your final answer within \\boxed{}.",
        chat_template: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Args:
            model: A hub name, a folder in Hugging Face form, or `embedded:qwen2` / `embedded:llama`.
            lora: Train low-rank adapters in place of all weights.
            dtype: Precision of the loaded weights.
            system_prompt: Text of a system message before each question.
            instruction: Text put after each question, on a line of its own; empty for none.
            chat_template: Path of a jinja file that replaces the tokenizer's template.
            attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; transformers chooses when not given. With
                `varlen` packed sequences need no mask (PyTorch's kernel), and targets share no prompt in training.
            gradient_checkpointing: Recompute activations in the backward pass to save memory.
            trust_remote_code: Run code that comes with the model. Off unless you know the repository.

        Raises:
            ValueError: the model cannot be found or loaded; the message names it.
        """
        super().__init__()
        self.name = model
        self.policy_version = 0
        """Optimizer steps this student has taken, over all stages; stamped on every rollout."""
        self.tokens = Tokens()
        """What its training has cost so far."""
        path = resolve_model(model)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code
            )
            network = AutoModelForCausalLM.from_pretrained(
                path,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"student.model: cannot load {model!r}: {str(error).splitlines()[0]}") from error
        self.chat = Chat(self.tokenizer, network, system_prompt, instruction, chat_template)
        # A base model may not list the end of turn of its own chat template: whoever loads the student must stop there.
        network.generation_config.eos_token_id = sorted(self.chat.eos_ids)
        if gradient_checkpointing:
            # Renamed in transformers 5.2x; the keyword is the first argument of both.
            enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.lora = lora
        if attn_implementation == VARLEN and not _attends_plainly(network.config):
            raise ValueError(
                f"student.attn_implementation: varlen serves {', '.join(PLAIN_ATTENTION)} with full attention, not "
                f"{network.config.model_type}"
            )
        self.network: PreTrainedModel = _with_adapters(network, lora, gradient_checkpointing) if lora else network
        self._reference: FrozenWeights | None = None
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """Fills the ends of rows; never attended to, so any valid id serves a tokenizer without a pad token."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else min(self.eos_ids)

    @property
    def hidden_size(self) -> int:
        return int(self.base_model.config.get_text_config().hidden_size)

    @property
    def max_length(self) -> int:
        """Positions the model was made for."""
        return int(getattr(self.network.config, "max_position_embeddings", 1 << 30))

    # -- text and tokens ------------------------------------------------------------------------------------------

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a chat turn with `text`, up to where the student begins to answer."""
        return self.chat.prompt(text)

    def encode_question(self, question: str) -> tuple[int, ...]:
        """Token ids of the prompt that asks for a solution: the question, the instruction, the generation prompt."""
        return self.chat.question(question)

    def prompt_length(self, question: str) -> int:
        """Tokens of `encode_question`."""
        return len(self.encode_question(question))

    def encode_target(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer with the end-of-turn token, without any other special token."""
        return self.chat.target(text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def count_written(self, texts: Iterable[str | None]) -> None:
        """Adds what a teacher wrote to what the training of this student has cost."""
        self.tokens.written += sum(len(self.encode_target(text)) for text in texts if text)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends the student's turn."""
        return self.chat.eos_ids

    # -- scores -----------------------------------------------------------------------------------------------------

    def score(
        self, batch: PackedBatch, temperature: float = 1.0, with_entropy: bool = False, with_ranks: bool = False
    ) -> TokenScores:
        """Log-probabilities of the target tokens of a micro-batch, with the gradient if grad mode is on.

        Args:
            temperature: logits are divided by it, as the sampler's were.

        Returns:
            TokenScores over the N target tokens, in the batch's row-major order.
        """
        head = self.network.get_output_embeddings()
        fused = self._has_plain_head
        ids, positions = batch.input_ids, batch.position_ids
        if self.network.config._attn_implementation.startswith("flash"):
            # transformers tells sequences apart by their positions in a single row only; padding is a sequence too.
            ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        apart: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if self.network.config._attn_implementation == VARLEN:
            apart = packing_arguments(positions)
        with _scoring(head, batch, temperature, with_entropy, with_ranks) if fused else _project_only(head, batch):
            output = self.network(
                input_ids=ids, position_ids=positions, use_cache=False, **apart,
            ).logits  # fmt: skip
        if not fused:
            return TokenScores(*scores_of_logits(output[0], batch.target_ids, temperature, with_entropy, with_ranks))
        columns = list(output.unbind(-1))
        log_probs, others = columns[0], [column.detach() for column in columns[1:]]
        entropy = others.pop(0) if with_entropy else None
        return TokenScores(log_probs, entropy, others.pop(0).long() if with_ranks else None)

    @property
    def _has_plain_head(self) -> bool:
        """Whether logits are the head's output as it is: a plain projection that nothing scales or caps."""
        config = self.base_model.config
        scaled = any(getattr(config, key, None) not in (None, 1, 1.0) for key in AFTER_HEAD)
        return type(self.network.get_output_embeddings()) is nn.Linear and not scaled

    @property
    def shares_prompts(self) -> bool:
        """Whether targets with one prompt may lie behind it in one row, told apart by a mask of ours."""
        config = self.base_model.config
        return _attends_plainly(config) and config._attn_implementation == "sdpa"

    def forward(self, batch: PackedBatch, temperature: float = 1.0, with_entropy: bool = False) -> TokenScores:
        return self.score(batch, temperature, with_entropy)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it there is no dropout; afterwards the student is in the mode that it was in."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, `score` answers as the reference policy: adapters off (LoRA), or the frozen weights.

        Raises:
            RuntimeError: full fine-tuning without `freeze_reference()` first.
        """
        if self.lora is not None:
            with self.network.disable_adapter():  # type: ignore[operator]
                yield
            return
        if self._reference is None:
            raise RuntimeError("no reference policy: call freeze_reference() before training starts")
        self._reference.swap()
        try:
            yield
        finally:
            self._reference.swap()

    @property
    def has_reference(self) -> bool:
        return self.lora is not None or self._reference is not None

    def freeze_reference(self) -> None:
        """Keeps the present weights as the reference policy. With LoRA the base already is one: nothing is copied."""
        if self.lora is None:
            self._reference = FrozenWeights(self.network)

    def drop_reference(self) -> None:
        self._reference = None

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model itself, with adapters inside its layers if there are any."""
        return self.network.get_base_model() if self.lora is not None else self.network  # type: ignore[operator]

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def shard(self, mesh: DeviceMesh) -> None:
        """Spreads the weights over the processes of `mesh` (FSDP2), if they are not spread already.

        Raises:
            ValueError: the architecture does not say what its blocks are.
        """
        weights.shard(self.network, self.base_model._no_split_modules or (), mesh)

    def whole(self) -> AbstractContextManager[None]:
        """Within it every process holds all weights: sampling would otherwise gather each block for every token."""
        return weights.whole(self.network)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name in a transformers checkpoint, adapters folded in, tied weights once.

        What is sharded is gathered a block at a time: every process must run through it in step, and a tensor is good
        only until the next is asked for.
        """
        return weights.merged(self.network, self.base_model)

    def trainable_state(self) -> Iterator[tuple[str, Tensor]]:
        """What training changes, by parameter name; shards are gathered one parameter at a time, in step."""
        return weights.trainable(self.network)

    @torch.no_grad()
    def load_trainable_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Puts back what `trainable_state` gave, into shards too.

        Raises:
            ValueError: a name or a shape differs; the message names the first and `source`.
        """
        mine = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        differing = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
        if differing:
            raise ValueError(f"{source}: not the weights of this student, first at {differing[0]}")
        for name, parameter in mine.items():
            parameter.copy_(weights.like(parameter, state[name]))

    def save(self, folder: str | Path) -> None:
        """Writes the student in Hugging Face form (LoRA merged), loadable by `AutoModelForCausalLM`.

        Every process must call it; the first one writes, and alone holds a whole copy, on the CPU.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights() if is_first()}

        def fill(empty: Path) -> None:
            self.base_model.save_pretrained(empty, state_dict=state)
            self.tokenizer.save_pretrained(empty)

        if is_first():
            write_folder(Path(folder), fill)
        barrier()


def _attends_plainly(config: Any) -> bool:
    """Whether layers attend to all tokens before, told apart by a mask or by position ids alone."""
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in PLAIN_ATTENTION and full


def resolve_model(model: str) -> str:
    """The folder of an embedded student, or the name as given.

    Raises:
        ValueError: `embedded:NAME` does not exist.
    """
    if not model.startswith("embedded:"):
        return model
    folder = EMBEDDED / model.removeprefix("embedded:")
    if not (folder / "config.json").is_file():
        known = sorted(f"embedded:{path.parent.name}" for path in EMBEDDED.glob("*/config.json"))
        raise ValueError(f"student.model: {model!r} is not embedded; known: {', '.join(known)}")
    return str(folder)


@contextmanager
def _project_only(head: nn.Module, batch: PackedBatch) -> Iterator[None]:
    """Makes the vocabulary projection see only the hidden states that predict a target: [R, L, h] -> [1, N, h].

    A hook on the output embedding, so it serves every architecture, with adapters and logit scaling or capping.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[batch.context_index][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _scoring(
    head: nn.Linear, batch: PackedBatch, temperature: float, with_entropy: bool, with_ranks: bool
) -> Iterator[None]:
    """Makes the vocabulary projection give scores of the targets in the place of logits: [R, L, h] -> [N, 1 to 3].

    Within its forward, so that whatever a strategy does around that (gathering shards, say) is done.
    """
    targets = batch.target_ids

    def scores(hidden: Tensor) -> Tensor:
        chosen = hidden.flatten(0, 1)[batch.context_index]
        columns = token_scores(chosen, head.weight, head.bias, targets, temperature, with_entropy, with_ranks)
        return torch.stack([column.float() for column in columns if column is not None], dim=-1)

    head.forward = scores  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward


def _with_adapters(network: PreTrainedModel, lora: Lora, gradient_checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if gradient_checkpointing:
        network.enable_input_require_grads()
    return get_peft_model(network, settings)
