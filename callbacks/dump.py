"""Every rollout of GRPO in Parquet, for whoever wants to look at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from slmreason.records import RolloutGroup
from slmreason.run.files import write_file
from slmreason.run.folder import StageFolder


class DumpRollouts(Callback):
    """Writes all rollouts of each GRPO batch to a Parquet file of the stage's folder `rollouts/`.

    `datasets.load_dataset("parquet", data_files="runs/NAME/round-*/grpo/rollouts/*.parquet")` reads them. A fit that
    goes on writes the files of the batches that it does again anew.
    """

    def __init__(self, with_tokens: bool = False) -> None:
        """
        Args:
            with_tokens: The tokens of prompt and completion too, and the sampler's log-probs.
        """
        self.with_tokens = with_tokens

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        groups = outputs.get("rollout_groups") if isinstance(outputs, dict) else None
        if not groups:
            return
        import pyarrow as pa  # here: no other fit should wait for it
        import pyarrow.parquet as pq

        epoch = trainer.current_epoch
        table = pa.Table.from_pylist(rollout_rows(groups, epoch, batch_idx, self.with_tokens))
        folder = StageFolder(Path(trainer.default_root_dir)).rollouts
        write_file(
            folder / f"epoch-{epoch + 1}-batch-{batch_idx:06d}.parquet", lambda path: pq.write_table(table, path)
        )


def rollout_rows(
    groups: Sequence[RolloutGroup], epoch: int, batch_idx: int, with_tokens: bool = False
) -> list[dict[str, Any]]:
    """A row for each rollout, in the order of the groups."""
    rows = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            row: dict[str, Any] = {
                "epoch": epoch,
                "batch": batch_idx,
                "group": number,
                "problem_id": group.problem.id,
                "question": group.problem.whole_question,
                "answer": group.problem.answer,
                "completion": rollout.text,
                "completion_tokens": len(rollout.completion_ids),
                "reward": rollout.reward,
                "correct": rollout.correct,
                "truncated": rollout.truncated,
                "policy_version": rollout.policy_version,
                **{f"reward/{name}": score for name, score in rollout.scores.items()},
            }
            if with_tokens:
                row["prompt_ids"] = list(rollout.prompt_ids)
                row["completion_ids"] = list(rollout.completion_ids)
                row["sampler_log_probs"] = list(rollout.sampler_log_probs)
            rows.append(row)
    return rows
