"""The student: one causal language model with its tokenizer and chat template, trained by every stage.

The modules, the rollout engine and the Bridge all hold this same object. Log-probabilities are computed for target
tokens alone: the hidden states of all other positions never reach the vocabulary projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slmreason.records import Problem, Tokens
from slmreason.run.files import write_folder
from slmreason.runtime.distributed import barrier, is_first
from slmreason.student import weights
from slmreason.student.attention import VARLEN
from slmreason.student.chat import Chat
from slmreason.student.layout import PLAIN_ATTENTION, Findings, attends_plainly, layout_of
from slmreason.student.loading import check_tokens, embeddings, load, max_positions, torch_dtype
from slmreason.student.lora import Lora, peft_config, with_adapters
from slmreason.student.offload import OffloadedActivations
from slmreason.student.packing import FALLBACK_HIDDEN_SIZE, PackedBatch
from slmreason.student.quantization import Quantization, quantization_config, saved_plainly
from slmreason.student.reference import ReferencePolicy
from slmreason.student.scoring import TokenScores, score_batch
from slmreason.student.template import DATE
from slmreason.student.trained import TrainedWeights


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
        quantization: Quantization | None = None,
        activation_offload: bool = False,
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
            quantization: `nf4` keeps the frozen weights below the adapters in four bits (bitsandbytes, on a GPU).
            activation_offload: Keep what the backward pass needs in the CPU's memory, which takes time.

        Raises:
            ValueError: the model cannot be found or loaded; the message names it. Or keys exclude each other.
        """
        super().__init__()
        self.policy_version = 0
        """Optimizer steps this student has taken, over all stages; stamped on every rollout."""
        self.tokens = Tokens()
        """What its training has cost so far."""
        if lora is not None:
            peft_config(lora)  # a mistake in it is said before a large model is read
        if activation_offload and gradient_checkpointing:
            raise ValueError(
                "student.activation_offload: student.gradient_checkpointing keeps no activations that could be "
                "offloaded; choose one of them"
            )
        options: dict[str, Any] = {"dtype": torch_dtype(dtype), "attn_implementation": attn_implementation}
        if quantization is not None:
            options["quantization_config"] = quantization_config(quantization, lora, options["dtype"])
        network, tokenizer, self.name = load(model, trust_remote_code, **options)
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
        self.activation_offload = activation_offload
        if attn_implementation == VARLEN and not attends_plainly(network.config):
            raise ValueError(
                f"student.attn_implementation: varlen serves {', '.join(PLAIN_ATTENTION)} with full attention, not "
                f"{network.config.model_type}"
            )
        self.network: PreTrainedModel = with_adapters(network, lora, gradient_checkpointing) if lora else network
        self.trained = TrainedWeights(self.network)
        self.reference_policy = ReferencePolicy(self.network, lora)
        self.findings = Findings()
        """Which ways of computing were found right for this model, by trying."""
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
        way = layout_of(self).way
        offloads = self.activation_offload and torch.is_grad_enabled()
        with OffloadedActivations(self.network) if offloads else nullcontext():
            return score_batch(self.network, batch, way, temperature, with_entropy, with_ranks)

    def forward(self, batch: PackedBatch, temperature: float = 1.0, with_entropy: bool = False) -> TokenScores:
        return self.score(batch, temperature, with_entropy)

    @property
    def shares_prompts(self) -> bool:
        """Whether targets with one prompt may lie behind it in one row, told apart by a mask of ours."""
        return layout_of(self).shares_prompts

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it there is no dropout; afterwards the student is in the mode that it was in."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    # -- weights ----------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model itself, with adapters inside its layers if there are any."""
        return self.network.get_base_model() if self.lora is not None else self.network  # type: ignore[operator]

    def whole(self) -> AbstractContextManager[None]:
        """Within it every process holds all weights: sampling would otherwise gather each block for every token."""
        return weights.whole(self.network)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by its name in a transformers checkpoint, adapters folded in, tied weights once.

        What is sharded is gathered a block at a time: every process must run through it in step, and a tensor is good
        only until the next is asked for.
        """
        return weights.merged(self.network, self.base_model)

    def save(self, folder: str | Path) -> None:
        """Writes the student in Hugging Face form (LoRA merged), loadable by `AutoModelForCausalLM`.

        Every process must call it; the first one writes, and alone holds a whole copy, on the CPU.
        """
        state = {name: tensor.to("cpu", copy=True) for name, tensor in self.weights() if is_first()}

        def fill(empty: Path) -> None:
            with saved_plainly(self.base_model):
                self.base_model.save_pretrained(empty, state_dict=state)
            self.tokenizer.save_pretrained(empty)

        if is_first():
            write_folder(Path(folder), fill)
        barrier()
