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
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto.wandb_internal_pb2 import Record

from slmreason.callbacks import SampleCompletions
from slmreason.callbacks.samples import log_table, markdown_table
from slmreason.cli import config, main
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


def events(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of the one experiment below a folder."""
    [experiment] = folder.iterdir()
    return EventAccumulator(str(experiment)).Reload()


def tensorboard_points(held: EventAccumulator) -> Points:
    return {(n, e.step): e.value for n in held.Tags()["scalars"] for e in held.Scalars(n)}


def ends(folder: Path) -> dict[str, int]:
    """The run's step at which each stage ends, by the steps of each `metrics.csv`."""
    found, total = {"": 0}, 0
    for stage in STAGES:
        total += 1 + max(step for _, step in csv_points(folder / stage / "metrics.csv"))
        found[stage] = total
    return found


def over_all_stages(folder: Path) -> Points:
    """The points of each `metrics.csv` at the steps of the whole run."""
    points: Points = {}
    for stage, before in zip(STAGES, ends(folder).values(), strict=False):
        points |= {(n, before + step): value for (n, step), value in
                   csv_points(folder / stage / "metrics.csv").items()}  # fmt: skip
    return points


def of_fits(points: Points) -> Points:
    """Without what `metrics.csv` does not have."""
    added = ("tokens/", "spent/", "bands/", "benchmark/")
    return {key: v for key, v in points.items() if not key[0].startswith(added) and "learning_rate" not in key[0]}


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


def test_every_logger_has_the_metrics_of_all_stages_in_one_experiment_at_steps_that_go_on(run: Run) -> None:
    expected = over_all_stages(run.folder / "run")
    assert {name.partition("/")[0] for name, _ in expected} == {"sft", "grpo", "cft", "epoch"}
    points = csv_points(run.folder / "logs/csv/lightning_logs/run/mine/metrics.csv")
    assert of_fits(points) == pytest.approx(expected, nan_ok=True)
    same = pytest.approx(points, nan_ok=True)
    assert tensorboard_points(events(run.folder / "logs/tensorboard/lightning_logs/run")) == same
    [file] = wandb_runs(run).values()
    assert wandb_points(file) == same


def test_wandb_has_one_run_that_is_named_after_the_run_and_ended(run: Run) -> None:
    [(name, file)] = wandb_runs(run).items()
    assert name == "run"
    assert [record.exit.exit_code for record in wandb_records(file) if record.HasField("exit")] == [0]


def test_the_loggers_know_what_is_between_the_fits(run: Run) -> None:
    points = csv_points(run.folder / "logs/csv/lightning_logs/run/mine/metrics.csv")
    summary, last = json.loads((run.folder / "run/summary.json").read_text()), ends(run.folder / "run")
    steps = dict(zip((row["stage"] for row in summary), last.values(), strict=True))
    shown = {(row["stage"], score["benchmark"]): score["value"] for row in summary for score in row["scores"]}
    assert len(shown) == len(summary) == 7
    for (stage, benchmark), value in shown.items():
        assert points[f"benchmark/{benchmark}/pass@1", steps[stage]] == pytest.approx(value)
    for step in (0, last[STAGES[0]], last[STAGES[-1]]):
        assert sum(points[f"bands/{band}", step] for band in ("simple", "medium", "hard", "unknown")) == 16
    cost = summary[-1]["tokens"]
    end = last[STAGES[-1]]
    assert {kind: points[f"tokens/{kind}", end] for kind in cost} == cost
    spent = {name: value for (name, step), value in points.items() if step == end and name.startswith("spent/")}
    assert {"spent/probe", "spent/bridge", "spent/fits"} <= set(spent)
    assert sum(spent.values()) == points["tokens/total", end] == sum(cost.values())


def test_the_learning_rate_is_that_of_each_stage(run: Run) -> None:
    points = csv_points(run.folder / "logs/csv/lightning_logs/run/mine/metrics.csv")
    config = yaml.safe_load((run.folder / "run/config.yaml").read_text())
    for stage in ("sft", "grpo", "cft"):
        rates = [value for (name, _), value in points.items() if name == f"{stage}/learning_rate"]
        assert rates
        assert 0 < max(rates) <= config[stage]["learning_rate"]


def test_every_logger_has_the_config_of_the_run(run: Run) -> None:
    text = (run.folder / "run/config.yaml").read_text()
    saved = yaml.safe_load(text)
    for folder in ("tensorboard/lightning_logs/run/version_0", "csv/lightning_logs/run/mine"):
        assert yaml.safe_load((run.folder / "logs" / folder / "hparams.yaml").read_text())["grpo"] == saved["grpo"]
    [tensor] = events(run.folder / "logs/tensorboard/lightning_logs/run").Tensors("config/text_summary")
    page = markdown_to_safe_html(tensor.tensor_proto.string_val[0])
    assert yaml.safe_load(html.unescape(re.sub(r"<[^>]*>", "", page))) == saved
    [file] = wandb_runs(run).values()
    told = {item.key: item.value_json for record in wandb_records(file) for item in record.config.update}
    assert json.loads(told["sft"]) == saved["sft"]


@pytest.mark.parametrize("number", [1, 2])
def test_wandb_and_tensorboard_hold_a_table_of_completions(run: Run, number: int) -> None:
    stage = f"round-{number:02d}/grpo"
    first = run.rows(f"run/{stage}/samples.jsonl")[0]
    shown = {**first, "question": first["question"].replace("How many", "[OPENAI_API_KEY]")}
    [file] = wandb_runs(run).values()
    paths = (file.parent / "files/media/table/grpo").glob("samples_*.table.json")
    tables = [json.loads(path.read_text()) for path in paths]
    assert shown in [dict(zip(table["columns"], table["data"][0], strict=True)) for table in tables]
    before = ends(run.folder / "run")[f"round-{number:02d}/sft"]
    tensors = events(run.folder / "logs/tensorboard/lightning_logs/run").Tensors("grpo/samples/text_summary")
    [tensor] = [each for each in tensors if each.step == before]
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


KILLED = ["--run_dir=run", "--curriculum.checkpoint.every_n_steps=1", "--trainer.callbacks+=tests.plugins.Dies",
          "--grpo.prompts_per_step=2"]  # fmt: skip


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_with_its_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that never was: what the killed processes had logged beyond their checkpoints is left out."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    loggers = "--trainer.logger+=lightning.pytorch.loggers."
    args = [
        "fit", *TINY, *KILLED, f"{loggers}TensorBoardLogger", "--trainer.logger.save_dir=logs/tensorboard",
        f"{loggers}CSVLogger", "--trainer.logger.save_dir=logs/csv",
        f"{loggers}WandbLogger", "--trainer.logger.save_dir=logs/wandb", "--trainer.logger.offline=true",
        "--trainer.logger+=tests.plugins.Recorder", "--trainer.logger.path=logs/recorded.jsonl",
    ]  # fmt: skip
    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    done = command(*args, cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stdout[-3000:]
    for stage, batch in (("sft", 1), ("grpo", 1), ("cft", 0)):
        monkeypatch.setenv("DIES_IN", stage)
        monkeypatch.setenv("DIES_AT", str(batch))
        assert command(*args, "--resume=auto", cwd=tmp_path / "cut").returncode != 0
    monkeypatch.delenv("DIES_IN")
    done = command(*args, "--resume=auto", cwd=tmp_path / "cut")
    assert done.returncode == 0, done.stdout[-3000:]

    expected = csv_points(tmp_path / "whole/logs/csv/lightning_logs/run/version_0/metrics.csv")
    same = pytest.approx(expected, nan_ok=True)
    [metrics] = (tmp_path / "cut/logs/csv/lightning_logs/run").glob("*/metrics.csv")
    assert csv_points(metrics) == same
    assert len(rows_of(metrics)) == len(rows_of(tmp_path / "whole/logs/csv/lightning_logs/run/version_0/metrics.csv"))
    held, other = (events(tmp_path / name / "logs/tensorboard/lightning_logs/run") for name in ("cut", "whole"))
    assert tensorboard_points(held) == same
    assert {n: [e.step for e in held.Scalars(n)] for n in held.Tags()["scalars"]} == {
        n: [e.step for e in other.Scalars(n)] for n in other.Tags()["scalars"]
    }
    files = list((tmp_path / "cut/logs/wandb").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 4  # W&B's files of the processes, all of one run
    assert len({record.run.run_id for file in files for record in wandb_records(file) if record.HasField("run")}) == 1
    kept = [points for file in files if (points := wandb_points(file))]  # a kill takes what W&B has not written yet
    assert kept
    for points in kept:
        assert points == pytest.approx({key: expected[key] for key in points}, nan_ok=True)

    calls = [json.loads(line) for line in (tmp_path / "cut/logs/recorded.jsonl").read_text().splitlines()]
    assert [call["call"] for call in calls if call["call"] != "log"] == [
        "config", "resume", "config", "resume", "config", "resume", "config", "finalize"
    ]  # fmt: skip
    assert {call["version"] for call in calls if call["call"] == "resume"} == {"the only one"}
    assert_monotone(calls)


def test_steps_rise_over_stages_and_rounds_in_one_experiment(tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    args = [*TINY, "--curriculum.rounds=2", "--data.holdout=0.2", "--sft.epochs=2", f"--run_dir={tmp_path / 'run'}",
            "--grpo.kl=0.01", "--trainer.logger=tests.plugins.Recorder", f"--trainer.logger.path={path}"]  # fmt: skip
    assert main(["fit", *args]) == 0
    calls = [json.loads(line) for line in path.read_text().splitlines()]
    assert [call["call"] for call in calls if call["call"] != "log"] == ["config", "finalize"]
    assert calls[-1] == {"call": "finalize", "status": "success"}
    assert_monotone(calls)
    logged = [call for call in calls if call["call"] == "log"]
    names = {name for call in logged for name in call["metrics"]}
    assert {"val/pass@1", "grpo/kl", "benchmark/chain/pass@1", "bands/simple", "spent/probe", "sft/learning_rate",
            "grpo/learning_rate", "cft/learning_rate", "sft/loss_epoch", "grpo/loss",
            "cft/loss_epoch"} <= names  # fmt: skip
    steps = {stage: [call["step"] for call in logged if any(name.startswith(f"{stage}/") for name in call["metrics"])]
             for stage in ("sft", "grpo", "cft")}  # fmt: skip
    assert steps["sft"][0] == 0
    assert steps["sft"][-1] > steps["grpo"][0] > steps["sft"][0]  # the second round goes on
    assert max(steps["cft"]) > max(steps["grpo"]) > max(steps["sft"])


def assert_monotone(calls: list[dict[str, Any]]) -> None:
    """Steps and tokens only rise, but where a process takes up from an older checkpoint."""
    step = tokens = 0
    for call in calls:
        if call["call"] == "resume":
            assert call["step"] is None or call["step"] <= step + 1
            step = tokens = 0
        if call["call"] == "log":
            assert call["step"] >= step
            assert call["metrics"]["tokens/total"] >= tokens
            step, tokens = call["step"], call["metrics"]["tokens/total"]
    assert step > 0


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_logger_that_cannot_begin_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECORDER_FAILS", "nobody\nis there")
    args = [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.logger=tests.plugins.Recorder",
            f"--trainer.logger.path={tmp_path / 'recorded.jsonl'}"]  # fmt: skip
    assert main(["fit", *args]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: trainer.logger: Recorder cannot begin: nobody is there"


def test_mlflow_by_flag_has_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["fit", *TINY, "--run_dir=mine", "--trainer.logger=MLFlowLogger"]) == 0
    client = tracking.MlflowClient("sqlite:///mlflow.db")
    [kept] = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert (kept.info.run_name, kept.info.status) == ("mine", "FINISHED")
    assert kept.data.params["grpo.group_size"] == "4"
    assert {"sft/loss_epoch", "grpo/reward_step", "cft/loss_epoch", "benchmark/chain/pass_at_1", "bands/hard",
            "tokens/total"} <= set(kept.data.metrics)  # fmt: skip
    steps = [each.step for each in client.get_metric_history(kept.info.run_id, "benchmark/chain/pass_at_1")]
    assert len(steps) == 4
    assert steps == sorted(set(steps))


class _Missing:
    """What Lightning has in the place of a package that is not installed."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("logger", "extra"),
    [("TensorBoardLogger", "tensorboard"), ("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")],
)
def test_a_logger_without_its_package_is_an_error_that_names_the_extra(
    logger: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pytorch.loggers.wandb._WANDB", "fabric.loggers.tensorboard._TENSORBOARD",
                 "fabric.loggers.tensorboard._TENSORBOARDX", "pytorch.loggers.mlflow._MLFLOW"):  # fmt: skip
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
