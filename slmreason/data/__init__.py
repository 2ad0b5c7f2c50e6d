"""Problems, their difficulty, and the sets that stages train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slmreason.runtime.face import lazily

if TYPE_CHECKING:
    from slmreason.data.columns import Columns
    from slmreason.data.datamodule import ReasoningDataModule
    from slmreason.data.ledger import Ledger
    from slmreason.data.sources import load_problems

__all__ = [
    "Columns",
    "Ledger",
    "ReasoningDataModule",
    "load_problems",
]

__getattr__ = lazily(
    __name__,
    {
        "Columns": "columns",
        "Ledger": "ledger",
        "ReasoningDataModule": "datamodule",
        "load_problems": "sources",
    },
)
