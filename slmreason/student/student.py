"""The student: one causal language model with its tokenizer and chat template, trained by every stage.

The modules, the rollout engine and the Bridge all hold this same object. Log-probabilities are computed for target
tokens alone: the hidden states of all other positions never reach the vocabulary projection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmreason.records import Example, Problem, Tokens
from slmreason.run.files import is_no_room, write_folder
from slmreason.runtime.distributed import barrier, is_first
from slmreason.student import selfcheck, weights
from slmreason.student.attention import VARLEN
from slmreason.student.bundles import Bundle, alone
from slmreason.student.chat import DATE, Chat
from slmreason.student.loading import (
    EMBEDDED,
    check_tokens,
    embeddings,
    load,
    max_positions,
    resolve_model,
    torch_dtype,
)
from slmreason.student.packing import FALLBACK_HIDDEN_SIZE, PackedBatch, collate_bundles
from slmreason.student.scoring import TokenScores, Way, score_batch, ways
from slmreason.student.selfcheck import Check
from slmreason.student.weights import FrozenWeights

__all__ = ["EMBEDDED", "Lora", "Student", "TokenScores", "resolve_model"]
log = logging.getLogger(__name__)
ROWS_OF_TWO = 20
"""As the hidden size it makes `collate` put the sequences of the check into two rows, with padding in one."""
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
class Layout:
    """How batches are scored, as the model itself was found to allow."""

    way: Way
    shares_prompts: bool
    """Targets with one prompt may lie behind it in one row, told apart by a mask of ours."""


class Student(nn.Module):
    """A causal language model of transformers with its tokenizer, chat template and optional LoRA adapters."""

    def __init__(
        self,
        model: str,
        lora: Lora | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto", "fastest"] = "float32",
        system_prompt: str | None = None,
        instruction: str = "Please reason step by step, and put your final answer within \\boxed{}.",
        chat_template: str | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str = DATE,
    ) -> None:
        """
        Args:
            model: A hub name, a folder in Hugging Face form, or `embedded:qwen2` / `embedded:llama`.
            lora: Train low-rank adapters in place of all weights.
            dtype: Precision of the loaded weights. `auto` is what they are stored in; `fastest` is bfloat16 where this
                machine multiplies in it, else float32, and which of them is said.
            system_prompt: Text of a system message before each question.
            instruction: Text put after each question, on a line of its own; empty for none.
            chat_template: Path of a jinja file that replaces the tokenizer's template.
            attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; transformers chooses when not given. With
                `varlen` packed sequences need no mask (PyTorch's kernel), and targets share no prompt in training.
            gradient_checkpointing: Recompute activations in the backward pass to save memory.
            trust_remote_code: Run code that comes with the model. Off unless you know the repository.
            chat_template_kwargs: Variables for the chat template in every rendering, such as {enable_thinking: false}.
            date: What a chat template that prints today's date gets, so that a run has the same prompts on any day;
                YYYY-MM-DD.

        Raises:
            ValueError: the model cannot be found or loaded; the message names it.
        """
        super().__init__()
        self.policy_version = 0
        """Optimizer steps this student has taken, over all stages; stamped on every rollout."""
        self.tokens = Tokens()
        """What its training has cost so far."""
        network, tokenizer, self.name = load(
            model,
            trust_remote_code,
            dtype=torch_dtype(dtype),
            attn_implementation=attn_implementation,
        )
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.chat = Chat(
            self.tokenizer,
            network.generation_config,
            system_prompt=system_prompt,
            instruction=instruction,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            date=date,
        )
        used = {*self.chat.question("1"), *self.chat.target("1")}
        check_tokens(network, tokenizer, used)
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
        self.masters = weights.MasterWeights(self.network)
        """Float32 copies of what was trained in half precision."""
        self._reference: FrozenWeights | None = None
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._check: Check | None = None
        self._build: tuple[Any, ...] | None = None
        """`build`, while a check is going on."""
        self.decodings: dict[tuple[Any, ...], Any] = {}
        """What `slmreason.rollout.decoding` found, for each `build`."""
        self.eval()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def pad_token_id(self) -> int:
        """Fills the ends of rows; never attended to, so any valid id serves a tokenizer without a pad token."""
        pad, known = self.tokenizer.pad_token_id, embeddings(self.base_model)
        return pad if pad is not None and 0 <= pad < known else min(i for i in self.eos_ids if i < known)

    @property
    def hidden_size(self) -> int:
        return int(getattr(self.base_model.config.get_text_config(), "hidden_size", FALLBACK_HIDDEN_SIZE))

    @property
    def max_length(self) -> int:
        """Positions the model was made for."""
        return max_positions(self.base_model)

    # -- text and tokens ------------------------------------------------------------------------------------------

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a chat turn with `text`, up to where the student begins to answer."""
        return self.chat.prompt(text)

    def encode_question(self, question: str) -> tuple[int, ...]:
        """Token ids of the prompt that asks for a solution: the question, the instruction, the generation prompt."""
        return self.chat.question(question)

    def encode_problem(self, problem: Problem) -> tuple[int, ...]:
        """Token ids of the prompt that a problem is asked with: its earlier turns, then its question."""
        return self.chat.question(problem.question, problem.turns)

    def prompt_length(self, problem: Problem) -> int:
        """Tokens of `encode_problem`."""
        return len(self.encode_problem(problem))

    def encode_target(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer with the end-of-turn token, without any other special token."""
        return self.chat.target(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, without special ones."""
        return self.chat.decode(list(ids))

    def decode_completion(self, ids: Sequence[int]) -> str:
        """The text of a completion, with the thought that its prompt has opened, if the template opens one."""
        return self.chat.answer(list(ids))

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
        return score_batch(self.network, batch, self.layout.way, temperature, with_entropy, with_ranks)

    @property
    def layout(self) -> Layout:
        """How batches of this model are scored, found by trying (see `selfcheck`) when it is first asked for.

        Raises:
            ValueError: no way gives the log-probs of a plain forward pass; the message names the model's type.
        """
        if self.build not in self._layouts:
            self._layouts[self.build] = self._find_layout()
        return self._layouts[self.build]

    @property
    def build(self) -> tuple[Any, ...]:
        """What decides which computations are right, beside the model's type: attention, precision, device."""
        # Not the precision that a check widens the weights to.
        return self._build or (self.network.config._attn_implementation, self.base_model.dtype, self.device.type)

    def _find_layout(self) -> Layout:
        """Compares the ways to score with a plain forward pass; neither weights, mode nor random numbers change."""
        with self.checking() as check:

            def score(way: Way, bundles: list[Bundle[Example]] | None = None) -> list[Tensor]:
                batch = collate_bundles(
                    bundles or alone(check.examples), self.pad_token_id, hidden_size=ROWS_OF_TWO
                ).to(self.device)
                pieces = score_batch(self.network, batch, way).log_probs.split(batch.target_lengths.tolist())
                return [piece for _, piece in sorted(zip(batch.order, pieces, strict=True), key=lambda pair: pair[0])]

            way, off = selfcheck.first_right(ways(self.network), score, check.log_probs, check.dtype)
            if way is None:
                best = [
                    min((t for t in off if t.way.packed == packed), key=lambda t: t.gap) for packed in (True, False)
                ]
                raise ValueError(
                    f"student.model: {self.kind} cannot be trained here. Its log-probs are compared with those of a "
                    f"forward pass over each sequence alone: {'; '.join(map(str, best))}"
                )
            shares = False
            if way.packed and self._may_share_prompts:
                first, second, other = check.examples
                together = [Bundle((first, second)), Bundle((other,))]
                shares = (
                    selfcheck.first_right([way], lambda w: score(w, together), check.log_probs, check.dtype)[0]
                    is not None
                )
        if not way.packed:
            worst = min(off, key=lambda trial: trial.gap)
            log.warning("student.model: %s: each sequence gets a row of its own, at the price of padding: log-probs "
                        "are off otherwise (%s)", self.kind, worst)  # fmt: skip
        return Layout(way, shares)

    @contextmanager
    def checking(self) -> Iterator[Check]:
        """Within it ways of computing can be tried on the model (see `selfcheck`); it may be entered again.

        Raises:
            ValueError: the model has no plain forward pass to compare with.
        """
        if self._check is not None:
            yield self._check
            return
        base, self._build = self.base_model, self.build
        # Widening half a billion weights takes seconds; types whose float32 numbers the tests know do without.
        is_known = base.config.model_type in PLAIN_ATTENTION
        is_flash = self.network.config._attn_implementation.startswith("flash")
        widen = not is_known and not is_flash and not weights.units(base)
        try:
            with self.evaluating(), self.whole(), selfcheck.checking(base, widen) as dtype:
                examples = selfcheck.examples(self.tokenizer, embeddings(base))
                self._check = Check(examples, self._plain_log_probs(examples), dtype)
                yield self._check
        finally:
            self._check = self._build = None

    def _plain_log_probs(self, examples: Sequence[Example]) -> list[Tensor]:
        try:
            return [selfcheck.plain_log_probs(self.network, example) for example in examples]
        except Exception as error:
            raise ValueError(
                f"student.model: {self.kind} is no causal language model of text that can be trained here: its "
                f"forward pass ends in {selfcheck.fault_of(error)}"
            ) from error

    @property
    def kind(self) -> str:
        """The model's type as messages name it: `qwen2 (Qwen2ForCausalLM)`."""
        return f"{self.base_model.config.model_type} ({type(self.base_model).__name__})"

    @property
    def shares_prompts(self) -> bool:
        """Whether targets with one prompt may lie behind it in one row, told apart by a mask of ours."""
        return self.layout.shares_prompts

    @property
    def _may_share_prompts(self) -> bool:
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
        return weights.trainable(self.network, self.masters)

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
        weights.put_trainable(self.network, self.masters, state)

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

    def try_saving(self) -> None:
        """Saves all but the weights into a folder that is thrown away: what would fail at the end fails now.

        Raises:
            ValueError: transformers refuses; the message says why.
        """
        try:
            with TemporaryDirectory() as folder:
                self.base_model.config.save_pretrained(folder)
                if self.base_model.can_generate():
                    self.base_model.generation_config.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
        except Exception as error:
            if is_no_room(error):  # in the temporary folder, which says nothing of the model
                return
            raise ValueError(
                f"student.model: {self.name} could be trained and not be saved: {selfcheck.fault_of(error)}"
            ) from error


def _attends_plainly(config: Any) -> bool:
    """Whether layers attend to all tokens before, told apart by a mask or by position ids alone."""
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in PLAIN_ATTENTION and full


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
    adapted = get_peft_model(network, settings)
    weights.keep_adapters_float32(adapted)
    return adapted
