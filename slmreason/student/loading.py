"""A causal language model and its tokenizer, from a folder or the hub: what their files say is mended or refused here.

What is wrong in a checkpoint's settings would otherwise end a run late, in its first batch or when it is saved.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

log = logging.getLogger(__name__)
EMBEDDED = Path(__file__).parents[1] / "embedded" / "students"
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "seq_length")
"""What configs call the number of positions that a model was made for."""
UNBOUNDED = 1 << 30
X86_BFLOAT16 = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
"""Of `torch.cpu`: whether the processor has the instructions."""


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


def torch_dtype(name: str) -> torch.dtype | Literal["auto"]:
    """The dtype that `student.dtype` names, as transformers takes it."""
    if name == "auto":
        return "auto"
    if name != "fastest":
        found: torch.dtype = getattr(torch, name)
        return found
    multiplies = multiplies_in_bfloat16()
    what = "multiplies in bfloat16" if multiplies else "does not multiply in bfloat16"
    dtype = torch.bfloat16 if multiplies else torch.float32
    log.info("student.dtype fastest: %s, since this machine %s", str(dtype).removeprefix("torch."), what)
    return dtype


def multiplies_in_bfloat16() -> bool:
    """Whether the GPU, or without one the processor, has instructions for products of bfloat16.

    A processor without them computes such products in float32, and converts each time. On x86 they are those of
    AVX512-BF16 or AMX: oneDNN by itself takes AVX512 for enough.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return any(getattr(torch.cpu, name, bool)() for name in X86_BFLOAT16)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load(model: str, trust_remote_code: bool, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model, its tokenizer, and the name of the model whose weights they began with.

    An adapter's folder gives its base model with the adapter folded in.

    Raises:
        ValueError: they cannot be found or loaded, or do not belong together; the message names the model.
    """
    path = resolve_model(model)
    adapter = Path(path) / "adapter_config.json"
    try:
        base = _base_of(adapter) if adapter.is_file() else path
        if base != path and "quantization_config" in options:
            raise ValueError("it is an adapter, which cannot be folded into quantized weights; export it as merged")
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base, trust_remote_code=trust_remote_code, use_safetensors=True, **options
        )
        if base != path:
            network = _fold_in(network, path)
            log.info("student.model: %s is an adapter: folded into the weights of %s", model, base)
        has_tokenizer = base == path or (Path(path) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(path if has_tokenizer else base, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a library does with files that are not what they should be
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"student.model: cannot load {model!r}: {first_line}") from error
    mend_generation(network, valid_pad(network, tokenizer))
    return network, tokenizer, model if base == path else base


def _base_of(adapter: Path) -> str:
    settings = json.loads(adapter.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError("it is an adapter that does not say of which model (base_model_name_or_path)")
    return str(base)


def _fold_in(network: PreTrainedModel, folder: str) -> PreTrainedModel:
    from peft import PeftModel  # slow to import, and most commands do without

    merged: PreTrainedModel = PeftModel.from_pretrained(network, folder).merge_and_unload()  # type: ignore[operator]
    return merged.requires_grad_(True)


def embeddings(network: Any) -> int:
    """Token ids that a model has an embedding for."""
    return int(network.get_input_embeddings().weight.shape[0])


def kind_of(model: PreTrainedModel) -> str:
    """A model's type as messages name it: `qwen2 (Qwen2ForCausalLM)`."""
    return f"{model.config.model_type} ({type(model).__name__})"


def valid_pad(network: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's pad token, or none where the model has no embedding for it."""
    pad = tokenizer.pad_token_id
    if pad is None or 0 <= pad < embeddings(network):
        return pad
    log.warning("student.model: its pad token %d has no embedding (there are %d): the end of a turn fills rows instead",
                pad, embeddings(network))  # fmt: skip
    return None


def check_tokens(network: Any, tokenizer: PreTrainedTokenizerBase, ids: set[int]) -> None:
    """
    Raises:
        ValueError: the model has no embedding for one of these tokens, which every prompt and target needs.
    """
    beyond = sorted(i for i in ids if i >= embeddings(network))
    if beyond:
        raise ValueError(
            f"student.model: its tokenizer's {tokenizer.convert_ids_to_tokens(beyond[0])!r} is token {beyond[0]}, and "
            f"the model has embeddings for {embeddings(network)} tokens: the tokenizer is of another model, or the "
            "embeddings were not resized"
        )


def mend_generation(network: PreTrainedModel, pad: int | None) -> None:
    """Makes the model's generation settings such that transformers will save them.

    Sampling flags beside `do_sample: false`, which it refuses to save, are read as what they ask for.
    """
    generation = getattr(network, "generation_config", None)
    if generation is None:
        return
    if generation.pad_token_id is not None and not 0 <= generation.pad_token_id < embeddings(network):
        generation.pad_token_id = pad
    if not (fault := _fault_of(generation)):
        return
    sampled = copy.deepcopy(generation)
    sampled.do_sample = True
    if not _fault_of(sampled):
        network.generation_config = sampled
        log.info("student.model: its generation_config.json has sampling flags and no do_sample: true, which is added")
        return
    ids = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network.generation_config = GenerationConfig(**ids)
    log.warning("student.model: its generation_config.json cannot be saved again, only its tokens are kept: %s", fault)


def _fault_of(generation: GenerationConfig) -> str:
    try:
        generation.validate(strict=True)
    except ValueError as error:
        return str(error).strip().splitlines()[-1].strip()
    return ""


def max_positions(network: Any) -> int:
    """Positions that a model was made for; `UNBOUNDED` where its config says none."""
    config = network.config.get_text_config()
    found = [getattr(config, name, None) for name in POSITIONS]
    return next((int(number) for number in found if isinstance(number, int) and number > 0), UNBOUNDED)
