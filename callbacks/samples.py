"""A look at what the student writes: sampled completions in a file, in the loggers, and a few of them on the screen."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slmreason.records import Rollout, RolloutGroup
from slmreason.run.folder import StageFolder
from slmreason.run.loggers import step_of
from slmreason.runtime.lightning_internals import logging_step
from slmreason.runtime.redact import shown


class SampleCompletions(Callback):
    """Writes completions of every `every_n_steps`-th GRPO batch to `samples.jsonl` of the stage, and shows one.

    They are the table `grpo/samples` too, in every logger that has a place for one.
    """

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
        rows = [
            {
                "epoch": trainer.current_epoch,
                "batch": batch_idx,
                "problem_id": group.problem.id,
                "question": group.problem.whole_question,
                "answer": group.problem.answer,
                "completion": rollout.text,
                "reward": rollout.reward,
                "correct": rollout.correct,
                "truncated": rollout.truncated,
                **{f"reward/{name}": score for name, score in rollout.scores.items()},
                **{f"extra/{name}": value for name, value in rollout.extra.items()},
            }
            for group, rollout in picked
        ]
        path = StageFolder(Path(trainer.default_root_dir)).samples
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        log_table(trainer, "grpo/samples", rows)
        console = live_console(trainer)
        if self.show and console.is_terminal:
            console.print(self.table(picked[:2]))

    def table(self, picked: list[tuple[RolloutGroup, Rollout]]) -> Table:
        """The completions as a table. Model text is shown as plain text: no markup, no control characters."""
        table = Table(title="sampled completions", show_lines=True)
        for column in ("question", "answer", "completion", "reward"):
            table.add_column(column, overflow="fold")
        for group, rollout in picked:
            texts = (group.problem.whole_question, group.problem.answer, rollout.text, f"{rollout.reward:g}")
            table.add_row(*(Text(shown(text[: self.max_chars])) for text in texts))
        return table


def log_table(trainer: L.Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a table in TensorBoard, and in loggers that have a `log_table`, as W&B's. Texts are what may be shown."""
    step = logging_step(trainer)
    columns = list(rows[0])
    cells = [[shown(value) if isinstance(value, str) else value for value in row.values()] for row in rows]
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, cells), step_of(logger, step))
        elif hasattr(logger, "log_table"):
            logger.log_table(name, columns=columns, data=cells, step=step)


def markdown_table(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table whose texts are shown as they are: what Markdown or HTML would take for a mark is written as a number."""

    def line(values: Sequence[object]) -> str:
        return "| " + " | ".join(_MARKS.sub(_as_number, str(value)).replace("\n", "<br>") for value in values) + " |"

    return "\n".join([line(columns), "|---" * len(columns) + "|", *map(line, cells)])


_MARKS = re.compile(r"[&<>\\`*_\[\]!|]")


def _as_number(mark: re.Match[str]) -> str:
    return f"&#{ord(mark[0])};"


def live_console(trainer: L.Trainer) -> Console:
    """The console of the progress bar that is running, so that a table goes above the bar, not through it."""
    bar = trainer.progress_bar_callback
    progress = bar.progress if isinstance(bar, RichProgressBar) else None
    return progress.console if progress is not None else Console()


def best_and_worst(group: RolloutGroup) -> list[Rollout]:
    """The rollouts of highest and lowest reward, one when they are equal."""
    ordered = sorted(group.rollouts, key=lambda rollout: -rollout.reward)
    return [ordered[0], ordered[-1]] if ordered[0].reward != ordered[-1].reward else [ordered[0]]
