"""Nothing is unpickled, no foreign code is run, and neither keys nor control characters get out."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from slmreason.callbacks import SampleCompletions
from slmreason.cli import main
from slmreason.cli.errors import explain, tidy
from slmreason.cli.screen import quiet
from slmreason.curriculum.resume import checkpoints, newest_checkpoint
from slmreason.evaluate.benchmarks import Score
from slmreason.export.export import model_card
from slmreason.records import Problem, Rollout, RolloutGroup
from slmreason.report.terminal import scores_table
from slmreason.rollout.vllm import VLLMOptions
from slmreason.run.tree import load_tree
from slmreason.runtime.redact import cell, is_secret, printable, redact, shown
from slmreason.student import EMBEDDED, Student
from tests.runs import SMALL

ROOT = Path(__file__).parents[2]
KEYS = {
    "OPENAI_API_KEY": "plain-Looking/value+of-openai",
    "HF_TOKEN": "plainlookinghuggingfacetoken",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
}
"""Of no shape that gives them away: what is known of them is that the environment has them."""


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Commands put handlers of their own on the loggers; other tests want them as they were."""
    loggers = [logging.getLogger(name) for name in ("slmreason", "lightning.pytorch", "lightning.fabric")]
    kept = [(log, log.handlers[:], log.propagate, log.level) for log in loggers]
    yield
    for log, handlers, propagate, level in kept:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return KEYS


# -- what the code may not do ------------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CODE = sorted(
    path
    for folder in ("slmreason", "callbacks", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "slmreason" / "callbacks")  # a link to the folder callbacks
)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of such an expression, with `?` for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def constant(call: ast.Call, name: str) -> Any:
    """The value of a keyword that is written out; `...` when there is none."""
    found = [k.value for k in call.keywords if k.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else ...


def faults(code: str, product: bool = True) -> list[str]:
    """`line: what` of everything that loads or runs what could be foreign code.

    Args:
        product: False for tests, which load what they have just saved, and make pickles to see them refused.
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        found += [(node.lineno, f"import {n}") for n in names if product and n.partition(".")[0] in PICKLES]  # type: ignore[attr-defined]
        unwanted = ("os.system", "os.popen", "torch.save", "torch.load", "yaml.load")  # not by their bare name either
        found += [(node.lineno, f"import {n}") for n in names if n in unwanted]  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            found += [(node.lineno, fault) for fault in call_faults(node, product)]
    return [f"{line}: {fault}" for line, fault in sorted(found)]


def call_faults(call: ast.Call, product: bool) -> Iterator[str]:
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen", "pty.spawn"):
        yield name
    if name == "torch.save" and product:
        yield name
    if name == "torch.load" and constant(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load"):
        yield name  # safe_load serves
    if last == "load" and constant(call, "allow_pickle") is True:
        yield "allow_pickle=True"
    if constant(call, "shell") is True or name in ("subprocess.getoutput", "subprocess.getstatusoutput"):
        yield "a shell"
    if product and constant(call, "trust_remote_code") is True:
        yield "trust_remote_code=True"
    # Without it, a folder that has no safetensors is read from pytorch_model.bin.
    loads_model = re.search(r"(?:AutoModel\w*|PreTrainedModel)\.from_pretrained$", name)
    if product and loads_model and constant(call, "use_safetensors") is not True:
        yield "a model that need not be safetensors"
    if last in ("AutoModelForCausalLM", "from_pretrained", "snapshot_download") and constant(call, "token") not in (
        ...,
        None,
    ):
        yield "a token in the code"


BAD = {
    "import pickle": "import pickle",
    "import torch, cloudpickle as c": "import cloudpickle",
    "from pickle import loads": "import pickle",
    "def f():\n    from joblib.externals import loky": "import joblib.externals",
    "import dill": "import dill",
    "import shelve": "import shelve",
    "import marshal": "import marshal",
    "torch.save(x, path)": "torch.save",
    "from torch import load": "import torch.load",
    "torch.load(path)": "torch.load without",
    "torch.load(path, weights_only=False)": "torch.load without",
    "torch.load(path, weights_only=flag)": "torch.load without",
    "numpy.load(path, allow_pickle=True)": "allow_pickle",
    "eval('1')": "eval",
    "exec(code)": "exec",
    "yaml.load(text)": "yaml.load",
    "yaml.load(text, Loader=yaml.Loader)": "yaml.load",
    "yaml.unsafe_load(text)": "yaml.unsafe_load",
    "subprocess.run('ls', shell=True)": "a shell",
    "run('ls', shell=True)": "a shell",
    "subprocess.getoutput('ls')": "a shell",
    "os.system('ls')": "os.system",
    "from os import system": "import os.system",
    "AutoTokenizer.from_pretrained(x, trust_remote_code=True)": "trust_remote_code=True",
    "Student(x, trust_remote_code=True)": "trust_remote_code=True",
    "AutoModelForCausalLM.from_pretrained(x)": "need not be safetensors",
    "transformers.AutoModel.from_pretrained(x, use_safetensors=False)": "need not be safetensors",
    "AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, token='abc')": "a token in the code",
}


@pytest.mark.parametrize("code", BAD)
def test_each_rule_finds_what_it_is_for(code: str) -> None:
    assert BAD[code] in " ".join(faults(code))


def test_the_rules_leave_good_code_alone() -> None:
    good = """
import torch, yaml, subprocess
from safetensors.torch import load_file
model.eval()
re.compile("x").match("y")
torch.load(path, weights_only=True)
yaml.safe_load(text)
subprocess.run(["ls"], shell=False)
AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=given)
AutoTokenizer.from_pretrained(x)
"""
    assert faults(good) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_loads_or_runs_what_could_be_foreign_code(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8"), product=path.parts[len(ROOT.parts)] != "tests") == []


def test_the_code_that_is_looked_at_is_all_of_it() -> None:
    assert len(CODE) > 80
    assert {"redact.py", "health.py", "faults.py", "conftest.py"} <= {path.name for path in CODE}


# -- pickles and foreign code ------------------------------------------------------------------------------------


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def pickled(path: Path, marker: Path) -> None:
    torch.save({"state_dict": {}, "run": Malicious(marker)}, path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one stage, made with keys in the environment."""
    folder = tmp_path_factory.mktemp("secure") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        assert main(["fit", *ARGUMENTS, f"--run_dir={folder}"]) == 0
    return folder


ARGUMENTS = [*SMALL, "--curriculum.stages=[sft]", "--sft.epochs=1", "--curriculum.checkpoint.every_n_steps=2"]


def copied(run: Path, tmp_path: Path) -> Path:
    """The run at another place. Its config names no place but its own."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(folder)))
    return folder


def test_the_malicious_file_does_its_work_where_it_is_unpickled(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    pickled(tmp_path / "file", tmp_path / "marker")
    pickle.loads(pickle.dumps(Malicious(tmp_path / "marker")))  # noqa: S301
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name",
    [
        "in-round-1-sft-epoch-0-batch-1",
        "mine",
        "after-round-1-sft",
    ],
)
def test_a_pickled_checkpoint_is_passed_over_for_an_older_one(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = copied(run, tmp_path), tmp_path / "marker"
    newest = checkpoints(folder)[-1]
    pickled(folder / "resume" / f"000099-{name}.ckpt", marker)
    assert newest_checkpoint(folder)[0] == newest  # type: ignore[index]
    assert main(["fit", *ARGUMENTS, f"--run_dir={folder}", "--resume=auto"]) == 0
    assert "cannot be read; an older checkpoint is looked for" in " ".join(capsys.readouterr().out.split())
    assert not marker.exists()


def test_a_pickled_checkpoint_after_a_stage_is_never_unpickled(run: Path, tmp_path: Path) -> None:
    folder, marker = copied(run, tmp_path), tmp_path / "marker"
    pickled(folder / "resume" / "000099-after-round-1-sft.ckpt", marker)
    with suppress(ValueError):
        main(["fit", *ARGUMENTS, f"--run_dir={folder}", "--resume=auto"])
    assert not marker.exists()


def test_a_run_with_pickled_checkpoints_alone_does_not_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = copied(run, tmp_path), tmp_path / "marker"
    for path in checkpoints(folder):
        pickled(path, marker)
    with pytest.raises(ValueError, match=r"cannot go on.*not a checkpoint, or a torn one"):
        newest_checkpoint(folder)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "not a checkpoint, or a torn one" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert not marker.exists()


def test_a_plain_pickle_is_no_checkpoint_either(tmp_path: Path) -> None:
    path, marker = tmp_path / "x.ckpt", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(ValueError, match="not a checkpoint, or a torn one"):
        load_tree(path)
    assert not marker.exists()


def stratify(model: Path, out: Path, *more: str) -> int:
    data = "--data.train=embedded:chain/train?count=2"
    return main(["stratify", "--config=quickstart", f"--student.model={model}", data, f"--out={out}", *more])


def test_weights_in_a_pickle_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, marker = Path(shutil.copytree(EMBEDDED / "qwen2", tmp_path / "model")), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", marker)
    assert stratify(folder, tmp_path / "out.jsonl") == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: student.model: cannot load '{folder}'")
    assert "model.safetensors" in shown
    assert not marker.exists()


def with_code(tmp_path: Path, marker: Path, **config: Any) -> Path:
    """A model folder whose config names classes in a file of its own, which leaves a marker when it is run."""
    folder = Path(shutil.copytree(EMBEDDED / "qwen2", tmp_path / "model"))
    before = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(before | {"auto_map": names} | config))
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n\n\n"
        "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_a_models_own_code_runs_only_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    folder = with_code(tmp_path, marker, model_type="own")
    assert stratify(folder, tmp_path / "out.jsonl") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith(f"error: student.model: cannot load '{folder}'")
    assert "contains custom code which must be executed" in shown
    assert not marker.exists()
    # That the code can run at all shows that the refusal is what kept it from running.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert type(Student(str(folder), trust_remote_code=True).network).__name__ == "Own"
    assert marker.exists()


def test_code_beside_a_known_kind_of_model_is_not_run(tmp_path: Path) -> None:
    folder = with_code(tmp_path, tmp_path / "marker")
    assert type(Student(str(folder)).network).__module__.startswith("transformers.")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("cls", [Student, VLLMOptions])
def test_foreign_code_is_off_unless_given(cls: type) -> None:
    assert signature(cls).parameters["trust_remote_code"].default is False


# -- keys --------------------------------------------------------------------------------------------------------


def leaked(text: str) -> list[str]:
    """The names of the keys that a text holds, line breaks or not."""
    joined = "".join(text.split())
    return [name for name, value in KEYS.items() if value in text or value in joined]


def test_log_lines_with_keys_in_message_arguments_and_traceback(
    keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    quiet()
    log = logging.getLogger("slmreason.somewhere")
    log.warning(f"the key is {keys['OPENAI_API_KEY']}")  # noqa: G004 - as a careless line would have it
    log.warning("the token is %s", {"t": keys["HF_TOKEN"]})
    try:
        raise OSError(f"https://api.wandb.ai refused {keys['WANDB_API_KEY']}")
    except OSError:
        log.exception("failed with %r", keys["OPENAI_API_KEY"])
    logging.getLogger("lightning.pytorch").error("of a library: %s", keys["WANDB_API_KEY"])
    seen = capsys.readouterr()
    assert leaked(seen.out + seen.err) == []
    for word in ("[OPENAI_API_KEY]", "[HF_TOKEN]", "[WANDB_API_KEY]", "OSError", "Traceback"):
        assert word in seen.out


CRASH = """
import os, threading, warnings
from slmreason.runtime.redact import guard
guard()
warnings.warn("warned of " + os.environ["HF_TOKEN"])
def fail():
    raise KeyError(os.environ["WANDB_API_KEY"])
thread = threading.Thread(target=fail)
thread.start()
thread.join()
try:
    raise ValueError("first " + os.environ["HF_TOKEN"])
except ValueError as error:
    raise RuntimeError("HTTP 401 with " + os.environ["OPENAI_API_KEY"] + chr(27) + "[2J") from error
"""


def test_errors_and_warnings_that_nobody_catches_are_without_keys(keys: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert leaked(done.stdout + done.stderr) == []
    assert "\x1b" not in done.stderr
    for word in ("warned of [HF_TOKEN]", "KeyError: '[WANDB_API_KEY]'", "RuntimeError: HTTP 401 with [OPENAI_API_KEY]",
                 "ValueError: first", "direct cause"):  # fmt: skip
        assert word in done.stderr


def test_print_config_and_the_saved_config_are_without_keys(
    keys: dict[str, str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=quickstart", "--print_config"])
    assert leaked(capsys.readouterr().out) == []
    assert main(["fit", "--help", "all"]) == 0
    assert leaked(capsys.readouterr().out) == []
    assert leaked((run / "config.yaml").read_text()) == []


HUNTER = "hunter2hunter2hunter2"
API = ["--teacher=APITeacher", "--teacher.model=m"]
GIVEN: dict[str, tuple[list[str], str]] = {
    "a password in an address": ([*API, f"--teacher.base_url=http://me:{HUNTER}@h/v1"], "teacher.init_args.base_url"),
    "a key in a query": ([f"--data.train=https://h/x.jsonl?api_key={HUNTER}&b=1"], "data.train"),
    "a logger's key": (
        ["--trainer.logger=CometLogger", f"--trainer.logger.api_key={HUNTER}"], "trainer.logger.init_args.api_key"
    ),
    "a key by its shape": (["--student.model=sk-proj-abcdefgh1234567890abcdefgh"], "student.model"),
    "a key of the environment": ([f"--run_dir=runs/{KEYS['WANDB_API_KEY']}"], "run_dir"),
    "a key in a list": ([f"--benchmarks=[x.jsonl,https://h/x?token={HUNTER}]"], "benchmarks.1"),
    "a key of no known name": ([*API, "--teacher.base_url=http://h/v1", f"--teacher.api_key={HUNTER}"], "api_key"),
    "an option that is not there": ([f"--student.token={HUNTER}"], "student.token"),
    "one with the value beside it": (["--openai_api_key", HUNTER], "--openai_api_key"),
    "a key in a wrong place": ([f"--sft.learning_rate={HUNTER}"], "sft.learning_rate"),
    "a key in a list of choices": ([f"--curriculum.stages=[sft,{HUNTER}]"], "curriculum.stages"),
}  # fmt: skip


@pytest.mark.parametrize("how", GIVEN)
@pytest.mark.parametrize("more", [[], ["--print_config"]])
def test_a_key_on_the_command_line_is_refused_by_its_option_and_not_repeated(
    how: str, more: list[str], keys: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments, option = GIVEN[how]
    assert main(["fit", "--config=quickstart", *arguments, *more]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("error: ")
    assert option in seen.err
    assert HUNTER not in seen.out + seen.err
    assert "abcdefgh1234567890" not in seen.out + seen.err
    assert leaked(seen.out + seen.err) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "option"),
    [
        (f"trainer: {{logger: {{class_path: CometLogger, init_args: {{api_key: {HUNTER}}}}}}}", "api_key"),
        (f"teacher: {{class_path: APITeacher, init_args: {{base_url: 'http://h', api_key: {HUNTER}}}}}", "api_key"),
        (f"openai_api_key: {HUNTER}", "openai_api_key"),
        (f"data: {{token: {HUNTER}}}", "token"),
        (f"student: {{model: 'https://u:{HUNTER}@hub/m'}}", "student.model"),
        (f"grpo: {{learning_rate: {HUNTER}}}", "grpo.learning_rate"),
        (f"data: {{train: {KEYS['HF_TOKEN']}}}", "data.train"),
        (f"student: [\napi_key: {HUNTER}", "config"),
    ],
)
def test_a_key_in_a_config_file_is_refused_by_its_option_and_not_repeated(
    text: str, option: str, keys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text + "\n")
    out = tmp_path / "run"
    assert main(["fit", "--config=quickstart", f"--config={tmp_path / 'mine.yaml'}", f"--run_dir={out}"]) == 2
    seen = capsys.readouterr()
    assert seen.err.startswith("error: ")
    assert option in seen.err
    assert HUNTER not in seen.out + seen.err
    assert leaked(seen.out + seen.err) == []
    assert not out.exists()


def test_unknown_arguments_are_named_without_what_was_given() -> None:
    assert explain("Unrecognized arguments: --a.b=x y --key z --c", ["a.c"]).startswith(
        "Unrecognized arguments: --a.b --key --c"
    )


def test_values_of_several_lines_are_left_out_of_messages() -> None:
    one, other = "Bad:\n  - Expected a <class 'int'>.", "\n  - Option 'y' is not accepted"
    message = f"{one} Got value: x\n{HUNTER}{other}\nGiven value: {HUNTER}\n  - {HUNTER}"
    assert tidy(message) == one + other


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://user:pa55word@host/path", "pa55word"),
        ("git+ssh://me:pa55word@host", "pa55word"),
        ("http://h/v1?api_key=abcd1234&n=2", "abcd1234"),
        ("http://h/?n=2&X-Amz-Signature=0a1b2c3d", "0a1b2c3d"),
        ("Authorization: Bearer abcd.1234-efgh", "abcd.1234-efgh"),
        ("{'authorization': 'Basic dXNlcjpwdw=='}", "dXNlcjpwdw=="),
        ('"api_key": "abcd1234"', "abcd1234"),
        ("password=correcthorse", "correcthorse"),
        ("key sk-abcdefghijklmnop1234567890 is wrong", "sk-abcdefghijklmnop1234567890"),
        ("sk-proj-aB3_dE5-gH7_jK9_lM1_nO3", "aB3_dE5"),
        ("sk-ant-api03-" + "aB3" * 20, "aB3aB3"),
        ("Incorrect API key provided: sk-12345***********6789.", "6789"),
        ("hf_abcdefghijklmnopqrstuvwx", "hf_abcdef"),
        ("ghp_abcdefghijklmnopqrstuvwx1234", "abcdefgh"),
        ("github_pat_11ABCDEFG0abcdefgh_ijkl", "11ABCDEFG0"),
        ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN7"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "c2lnbmF0dXJl"),
    ],
)
def test_keys_of_known_shape_and_place_are_hidden(text: str, hidden: str) -> None:
    assert hidden in text
    assert hidden not in redact(text)
    assert is_secret("model", text)


def test_a_key_is_hidden_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_API_KEY", "a/b c'd\"e\\f+12345")
    for text in ("a/b c'd\"e\\f+12345", repr("a/b c'd\"e\\f+12345"), "x=a%2Fb%20c%27d%22e%5Cf%2B12345"):
        assert "12345" not in redact(text)
    monkeypatch.setenv("PLAIN_TOKEN", "  spaces-around-it\n")
    assert redact("(spaces-around-it)") == "([PLAIN_TOKEN])"


ORDINARY = [
    "ordinary text, 12 apples and 3.50 dollars", "1234567890123456789012345678901234567890", "eos_token: <|im_end|>",
    "eos_token=</s>", "pad_token_id: 151643", "max_tokens=2048, max_completion_tokens: 512", "token: 12",
    "runs/2025-01-01/model.safetensors", "/data/keys/key.jsonl", "C:\\keys\\token.txt", "monkey=banana, turkey: 2",
    "sk-learn-model", "sk-learn-model-2", "models/sk-learn-model-v2.1", "org/sk-tokenizer-2024", "risk-averse-12345678",
    "Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.2-1B", "hf_model",
    "embedded:chain/train?count=240&difficulty=1,2",
    "teacher.api_key_env=OPENAI_API_KEY", "set WANDB_API_KEY", "api_key: null", "https://host/v1?count=3",
    "me@host.org",     "the bearer certificates and bearer instruments", "a bearer of good news",
    "the secret of the key is a token of love",
    r"\frac{1}{2} + \sqrt{x^2} = \boxed{42} & y \\ $a@b$", r"x:y = 3:4 \quad\text{key idea}", "https://h/@scope/name",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays_as_it_is(text: str, keys: dict[str, str]) -> None:
    assert redact(text) == text
    assert shown(text) == text
    assert not is_secret("model", text)


@pytest.mark.parametrize("option", ["eos_token", "pad_token_id", "token_budget", "max_tokens", "api_key_env", "keys"])
def test_options_that_only_sound_like_keys_are_none(option: str) -> None:
    assert not is_secret(option, "some value")


MATH = st.lists(
    st.one_of(
        st.sampled_from([r"\frac{", "}", r"\sqrt", "$", "$$", "&", r"\\", "=", "+", "-", "*", "/", "^", "_", "(", ")",
                         "[", "]", "?", ":", "%", "@", "#", "<", ">", "|", "!", ",", ".", "'", '"', r"\text{token }",
                         "key", "the answer is", r"\boxed{", "sk", "token", "secret", "\n", " "]),
        st.integers().map(str), st.floats(allow_nan=False, allow_infinity=False).map(str),
        st.text("abcdefghijklmnopqrstuvwxyzABCXYZ", max_size=9),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(MATH)
def test_texts_of_mathematics_are_left_alone(pieces: list[str]) -> None:
    text = " ".join(pieces)
    assert redact(text) == text


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text(max_size=30))
def test_what_is_shown_drives_no_terminal_and_holds_no_key(before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEYS["OPENAI_API_KEY"])
        text = shown(f"{before}{KEYS['OPENAI_API_KEY']}{after}")
    assert KEYS["OPENAI_API_KEY"] not in text
    assert harmless(text)


@pytest.mark.timing
def test_long_texts_are_looked_through_in_no_time() -> None:
    import time

    started = time.perf_counter()
    for piece in (
        "sk-",
        "sk-a",
        "a" * 9,
        "Bearer ",
        "https://",
        "?key",
        "&a_",
        "eyJ",
        "api_key",
        "sk-" + "a-" * 60,
        " ",
    ):
        redact(piece * (100_000 // len(piece)))
    assert time.perf_counter() - started < 10


# -- control characters and markup -------------------------------------------------------------------------------

TRICKS = {
    "colour": "\x1b[31mred\x1b[0m", "clear": "\x1b[2J\x1b[H", "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://x\x07a",
    "clipboard": "\x1b]52;c;cm0gLXJm\x07", "8-bit": "\x9b31m", "return": "right\rwrong",
    "backspace": "wrong\b\b\b\b\bright",
    "nul": "a\x00b", "bell": "\x07", "override": "abc\u202efdp.exe", "isolate": "\u2066x\u2069", "joined": "a\u200bb",
    "line": "a\x0bb\x0cc", "delete": "a\x7fb", "paragraph": "a\u2028b\u2029c", "half": "a\ud800b",
}  # fmt: skip


def harmless(text: str) -> bool:
    """Without anything that is not printable but line breaks and spaces."""
    return not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]", text
    )


def drawn(*things: Any) -> str:
    """What a terminal would get; without colours, since those are rich's own."""
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True, color_system=None, legacy_windows=False)
    for thing in things:
        console.print(thing)
    return re.sub(r"\x1b\[(?:\d+;)*\d*m", "", file.getvalue())  # of bold and italic


@pytest.mark.parametrize("trick", TRICKS)
def test_control_characters_of_a_models_text_do_not_reach_the_terminal(
    trick: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TRICKS[trick]
    assert not harmless(text)
    assert harmless(printable(text))
    rollout = Rollout((1,), (2,), (-1.0,), text, 1.0, True, False, 0)
    table = SampleCompletions().table([(RolloutGroup(Problem("p", text, text), (rollout,)), rollout)])
    assert harmless(drawn(table))
    score = Score(text, "pass@1", 0.5, 0.4, 0.6, 10)
    assert harmless(drawn(scores_table("title", [(text, [score])])))
    quiet()
    logging.getLogger("slmreason.x").warning("a completion: %s", text)
    assert main(["fit", "--config=quickstart", f"--student.model=no/such{text}folder"]) == 2
    assert main(["fit", "--config", f"no-such-{text}"]) == 2
    seen = capsys.readouterr()
    assert harmless(seen.out)
    assert harmless(seen.err)


@pytest.mark.parametrize(
    "text", ["[red]x[/red]", "[/]", "[link=file:///etc/passwd]x[/link]", "[bold", ":smile: [b]", "\\[red]"]
)
def test_markup_in_a_text_is_shown_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = Rollout((1,), (2,), (-1.0,), text, 1.0, True, False, 0)
    assert text in drawn(SampleCompletions().table([(RolloutGroup(Problem("p", "q", "a"), (rollout,)), rollout)]))
    table = drawn(scores_table("title", [(text, [Score(text, "pass@1", 0.5, 0.4, 0.6, 10)])]))
    assert table.count(text) == 2 or ":smile:" in text
    assert "\x1b]8" not in table
    assert text in drawn(cell(text)) or ":smile:" in text
    quiet()
    logging.getLogger("slmreason.x").warning("a completion: %s", text)
    assert text in capsys.readouterr().out


def test_the_model_card_escapes_names_and_outcomes(run: Path) -> None:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    summary = json.loads((run / "summary.json").read_text())
    evil = "<script>alert(1)</script> <img src=x onerror=y> | x"
    summary[-1]["outcome"] = evil
    for score in summary[0]["scores"] + summary[-1]["scores"]:
        score["benchmark"] = evil
    config["student"]["model"] = "x/<b>\n---\n# y"
    config["data"]["train"] = "``<i>"
    card = model_card(evil, config, summary, "merged")
    _, front, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert "base_model" not in yaml.safe_load(front)  # that is no name of a model
    plain = re.sub(r"```.*?```|(`+)[^`].*?[^`]\1(?!`)", "", body, flags=re.DOTALL)  # code is shown as it is
    assert "&lt;script&gt;" in plain
    assert not re.search(r"<\s*(?:script|img|b|i)\b", plain.replace("``<i>", ""))
    assert (
        len({line.count("|") for line in body.splitlines() if line.startswith(("| base", "| round", "| stage"))}) == 1
    )


# -- what is left on the disk ------------------------------------------------------------------------------------


def is_pickle(path: Path) -> bool:
    """Pickles begin with their protocol; torch's and numpy's files are archives with one inside."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        return any(name.endswith((".pkl", ".pickle", ".npy")) for name in zipfile.ZipFile(path).namelist())
    return data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05" or data.startswith(b"\x93NUMPY")


def test_pickles_would_be_found(tmp_path: Path) -> None:
    for name, protocol in (("a", 2), ("b", 5)):
        (tmp_path / name).write_bytes(pickle.dumps({"x": 1}, protocol=protocol))
    torch.save({"x": 1}, tmp_path / "c")
    torch.save({"x": 1}, tmp_path / "d", _use_new_zipfile_serialization=False)
    assert [path.name for path in sorted(tmp_path.iterdir()) if is_pickle(path)] == ["a", "b", "c", "d"]


def test_a_finished_run_has_no_pickle_and_no_key(run: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".ckpt", ".jsonl", ".yaml", ".safetensors", ".csv"}
    assert [path for path in files if is_pickle(path)] == []
    assert [path for path in files for value in KEYS.values() if value.encode() in path.read_bytes()] == []
    for path in files:
        if path.suffix in (".ckpt", ".safetensors"):
            header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
            assert header
