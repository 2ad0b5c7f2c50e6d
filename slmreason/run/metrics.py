"""metrics.csv of a stage: Lightning's CSV logger, which goes on with a file that is there rather than deleting it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from slmreason.run.files import write_text


class StageCSVLogger(CSVLogger):
    """Writes `metrics.csv` into a stage's folder."""

    def __init__(self, stage_dir: Path) -> None:
        super().__init__(str(stage_dir), name="", version="", flush_logs_every_n_steps=20)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = _Writer(log_dir=self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Takes the columns of a file that is there; Lightning's own warns and deletes it."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """As Lightning's, but whole or not at all."""
        path = Path(self.metrics_file_path)
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
