"""Which run `--resume` means, and the command that goes on with it, by the files of run folders alone."""

from __future__ import annotations

import json
import os
import shlex
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from slmreason.cli.command import find
from slmreason.cli.config import command_parser, parse
from slmreason.cli.errors import ConfigError
from slmreason.cli.runs import (
    GoingOn,
    days_to_seconds,
    newest_unfinished,
    program,
    run_folders,
    stand_of,
    with_saved_config,
)

DONE = ["done", "done", "done"]
LATE = "skipped: trainer.max_time is used up"
CONFIG: dict[str, Any] = {
    "run_dir": "runs/x", "grpo": {"kl": 0.0}, "trainer": {"max_time": None},
    "curriculum": {"rounds": 1, "stages": ["sft", "grpo"], "max_tokens": None},
}  # fmt: skip


def begin(folder: Path, outcomes: list[str], student: bool, began: int, config: dict[str, Any] = CONFIG) -> Path:
    """A run folder as a run leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    os.utime(folder / "config.yaml", (began, began))
    stages = [{"stage": f"stage {n}", "outcome": o, "tokens": {"sampled": 9, "trained": 9, "written": 9}}
              for n, o in enumerate(outcomes)]  # fmt: skip
    if outcomes:
        (folder / "summary.json").write_text(json.dumps(stages))
    if student:
        (folder / "student").mkdir()
    return folder


def differing_in_kl() -> dict[str, Any]:
    return {**CONFIG, "grpo": {"kl": 0.1}}


STANDS: dict[str, tuple[list[str], bool, str]] = {
    "begun": ([], False, "unfinished: begun, no stage is done"),
    "after the base": (["done"], False, "unfinished: stage 0 is done"),
    "after a stage": (["done", "done"], False, "unfinished: stage 1 is done"),
    "a stage was skipped": (["done", "skipped: nobody is hard", "done"], True, "finished"),
    "all but the student": (DONE, False, "unfinished: stage 2 is done"),
    "finished": (DONE, True, "finished"),
    "no time for a stage": (["done", "done", LATE], True, "unfinished: stage 1 is done"),
    "no time for anything": (["done", LATE, LATE], True, "unfinished: stage 0 is done"),
    "stopped, gone on with, cut off": (["done", "done"], True, "unfinished: stage 1 is done"),
}


@pytest.mark.parametrize("name", STANDS)
def test_a_run_is_finished_when_every_stage_is_done_and_the_student_saved(tmp_path: Path, name: str) -> None:
    outcomes, student, says = STANDS[name]
    assert stand_of(begin(tmp_path / "x", outcomes, student, 1), CONFIG).says == says


def test_a_run_whose_tokens_are_spent_is_finished_until_it_may_have_more(tmp_path: Path) -> None:
    folder = begin(tmp_path / "x", ["done", "done"], True, 1)
    few, more = ({**CONFIG, "curriculum": {**CONFIG["curriculum"], "max_tokens": most}} for most in (27, 28))
    assert stand_of(folder, few).state == "finished"
    assert stand_of(folder, more).state == "unfinished"


def test_files_that_are_torn_are_no_end_of_the_search(tmp_path: Path) -> None:
    whole = begin(tmp_path / "x", ["done"], False, 1)
    (begin(tmp_path / "x-2", DONE, True, 2) / "summary.json").write_text('[{"stage"')
    (begin(tmp_path / "x-3", DONE, True, 3) / "config.yaml").write_text("a: [")
    (begin(tmp_path / "x-4", DONE, True, 4) / "config.yaml").write_bytes(b"\xff\xfe")
    assert newest_unfinished(tmp_path / "x", CONFIG) == tmp_path / "x-2"
    (tmp_path / "x-2" / "summary.json").write_text("{}")
    assert stand_of(tmp_path / "x-2", CONFIG).state == "unfinished"
    assert stand_of(whole, CONFIG).state == "unfinished"


def test_folders_of_other_names_are_other_runs(tmp_path: Path) -> None:
    for name in ("x", "x-2", "x-10", "x-1", "x-0", "x-02", "x-2-2", "xy", "x-old", "other"):
        begin(tmp_path / name, [], False, 1)
    (tmp_path / "x-3").mkdir()
    assert [path.name for path in run_folders(tmp_path / "x")] == ["x", "x-10", "x-2"]
    assert run_folders(tmp_path / "no" / "such") == []
    begin(tmp_path / "a[b]", [], False, 1)
    assert run_folders(tmp_path / "a[b]") == [tmp_path / "a[b]"]


def test_the_newest_unfinished_run_is_the_one_that_was_begun_last(tmp_path: Path) -> None:
    """A name may be free again: then the run without a number is the newer one."""
    begin(tmp_path / "x", ["done"], False, 5)
    begin(tmp_path / "x-2", ["done"], False, 3)
    begin(tmp_path / "x-3", DONE, True, 7)
    begin(tmp_path / "x-4", ["done"], False, 9, differing_in_kl())
    assert newest_unfinished(tmp_path / "x", CONFIG) == tmp_path / "x"


def test_where_all_are_finished_it_is_the_newest_and_where_there_is_none_a_new_one_begins(tmp_path: Path) -> None:
    assert newest_unfinished(tmp_path / "x", CONFIG) is None
    begin(tmp_path / "x", DONE, True, 1)
    begin(tmp_path / "x-2", DONE, True, 2)
    assert newest_unfinished(tmp_path / "x", CONFIG) == tmp_path / "x-2"


def test_runs_by_other_configs_are_listed_and_refused(tmp_path: Path) -> None:
    begin(tmp_path / "x", ["done"], False, 1, differing_in_kl())
    begin(tmp_path / "x-2", ["done"], False, 2, {**CONFIG, "seed_everything": 7})
    with pytest.raises(ConfigError) as caught:
        newest_unfinished(tmp_path / "x", CONFIG)
    newer, older = str(caught.value).splitlines()[1:3]
    assert newer == f"  {tmp_path}/x-2: by another config, which differs in seed_everything (7 then, None now)"
    assert older == f"  {tmp_path}/x: by another config, which differs in grpo.kl (0.1 then, 0.0 now)"


def test_the_command_has_what_was_changed_since_the_run_began(tmp_path: Path) -> None:
    folder = begin(tmp_path / "it's a run", ["done"], False, 1)
    now = {**CONFIG, "run_dir": "elsewhere", "trainer": {"max_time": "00:01:00:00"},
           "curriculum": {**CONFIG["curriculum"], "checkpoint": {"keep": 3}}}  # fmt: skip
    words = shlex.split(GoingOn(now, folder=folder).command().removeprefix(program()))
    assert words == ["fit", "--resume", str(folder), "--trainer.max_time=00:01:00:00", "--curriculum.checkpoint.keep=3"]
    said = GoingOn(now, timedelta(minutes=90), folder).after("trainer.max_time is used up")
    assert said.count("--trainer.max_time") == 1
    assert "--trainer.max_time=00:03:00:00" in said
    assert str(GoingOn(now)) == "run the same command again"


@pytest.mark.parametrize("name", ["auto", "null", "~x", "-x", "true", "7"])
def test_the_command_names_a_folder_that_is_called_like_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = command_parser(find("fit"))
    Path(name).mkdir()
    parser.save(parse(parser, ["--grpo.kl=0.25"]), f"{name}/config.yaml", skip_none=False)
    command = shlex.split(GoingOn({}, folder=Path(name)).command().removeprefix(program()))
    config = parse(parser, with_saved_config(command[1:]))
    assert Path(config.resume) == Path(name)
    assert config.grpo.kl == 0.25


def test_a_config_that_is_given_is_not_replaced_by_the_saved_one(tmp_path: Path) -> None:
    folder = begin(tmp_path / "x", [], False, 1)
    saved = f"--config={folder / 'config.yaml'}"
    assert with_saved_config(["--resume", str(folder), "--a=1"]) == [saved, "--resume", str(folder), "--a=1"]
    assert with_saved_config([f"--resume={folder}"]) == [saved, f"--resume={folder}"]
    for given in (["--config", "quickstart"], ["--config=quickstart"], ["-c", "quickstart"]):
        assert with_saved_config([*given, f"--resume={folder}"]) == [*given, f"--resume={folder}"]
    assert with_saved_config(["--resume=auto"]) == ["--resume=auto"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "00:00:00:01"), (61, "00:00:01:01"), (3600, "00:01:00:00"), (200000, "02:07:33:20")]
)
def test_a_time_is_written_as_the_trainer_takes_it(seconds: float, text: str) -> None:
    assert days_to_seconds(timedelta(seconds=seconds)) == text
