"""The conditions of the check of a model, and its shortcuts."""

from __future__ import annotations

from pathlib import Path

import torch

from slmreason.records import Example
from slmreason.rollout.decoding import decoding_of
from slmreason.student import Student, selfcheck
from slmreason.student.bundles import Bundle
from slmreason.student.packing import collate_bundles
from tests.causal_types import make_model


def test_windows_are_short_during_the_check_and_as_long_as_before_after_it(tmp_path: Path) -> None:
    student = Student(str(make_model(tmp_path, "mistral")), instruction="")
    windows = [student.network.config.sliding_window]
    with selfcheck.short_windows(student.base_model):
        windows.append(student.network.config.sliding_window)
    assert [*windows, student.network.config.sliding_window] == [24, selfcheck.SHORT_WINDOW, 24]
    assert not student.shares_prompts  # our mask knows no window
    assert decoding_of(student).by == "steps"


def test_sequences_in_rows_of_their_own_are_those_that_were_packed() -> None:
    examples = [Example((1, 2, 3), (4, 5), "", ""), Example((1, 2, 3), (6,), "", ""), Example((7,), (8, 9, 10), "", "")]
    bundles = [Bundle((examples[0], examples[1])), Bundle((examples[2],))]
    batch = collate_bundles(bundles, 0, hidden_size=4096)
    apart = batch.one_a_row()
    rows = [examples[i] for i in batch.order]
    assert apart.input_ids.shape == (3, max(map(len, rows)))
    for row, example in zip(apart.input_ids.tolist(), rows, strict=True):
        assert tuple(row[: len(example)]) == (*example.prompt_ids, *example.target_ids)
    assert torch.equal(apart.target_ids, batch.target_ids)
    flat = apart.input_ids.flatten()
    wanted = [token for e in rows for token in (*e.prompt_ids, *e.target_ids)[len(e.prompt_ids) - 1 : -1]]
    assert flat[apart.context_index].tolist() == wanted
    assert apart.blocks is None
