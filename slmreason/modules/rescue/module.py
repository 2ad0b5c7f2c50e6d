"""The part of the GRPO module that rescues: which option a config names, and what it adds to each step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import share_done
from slmreason.modules.rescue.base import Added, Rescue, SampledStep
from slmreason.modules.rescue.chord import Chord
from slmreason.modules.rescue.gate import SFTGate
from slmreason.modules.rescue.handover import HandoverGroups
from slmreason.modules.rescue.traces import VerifiedTraces
from slmreason.modules.sampling import SamplingModule
from slmreason.modules.settings import GRPOSettings
from slmreason.records import RolloutGroup
from slmreason.rollout.engine import RolloutEngine
from slmreason.student import Student
from slmreason.verify.rewards import RewardFn

log = logging.getLogger(__name__)


class RescuingModule(SamplingModule):
    """Samples the groups of a step, and has those rescued that have no right rollout."""

    def __init__(self, student: Student, engine: RolloutEngine, reward: RewardFn, settings: GRPOSettings) -> None:
        super().__init__(student, engine, reward, settings)
        self.traces = VerifiedTraces(student, reward, settings.max_completion_tokens)
        """What problems are rescued with."""
        self.rescue: Rescue | None = None
        """Of the present fit, where `grpo.rescue` names one."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.rescue = self._make_rescue()
        data = getattr(self.trainer, "datamodule", None)
        if self.rescue is None or not isinstance(data, ReasoningDataModule):
            return
        count = sum(map(self.traces.may_have, data.problems))
        level = logging.INFO if count else logging.WARNING
        log.log(level, "grpo.rescue: %d of %d problems have a trace that they may be rescued with; SFT before, "
                "bridge.traces or a data set with solutions gives them one", count, len(data.problems))  # fmt: skip

    def _make_rescue(self) -> Rescue | None:
        settings = self.settings.rescue
        if settings.kind == "handover":
            size = self.settings.group_size
            return HandoverGroups(self.student, self.traces, self.engine, self.reward, settings, size)
        if settings.kind == "sft_gate":
            return SFTGate(self.student, self.traces, settings.sft_weight)
        if settings.kind == "chord":
            return Chord(self.student, self.traces, settings.mu, settings.mu_end)
        return None

    def rescued(self, groups: Sequence[RolloutGroup], batch_idx: int) -> Added:
        """What is added to a step for the problems that no rollout solved; every process gets the same."""
        if self.rescue is None:
            return Added()
        version, epoch = self.student.policy_version, self.trainer.current_epoch
        sampling = self.settings.sampling("grpo", version, epoch, batch_idx, "rescue")
        share = share_done(self, with_present=False)
        added = self.rescue(SampledStep(groups, sampling, share, self.rollout_watch))
        self.log_dict({f"grpo/rescue/{name}": value for name, value in added.metrics.items()}, batch_size=1)
        return added
