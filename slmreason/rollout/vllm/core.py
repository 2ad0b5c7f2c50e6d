"""vLLM itself, within the current process: built once, given weights, asked for completions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from slmreason.rollout.engine import Completion, EngineError, Sampling, prompt_seed
from slmreason.rollout.vllm.options import Spec

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Bounds on the rank of adapters that vLLM can be built with."""
BATCHED_TOKENS = 4096
"""Tokens that vLLM computes in one step on a GPU, at least. TRL has the same; vLLM by itself takes 2048."""


class Core:
    """A vLLM engine within the current process.

    Building it changes the process it is in: environment, random number generators, threads, functions of torch,
    torch.distributed. A process of its own does not mind; the trainer's puts things back (see `in_process`).
    """

    def __init__(self, spec: Spec) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's loop in this process, not in one more
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Else tokens are drawn from nothing, and look like a bad student's. See `_step`.
        os.environ.setdefault("VLLM_RAISE_ON_LOGIT_NANS", "1")
        from vllm.platforms import current_platform

        self._on_cpu = bool(current_platform.is_cpu())
        if self._on_cpu:
            # Else its sampler is compiled in the first call, for longer than small runs take altogether.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        from vllm import EngineArgs, LLMEngine

        self.spec = spec
        self._sleeps = spec.options.sleep and not self._on_cpu
        self._asleep: set[str] = set()
        self._adapters: Any = None
        """vLLM's name for the newest adapters; None where the weights hold all."""
        self._taken = 0
        arguments = self._arguments()
        self._refusal = None if spec.lora_rank is None else _no_adapters(arguments)
        if spec.lora_rank is not None and self._refusal is None:
            rank = next(rank for rank in LORA_RANKS if rank >= spec.lora_rank)
            arguments |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def _arguments(self) -> dict[str, Any]:
        spec, options = self.spec, self.spec.options
        cache = options.cache_gib if options.cache_gib is not None or not self._on_cpu else 1.0
        arguments: dict[str, Any] = {
            "model": spec.model,
            "dtype": spec.dtype,
            "trust_remote_code": options.trust_remote_code,
            # Never from a pickle; a student's weights follow.
            "load_format": "safetensors" if spec.from_disk else "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no sampling defaults besides what we ask for
            "max_model_len": spec.max_model_len,
            "max_num_seqs": options.max_sequences,
            "max_num_batched_tokens": max(BATCHED_TOKENS, spec.max_model_len, options.max_sequences),
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
            "enforce_eager": options.enforce_eager or self._on_cpu,
            "enable_sleep_mode": self._sleeps,
            # Of the whole distribution, before top_p cuts it. The temperature is in the logits by then: see `_at`.
            "logprobs_mode": "raw_logprobs",
            "disable_log_stats": True,
        }
        if self._on_cpu:
            # A prompt processed in pieces rewinds its request's generator, which generators of the CPU cannot do.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(8192, spec.max_model_len)
        return arguments

    # -- weights ----------------------------------------------------------------------------------------------------

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes weights by their names in a transformers checkpoint, tied ones once. Each tensor must live on.

        Adapters that were taken before are dropped.

        Raises:
            EngineError: a parameter of the network got no weight.
        """
        self._wake("weights")
        self._adapters = None
        (missing,) = self._engine.collective_rpc(_reload, args=(weights, self._on_cpu))
        if missing:
            raise EngineError(f"vLLM's {self.spec.model} got no weight for {', '.join(sorted(missing)[:5])}")
        self._forget_cached_prompts()

    def load_adapters(self, folder: str) -> str | None:
        """Takes LoRA adapters in peft's form, in place of those before; the weights beside them stay as they are.

        Returns:
            None, or why vLLM cannot have them: then nothing has changed, and they must be folded into the weights.
        """
        if self._refusal is not None:
            return self._refusal
        from vllm.lora.request import LoRARequest

        self._wake("weights")
        self._taken += 1  # a new number each time: adapters of an old one may be cached
        adapters = LoRARequest(f"adapters-{self._taken}", self._taken, folder)
        try:
            self._engine.add_lora(adapters)
        except Exception as error:  # vLLM has no one class for what it does not support
            return str(error) or f"it takes none of the adapters of {_targets(folder)} ({type(error).__name__})"
        (unplaced,) = self._engine.collective_rpc(_unplaced, args=(self._taken,))
        if unplaced:
            self._engine.remove_lora(self._taken)
            return f"it has no place for the adapters of {', '.join(sorted(unplaced)[:3])}"
        self._adapters = adapters
        self._forget_cached_prompts()
        return None

    def _forget_cached_prompts(self) -> None:
        """What is cached are keys and values of the weights before."""
        if not self._engine.reset_prefix_cache():
            raise EngineError("vLLM still holds cached prompts of the weights before")

    # -- completions ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        sampling: Sampling,
        tick: Callable[[int, int], None],
    ) -> list[list[Completion]]:
        """`group_size` completions of each prompt. Afterwards vLLM sleeps, also where there was no prompt.

        Args:
            tick: called after every step of the engine with the completions that it ended, mostly none, and their
                tokens.

        Raises:
            EngineError: a logit or a log-prob is not a number.
        """
        results: dict[int, list[Completion]] = {}
        copies = group_size if sampling.temperature == 0 else 1
        if prompts:
            self._wake("weights", "kv_cache")
            with self._at(sampling.temperature):
                self._ask(prompts, group_size, sampling)
                while self._engine.has_unfinished_requests():
                    finished = [output for output in self._step() if output.finished]
                    for output in finished:
                        results[int(output.request_id)] = [self._completion(found) for found in output.outputs]
                    ended = [completion for output in finished for completion in results[int(output.request_id)]]
                    tick(copies * len(ended), copies * sum(len(completion.token_ids) for completion in ended))
        self._fall_asleep()
        return [results[index] * copies for index in range(len(prompts))]

    def _ask(self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling) -> None:
        from vllm.inputs import tokens_input

        for index, prompt in enumerate(prompts):
            parameters = self._parameters(prompt, group_size, sampling)
            self._engine.add_request(
                str(index), tokens_input(list(prompt)), parameters, lora_request=self._adapters
            )  # fmt: skip

    def _parameters(self, prompt: Sequence[int], group_size: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1 if greedy else group_size,  # greedy completions of a prompt are all the same, and vLLM wants one
            temperature=0.0 if greedy else 1.0,  # the logits come divided: see `_at`
            top_p=1.0 if greedy else sampling.top_p,
            # vLLM adds the completion's number and needs 63 bits for both.
            seed=(prompt_seed(sampling, prompt) >> 1) + sampling.first,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(self.spec.eos_ids),
            logprobs=0 if sampling.with_log_probs else None,  # 0: of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    @contextmanager
    def _at(self, temperature: float) -> Iterator[None]:
        """Within it the model's logits are divided by the temperature.

        vLLM reports log-probs either of the logits as they leave the model, or of what is left after temperature and
        `top_p`. The trainer's are of the whole distribution at the temperature, which is neither, unless the model
        divides its logits itself.
        """
        if temperature in (0, 1):
            yield
            return
        self._engine.collective_rpc(_divide_logits, args=(temperature,))
        yield
        (calls,) = self._engine.collective_rpc(_undivided)
        if not calls:
            raise EngineError("vLLM sampled without the temperature: it does not call compute_logits of its model")

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except RuntimeError as error:
            if "NaNs detected in logits" in str(error):
                raise self._not_a_number("logits") from error
            raise
        return outputs

    def _completion(self, output: Any) -> Completion:
        tokens, log_probs = tuple(output.token_ids), ()
        if output.logprobs is not None:
            log_probs = tuple(step[token].logprob for token, step in zip(tokens, output.logprobs, strict=True))
            if not all(map(math.isfinite, log_probs)):
                raise self._not_a_number("log-probs")
        return Completion(tokens, log_probs, tokens[-1] not in self.spec.eos_ids)

    def _not_a_number(self, what: str) -> EngineError:
        spec = self.spec
        return EngineError(
            f"{what} of {spec.model} are not numbers (NaN) in vLLM: its weights are not finite, or {spec.dtype} is too "
            f"narrow for it; {spec.options.section}.dtype bfloat16 or float32 is wider than float16"
        )

    # -- memory -----------------------------------------------------------------------------------------------------

    def _wake(self, *tags: str) -> None:
        if wanted := [tag for tag in tags if tag in self._asleep]:
            self._engine.wake_up(wanted)
            self._asleep -= set(wanted)

    def _fall_asleep(self) -> None:
        """Leaves the device's memory to the trainer; weights wait in the host's, since the next sync may be far."""
        everything = {"weights", "kv_cache"}
        if self._sleeps and self._asleep != everything:
            self._engine.sleep(level=1)
            self._asleep = everything

    def close(self) -> None:
        self._engine.engine_core.shutdown()


# -- run by vLLM's own worker, which holds the model ----------------------------------------------------------------


def _no_adapters(arguments: dict[str, Any]) -> str | None:
    """Why vLLM cannot run a model with LoRA adapters beside its weights; None if it can."""
    from vllm import EngineArgs
    from vllm.model_executor.models import ModelRegistry, supports_lora

    config = EngineArgs(**arguments).create_model_config()
    model, name = ModelRegistry.resolve_model_cls(config.architectures, config)
    return None if supports_lora(model) else f"its {name} takes none"


def _reload(worker: Any, weights: Iterable[tuple[str, Tensor]], on_cpu: bool) -> set[str]:
    """Loads weights into a built model, within vLLM's worker.

    Returns:
        The names of parameters that got none. vLLM itself only logs them.
    """
    model = worker.model_runner.get_model()
    missing = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
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


def _targets(folder: str) -> str:
    """The modules that adapters are of, by their config."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    modules = config.get("target_modules")
    return ", ".join(sorted(modules)) if isinstance(modules, list) else str(modules)


def _unplaced(worker: Any, number: int) -> set[str]:
    """Modules whose adapters vLLM has read and would not use: it skips those whose names it does not know."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return set(manager.get_adapter(number).loras) - set(manager.modules)


class _Divided:
    """A model's `compute_logits`, divided by a temperature."""

    def __init__(self, compute_logits: Callable[..., Tensor | None], temperature: float) -> None:
        self._compute_logits, self._temperature = compute_logits, temperature
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        self.calls += 1
        logits = self._compute_logits(*args, **kwargs)
        return None if logits is None else logits.float() / self._temperature


def _divide_logits(worker: Any, temperature: float) -> None:
    model = worker.model_runner.get_model()
    model.compute_logits = _Divided(model.compute_logits, temperature)


def _undivided(worker: Any) -> int:
    """Ends what `_divide_logits` began, and says how often logits were divided."""
    model = worker.model_runner.get_model()
    calls = int(model.compute_logits.calls)
    del model.compute_logits
    return calls
