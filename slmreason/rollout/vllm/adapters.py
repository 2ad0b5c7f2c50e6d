"""A student's LoRA adapters as a folder that vLLM reads, and which of them it can read.

Folded into bf16 weights, the adapters of a young run are lost: a weight of 0.02 moves in steps of 0.0001, an update of
0.00003 not at all. Beside the weights they keep their own precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slmreason.rollout.vllm.core import LORA_RANKS
from slmreason.student import Student

NOT_IN_VLLM = ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
               "trainable_token_indices", "target_parameters", "use_bdlora", "kasa_config",
               "velora_config")  # fmt: skip
"""Settings of peft's LoRA that vLLM refuses or, worse, ignores."""


def rank_and_refusal(student: Student) -> tuple[int, str | None]:
    """The adapters' rank, and why vLLM cannot have them beside the weights; None if it may be tried."""
    config = _config(student)
    used = [name for name in NOT_IN_VLLM if getattr(config, name, None)]
    if config.bias != "none":
        used.append(f"bias {config.bias}")
    if used:
        return config.r, f"it does not know {', '.join(used)}"
    if config.r > LORA_RANKS[-1]:
        return config.r, f"the rank {config.r} is above {LORA_RANKS[-1]}"
    return config.r, None


def write_adapters(student: Student, folder: Path) -> None:
    """Writes the adapters in peft's form, float32. Shards are gathered: every process must call it, in step."""
    from peft import get_peft_model_state_dict

    gathered = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in student.trained.state()}
    state = get_peft_model_state_dict(student.network, state_dict=gathered, save_embedding_layers=False)
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    _config(student).save_pretrained(str(folder))


def _config(student: Student) -> Any:
    """peft's settings of the student's adapters."""
    network: Any = student.network
    return network.peft_config[network.active_adapter]
