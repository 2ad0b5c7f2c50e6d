"""Supervised fine-tuning on the Acquisition Set: a loss of the target tokens, normalised over the global batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import StudentModule, sum_over_processes
from slmreason.modules.by_hand import DatasetTraces, load, room_for_answers
from slmreason.modules.old_policy import OldPolicy
from slmreason.modules.settings import SFTSettings, SupervisedSettings
from slmreason.objectives import supervised_loss
from slmreason.records import Place
from slmreason.student import Student
from slmreason.student.packing import PackedBatch


class SFTModule(StudentModule):
    """Teaches what is not mastered yet."""

    stage = SFTSettings.stage
    settings: SupervisedSettings

    def __init__(self, student: Student, settings: SupervisedSettings | None = None) -> None:
        super().__init__(student, settings or SFTSettings())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.old_policy: OldPolicy | None = None
        """What psft stays near; of one fit."""
        if self.settings.loss == "psft":
            self.old_policy = OldPolicy(self.student, self.settings.psft_steps)

    def enter(self, data: ReasoningDataModule) -> int:
        """The solutions that came with the dataset, those that pass the checks, of what is not mastered."""
        load(data, self.student, room_for_answers(self))
        return data.enter(DatasetTraces(Place(1, self.stage), self.student))

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batch.window != accumulate:
            raise RuntimeError(
                f"the batch was planned for accumulate_grad_batches={batch.window}, the trainer now has {accumulate}"
            )
        if self.old_policy is not None:
            self.old_policy.begin(self.trainer.global_step)
        loss = self.loss_of(batch)
        tokens, computed, total = sum_over_processes(
            self, batch.num_target_tokens, batch.num_tokens, loss * batch.global_target_tokens
        )
        self.student.tokens.trained += int(computed)
        self.watch([batch], total / batch.global_target_tokens)
        self.log(
            f"{self.stage}/loss", total / tokens, prog_bar=True, batch_size=int(tokens), on_step=True, on_epoch=True
        )
        self.log(f"{self.stage}/target_tokens", tokens, reduce_fx="sum", batch_size=1, on_epoch=True, on_step=False)
        # Lightning divides by the accumulated batches, data parallelism averages over ranks: undo both.
        return loss * accumulate * ranks

    def loss_of(self, batch: PackedBatch) -> Tensor:
        """Outside a fit the old policy of psft is the present one."""
        old = self.old_policy.log_probs(batch) if self.old_policy is not None else None
        log_probs = self.student(batch).log_probs
        return supervised_loss(
            log_probs,
            batch.global_target_tokens,
            loss=self.settings.loss,
            old_log_probs=old,
            clip_high=self.settings.psft_clip,
        )

    def optimizer_step(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().optimizer_step(*args, **kwargs)
        self.student.policy_version += not self.step_skipped

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self.old_policy = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.old_policy is not None:
            checkpoint["old_policy"] = self.old_policy.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.old_policy is not None:
            self.old_policy.load_state_dict(checkpoint["old_policy"])
