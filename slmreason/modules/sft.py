"""Supervised fine-tuning on the Acquisition Set: cross entropy on target tokens, normalised over the global batch."""

from __future__ import annotations

from torch import Tensor

from slmreason.data.datamodule import ReasoningDataModule
from slmreason.modules.base import StudentModule, sum_over_processes
from slmreason.modules.by_hand import DatasetTraces, load
from slmreason.modules.settings import CFTSettings, SFTSettings
from slmreason.objectives import cross_entropy
from slmreason.records import Place
from slmreason.student import Student
from slmreason.student.packing import PackedBatch


class SFTModule(StudentModule):
    """Teaches what is not mastered yet."""

    stage = SFTSettings.stage

    def __init__(self, student: Student, settings: SFTSettings | CFTSettings | None = None) -> None:
        super().__init__(student, settings or SFTSettings())

    def enter(self, data: ReasoningDataModule) -> int:
        """The solutions that came with the dataset, those that pass the checks, of what is not mastered."""
        load(data, self.student)
        return data.enter(DatasetTraces(Place(1, self.stage), self.student))

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        accumulate, ranks = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if batch.window != accumulate:
            raise RuntimeError(
                f"the batch was planned for accumulate_grad_batches={batch.window}, the trainer now has {accumulate}"
            )
        loss = self.loss_of(batch)
        tokens, computed, nll = sum_over_processes(
            self, batch.num_target_tokens, batch.num_tokens, loss * batch.global_target_tokens
        )
        self.student.tokens.trained += int(computed)
        self.watch([batch], nll / batch.global_target_tokens)
        self.log(f"{self.stage}/loss", nll / tokens, prog_bar=True, batch_size=int(tokens), on_step=True, on_epoch=True)
        self.log(f"{self.stage}/target_tokens", tokens, reduce_fx="sum", batch_size=1, on_epoch=True, on_step=False)
        # Lightning divides by the accumulated batches, data parallelism averages over ranks: undo both.
        return loss * accumulate * ranks

    def loss_of(self, batch: PackedBatch) -> Tensor:
        return cross_entropy(self.student(batch).log_probs, batch.global_target_tokens)

    def optimizer_step(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super().optimizer_step(*args, **kwargs)
        self.student.policy_version += not self.step_skipped
