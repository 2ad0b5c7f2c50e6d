"""What the loggers of a run hold, and what a run prints where no terminal is."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto.wandb_internal_pb2 import Record

from slmreason.callbacks import SampleCompletions
from slmreason.callbacks.samples import log_table, markdown_table
from slmreason.cli import config, main
from slmreason.curriculum.trainer import loggers_of
from slmreason.records import Problem, Rollout, RolloutGroup
from tests.runs import ROOT, Run, command

TINY = [
    "--config=quickstart", "--data.train=embedded:chain/train?count=16", "--data.batch_size=4", "--curriculum.rounds=1",
    "--curriculum.probe.attempts=2", "--curriculum.probe.epoch_share=0", "--sft.epochs=1", "--grpo.epochs=1",
    "--grpo.group_size=4", "--benchmarks=[embedded:chain/test?count=4]", "--trainer.accelerator=cpu",
]  # fmt: skip
STAGES = [f"round-{number:02d}/{stage}" for number in (1, 2) for stage in ("sft", "grpo", "cft")]
SECRETS = {"OPENAI_API_KEY": "How many", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
"""The first stands in every question, as it would if a model or a data set spelled a key."""
Points = dict[tuple[str, int], float]
"""The value of each metric at each step."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two rounds with three loggers, all given by flags. Keys are in the environment."""
    folder = tmp_path_factory.mktemp("loggers")
    loggers = "--trainer.logger+=lightning.pytorch.loggers."
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(folder / "home"))
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        done = command(
            "fit", *TINY, "--run_dir=run", "--curriculum.rounds=2",
            f"{loggers}TensorBoardLogger", "--trainer.logger.save_dir=logs/tensorboard",
            f"{loggers}CSVLogger", "--trainer.logger.save_dir=logs/csv", "--trainer.logger.version=mine",
            f"{loggers}WandbLogger", "--trainer.logger.save_dir=logs/wandb", "--trainer.logger.offline=true",
            cwd=folder,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return Run(folder, done.stdout)


def csv_points(file: Path) -> Points:
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    return {(n, int(row["step"])): float(v) for row in rows for n, v in row.items() if n != "step" and v}


def events(run: Run, stage: str) -> EventAccumulator:
    [folder] = (run.folder / "logs/tensorboard/lightning_logs/run" / stage).iterdir()
    return EventAccumulator(str(folder)).Reload()


def wandb_records(file: Path) -> Iterator[Record]:
    """What an offline run keeps: LevelDB's log format, after a header of 7 bytes."""
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # a record's header does not go over a block's end
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def wandb_runs(run: Run) -> dict[str, Path]:
    """The file of each run of W&B, by the name that W&B shows."""
    files = (run.folder / "logs/wandb").glob("wandb/offline-run-*/run-*.wandb")
    return {r.run.display_name: file for file in files for r in wandb_records(file) if r.HasField("run")}


def wandb_points(file: Path) -> Points:
    points: Points = {}
    for record in wandb_records(file):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if not name.startswith(("_", "grpo/samples", "trainer/global_step")):
                points[name, row["trainer/global_step"]] = float(value)
    return points


@pytest.mark.parametrize("stage", STAGES)
def test_every_logger_has_the_same_metrics_at_the_same_steps_of_each_stage(run: Run, stage: str) -> None:
    points = csv_points(run.folder / "run" / stage / "metrics.csv")
    assert {name.partition("/")[0] for name, _ in points} == {stage.partition("/")[2], "epoch"}
    assert min(step for _, step in points) == 0
    same = pytest.approx(points, nan_ok=True)
    assert csv_points(run.folder / "logs/csv/lightning_logs/run" / stage / "mine/metrics.csv") == same
    held = events(run, stage)
    assert {(n, e.step): e.value for n in held.Tags()["scalars"] for e in held.Scalars(n)} == same
    assert wandb_points(wandb_runs(run)[f"run/{stage}"]) == same


def test_wandb_has_a_run_for_each_stage_in_one_group(run: Run) -> None:
    files = wandb_runs(run)
    assert sorted(files) == sorted(f"run/{stage}" for stage in STAGES)
    for file in files.values():
        kept = list(wandb_records(file))
        assert {record.run.run_group for record in kept if record.HasField("run")} == {"run"}
        assert any(record.HasField("exit") for record in kept)  # each is ended, the last one too


def test_wandb_and_tensorboard_have_the_config_of_the_run(run: Run) -> None:
    saved = yaml.safe_load((run.folder / "run/config.yaml").read_text())
    [folder] = (run.folder / "logs/tensorboard/lightning_logs/run/round-01/sft").iterdir()
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["grpo"] == saved["grpo"]
    records = wandb_records(wandb_runs(run)["run/round-01/sft"])
    told = {item.key: item.value_json for record in records for item in record.config.update}
    assert json.loads(told["sft"]) == saved["sft"]


@pytest.mark.parametrize("number", [1, 2])
def test_wandb_and_tensorboard_hold_a_table_of_completions(run: Run, number: int) -> None:
    stage = f"round-{number:02d}/grpo"
    first = run.rows(f"run/{stage}/samples.jsonl")[0]
    shown = {**first, "question": first["question"].replace("How many", "[OPENAI_API_KEY]")}
    folder = wandb_runs(run)[f"run/{stage}"].parent
    table = json.loads(next((folder / "files/media/table/grpo").glob("samples_*.table.json")).read_text())
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == shown
    [tensor, *_] = events(run, stage).Tensors("grpo/samples/text_summary")
    texts = cells(tensor.tensor_proto.string_val[0])
    assert texts[:9] == list(shown)
    assert texts[9:18] == [str(value) for value in shown.values()]


def test_no_secret_reaches_a_logger(run: Run) -> None:
    files = [path for path in (run.folder / "logs").rglob("*") if path.is_file()]
    assert {".wandb", ".json", ".csv", ".yaml"} <= {path.suffix for path in files}
    for path in files:
        for name, value in SECRETS.items():
            assert value.encode() not in path.read_bytes(), f"{name} in {path}"
    assert "How many" in (run.folder / "run/round-01/grpo/samples.jsonl").read_text()


def cells(markdown: bytes | str) -> list[str]:
    """What TensorBoard shows in the cells of a table."""
    page = markdown_to_safe_html(markdown)
    found = re.findall(r"<t[dh]>(.*?)</t[dh]>", page, flags=re.DOTALL)
    assert not any(re.search(r"<(?!br>)", cell) for cell in found), page
    return [html.unescape(cell.replace("<br>", "\n")) for cell in found]


@pytest.mark.parametrize(
    "text",
    [
        "a | b |\n|---|\n| c", "<script>alert(1)</script> <img src=x onerror=y>", "![x](http://a.example/b.png)",
        "[x](javascript:y) <http://a.example>", "**a** _b_ __c__ `d` ``e``", "\\| \\boxed{1} \\*",
        "&lt;b&gt; &#42; &amp;", "# a\n- b\n\n    c\n\n1. d\n> e\n---\n```f\ng\n```", "[x]: http://a.example",
        "{a} $b$ ~~c~~",
    ],
)  # fmt: skip
def test_a_text_is_shown_as_it_is_in_tensorboard(text: str) -> None:
    assert cells(markdown_table(["head", text], [["left", text], [text, 1.5]])) == [
        "head", text, "left", text, text, "1.5",
    ]  # fmt: skip


def test_a_table_goes_to_each_logger_that_can_hold_one_at_the_step_of_the_batch(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    able = SimpleNamespace(log_table=lambda name, **table: given.append({"name": name, **table}))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    trainer: Any = SimpleNamespace(loggers=[CSVLogger(tmp_path), able, SimpleNamespace()], fit_loop=loop)
    log_table(trainer, "grpo/samples", [{"completion": "a\x1b[31mb", "reward": 1.0}])
    assert given == [
        {"name": "grpo/samples", "columns": ["completion", "reward"], "data": [["a\ufffd[31mb", 1.0]], "step": 7}
    ]


def test_only_the_batches_that_are_looked_at_have_a_table(tmp_path: Path) -> None:
    steps: list[int] = []
    able = SimpleNamespace(log_table=lambda name, step, **table: steps.append(step))
    rollout = Rollout((1,), (2,), (-1.0,), "4", 1.0, True, False, 0)
    outputs = {"rollout_groups": [RolloutGroup(Problem("p", "2 + 2?", "4"), (rollout,))]}
    for batch in range(5):
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=batch))
        trainer: Any = SimpleNamespace(
            loggers=[able], fit_loop=loop, current_epoch=0, default_root_dir=tmp_path, progress_bar_callback=None
        )
        SampleCompletions(every_n_steps=2).on_train_batch_end(trainer, None, outputs, None, batch)  # type: ignore[arg-type]
    assert steps == [0, 2, 4]


@pytest.mark.parametrize("cls", [CSVLogger, TensorBoardLogger])
def test_a_fit_that_is_gone_on_with_leaves_what_was_logged_before(tmp_path: Path, cls: Any) -> None:
    for part in range(2):
        _, logger = loggers_of(cls(tmp_path), tmp_path / "run/round-01/sft")
        logger.log_metrics({"sft/loss": 1.0}, step=part)
        logger.finalize("success")
    [folder] = tmp_path.glob("lightning_logs/run/round-01/sft")
    assert sorted(path.name for path in folder.iterdir()) == ["version_0", "version_1"]
    assert all(any(path.iterdir()) for path in folder.iterdir())


class _Missing:
    """What Lightning has in the place of a package that is not installed."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize(("logger", "extra"), [("TensorBoardLogger", "tensorboard"), ("WandbLogger", "wandb")])
def test_a_logger_without_its_package_is_an_error_that_names_the_extra(
    logger: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pytorch.loggers.wandb._WANDB", "fabric.loggers.tensorboard._TENSORBOARD",
                 "fabric.loggers.tensorboard._TENSORBOARDX"):  # fmt: skip
        monkeypatch.setattr(f"lightning.{name}_AVAILABLE", _Missing())
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert main(["fit", *TINY, f"--run_dir={tmp_path / 'run'}", f"--trainer.logger={logger}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"pip install 'slmreason[{extra}]'")
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not (tmp_path / "run").exists()


def test_where_no_terminal_is_each_stage_is_one_line(tmp_path: Path) -> None:
    code = "import sys; from slmreason.cli import main; print(main(sys.argv[1:]), 'wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", *TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.logger=CSVLogger"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40"}, capture_output=True, check=True, timeout=300,
    )  # fmt: skip
    out = done.stdout.decode()
    assert out.endswith("\n0 False\n")  # it went well, and W&B was not even imported
    for bad in ("\r", "\x1b", "━", "it/s", "%|"):
        assert bad not in out.partition("greedy pass@1")[0], bad  # the table of the results has lines of its own
        assert bad not in done.stderr.decode(), bad
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [row["stage"] for row in summary] == ["base", "round 1 sft", "round 1 grpo", "round 1 cft"]
    before = 0
    for row in summary:
        total = sum(row["tokens"].values())
        [line] = [line for line in out.splitlines() if line.startswith(f"{row['stage']}: ")]
        expected = re.escape(f"{row['stage']}: {row['outcome']}")
        if row["stage"] != "base":
            expected += rf" \| \d+ s, {total - before} tokens"
        for score in row["scores"]:
            expected += re.escape(f" | {score['benchmark']} {100 * score['value']:.1f}")
        if row["scores"]:
            expected += rf" \| benchmarks \d+ s, {row['benchmark_tokens']} tokens"
        assert re.fullmatch(expected, line), line
        before = total
    assert before > 0
