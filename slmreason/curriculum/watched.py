"""What the fits log, and what of it a callback may watch: a name that nobody logs is refused before anything begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from slmreason.modules.base import StudentModule
from slmreason.modules.grpo import GRPOModule
from slmreason.modules.validation import Tally, Validation

log = logging.getLogger(__name__)
NO_VALIDATION = """\
there is nothing to validate on: set data.holdout or data.validation; benchmarks are run between the stages \
(curriculum.evaluate, evaluation.limit)"""


def _at_every_end(*names: str) -> tuple[str, ...]:
    """The names of what is logged at each step and for the epoch."""
    return tuple(f"{name}{end}" for name in names for end in ("", "_step", "_epoch"))


_COMMON = ("gradient_norm", "skipped_steps")
_SUPERVISED = ("loss", "loss_step", "loss_epoch", "target_tokens", *_COMMON)
_ROLLOUTS = _at_every_end("reward", "informative", "all_zero", "all_one", "truncated", "completion_tokens")
_DRAWS = _at_every_end("sampled_groups", "refilled")
UPDATE = ("loss", "entropy", "clipped", "sampler_mismatch", "masked", "kl", *_COMMON)
"""Of GRPO's optimizer steps; an epoch without an informative group has none."""
METRICS: dict[str, tuple[str, ...]] = {
    "sft": _SUPERVISED,
    "cft": _SUPERVISED,
    "grpo": (*_ROLLOUTS, *_DRAWS, *UPDATE),
}
"""What a stage can log; each is named `sft/loss`. What of it the settings leave out, `Logged.of` knows."""


NOBODY_BELOW = {
    "reward/": "no term of reward has that name",
    "order/": "grpo.max_sampled_groups is null, and grpo.order is random",
    "rescue/": "grpo.rescue.kind is null",
}
"""Beginnings of names, and why nobody logs a name that begins so."""


@dataclass(frozen=True)
class Logged:
    """What the fits of one stage log."""

    names: tuple[str, ...]
    """Without the stage's own."""
    not_now: Mapping[str, str] = field(default_factory=dict)
    """What they would log by other settings, and which settings leave it out."""
    any_below: tuple[str, ...] = ()
    """Beginnings of names that are known in a fit alone."""

    @classmethod
    def of(cls, module: StudentModule) -> Logged:
        """What the fits of a module log."""
        names = METRICS[module.stage]
        if not isinstance(module, GRPOModule):
            return cls(names)
        settings, reward = module.settings, module.reward
        not_now = {}
        if settings.kl == 0:
            not_now["kl"] = "grpo.kl is 0"
        if settings.mask_mismatch is None:
            not_now["masked"] = "grpo.mask_mismatch is null"
        if not settings.draws_at_each_step:
            not_now |= dict.fromkeys(_DRAWS, NOBODY_BELOW["order/"])
        open_names = {"order/": settings.draws_at_each_step, "reward/": reward.may_log_more,
                      "rescue/": settings.rescue.kind is not None}  # fmt: skip
        any_below = tuple(name for name, is_open in open_names.items() if is_open)
        names = (
            *(name for name in names if name not in not_now),
            *_at_every_end(*(f"reward/{t}" for t in reward.terms)),
        )
        return cls(names, not_now, any_below)

    def why_not(self, metric: str) -> str | None:
        """Why a metric is not logged, in words; empty where nothing more is to be said, None where it is or may be."""
        if metric in self.names or metric.startswith(self.any_below):
            return None
        beginning = f"{metric.partition('/')[0]}/"
        return self.not_now.get(metric, NOBODY_BELOW.get(beginning, ""))


def check_watched(
    callback: Callback,
    watched: str,
    logged: Mapping[str, Logged],
    validated: Sequence[str] = (),
    others_log: bool = False,
) -> None:
    """Refuses a callback that watches what is never logged, and says where it is in some of the stages alone.

    Args:
        watched: the metric's name.
        logged: by stage of the run.
        validated: the metrics of a validation; none where there is none.
        others_log: there are callbacks that may log metrics of their own.

    Raises:
        ValueError: nobody logs it; the message names the callback and what there is to watch.
    """
    says = f"trainer.callbacks: {type(callback).__name__} watches {watched}"
    stage, _, metric = watched.partition("/")
    if not logged:
        log.info("%s, and curriculum.stages is empty: there is no fit to watch", says)
        return
    if stage == "val":
        _check_validated(says, watched, validated)
        return
    if stage in METRICS and stage not in logged:
        raise ValueError(f"{says}, and there is no {stage} in curriculum.stages")
    why = logged[stage].why_not(metric) if stage in logged else ""
    if why is not None and not others_log:
        there = {name: logged[name] for name in ([stage] if stage in logged else logged)}
        names = [f"{name}/{each}" for name, mine in there.items() for each in mine.names]
        raise ValueError(f"{says}, which no stage logs{f' ({why})' if why else ''}; there are {', '.join(names)}")
    if why is not None or (stage in logged and metric not in logged[stage].names):
        log.info("%s: whether it is logged is known in the fit alone", says)
    if isinstance(callback, ModelCheckpoint) and stage == "grpo" and metric in UPDATE:
        raise ValueError(f"{says}, which an epoch without an informative group does not have; watch grpo/reward")
    if stage in logged and len(logged) > 1:
        log.info("%s: it is in the %s stages alone", says, stage)


def _check_validated(says: str, watched: str, validated: Sequence[str]) -> None:
    if not validated:
        raise ValueError(f"{says}, which no stage logs: trainer.limit_val_batches is 0, or {NO_VALIDATION}")
    if watched not in validated:
        raise ValueError(f"{says}, which no validation logs; there are {', '.join(validated)}")


def validation_metrics(validation: Validation | None) -> list[str]:
    """What a validation logs; nothing where there is none."""
    return [] if validation is None else list(Tally(problems=1).metrics(validation.settings.samples))
