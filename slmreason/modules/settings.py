"""The settings of a fit, one dataclass for each stage.

The fields are the keys of a config, and the text beneath each is its help.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from slmreason.objectives import AdvantageScale, PolicyLoss
from slmreason.rollout.engine import Sampling, stable_seed

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class FitSettings:
    """What every fit is told, whatever its objective."""

    stage: ClassVar[str]
    """The key of these settings in a config, which their errors name."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    epochs: int
    """Epochs of each fit."""
    _: KW_ONLY
    weight_decay: float = 0.0
    """On matrices only."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up at the start of each fit."""
    decay: Decay = "constant"
    """How the learning rate falls over the fit."""
    max_skipped_steps: int = 3
    """A step whose loss or gradient is not finite is skipped; the run stops, and keeps the batch, when this many in a
    row are."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of its range; the message names the key.
        """
        if self.learning_rate <= 0 or self.epochs < 1 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"{self.stage}: needs learning_rate > 0, epochs >= 1, warmup_steps >= 0 and weight_decay >= 0; got "
                f"{self.learning_rate}, {self.epochs}, {self.warmup_steps}, {self.weight_decay}"
            )
        if self.max_skipped_steps < 1:
            raise ValueError(f"{self.stage}.max_skipped_steps must be at least 1, got {self.max_skipped_steps}")


@dataclass(frozen=True)
class SFTSettings(FitSettings):
    """Teaches what is not mastered yet."""

    stage = "sft"

    learning_rate: float = 1e-5
    epochs: int = 2
    """Epochs of each SFT fit; the set is drawn anew before each."""


@dataclass(frozen=True)
class CFTSettings(FitSettings):
    """Turns groups that carried no gradient into supervision. A fit of its own (arXiv 2501.17703: mixing did worse)."""

    stage = "cft"

    learning_rate: float = 5e-6
    epochs: int = 1
    """Epochs of each CFT fit; problems that a newer rollout solved leave the set between them."""


@dataclass(frozen=True)
class GRPOSettings(FitSettings):
    """Makes reliable what the student can do sometimes."""

    stage = "grpo"

    learning_rate: float = 1e-6
    epochs: int = 1
    """Epochs of each GRPO fit; the set is drawn anew before each."""
    prompts_per_step: int = 16
    """Problems of one optimizer step (times trainer.accumulate_grad_batches), of all processes together."""
    group_size: int = 8
    """Rollouts of each problem; TRL calls it num_generations."""
    max_completion_tokens: int = 512
    """A rollout is cut here."""
    temperature: float = 1.0
    """Of sampling; the policy's logits are divided by it too."""
    top_p: float = 1.0
    """Nucleus of sampling. Log-probs, ratios and the sampler correction are of the whole distribution."""
    loss: PolicyLoss = "grpo"
    """Which policy loss (see `slmreason.objectives.token_weights`); TRL calls it loss_type."""
    advantage_scale: AdvantageScale = "group"
    """`group` divides by the group's standard deviation, `none` does not; TRL: scale_rewards."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low; TRL calls it epsilon."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high; TRL calls it epsilon_high."""
    kl: float = 0.0
    """Weight of the KL penalty to the reference policy; TRL calls it beta. At 0 there is no reference model."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch of rollouts; TRL calls it num_iterations."""
    importance_cap: float = 2.0
    """Cap of the sampler correction, which is on where the rollout engine's log-probs differ from the trainer's: with
    another engine than HFEngine, and in half precision."""
    mask_truncated: bool = True
    """Leave rollouts that hit the token limit out of the loss."""
    _: KW_ONLY
    seed: int = 0
    """Of sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = {
            "prompts_per_step": self.prompts_per_step,
            "max_completion_tokens": self.max_completion_tokens,
            "updates_per_batch": self.updates_per_batch,
            "group_size - 1": self.group_size - 1,
        }
        for key, value in positive.items():
            if value < 1:
                raise ValueError(f"grpo.{key} must be at least 1, got {value}")
        if self.temperature <= 0:
            raise ValueError(f"grpo.temperature must be above 0 (equal rollouts teach nothing), got {self.temperature}")

    def sampling(self, *key: object, with_log_probs: bool = True) -> Sampling:
        """How rollouts are drawn; the key names the place they are drawn at."""
        return Sampling(
            max_new_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=stable_seed(self.seed, *key),
            with_log_probs=with_log_probs,
        )
