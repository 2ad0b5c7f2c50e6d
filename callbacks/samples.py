"""A look at what the student writes: sampled completions in a file, and a few of them on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slmreason.records import Rollout, RolloutGroup
from slmreason.redact import shown


class SampleCompletions(Callback):
    """Writes completions of every `every_n_steps`-th GRPO batch to `samples.jsonl` of the stage, and shows one."""

    def __init__(self, every_n_steps: int = 10, per_batch: int = 4, show: bool = True, max_chars: int = 300) -> None:
        """
        Args:
            every_n_steps: Batches between two looks.
            per_batch: Completions written at each look: the best and the worst of as many groups.
            show: Print the first of them too.
            max_chars: Longer texts are cut on the screen; the file has them whole.
        """
        if every_n_steps < 1 or per_batch < 1:
            raise ValueError("SampleCompletions: every_n_steps and per_batch must be at least 1")
        self.every_n_steps, self.per_batch = every_n_steps, per_batch
        self.show, self.max_chars = show, max_chars

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        groups = outputs.get("rollout_groups") if isinstance(outputs, dict) else None
        if not groups or batch_idx % self.every_n_steps:
            return
        picked = [(group, rollout) for group in groups for rollout in best_and_worst(group)][: self.per_batch]
        path = Path(trainer.default_root_dir) / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            for group, rollout in picked:
                row = {
                    "epoch": trainer.current_epoch,
                    "batch": batch_idx,
                    "problem_id": group.problem.id,
                    "question": group.problem.question,
                    "answer": group.problem.answer,
                    "completion": rollout.text,
                    "reward": rollout.reward,
                    "correct": rollout.correct,
                    "truncated": rollout.truncated,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        console = live_console(trainer)
        if self.show and console.is_terminal:
            console.print(self.table(picked[:2]))

    def table(self, picked: list[tuple[RolloutGroup, Rollout]]) -> Table:
        """The completions as a table. Model text is shown as plain text: no markup, no control characters."""
        table = Table(title="sampled completions", show_lines=True)
        for column in ("question", "answer", "completion", "reward"):
            table.add_column(column, overflow="fold")
        for group, rollout in picked:
            texts = (group.problem.question, group.problem.answer, rollout.text, f"{rollout.reward:g}")
            table.add_row(*(Text(shown(text[: self.max_chars])) for text in texts))
        return table


def live_console(trainer: L.Trainer) -> Console:
    """The console of the progress bar that is running, so that a table goes above the bar, not through it."""
    bar = trainer.progress_bar_callback
    progress = bar.progress if isinstance(bar, RichProgressBar) else None
    return progress.console if progress is not None else Console()


def best_and_worst(group: RolloutGroup) -> list[Rollout]:
    """The rollouts of highest and lowest reward, one when they are equal."""
    ordered = sorted(group.rollouts, key=lambda rollout: -rollout.reward)
    return [ordered[0], ordered[-1]] if ordered[0].reward != ordered[-1].reward else [ordered[0]]
