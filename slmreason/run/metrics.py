"""metrics.csv: Lightning's CSV logger, which goes on with a file that is there rather than deleting it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from slmreason.run.files import write_text
from slmreason.runtime.lightning_internals import AnyWriterCSVLogger, OpenCSVWriter


class StageCSVLogger(AnyWriterCSVLogger):
    """Writes `metrics.csv` into a stage's folder."""

    def __init__(self, stage_dir: Path) -> None:
        super().__init__(str(stage_dir), name="", version="", flush_logs_every_n_steps=20)

    def new_writer(self) -> _Writer:
        return _Writer(log_dir=self.log_dir)


def continued_writer(folder: str, step: int | None = None) -> OpenCSVWriter:
    """What goes on with the `metrics.csv` of a folder, for a logger of the user's.

    Args:
        step: rows from there on are cut off; None keeps all.
    """
    writer = _Writer(log_dir=folder)
    if step is not None and Path(writer.metrics_file_path).is_file():
        writer.rewrite(writer.metrics_keys, before=step)
    return writer


class _Writer(OpenCSVWriter):
    def find_file(self) -> None:
        """Takes the columns of a file that is there."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def rewrite(self, fieldnames: list[str], before: int | None = None) -> None:
        """As Lightning's, but whole or not at all.

        Args:
            before: a step; rows from there on are left out.
        """
        path = Path(self.metrics_file_path)
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if before is None or int(row["step"]) < before]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
