"""The settings of a fit, one dataclass for each stage.

The fields are the keys of a config, and the text beneath each is its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, get_args

from slmreason.data.order import Order, OrderName
from slmreason.modules.rescue.settings import RescueSettings, refuse_idle
from slmreason.objectives import AdvantageScale, MismatchMask, PolicyLoss, SupervisedLoss
from slmreason.rollout.engine import Sampling, stable_seed
from slmreason.student.optimizers import ByClass

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class ValidationSettings:
    """How the fits are validated, where there is `data.holdout` or `data.validation`: `val/pass@1` is greedy."""

    samples: int = 1
    """With 2 or more, so many further completions of each problem are drawn: `val/pass@8` is the share of problems
    that one of 8 solves."""
    temperature: float = 1.0
    """Of the further completions."""
    problems_per_batch: int = 64
    """Problems of a validation batch, in which `trainer.limit_val_batches` counts."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of its range; the message names the key.
        """
        if self.samples < 1 or self.problems_per_batch < 1:
            raise ValueError(
                f"validation: samples and problems_per_batch must be at least 1, got {self.samples} and "
                f"{self.problems_per_batch}"
            )
        if not self.temperature > 0:
            raise ValueError(f"validation.temperature must be above 0, got {self.temperature}; val/pass@1 is greedy")


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
    optimizer: dict[str, Any] | str | None = None
    """Class path of an optimizer, or {class_path, init_args}, such as torch.optim.SGD or torch.optim.Muon; AdamW when
    not given. Half-precision weights keep their float32 copies with any. What takes matrices alone gets the matrices
    but the embeddings; the rest goes to AdamW, at the same rate."""
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
        self.by_class()

    def by_class(self) -> ByClass | None:
        """The optimizer that is named, tried; None for AdamW.

        Raises:
            ValueError: it is none, or cannot be used.
        """
        if self.optimizer is None:
            return None
        return ByClass.of(f"{self.stage}.optimizer", self.optimizer, self.weight_decay)

    def refuse_idle(self, idle: Mapping[str, str]) -> None:
        """Refuses values that change nothing.

        Args:
            idle: keys that have no effect beside the others, and why; a key at its default is let pass.

        Raises:
            ValueError: one has another value than its default; the message names it.
        """
        refuse_idle(self, self.stage, idle)


@dataclass(frozen=True)
class SupervisedSettings(FitSettings):
    """What SFT and CFT are told: their targets are given."""

    _: KW_ONLY
    loss: SupervisedLoss = "nll"
    """`nll` is cross entropy; `dft` weighs each token by its probability (TRL: loss_type); `psft` clips a token's
    probability ratio to the student of up to psft_steps steps ago, so that no token is pushed far at once."""
    psft_steps: int = 4
    """psft: optimizer steps before the present student becomes the one that ratios are taken to. That costs a copy of
    what is trained, and a forward pass in all of these steps but the first."""
    psft_clip: float = 0.28
    """psft: a token is not pushed further where its ratio is above 1 + psft_clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss != "psft":
            why = f"with {self.stage}.loss {self.loss}"
            self.refuse_idle({"psft_steps": why, "psft_clip": why})
        if self.psft_steps < 2:
            raise ValueError(f"{self.stage}.psft_steps must be at least 2 (with 1 psft is nll), got {self.psft_steps}")
        if self.psft_clip <= 0:
            raise ValueError(f"{self.stage}.psft_clip must be above 0, got {self.psft_clip}")


@dataclass(frozen=True)
class SFTSettings(SupervisedSettings):
    """Teaches what is not mastered yet."""

    stage = "sft"

    learning_rate: float = 1e-5
    epochs: int = 2
    """Epochs of each SFT fit; the set is drawn anew before each."""


@dataclass(frozen=True)
class CFTSettings(SupervisedSettings):
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
    """Which policy loss (see `slmreason.objectives.policy_loss`); TRL calls it loss_type. `grpo`, `dr_grpo` and `dapo`
    clip each token's ratio, `gspo` the rollout's, `gmpo` each token's before their geometric mean; `cispo` caps the
    ratio and keeps the gradient, `sapo` dampens it smoothly."""
    advantage_scale: AdvantageScale = "group"
    """What the difference of a reward from its group's mean is divided by: `group` the group's standard deviation,
    `none` nothing, `batch` the standard deviation of all rewards of the step, `maxrl` the group's mean (for rewards of
    0 and 1: the rarer a right answer, the more it weighs); with `rloo` the mean is that of the other rollouts. TRL:
    scale_rewards."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low (gmpo: at exp(-clip_low), for which its paper has 0.4); TRL calls it
    epsilon."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high (gmpo: at exp(clip_high), for which its paper has 0.4); TRL calls it
    epsilon_high."""
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
    cispo_cap: float = 5.0
    """cispo: the ratio that weighs a token is at most this; TRL calls it epsilon_high."""
    sapo_temperature_pos: float = 1.0
    """sapo: how fast the gradient fades as the ratio leaves 1, where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """sapo: the same where it is not."""
    entropy_bonus: float = 0.0
    """Weight of the mean entropy of a token in what is maximised; TRL calls it entropy_coef. Its gradient is estimated
    from the tokens drawn."""
    mask_mismatch: MismatchMask | None = None
    """In place of importance_cap: leave out tokens (`token`) or whole rollouts (`sequence`) where the trainer's
    probability is more than mask_mismatch_above times the sampler's; the others weigh that ratio. TRL:
    vllm_importance_sampling_mode `token_mask`, `sequence_mask`."""
    mask_mismatch_above: float = 3.0
    """The largest ratio that mask_mismatch keeps, of a token or of a rollout (the product of its tokens')."""
    overlong_cache: int | None = None
    """Tokens before max_completion_tokens over which the reward falls linearly by 1 in all. Advantages alone are made
    of that reward; what is right, and which groups are trained on, stays the verifier's."""
    order: OrderName | Order = "random"
    """Which problems of the set are drawn next: `random` shuffles it once an epoch, `file` keeps the pool's order,
    `informative` takes those whose groups will probably have right and wrong rollouts, `easy_first` those most often
    solved; or a class of your own."""
    cooldown: int | None = None
    """Optimizer steps for which a problem that was drawn is not drawn again; with null an epoch draws each once at
    most. For informative, easy_first and classes of your own."""
    max_sampled_groups: int | None = None
    """Groups without a difference in reward are replaced within the step by the next draws, until prompts_per_step
    groups have one or this many were sampled (both times trainer.accumulate_grad_batches). Null replaces none."""
    rescue: RescueSettings = RescueSettings()
    """What a step does for problems that no rollout solved."""

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
        self._check_loss()
        self._check_rewards()
        self._check_draws()
        if self.rescue.kind == "handover" and self.rescue.samples > self.group_size:
            raise ValueError(
                f"grpo.rescue.samples must be at most grpo.group_size ({self.group_size}), got {self.rescue.samples}"
            )

    def _check_loss(self) -> None:
        above_zero = ("cispo_cap", "sapo_temperature_pos", "sapo_temperature_neg", "mask_mismatch_above")
        for key in above_zero:
            if getattr(self, key) <= 0:
                raise ValueError(f"grpo.{key} must be above 0, got {getattr(self, key)}")
        if self.entropy_bonus < 0:
            raise ValueError(f"grpo.entropy_bonus must be at least 0, got {self.entropy_bonus}")
        if self.entropy_bonus > 0 and self.top_p < 1:
            raise ValueError(
                f"grpo.entropy_bonus: {self.entropy_bonus} needs grpo.top_p of 1, got {self.top_p}: its gradient is "
                "estimated from tokens of the whole distribution"
            )
        owners = {
            "clip_low": ("grpo", "dr_grpo", "dapo", "gspo", "gmpo"),
            "clip_high": ("grpo", "dr_grpo", "dapo", "gspo", "gmpo"),
            "cispo_cap": ("cispo",),
            "sapo_temperature_pos": ("sapo",),
            "sapo_temperature_neg": ("sapo",),
        }
        idle = {key: f"with grpo.loss {self.loss}" for key, losses in owners.items() if self.loss not in losses}
        if self.mask_mismatch is None:
            idle["mask_mismatch_above"] = "without grpo.mask_mismatch"
        else:
            idle["importance_cap"] = "with grpo.mask_mismatch, whose bound is grpo.mask_mismatch_above"
        self.refuse_idle(idle)

    def _check_rewards(self) -> None:
        cache, limit = self.overlong_cache, self.max_completion_tokens
        if cache is None:
            return
        if not 1 <= cache <= limit:
            raise ValueError(f"grpo.overlong_cache must be from 1 to grpo.max_completion_tokens ({limit}), got {cache}")
        if self.advantage_scale == "maxrl":
            raise ValueError(
                f"grpo.overlong_cache: {cache} makes rewards negative, and grpo.advantage_scale maxrl divides by their "
                "mean; choose another scale"
            )

    def _check_draws(self) -> None:
        if isinstance(self.order, str) and self.order not in get_args(OrderName):
            names = ", ".join(get_args(OrderName))
            raise ValueError(f"grpo.order must be one of {names} or a class, got {self.order!r}")
        if self.cooldown is not None and self.cooldown < 0:
            raise ValueError(f"grpo.cooldown must be at least 0, got {self.cooldown}")
        if self.order in ("file", "random"):
            self.refuse_idle({"cooldown": f"with grpo.order {self.order}, which draws each problem once an epoch"})
        if self.max_sampled_groups is not None and self.max_sampled_groups <= self.prompts_per_step:
            raise ValueError(
                f"grpo.max_sampled_groups must be above grpo.prompts_per_step ({self.prompts_per_step}), "
                f"got {self.max_sampled_groups}"
            )

    @property
    def draws_at_each_step(self) -> bool:
        """Whether a step draws its problems when it begins; otherwise an epoch is shuffled and cut beforehand."""
        return self.order != "random" or self.max_sampled_groups is not None

    def sampling(self, *key: object, with_log_probs: bool = True) -> Sampling:
        """How rollouts are drawn; the key names the place they are drawn at."""
        return Sampling(
            max_new_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=stable_seed(self.seed, *key),
            with_log_probs=with_log_probs,
        )
