"""The short help, the help of a group, and mistakes that are found before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from slmreason.cli import main
from slmreason.cli.command import COMMANDS, find
from slmreason.cli.config import build_parser, command_parser
from slmreason.cli.help import COMMON, OWN, group_help, short_help


def test_every_key_of_the_short_help_is_one_of_the_parser() -> None:
    known = set(build_parser("fit", "").known_keys())
    told = {key for keys in COMMON.values() for key, _, _ in keys}
    within = {"student.lora.r", "data.columns.question"}  # of sections that may be null
    assert told - within <= known | {"config"}
    assert {key.rpartition(".")[0] for key in within} <= known


@pytest.mark.parametrize("command", sorted(OWN))
def test_the_short_help_tells_every_option_that_a_command_alone_has(command: str) -> None:
    told = {option for option, _ in OWN[command]}
    assert told == set(command_parser(find(command)).own_options) - {"file"}
    page = short_help(command, COMMANDS[command])
    assert len(page.splitlines()) < 60
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["fit", "--help"], "--grpo.group_size"),
        (["fit", "--config", "quikstart"], "did you mean quickstart?"),
        (["fit", "--config=quikstart"], "did you mean quickstart?"),
        (["compare", "--config", "quikstart"], "did you mean quickstart?"),
        (["fit", "quickstart"], "did you mean: slmreason fit --config quickstart?"),
        (["fit", "mine.yaml"], "did you mean: slmreason fit --config mine.yaml?"),
        (["test", "gsm8k"], "options begin with --"),
    ],
)
def test_help_and_mistakes_that_need_no_parser_are_answered_without_torch(args: list[str], says: str) -> None:
    code = f"import sys; from slmreason.cli import main; main({args!r}); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert says in done.stdout + done.stderr
    assert done.returncode == 0


def test_the_help_of_a_group_has_its_keys_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help", "grpo"]) == 0
    page = capsys.readouterr().out
    assert "--grpo.clip_low" in page
    assert "The ratio is clipped below" in page
    assert "--sft." not in page
    assert main(["fit", "--help", "gpro"]) == 2
    assert "no such group; there are" in capsys.readouterr().err


def test_a_group_that_is_the_beginning_of_another_key_is_not_mixed_with_it() -> None:
    page = "usage: x\n\nA:\n  --data.train TRAIN\n\nB:\n  --data_more.x X\n    about --data.train"
    assert group_help(page, "data") == "A:\n  --data.train TRAIN"


@pytest.mark.parametrize(
    ("given", "meant"),
    [("grpo.lr", "grpo.learning_rate"), ("grpo.num_generations", "grpo.group_size"), ("grpo.beta", "grpo.kl"),
     ("cft.num_train_epochs", "cft.epochs"), ("model_name_or_path", "student.model"), ("output_dir", "run_dir"),
     ("grpo.gradient_accumulation_steps", "trainer.accumulate_grad_batches"), ("grpo.group_sise", "grpo.group_size")],
)  # fmt: skip
def test_a_key_by_another_trainers_name_is_answered_with_ours(
    capsys: pytest.CaptureFixture[str], given: str, meant: str
) -> None:
    assert main(["fit", f"--{given}=1"]) == 2
    assert f"did you mean: {meant}" in capsys.readouterr().err
