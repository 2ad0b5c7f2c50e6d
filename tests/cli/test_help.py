"""The short help, the help of a group, and mistakes that are found before anything heavy is imported."""

from __future__ import annotations

import re
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


TYPING = re.compile(
    r"\b(?:Union|Optional|Literal|list|dict|tuple|Iterable|Callable)\[|<class |NoneType|type: |known subcl"
)


def test_no_page_tells_a_type_in_the_syntax_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help", "all"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert TYPING.findall(page) == []
    for told in (
        "(one of: APITeacher, ",
        "VLLMTeacher, a class path, or null; default: null)",
        "(a list of sft, grpo or cft; default: ",
        "(a whole number, or null; default: null)",
        "(a mapping {r, alpha, ",
        "default: HFEngine)",
        "(true or false; default: false)",
    ):
        assert told in page
    with pytest.raises(SystemExit):
        main(["fit", "--rollout.help=VLLMEngine"])
    page = " ".join(capsys.readouterr().out.split())
    assert TYPING.findall(page) == []
    assert ", or null; default: null)" in page


@pytest.mark.parametrize(
    ("arg", "says"),
    [
        ("--grpo.group_size=many", "grpo.group_size: takes a whole number"),
        ("--curriculum.max_tokens=lots", "curriculum.max_tokens: takes a whole number, or null"),
        ("--grpo.loss=ppo", "grpo.loss: takes one of: grpo, dr_grpo, dapo, gspo, cispo, sapo, or gmpo"),
        ("--rollout=EngineOfNobody", "rollout: there is no class EngineOfNobody; it takes one of: "),
        ("--teacher=TeacherOfNobody", "teacher: there is no class TeacherOfNobody; it takes one of: APITeacher, "),
        ("--student.lora=big", "student.lora: takes a mapping {r, alpha, "),
        ("--student.lora.r=big", "student.lora.r: takes a whole number"),
        ("--student.lora.rank=8", "student.lora: Option 'rank' is not accepted; there are alpha, "),
        ("--trainer.limit_train_batches=few", "trainer.limit_train_batches: takes a number, or null"),
        ("--trainer.logger=7", "trainer.logger: takes "),
        ("--data.holdout=tenth", "data.holdout: takes a number"),
    ],
)
def test_a_value_that_a_key_does_not_take_is_answered_in_a_line_with_what_it_takes(
    capsys: pytest.CaptureFixture[str], arg: str, says: str
) -> None:
    assert main(["fit", arg]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert TYPING.findall(line) == []


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
