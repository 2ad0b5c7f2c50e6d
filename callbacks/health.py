"""A watch over the numbers of a fit: what goes wrong slowly is said once, with the number and what to do about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from slmreason.records import RolloutGroup
from slmreason.run.files import append_records
from slmreason.run.folder import StageFolder
from slmreason.runtime.distributed import is_first

log = logging.getLogger(__name__)

REWARD = "Lower grpo.learning_rate, raise grpo.kl, and see in samples.jsonl what is written now"
ENTROPY = "Rollouts become alike: raise grpo.clip_high or grpo.temperature, or lower grpo.learning_rate"
LENGTH = (
    "Try grpo.loss dr_grpo or dapo, lower grpo.learning_rate, and see in samples.jsonl whether they repeat themselves"
)
TRUNCATED = "Raise grpo.max_completion_tokens, or train the student to end, by SFT, before GRPO"
KL = "Raise grpo.kl or lower grpo.learning_rate"
MISMATCH = (
    "Give the sampler the trainer's precision (rollout.dtype); grpo.importance_cap bounds what the difference does"
)
LOSS = "Lower the stage's learning_rate, give it warmup_steps, or set trainer.gradient_clip_val"
SILENT = {
    "zero": (
        "every rollout failed",
        "The problems are too hard: more SFT first, easier ones in data.train, a larger grpo.group_size or "
        "grpo.max_completion_tokens; if the answers in samples.jsonl look right, check the reward",
    ),
    "one": (
        "every rollout succeeded",
        "The problems are mastered: harder ones in data.train, a smaller data.review_share, a higher grpo.temperature",
    ),
    "mixed": (
        "each failed or succeeded as a whole",
        "Rollouts of a problem are alike: raise grpo.temperature or grpo.group_size",
    ),
}
"""By what the groups were: what that means, and what to do."""


@dataclass(frozen=True)
class Finding:
    """A condition that holds now."""

    condition: str
    number: float
    says: str
    remedy: str


@dataclass
class Trend:
    """The mean of a number over its newest `window` values, and what that mean was at first and at its highest."""

    window: int
    values: list[float] = field(default_factory=list)
    first: float = math.nan
    best: float = math.nan
    mean: float = math.nan
    """NaN, as the others, until there are `window` values: comparisons with it are false."""
    error: float = math.nan
    """Standard error of the mean, and of the best one."""
    best_error: float = math.nan

    def add(self, value: float) -> None:
        """What is not finite is left out."""
        if not math.isfinite(value):
            return
        self.values = [*self.values, value][-self.window :]
        if len(self.values) < self.window:
            return
        self.mean = sum(self.values) / self.window
        self.first = self.mean if math.isnan(self.first) else self.first
        squares = sum((value - self.mean) ** 2 for value in self.values)
        self.error = math.sqrt(squares / self.window / max(1, self.window - 1))
        if not self.mean <= self.best:
            self.best, self.best_error = self.mean, self.error

    @property
    def fallen(self) -> bool:
        """The mean is below its best by more than noise explains.

        Six errors and not two: the best is the luckiest of many means, the error is that of few values, and every batch
        is one more try. A fit of 300 batches whose reward stays the same then warns one time in a hundred.
        """
        return self.best - self.mean > 6 * math.hypot(self.error, self.best_error)


class TrainingHealth(Callback):
    """Warns of collapse, blow-up and steps without signal; each warning is a line of the stage's `health.jsonl` too."""

    def __init__(
        self,
        window: int = 10,
        reward_share: float = 0.5,
        min_entropy: float = 0.01,
        entropy_share: float = 0.2,
        length_factor: float = 2.0,
        max_truncated: float = 0.5,
        steps_without_signal: int = 5,
        max_kl: float = 1.0,
        max_mismatch: float = 0.2,
        loss_factor: float = 1.5,
        repeat_after: int = 200,
    ) -> None:
        """
        Args:
            window: Batches over which a number is averaged before it is compared; a shorter fit is not judged by it.
            reward_share: GRPO: warns when the mean reward falls below this share of its best in the fit.
            min_entropy: GRPO: warns when the mean entropy falls below this many nats a token.
            entropy_share: GRPO: warns when the mean entropy falls below this share of what the fit began with.
            length_factor: GRPO: warns when completions become this many times as long as at the fit's beginning.
            max_truncated: GRPO: warns when more than this share of the completions is cut at the token limit.
            steps_without_signal: GRPO: warns when this many batches in a row have no informative group.
            max_kl: GRPO: warns when the policy is further than this from its reference, in nats a token.
            max_mismatch: GRPO: warns when sampler and trainer differ by more than this, in nats a token.
            loss_factor: SFT and CFT: warns when the mean loss is this many times what the fit began with.
            repeat_after: Batches after which a warning is repeated while its condition lasts.

        Raises:
            ValueError: a number is out of its range; the message names it.
        """
        shares = {"reward_share": reward_share, "entropy_share": entropy_share, "max_truncated": max_truncated}
        counts = {"window": window, "steps_without_signal": steps_without_signal, "repeat_after": repeat_after}
        factors = {"length_factor": length_factor, "loss_factor": loss_factor}
        bounds = {"min_entropy": min_entropy, "max_kl": max_kl, "max_mismatch": max_mismatch}
        for name, value in {**counts, **factors}.items():
            if not value >= 1:  # NaN neither
                raise ValueError(f"TrainingHealth: {name} must be at least 1, got {value}")
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"TrainingHealth: {name} must be within 0 and 1, got {value}")
        for name, value in bounds.items():
            if not value >= 0:
                raise ValueError(f"TrainingHealth: {name} must be at least 0, got {value}")
        self.window, self.reward_share, self.min_entropy = window, reward_share, min_entropy
        self.entropy_share, self.length_factor, self.max_truncated = entropy_share, length_factor, max_truncated
        self.steps_without_signal, self.max_kl, self.max_mismatch = steps_without_signal, max_kl, max_mismatch
        self.loss_factor, self.repeat_after = loss_factor, repeat_after
        self._begin()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._begin()  # a checkpoint is read later

    def _begin(self) -> None:
        self._batches, self._steps = 0, 0
        self._courses: dict[str, Trend] = {}
        self._silent: dict[str, int] = {}
        """How many of the newest batches, none of which had an informative group, had groups of which kind."""
        self._warned: dict[str, int] = {}
        """Batch at which each condition was warned of last."""
        self._lasting: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "steps": self._steps, "silent": self._silent, "warned": self._warned,
                "lasting": self._lasting, "courses": {n: asdict(c) for n, c in self._courses.items()}}  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches, self._steps = state_dict["batches"], state_dict["steps"]
        self._silent, self._warned = dict(state_dict["silent"]), dict(state_dict["warned"])
        self._lasting = list(state_dict["lasting"])
        self._courses = {name: Trend(**course) for name, course in state_dict["courses"].items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        groups = outputs.get("rollout_groups") if isinstance(outputs, dict) else None
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        stepped, self._steps = trainer.global_step > self._steps, trainer.global_step
        if groups:
            # Without an optimizer step the policy's numbers are those of an older batch.
            policy = ("entropy", "kl", "sampler_mismatch") if stepped else ()
            self.look(groups, {name: metrics.get(f"grpo/{name}", math.nan) for name in policy})
        else:
            self._add({"loss": metrics.get(f"{pl_module.stage}/loss_step", math.nan)})
        for finding in self._news():
            if is_first():
                log.warning("%s: %s. %s", pl_module.stage, finding.says, finding.remedy)
            place = {"stage": pl_module.stage, "epoch": trainer.current_epoch, "batch": batch_idx}
            row = {**place, "step": trainer.global_step, **asdict(finding)}
            append_records(StageFolder(Path(trainer.default_root_dir)).health, [row])

    def look(self, groups: Sequence[RolloutGroup], policy: dict[str, float]) -> None:
        """Takes in the rollouts of one batch, and what the policy's update said of them."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        numbers = {
            "reward": sum(rollout.reward for rollout in rollouts) / len(rollouts),
            "length": sum(len(rollout.completion_ids) for rollout in rollouts) / len(rollouts),
            "truncated": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        }
        self._add({**numbers, **policy})
        if any(group.informative for group in groups):
            self._silent = {}
        else:
            kind = "zero" if all(g.all_zero for g in groups) else "one" if all(g.all_one for g in groups) else "mixed"
            self._silent[kind] = self._silent.get(kind, 0) + 1

    def _add(self, numbers: dict[str, float]) -> None:
        self._batches += 1
        for name, value in numbers.items():
            self._courses.setdefault(name, Trend(self.window)).add(value)

    def _news(self) -> list[Finding]:
        """What holds now and is to be said: when it begins, and when it has lasted for long since it was said."""
        found = list(self.findings())
        news = []
        for finding in found:
            since = self._batches - self._warned.get(finding.condition, -self.repeat_after)
            # What comes and goes about its threshold is not news each time.
            began = finding.condition not in self._lasting and since >= self.window
            if began or since >= self.repeat_after:
                self._warned[finding.condition] = self._batches
                news.append(finding)
        self._lasting = [finding.condition for finding in found]
        return news

    def findings(self) -> Iterator[Finding]:
        """The conditions that hold after the newest batch."""
        none, last = Trend(self.window), f"over the last {self.window} batches"
        reward, entropy, length, truncated, kl, mismatch, loss = (
            self._courses.get(name, none)
            for name in ("reward", "entropy", "length", "truncated", "kl", "sampler_mismatch", "loss")
        )
        if reward.best > 0 and reward.mean < self.reward_share * reward.best and reward.fallen:
            says = f"the reward is {reward.mean:.3g} {last}, at its best it was {reward.best:.3g}"
            yield Finding("reward collapse", reward.mean, says, REWARD)
        if entropy.mean < max(self.min_entropy, self.entropy_share * entropy.first):
            says = f"the entropy is {entropy.mean:.3g} nats a token {last}, at first it was {entropy.first:.3g}"
            yield Finding("entropy collapse", entropy.mean, says, ENTROPY)
        if length.mean > self.length_factor * length.first:
            says = f"completions have {length.mean:.4g} tokens {last}, at first they had {length.first:.4g}"
            yield Finding("length blow-up", length.mean, says, LENGTH)
        if truncated.mean > self.max_truncated:
            says = f"{truncated.mean:.0%} of the completions were cut at the token limit {last}"
            yield Finding("truncation", truncated.mean, says, TRUNCATED)
        if (count := sum(self._silent.values())) >= self.steps_without_signal:
            [kind] = self._silent if len(self._silent) == 1 else ["mixed"]
            says = f"no group was informative in {count} batches in a row, {SILENT[kind][0]}"
            yield Finding("no signal", count, says, SILENT[kind][1])
        if kl.mean > self.max_kl:
            says = f"the policy is {kl.mean:.3g} nats a token from its reference {last}"
            yield Finding("far from the reference", kl.mean, says, KL)
        if mismatch.mean > self.max_mismatch:
            says = f"sampler and trainer differ by {mismatch.mean:.3g} nats a token {last}"
            yield Finding("sampler mismatch", mismatch.mean, says, MISMATCH)
        if loss.mean > self.loss_factor * loss.first:
            says = f"the loss is {loss.mean:.3g} {last}, at first it was {loss.first:.3g}"
            yield Finding("loss rises", loss.mean, says, LOSS)
