"""A teacher model in a vLLM worker beside the trainer, with weights, tokenizer and chat template of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from slmreason.rollout.engine import Completion, Sampling
from slmreason.rollout.vllm import LONGEST, Spec, VLLMOptions, Worker, check_installed
from slmreason.run.progress import counting
from slmreason.student import resolve_model
from slmreason.student.chat import Chat
from slmreason.teacher.prompted import Answer, Conversation, Failure, LLMTeacher

log = logging.getLogger(__name__)


class VLLMTeacher(LLMTeacher):
    """A causal language model in a vLLM worker process, which starts when it is first asked."""

    def __init__(
        self,
        model: str,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        max_completion_tokens: int = 2048,
        device: str | None = None,
        chat_template: str | None = None,
        prompts: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            model: A hub name or a folder in Hugging Face form.
            temperature: 0 is greedy.
            top_p: Sample from the most likely tokens that together have this probability.
            seed: Of the sampling; the same question gets the same answer.
            max_completion_tokens: Longest answer, thoughts included.
            device: Such as cuda:1; if not given, the first GPU, or the CPU where there is none.
            chat_template: Path of a jinja file that replaces the tokenizer's template.
            prompts: Paths of jinja files that replace the prompts solve, bridge, locate, repair or new_trace.
            options: See `VLLMOptions`.

        Raises:
            ValueError: vLLM is not installed, the model cannot be found, or a value is wrong; the message names it.
        """
        super().__init__(prompts)
        check_installed("teacher", "VLLMTeacher")
        chosen = VLLMOptions(section="teacher", **options)
        if not 0 <= temperature <= 2:
            raise ValueError(f"teacher.temperature must be within 0 and 2, got {temperature}")
        self.model, path = model, resolve_model(model)
        try:
            self._chat, positions = _chat_and_positions(path, chat_template, chosen.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"teacher.model: cannot load {model!r}: {str(error).splitlines()[0]}") from error
        longest = chosen.max_model_len or min(positions, LONGEST)
        if not 0 < max_completion_tokens < longest:
            raise ValueError(
                f"teacher.max_completion_tokens: {max_completion_tokens} is not below {longest}, the model's longest "
                "prompt with its answer"
            )
        self.sampling = Sampling(max_completion_tokens, temperature, top_p, seed, with_log_probs=False)
        self.spec = Spec(
            model=path,
            dtype=chosen.dtype,
            eos_ids=tuple(sorted(self._chat.eos_ids)),
            max_model_len=longest,
            options=chosen,
            from_disk=True,
        )
        self.device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self._worker: Worker | None = None

    def chat(self, kind: str, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """See `LLMTeacher.chat`. A prompt that leaves no room for an answer gets none.

        Raises:
            EngineError: the worker cannot be started, died or hangs; the next call starts another.
        """
        prompts = [self.encode(conversation) for conversation in conversations]
        room = self.spec.max_model_len - self.sampling.max_new_tokens
        fitting = list(dict.fromkeys(prompt for prompt in prompts if len(prompt) <= room))
        answers = dict(zip(fitting, self._generate(kind, fitting), strict=True))
        return [
            self._answer(answers[prompt]) if prompt in answers else Failure(
                f"a prompt of {len(prompt)} tokens and an answer of up to {self.sampling.max_new_tokens} exceed "
                f"teacher.max_model_len = {self.spec.max_model_len}; raise it where the model allows, or lower "
                "teacher.max_completion_tokens"
            )
            for prompt in prompts
        ]  # fmt: skip

    def encode(self, conversation: Conversation) -> tuple[int, ...]:
        """Token ids of a conversation under the model's own template, up to where it begins to answer."""
        return self._chat.conversation([dict(message) for message in conversation])

    def close(self) -> None:
        """Ends the worker, as the end of this process would. The next question starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _generate(self, kind: str, prompts: list[tuple[int, ...]]) -> list[Completion]:
        if not prompts:
            return []
        began = time.monotonic()
        if self._worker is None:
            self._worker = Worker(self.spec, self.device)
        with counting(f"teacher {kind}", len(prompts)) as advance:
            try:
                groups = self._worker.generate(prompts, 1, self.sampling, lambda ended, _: advance(ended, ""))
            except BaseException:  # a worker that was interrupted may still be at work on this
                self.close()
                raise
        completions = [completion for [completion] in groups]
        seconds = time.monotonic() - began
        log.info(
            "teacher %s: %d requests (%.1f/s), %d tokens in, %d out", kind, len(prompts), len(prompts) / seconds,
            sum(map(len, prompts)), sum(len(completion.token_ids) for completion in completions),
        )  # fmt: skip
        return completions

    def _answer(self, completion: Completion) -> Answer:
        tokens = [token for token in completion.token_ids if token not in self._chat.eos_ids]
        # Special tokens stay: they may be where thoughts begin and end.
        return Answer(str(self._chat.tokenizer.decode(tokens)).strip(), completion.truncated)


def _chat_and_positions(path: str, chat_template: str | None, trust_remote_code: bool) -> tuple[Chat, int]:
    """A model's chat, and the longest sequence that it was made for, in tokens; neither needs its weights."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    # What a model says of its generation counts for where its turn ends, and for nothing else.
    generation = _generation_config(path, config)
    chat = Chat(tokenizer, generation, chat_template=chat_template, section="teacher")
    return chat, int(getattr(config, "max_position_embeddings", LONGEST))


def _generation_config(path: str, config: Any) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # the model has no such file
        return GenerationConfig(eos_token_id=config.eos_token_id)
