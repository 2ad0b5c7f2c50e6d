"""`slmreason.fit`: the command from Python, which leaves the process as it found it."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import slmreason
from slmreason.cli import main
from slmreason.cli.config import build_parser, parse
from slmreason.cli.errors import ConfigError
from slmreason.cli.python import Sections, as_arguments
from slmreason.curriculum import Curriculum
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora

TINY: dict[str, Any] = {
    "data": {"train": "embedded:chain/train?count=12"},
    "curriculum": {"rounds": 1, "stages": ["sft"], "evaluate": "ends", "probe": {"attempts": 2, "epoch_share": 0}},
    "sft": {"epochs": 1},
    "benchmarks": ["embedded:chain/test?count=4"],
    "evaluation": {"max_new_tokens": 40},
    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> slmreason.FitResult:
    return slmreason.fit(["quickstart", TINY], run_dir=tmp_path_factory.mktemp("runs") / "run")


def test_it_gives_the_trained_student_and_where_its_run_lies(result: slmreason.FitResult) -> None:
    saved = slmreason.Student(str(result.folder / "student"), instruction="")
    for trained, kept in zip(result.student.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(trained, kept)
    assert not result.student.training
    assert [report.place.label for report in result.reports] == ["base", "round 1 sft"]


def test_the_table_is_that_of_the_command_and_has_records(result: slmreason.FitResult) -> None:
    summary = json.loads((result.folder / "summary.json").read_text())
    assert [record["stage"] for record in result.table.records] == ["base", "round 1 sft"]
    assert [record["value"] for record in result.table.records] == [stage["scores"][0]["value"] for stage in summary]
    drawn = str(result.table)
    assert "greedy pass@1" in drawn
    assert "round 1 sft" in drawn


def test_it_runs_again_in_the_same_process_and_within_an_event_loop(result: slmreason.FitResult) -> None:
    async def cell() -> slmreason.FitResult:
        return slmreason.fit("quickstart", **TINY, run_dir=result.folder)

    again = asyncio.run(cell())
    assert again.folder == result.folder.with_name("run-2")
    assert again.table.records == result.table.records


def test_it_runs_in_another_thread_than_the_main_one(result: slmreason.FitResult, tmp_path: Path) -> None:
    async def cell() -> slmreason.FitResult:
        return await asyncio.to_thread(slmreason.fit, "quickstart", **TINY, run_dir=tmp_path / "run")

    assert asyncio.run(cell()).table.records == result.table.records


def test_a_finished_run_is_gone_on_with_by_its_folder(result: slmreason.FitResult) -> None:
    again = slmreason.fit(resume=result.folder)
    assert again.folder == result.folder
    assert again.table.records == result.table.records


def state_of_the_process() -> list[Any]:
    loggers = [logging.getLogger(name) for name in ("slmreason", "lightning.pytorch", "transformers")]
    kept = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return [kept, handlers, warnings.filters[:]]


def test_it_leaves_signals_logging_and_warnings_as_it_found_them(tmp_path: Path) -> None:
    before = state_of_the_process()
    slmreason.fit("quickstart", **TINY, run_dir=tmp_path / "run")
    assert state_of_the_process() == before
    with pytest.raises(ValueError, match="quickstart"):
        slmreason.fit("no-such-recipe")
    assert state_of_the_process() == before


@pytest.mark.parametrize(
    ("section", "value", "flag"),
    [
        ("grpo", {"group_sze": 4}, "--grpo.group_sze=4"),
        ("grpo", {"loss": "ppo"}, "--grpo.loss=ppo"),
        ("data", {"train": "embedded:nothing/train"}, "--data.train=embedded:nothing/train"),
        ("teachr", "ProceduralTeacher", "--teachr=ProceduralTeacher"),
    ],
)
def test_a_mistake_is_a_value_error_in_the_words_of_the_command_line(
    section: str, value: Any, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared below
        slmreason.fit("quickstart", run_dir=tmp_path / "run", **{section: value})  # type: ignore[arg-type]
    assert main(["fit", "--config=quickstart", f"--run_dir={tmp_path / 'run'}", flag]) == 2
    assert f"error: {caught.value}\n" == capsys.readouterr().err


def test_what_cannot_be_written_into_a_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout: a config is saved with the run, and HFEngine cannot"):
        slmreason.fit("quickstart", rollout=HFEngine())  # type: ignore[typeddict-item]


def test_a_run_that_fails_says_how_to_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Curriculum) -> None:
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(Curriculum, "run", dies)
    with pytest.raises(RuntimeError, match="cosmic ray") as caught:
        slmreason.fit("quickstart", **TINY, run_dir=tmp_path / "run")
    assert f"fit --resume {tmp_path / 'run'}" in caught.value.__notes__[0]


def test_a_key_that_lightning_caught_is_a_keyboard_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Curriculum) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as Trainer.fit does

    monkeypatch.setattr(Curriculum, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="what has been done is kept, go on with: "):
        slmreason.fit("quickstart", **TINY, run_dir=tmp_path / "run")


def test_sections_are_flags() -> None:
    assert as_arguments({"student": {"lora": Lora(r=4)}, "teacher": None})[:1] == ["--student.lora.r=4"]
    given = {"class_path": "HFEngine", "init_args": {"max_sequences": 8}}
    assert as_arguments({"rollout": given}) == ["--rollout=HFEngine", "--rollout.init_args.max_sequences=8"]
    assert as_arguments({"trainer": {"logger": False, "callbacks": []}, "teacher": None}) == [
        "--trainer.logger=false", "--trainer.callbacks=[]", "--teacher=null"
    ]  # fmt: skip
    assert as_arguments("quickstart") == ["--config=quickstart"]


def test_what_is_handed_on_whole_is_one_flag() -> None:
    given = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    arguments = as_arguments(
        {"sft": {"optimizer": given}, "student": {"lora": Lora(options={"rank_pattern": {"q": 2}})}}
    )
    config = parse(build_parser("fit", "x"), ["--config", "quickstart", *arguments])
    assert config.sft.optimizer == given
    assert config.student.lora.options == {"rank_pattern": {"q": 2}}


def test_the_typed_sections_are_those_of_the_config() -> None:
    config = build_parser("fit", "").get_defaults()
    assert set(Sections.__annotations__) == {key.partition(".")[0] for key in config.keys()} - {"config"}  # noqa: SIM118


def test_importing_slmreason_imports_nothing_heavy() -> None:
    code = "import sys, slmreason; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
