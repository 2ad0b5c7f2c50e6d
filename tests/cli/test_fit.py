"""`slmreason fit`: what it says of itself and what it makes of its config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmreason.cli import main
from slmreason.cli.errors import ConfigError
from slmreason.cli.fit import refuse_sharding
from slmreason.modules.settings import SFTSettings
from slmreason.modules.sft import SFTModule
from slmreason.student import Student

SMALL = ["--config=quickstart", "--data.train=embedded:chain/train?count=24", "--curriculum.probe.attempts=4",
         "--curriculum.rounds=1", "--trainer.accelerator=cpu"]  # fmt: skip


def test_without_a_teacher_a_run_says_what_it_does_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["fit", *SMALL, "--teacher=null", "--curriculum.evaluate=ends", f"--run_dir={run}",
                 "--benchmarks=[embedded:chain/test?count=4]", "--trainer.enable_progress_bar=false"]) == 0  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "no teacher: SFT has the dataset's own traces" in shown
    assert f" report {run}, or " in shown.rpartition("next: ")[2]
    written = (run / "round-01" / "sft" / "set-epoch-1.jsonl").read_text()
    origins = {json.loads(line)["origin"] for line in written.splitlines()}
    assert origins == {"self"}  # the embedded families bring no traces


def test_what_does_not_go_with_sharded_weights_is_refused_by_its_key(student: Student) -> None:
    plain, chosen = SFTModule(student), SFTModule(student, SFTSettings(optimizer="torch.optim.SGD"))
    refuse_sharding(student, [plain])
    with pytest.raises(ConfigError, match=r"sft\.optimizer: does not go with sharded weights"):
        refuse_sharding(student, [plain, chosen])
    student.base_model.hf_quantizer = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"student\.quantization: does not go with sharded weights"):
        refuse_sharding(student, [plain])
