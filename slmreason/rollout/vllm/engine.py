"""Rollouts with vLLM: several times faster than the decode loop on a GPU, at the price of a second copy of the weights.

The copy is filled from the student at each `sync`, a tensor at a time. LoRA adapters are folded in where the weights
are float32; in half precision, which would round them away, they stand beside the weights. Its numbers differ from the
trainer's in the last digits, so GRPO corrects for it (`exact = False`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist

from slmreason.rollout.engine import Completion, EngineError, Progress, RolloutEngine, Sampling
from slmreason.rollout.vllm.adapters import rank_and_refusal, write_adapters
from slmreason.rollout.vllm.in_process import InProcess, plain_precision
from slmreason.rollout.vllm.options import LONGEST, Spec, VLLMOptions, check_installed
from slmreason.rollout.vllm.placement import Placement
from slmreason.rollout.vllm.process import Worker
from slmreason.student import Student, resolve_model
from slmreason.student.weights import merged

log = logging.getLogger(__name__)

BATCHES_AT_ONCE = 4
"""Times max_sequences: vLLM fills a place that falls free, so only the last of them has empty ones."""


class VLLMEngine(RolloutEngine):
    """Sampling with vLLM, in this process or in a worker process beside it."""

    exact = False
    length_key = "rollout.max_model_len"

    def __init__(
        self,
        placement: Literal["auto", "in_process", "worker"] = "auto",
        adapters: Literal["auto", "beside", "folded"] = "auto",
        **options: Any,
    ) -> None:
        """
        Args:
            placement: `worker` runs vLLM in a process beside each training process, `in_process` in this one. `auto`
                is `in_process` for a single training process on the first GPU, else `worker`: on a CPU vLLM changes
                more of its process than can be put back, and several training processes have a process group.
            adapters: Where a student's LoRA adapters go: `beside` vLLM's weights, or `folded` into them. `auto` is
                `folded` in float32, where that is exact and samples faster, and `beside` in half precision, where small
                updates would be rounded away.
            options: See `VLLMOptions`.

        Raises:
            ValueError: vLLM is not installed, or a value is out of range.
        """
        check_installed("rollout", "VLLMEngine", instead="; rollout.class_path HFEngine does without")
        self.placement, self.adapters = placement, adapters
        self.options = VLLMOptions(section="rollout", **options)
        self._core: Placement | None = None
        self._base_of: weakref.ref[Student] | None = None
        """The student whose weights the core has without its adapters, which stand beside them."""
        self._refused = False
        """vLLM has refused a student's adapters, and this was said."""

    def max_length(self, student: Student) -> int:
        return self.options.max_model_len or min(student.max_length, LONGEST)

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

    def _take_beside(self, student: Student, core: Placement) -> bool:
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
        return BATCHES_AT_ONCE * self.options.max_sequences

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
        dtype: str = self.options.dtype
        if dtype == "auto":
            dtype = str(student.base_model.dtype).removeprefix("torch.")
        return Spec(
            model=resolve_model(student.name),
            dtype=dtype,
            eos_ids=tuple(sorted(student.eos_ids)),
            max_model_len=self.max_length(student),
            options=self.options,
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

    def _build(self, spec: Spec, student: Student) -> Placement:
        device = student.device
        alone = not dist.is_initialized() and device.index in (None, 0)
        if self.placement == "in_process" and not alone:
            raise EngineError("rollout.placement: in_process is for a single training process on the first device")
        if self.placement == "in_process" or (self.placement == "auto" and alone and device.type == "cuda"):
            return InProcess(spec, device)
        return Worker(spec, device, _largest_tensor(student))

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
