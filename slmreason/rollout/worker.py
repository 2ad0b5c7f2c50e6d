"""vLLM itself: built once, given weights, asked for completions. In this process, or served from one of its own."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from slmreason.rollout.engine import Completion, Sampling, prompt_seed

HEARTBEAT_S = 1.0
"""A worker that is alive says so at least this often while it samples."""
ALIGNMENT = 64
"""Bytes; where each tensor begins in the shared buffer."""


class EngineError(RuntimeError):
    """The rollout engine cannot be started, died, hangs, or did not take the weights."""


@dataclass(frozen=True)
class Spec:
    """What a vLLM engine is built from. Engines of one spec differ in nothing but their weights."""

    model: str
    """Folder or hub name whose config.json describes the network."""
    dtype: str
    eos_ids: tuple[int, ...]
    max_model_len: int
    max_sequences: int
    gpu_memory_utilization: float
    cache_gib: float | None
    enforce_eager: bool
    sleep: bool
    trust_remote_code: bool
    from_disk: bool = False
    """Read the weights that `model` has; else they come from outside alone."""


class Core:
    """A vLLM engine within the current process.

    Building it changes the process it is in: environment, random number generators, threads, functions of torch,
    torch.distributed. A process of its own does not mind; the trainer's puts things back (`slmreason.rollout.vllm`).
    """

    def __init__(self, spec: Spec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop in this process, not in one more
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())
        if self._on_cpu:
            # Else its sampler is compiled in the first call, for longer than small runs take altogether.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        from vllm import EngineArgs, LLMEngine

        self.spec = spec
        self._sleeps = spec.sleep and not self._on_cpu
        self._asleep: set[str] = set()
        self._engine = LLMEngine.from_engine_args(EngineArgs(**self._arguments()))

    def _arguments(self) -> dict[str, Any]:
        spec = self.spec
        cache = spec.cache_gib if spec.cache_gib is not None or not self._on_cpu else 1.0
        arguments: dict[str, Any] = {
            "model": spec.model,
            "dtype": spec.dtype,
            "trust_remote_code": spec.trust_remote_code,
            # Never from a pickle; a student's weights follow.
            "load_format": "safetensors" if spec.from_disk else "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no sampling defaults besides what we ask for
            "max_model_len": spec.max_model_len,
            "max_num_seqs": spec.max_sequences,
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
            "enforce_eager": spec.enforce_eager or self._on_cpu,
            "enable_sleep_mode": self._sleeps,
            "logprobs_mode": "processed_logprobs",  # of the distribution drawn from, not of the raw logits
            "disable_log_stats": True,
        }
        if self._on_cpu:
            # A prompt processed in pieces rewinds its request's generator, which generators of the CPU cannot do.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(8192, spec.max_model_len)
        return arguments

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes weights by their names in a transformers checkpoint, tied ones once. Each tensor must live on.

        Raises:
            EngineError: a parameter of the network got no weight.
        """
        self._wake("weights")
        (missing,) = self._engine.collective_rpc(_reload, args=(weights, self._on_cpu))
        if missing:
            raise EngineError(f"vLLM's {self.spec.model} got no weight for {', '.join(sorted(missing)[:5])}")
        # What is cached are keys and values of the weights before.
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM still holds cached prompts of the weights before")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        tick: Callable[[int], None],
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt.

        Args:
            tick: called after every step of the engine with the number of prompts that it finished, mostly 0.
        """
        from vllm.inputs import tokens_input

        self._wake("weights", "kv_cache")
        for index, prompt in enumerate(prompts):
            self._engine.add_request(
                str(index), tokens_input(list(prompt)), self._parameters(prompt, group_size, sampling)
            )
        results: dict[int, list[Completion]] = {}
        while self._engine.has_unfinished_requests():
            finished = [output for output in self._engine.step() if output.finished]
            for output in finished:
                results[int(output.request_id)] = [self._completion(found) for found in output.outputs]
            tick(len(finished))
        self._fall_asleep()
        copies = group_size if sampling.temperature == 0 else 1
        return [results[index] * copies for index in range(len(prompts))]

    def _parameters(self, prompt: Sequence[int], group_size: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1 if greedy else group_size,  # greedy completions of a prompt are all the same, and vLLM wants one
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            seed=prompt_seed(sampling, prompt) >> 1,  # vLLM adds the completion's number and needs 63 bits for both
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(self.spec.eos_ids),
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, output: Any) -> Completion:
        tokens = tuple(output.token_ids)
        log_probs = tuple(step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True))
        return Completion(tokens, log_probs, tokens[-1] not in self.spec.eos_ids)

    def _wake(self, *tags: str) -> None:
        if wanted := [tag for tag in tags if tag in self._asleep]:
            self._engine.wake_up(wanted)
            self._asleep -= set(wanted)

    def _fall_asleep(self) -> None:
        """Leaves the device's memory to the trainer; weights wait in the host's, since the next sync may be far."""
        if self._sleeps:
            self._engine.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def _reload(worker: Any, weights: Iterable[tuple[str, Tensor]], on_cpu: bool) -> set[str]:
    """Loads weights into a built model, within vLLM's worker.

    Returns:
        The names of parameters that got none. vLLM itself only logs them.
    """
    model = worker.model_runner.get_model()
    missing = {name for name, _ in model.named_parameters()}
    load_weights = model.load_weights

    def counted(weights: Iterable[tuple[str, Tensor]]) -> Any:
        loaded = load_weights(weights)
        missing.difference_update(missing if loaded is None else loaded)  # some models do not say what they loaded
        return loaded

    model.load_weights = counted
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    if on_cpu:
        _repack_heads(model)
    return missing


def _repack_heads(model: Any) -> None:
    """Packs the output embedding anew.

    On processors where vLLM's matrix products work on a packed copy, a head that is tied to the input embedding would
    keep the copy it had: it has no weight of its own whose loading would renew it (vLLM 0.30).
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


# -- a process of its own -------------------------------------------------------------------------------------------
#
# Messages are JSON: what one side says is data to the other, and can never be code. The trainer sends the spec, then
# ["load" | "generate", arguments]; the worker answers with any number of ["tick", count] and one ["done", result] or
# ["failed", message]. While it loads, the trainer sends a list of [name, dtype, shape, offset] for each filling of the
# shared buffer, answered by ["tick", 0], and null at the end.

Entry = tuple[str, str, tuple[int, ...], int]


def send(connection: Connection[Any, Any], message: object) -> None:
    """Sends a message; records in it become objects with their fields."""
    connection.send_bytes(json.dumps(message, default=vars).encode())


def receive(connection: Connection[Any, Any]) -> Any:
    """Waits for the other side's next message, in which records and tuples are objects and lists.

    Raises:
        EOFError: the other side is gone.
    """
    return json.loads(connection.recv_bytes())


def view(buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Tensor:
    """The tensor that lies at `offset` bytes in a buffer. [bytes], uint8 -> shape, dtype."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return buffer[offset : offset + size].view(dtype).view(shape)


def shared(descriptor: int, size: int) -> Tensor:
    """The memory behind a file descriptor, as both processes see it. [size], uint8."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def spec_of(fields: dict[str, Any]) -> Spec:
    """The spec that was sent."""
    return Spec(**{**fields, "eos_ids": tuple(fields["eos_ids"])})


def completions_of(groups: list[list[dict[str, Any]]]) -> list[list[Completion]]:
    """The completions that were sent."""
    return [
        [Completion(tuple(c["token_ids"]), tuple(c["log_probs"]), c["truncated"]) for c in group] for group in groups
    ]


def main(connection_fd: str, buffer_fd: str, size: str, folder: str) -> None:
    """The worker's life: build, then serve until the trainer closes the connection or is gone.

    Args:
        folder: of temporary files; a trainer that is gone cannot remove it.
    """
    connection: Connection[Any, Any] = Connection(int(connection_fd))
    buffer, trainer = shared(int(buffer_fd), int(size)), os.getppid()
    try:
        core = Core(spec_of(receive(connection)))
        send(connection, ("done", None))
        while True:
            _serve(core, _next(connection, trainer), connection, buffer)
    except (EOFError, ConnectionError):
        status = 0  # the trainer is done with this worker
        shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:
        traceback.print_exc()
        send(connection, ("failed", f"{type(error).__name__}: {error}"))
        status = 1
    # At once: vLLM holds nothing that the end of its process and of its temporary folder would not free.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _next(connection: Connection[Any, Any], trainer: int) -> Any:
    """The next request. A connection can outlive the trainer in its data loaders, hence the look at the parent."""
    while not connection.poll(HEARTBEAT_S):
        if os.getppid() != trainer:
            raise EOFError
    return receive(connection)


def _serve(core: Core, request: tuple[str, Sequence[Any]], connection: Connection[Any, Any], buffer: Tensor) -> None:
    kind, arguments = request
    if kind == "load":
        core.load(_incoming(connection, buffer))
        send(connection, ("done", None))
    else:
        prompts, group_size, sampling = arguments
        groups = core.generate(prompts, group_size, Sampling(**sampling), _heart(connection))
        send(connection, ("done", groups))


def _incoming(connection: Connection[Any, Any], buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    while True:
        entries: list[Entry] | None = receive(connection)
        if entries is None:
            return
        for name, dtype, shape, offset in entries:
            yield name, view(buffer, getattr(torch, dtype), tuple(shape), offset).clone()
        send(connection, ("tick", 0))


def _heart(connection: Connection[Any, Any]) -> Callable[[int], None]:
    last = time.monotonic()

    def beat(finished: int) -> None:
        nonlocal last
        if finished or time.monotonic() - last > HEARTBEAT_S:
            last = time.monotonic()
            send(connection, ("tick", finished))

    return beat
