"""The config as a Lightning CLI user expects it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from slmreason.cli import main
from slmreason.cli.config import build_parser, expand, fresh_trainer_config, instantiate, parse, trainer_of_run
from slmreason.cli.errors import ConfigError
from slmreason.cli.recipes import RECIPES, find_recipe
from slmreason.modules.settings import GRPOSettings
from slmreason.records import Problem
from slmreason.run.loggers import Axis, of_run

ROOT = Path(__file__).parents[2]


def parsed(*args: str):  # type: ignore[no-untyped-def]
    return parse(build_parser("fit", "x"), ["--config", "quickstart", *args])


def test_dotted_overrides_stacked_configs_and_lightning_flags(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("grpo: {group_size: 6, loss: dapo}\ntrainer: {max_steps: 7}\n")
    config = parsed(
        "--config", str(tmp_path / "more.yaml"), "--grpo.group_size", "4", "--trainer.max_time", "00:01:00:00",
        "--trainer.logger", "CSVLogger", "--trainer.strategy", "ddp", "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=grpo/reward",
    )  # fmt: skip
    assert (config.grpo.group_size, config.grpo.loss, config.trainer.max_steps) == (4, "dapo", 7)
    assert config.trainer.max_time == "00:01:00:00"
    assert config.trainer.strategy == "ddp"
    assert config.trainer.logger.class_path.endswith("CSVLogger")
    assert [c.class_path.rpartition(".")[2] for c in config.trainer.callbacks] == ["SampleCompletions", "EarlyStopping"]


def test_each_fit_gets_callbacks_and_loggers_of_its_own(tmp_path: Path) -> None:
    config = parsed("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path))
    first, second = fresh_trainer_config(config), fresh_trainer_config(config)
    assert first["logger"] is not second["logger"]
    assert first["callbacks"][0] is not second["callbacks"][0]


def test_mlflow_has_its_own_home_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    chosen, home = "--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db"
    assert expand([chosen])[1:] == [home]
    other = "--trainer.logger.tracking_uri=http://a.example"
    assert expand([chosen, other]) == [chosen, other]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://b.example")
    assert expand([chosen]) == [chosen]


def test_a_logger_that_a_run_had_leaves_its_name_to_its_class(tmp_path: Path) -> None:
    """One process may fit several times, and chooses loggers by their short names."""
    had = of_run(CSVLogger(tmp_path), Axis(), lambda: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = parsed("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}")
    assert config.trainer.logger.class_path == "lightning.pytorch.loggers.CSVLogger"
    assert isinstance(had, CSVLogger)


def test_the_fits_of_a_run_have_the_same_loggers_and_callbacks_of_their_own(tmp_path: Path) -> None:
    fresh = trainer_of_run(parsed("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path)))
    first, second = fresh(), fresh()
    assert isinstance(first["logger"], CSVLogger)
    assert first["logger"] is second["logger"]
    assert first["callbacks"][0] is not second["callbacks"][0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--grpo.group_sze=4"], ["group_sze", "grpo.group_size"]),
        (["--grpo.group_size=many"], ["grpo.group_size", "a whole number"]),
        (["--grpo.loss=ppo"], ["grpo.loss", "dr_grpo", "gspo"]),
        (["--rollout=NoEngine"], ["rollout", "NoEngine", "HFEngine"]),
        (["--trainer.max_epoch=3"], ["max_epoch", "trainer.max_epochs"]),
        (["--config=nothing"], ["nothing", "quickstart"]),
        (["--data.train=embedded:nothing/train"], ["embedded:nothing/train", "chain"]),
        (["--data.review_share=2"], ["data.review_share"]),
        (["--grpo.temperature=0"], ["grpo.temperature"]),
        (["--trainer.accelerator=cuda", "--trainer.devices=2"], ["CUDAAccelerator", "not available"]),
        (["--trainer.accelerator=cpu", "--trainer.strategy=fsdp_cpu_offload"], ["fsdp", "requires a GPU"]),
        (["--student.model=embedded:gpt"], ["student.model", "embedded:qwen2"]),
        (["--curriculum.stages=[sft,ppo]"], ["curriculum.stages", "grpo"]),
        (["--benchmarks=[embedded:chain/test,embedded:chain/train]"], ["benchmarks", "chain"]),
    ],
)
def test_a_mistake_names_the_key_and_what_is_accepted(
    args: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["fit", "--config", "quickstart", f"--run_dir={tmp_path / 'run'}", *args]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    for word in words:
        assert word in shown


def test_a_wrong_key_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("grpo: {group_sise: 4}\n")
    assert main(["fit", "--config", str(tmp_path / "bad.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "group_sise" in shown
    assert "grpo.group_size" in shown


def test_print_config_is_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "quickstart", "--print_config"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert yaml.safe_load(text)["grpo"]["group_size"] == 8
    again = parse(build_parser("fit", "x"), ["--config", str(tmp_path / "printed.yaml")])
    assert again.grpo == parsed().grpo


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rollout.help=HFEngine"], ["max_sequences"]),
        (["--trainer.callbacks.help=slmreason.callbacks.SampleCompletions"], ["every_n_steps"]),
    ],
)
def test_the_help_of_a_class_has_its_options(
    args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *args])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in shown] == []


def test_help_says_what_each_key_means() -> None:
    """In a process of its own: what `--help all` asks of the parser stays with the process."""
    code = """
import sys
from jsonargparse import set_parsing_settings
from slmreason.cli import main
from slmreason.cli.config import build_parser
main(["fit", "--help", "all"])
parser = build_parser("fit", "")
keys = [a for a in parser._actions if a.dest.partition(".")[0] not in ("trainer", "config", "print_config", "help")]
print("MISSING", [a.dest for a in keys if not a.dest.endswith(".help") and not (a.help or "").strip(" %")])
print("COUNT", len(keys))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MISSING []" in done.stdout, done.stdout[-2000:]
    shown = " ".join(done.stdout.split())
    for word in ("--grpo.group_size", "TRL calls it num_generations", "--trainer.strategy", "--bridge.max_rank"):
        assert word in shown
    assert int(done.stdout.rpartition("COUNT ")[2]) > 80


OVERLAYS = ("full-fsdp", "gpu-80gb")
GPU_RECIPES = ("gsm8k-llama3.2-1b", "gsm8k-qwen2.5-0.5b")


def test_options_of_peft_and_optimizers_by_class_path_come_through_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "student: {lora: {r: 8, options: {use_dora: true, init_lora_weights: pissa}}}\n"
        "grpo: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}}\n"
    )
    config = parsed("--config", str(tmp_path / "more.yaml"), "--sft.optimizer=torch.optim.Muon",
                    "--student.activation_offload=true")  # fmt: skip
    assert config.student.lora.options == {"use_dora": True, "init_lora_weights": "pissa"}
    assert config.student.activation_offload is True
    assert config.sft.optimizer == "torch.optim.Muon"
    assert config.grpo.optimizer == {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    assert GRPOSettings(**vars(config.grpo)).by_class().init_args == {"momentum": 0.9}  # type: ignore[union-attr]
    assert config.cft.optimizer is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_parses(path: Path) -> None:
    before = ["--config", GPU_RECIPES[0]] if path.stem in OVERLAYS else []
    config = parse(build_parser("fit", "x"), [*before, "--config", str(path)])
    assert config.student.model
    assert fresh_trainer_config(config)["callbacks"]


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_the_overlay_for_several_gpus_trains_all_weights_at_lower_rates(recipe: str) -> None:
    base = parse(build_parser("fit", "x"), ["--config", recipe])
    config = parse(build_parser("fit", "x"), ["--config", recipe, "--config", "full-fsdp"])
    assert (config.student.lora, config.trainer.strategy, config.trainer.devices) == (None, "fsdp", 4)
    assert config.sft.learning_rate < base.sft.learning_rate
    assert config.trainer.precision == base.trainer.precision


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_the_overlay_for_a_large_card_doubles_the_budget_and_recomputes_nothing(recipe: str) -> None:
    base = parse(build_parser("fit", "x"), ["--config", recipe])
    config = parse(build_parser("fit", "x"), ["--config", recipe, "--config", "gpu-80gb"])
    assert (base.data.token_budget, config.data.token_budget) == (8192, 16384)
    assert config.student.gradient_checkpointing is False
    assert config.student.lora == base.student.lora


@pytest.mark.parametrize("recipe", GPU_RECIPES)
def test_the_gpu_recipes_ask_for_a_gpu_and_leave_room_for_the_longest_benchmark_prompt(recipe: str) -> None:
    config = parse(build_parser("fit", "x"), ["--config", recipe])
    longest_prompt = 835  # tokens, in MATH-500 under Qwen's tokenizer
    assert config.trainer.accelerator == "gpu"
    assert longest_prompt + config.evaluation.max_new_tokens <= config.rollout.init_args.max_model_len
    assert (config.sft.decay, config.grpo.decay) == ("linear", "linear")


def test_recipes_are_found_by_name_only_when_no_such_file_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("quickstart") == str(RECIPES / "quickstart.yaml")
    assert find_recipe("configs/quickstart.yaml") == str(RECIPES / "quickstart.yaml")
    (tmp_path / "quickstart").write_text("seed_everything: 1\n")
    assert find_recipe("quickstart") == "quickstart"
    with pytest.raises(ConfigError, match="recipes: full-fsdp, gpu-80gb, gsm8k"):
        find_recipe("nope")


def test_a_pool_and_benchmarks_may_be_lists_of_entries(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data:\n  train:\n  - embedded:chain/train?count=4\n"
        "  - {path: mine=a.jsonl, weight: 2, columns: {question: q}, reward: {class_path: tests.plugins.CoinReward}}\n"
        "benchmarks:\n- embedded:logic/test?count=3\n- {path: b.jsonl, limit: 5}\n"
    )
    parser = build_parser("fit", "")
    config = parse(parser, ["--config", str(tmp_path / "c.yaml")])
    made = instantiate(parser, config)
    chain, mine = made.data.entries
    assert (chain.path, mine.path, mine.weight) == ("embedded:chain/train?count=4", "mine=a.jsonl", 2.0)
    assert mine.columns.question == "q"
    assert type(made.reward.reward_for(Problem("p", "?", "1", source="mine"))).__name__ == "CoinReward"
    assert [getattr(each, "path", each) for each in made.benchmarks] == ["embedded:logic/test?count=3", "b.jsonl"]
    again = parser.parse_string(parser.dump(config))
    assert again.data.train == config.data.train


def test_a_file_of_rows_is_not_taken_for_a_config(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text('["a.jsonl", "b.jsonl"]')
    assert parse(build_parser("fit", ""), [f"--data.train={rows}"]).data.train == str(rows)


def test_what_a_constructor_refuses_is_one_line_where_its_key_may_be_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = ["--teacher=APITeacher", "--teacher.base_url=http://127.0.0.1:9", "--teacher.model=x"]
    run = f"--run_dir={tmp_path / 'run'}"
    assert main(["fit", "--config=quickstart", *teacher, f"--teacher.answers={tmp_path}", run]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line == f"error: teacher.answers: {tmp_path} is a folder; a file is needed"
