"""The documentation site: it builds without a warning, its commands parse, its messages exist, its examples run."""

from __future__ import annotations

import ast
import csv
import html
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from slmreason.cli import COMMANDS, compare, fit, main
from slmreason.cli.command import Job, find
from slmreason.cli.config import CLASS_KEYS, Parser, build_parser, parse
from slmreason.cli.difference import differing_keys, flat
from slmreason.cli.python import as_arguments
from slmreason.data.sources import KNOWN, Columns
from slmreason.modules.grpo import GRPOModule
from slmreason.records import Problem
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.student import Lora, Student
from slmreason.teacher.base import FirstProcessTeacher
from slmreason.verify.by_source import RewardBySource
from slmreason.verify.terms import RewardTerms

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(language, title, text) of each fenced block of a page."""
    return BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))


def written(page: str) -> dict[str, str]:
    """The files that a page tells to write, by name."""
    return {title: text for _, title, text in blocks(page) if title and title != "message"}


def shell_commands(page: str) -> Iterator[list[str]]:
    """The arguments of every `slmreason` command of a page, and of scripts that stand in its place."""
    for language, _, text in blocks(page):
        if language != "bash":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                one, words = words[:end], words[end + 1 :]
                one = one[1:] if one and one[0] == "PYTHONPATH=." else one
                if one[:1] == ["slmreason"] or (one[:1] == ["python"] and one[1:2] and one[1].endswith(".py")):
                    yield one


# -- the site ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `mkdocs build --strict` builds it: any warning fails it."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        path = site / ("index.html" if page == "index" else f"{page}/index.html")
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)", path.read_text())
        assert loaded == [], page
    assert not list(site.rglob("*.py"))


def test_every_config_key_stands_on_the_page_with_a_meaning(site: Path) -> None:
    text = (site / "config" / "index.html").read_text(encoding="utf-8")
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    ]
    found = {html.unescape(re.sub(r"<[^>]+>", "", row[0])): row[1:] for row in rows if row}
    parser = build_parser("fit", "")
    printed: dict[str, Any] = yaml.safe_load(parser.dump(parse(parser, ["--config", "quickstart"]), skip_none=False))
    sections = {"rollout", "reward", "teacher", "trainer.callbacks"}
    expected = {key for key in flat(printed) if not any(key.startswith(f"{section}.") for section in sections)}
    expected |= {f"student.lora.{field.name}" for field in fields(Lora)}
    expected |= {f"data.columns.{field.name}" for field in fields(Columns)}
    expected |= CLASS_KEYS.keys()
    for section, base in CLASS_KEYS.items():
        for cls in below(base):
            if cls not in (FirstProcessTeacher, RewardBySource, RewardTerms):
                expected |= set(Parser().add_class_arguments(cls, section))
    assert {"teacher.base_url", "rollout.gpu_memory_utilization", "teacher.log_dir", "reward.timeout_s"} <= expected
    assert len(expected) > 150
    assert sorted(expected - found.keys()) == []
    assert [key for key in expected if not key.startswith("trainer.") and len(found[key][-1]) < 3] == []


def below(base: Any) -> list[Any]:
    """The classes of slmreason below another that can be chosen in a config."""
    found = [cls for child in base.__subclasses__() for cls in (child, *below(child))]
    return [cls for cls in found if cls.__module__.startswith("slmreason.") and not inspect.isabstract(cls)]


def test_a_key_without_a_meaning_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("config_keys", DOCS / "config_keys.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "config_keys", hook)
    spec.loader.exec_module(hook)
    parser = build_parser("fit", "")
    parser.add_argument("--grpo.nobody_wrote_about_me", type=int, default=1)
    with pytest.raises(ValueError, match=r"grpo\.nobody_wrote_about_me: no docstring says what it means"):
        list(hook.own_keys(parser))


def test_the_keys_that_may_change_are_those_of_the_code() -> None:
    """The page says which; the code's own rule is asked about each key of the two configs."""
    text = (DOCS / "config.md").read_text().partition("## Keys that may change")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([\w.]+)`", text)) - {"APITeacher"}
    teacher = [name for name in named if "." not in name and name != "run_dir"]
    told = (named - set(teacher)) | {f"teacher.init_args.{name}" for name in teacher}
    parser = build_parser("fit", "")
    config = yaml.safe_load(parser.dump(parse(parser, ["--config", "quickstart"]), skip_none=False))
    api = ["--teacher=APITeacher", "--teacher.base_url=http://x", "--teacher.model=x"]
    keys = {*flat(config), *flat({"teacher": parse(parser, api).teacher.as_dict()})}
    may_change = {key for key in keys if not differing_keys(nested(key, 1), nested(key, 2))}
    assert told == may_change


def nested(key: str, value: int) -> dict[str, Any]:
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    assert isinstance(tree, dict)
    return tree


# -- commands and messages ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Commands parse their arguments for real, and then do nothing; the files of the docs lie in the present folder."""
    for page in PAGES:
        for name, text in written(page).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("fit", "test", "data", "stratify", "bridge", "critique"):
        idle = replace(find(name), prepare=lambda request: Job(lambda: None))
        monkeypatch.setattr(f"slmreason.cli.{name}.COMMAND", idle)
    monkeypatch.setattr("slmreason.runtime.preemption.listen", lambda: None)
    monkeypatch.setattr(compare, "work_through", lambda runs, free: [])
    monkeypatch.setattr(compare, "show", lambda *_: None)
    yield tmp_path
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with a command, None when it parses."""
    args = words[1:] if words[0] == "slmreason" else words[2:]
    try:
        status = main(args)
    except SystemExit as stop:  # --help and --print_config
        status = int(str(stop.code))
    shown = capsys.readouterr().err
    # These two have no config: they are run on a folder that is not there, which comes after their arguments.
    excused = {"report": "no run there", "export": "is not a run folder"}.get(args[0], "no excuse")
    return None if status == 0 or excused in shown else shown


@pytest.mark.parametrize("page", [page for page in PAGES if next(shell_commands(page), None)])
def test_every_command_of_the_docs_parses(page: str, nothing_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {shlex.join(words): said for words in shell_commands(page) if (said := complaint(words, capsys))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("page", "name"), [(page, name) for page in PAGES for name in written(page) if name.endswith(".yaml")]
)
def test_every_config_of_the_docs_is_one(page: str, name: str, nothing_runs: Path) -> None:
    config = parse(build_parser("fit", ""), ["--config", "quickstart", "--config", name])
    given = flat(yaml.safe_load(written(page)[name]))
    taken = flat(config.as_dict())
    # A class that is named alone stands under `class_path`, as the class itself does.
    assert {
        key: said for key, said in given.items() if not holds(taken.get(key, taken.get(f"{key}.class_path")), said)
    } == {}


def holds(taken: Any, given: Any) -> bool:
    """Whether a value of a config is what a file gives, which may leave out what has a default."""
    taken = taken.as_dict() if isinstance(taken, Namespace) else taken
    if isinstance(given, dict) and isinstance(taken, dict):
        return all(key in taken and holds(taken[key], value) for key, value in given.items())
    if isinstance(given, list) and isinstance(taken, list):
        return len(given) == len(taken) and all(map(holds, taken, given))
    return bool(taken == given)


@pytest.mark.parametrize("args", ["trian", "fit --grpo.group_sise 4", "report runs/x --sampels 2", "compare --arms x"])
def test_a_command_that_does_not_parse_is_found(
    args: str, nothing_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(["slmreason", *args.split()], capsys)


def test_the_home_page_lists_every_command() -> None:
    listed = re.findall(r"^\| `slmreason (\w+)` \|", (DOCS / "index.md").read_text(), re.MULTILINE)
    assert set(listed) == set(COMMANDS)


def literals() -> str:
    """Every piece of text in the source, implicit concatenations joined."""
    pieces = []
    for folder in (ROOT / "slmreason", ROOT / "callbacks"):
        for path in folder.rglob("*.py"):
            tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            pieces += [node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\0".join(pieces)


FROM_ELSEWHERE = {"Problem with given class_path "}
"""Pieces of messages that jsonargparse writes; `test_a_class_that_is_not_found_is_named` sees them."""


def unwritten(message: str, source: str) -> list[str]:
    """The pieces of a message, between its `…`, that stand nowhere in the source."""
    pieces = [piece for piece in message.split("…") if len(piece.strip(" :;,.()'")) > 2]
    return [piece for piece in pieces or [message] if piece not in source and piece not in FROM_ELSEWHERE]


def test_every_message_in_the_docs_is_written_by_the_code() -> None:
    source = re.sub(r"%(?:\.\d)?[sdfg]", "\0", literals())
    told = [row for page in PAGES for _, title, text in blocks(page) if title == "message" for row in text.splitlines()]
    assert len(told) > 50
    assert {message: found for message in told if (found := unwritten(message, source))} == {}
    assert unwritten("budget of … requests is nearly used up", source) == [" requests is nearly used up"]


def test_every_section_of_a_report_is_explained() -> None:
    template = (ROOT / "slmreason" / "report" / "run.html.jinja").read_text()
    sections = re.findall(r"<h2>(.*?)</h2>", template)
    assert len(sections) > 5
    explained = re.findall(r"^## (.*)$", (DOCS / "report.md").read_text(), re.MULTILINE)
    assert [section for section in sections if section not in explained] == []


def test_a_class_that_is_not_found_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stratify", "--config=quickstart", "--reward=nowhere.NearReward", "--dry_run"]) == 2
    shown = capsys.readouterr().err
    assert "Problem with given class_path" in shown
    assert "No module named 'nowhere'" in shown


# -- the examples of extend.md -----------------------------------------------------------------------------------------

TINY = [
    "--curriculum.rounds=1", "--curriculum.probe.attempts=4", "--sft.epochs=1", "--grpo.prompts_per_step=4",
    "--grpo.group_size=4", "--curriculum.evaluate=ends", "--benchmarks=[embedded:logic/test?count=2]",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
]  # fmt: skip
FEW = "--data.train=embedded:chain/train?count=12"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder with the files of extend.md, from which their modules can be imported."""
    files = written("extend")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(fit, "GRPOModule", GRPOModule)  # put back what two_sided.py puts in its place
    monkeypatch.setattr("slmreason.runtime.preemption.listen", lambda: None)
    yield tmp_path
    KNOWN.pop("lemonade", None)
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def run_documented(holds: str, *more: str) -> None:
    """Runs the command of extend.md that has a word, with smaller budgets after its own options."""
    [words] = [words for words in shell_commands("extend") if holds in words]
    if words[0] == "slmreason":
        assert main([*words[1:], *more]) == 0
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words[1:], *more])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(words[1], run_name="__main__")
        assert stopped.value.code == 0


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_dataset_of_the_docs_is_read(example: Path) -> None:
    run_documented("lemonade-bands.jsonl", "--curriculum.probe.attempts=2")
    found = {row["problem_id"]: (row["question"], row["answer"]) for row in rows("lemonade-bands.jsonl")}
    assert set(found) == {"a1", "a2", "a3"}
    assert found["a2"] == ("Ben had 15 lemons and sold 9. How many are left?", "6")


def test_the_named_dataset_of_the_docs_is_read(example: Path) -> None:
    run_documented("named-bands.jsonl", "--curriculum.probe.attempts=2")
    assert [row["problem_id"] for row in rows("named-bands.jsonl")] == ["a1", "a2", "a3"]


def test_the_reward_of_the_docs_decides_what_is_right(example: Path) -> None:
    run_documented("near.yaml", *TINY, FEW)
    from near import NearReward  # type: ignore[import-not-found]

    saved = yaml.safe_load(Path("runs/near/config.yaml").read_text())["reward"]
    assert saved == {"class_path": "near.NearReward", "init_args": {"share": 0.1}}
    problem = Problem("a1", "Ann has 4 bags with 6 lemons each. How many lemons has she?", "24")
    near = NearReward(share=0.1)
    verdicts = [near(problem, text) for text in ("so it is 24", "about 23", "20", "none", "")]
    assert [(verdict.reward, verdict.correct) for verdict in verdicts] == [
        (1.0, True), (0.5, True), (0.0, False), (0.0, False), (0.0, False)
    ]  # fmt: skip
    with open("runs/near/round-01/grpo/metrics.csv") as file:
        rewards = [float(row["grpo/reward_step"]) for row in csv.DictReader(file) if row["grpo/reward_step"]]
    assert rewards
    # What the run's own rollouts earned: half points come from this reward alone.
    samples = rows("runs/near/round-01/grpo/samples.jsonl")
    assert {sample["reward"] for sample in samples} <= {0.0, 0.5, 1.0}
    assert all(sample["correct"] == (sample["reward"] > 0) for sample in samples)


def test_the_reward_functions_of_the_docs_are_terms_of_the_reward(example: Path) -> None:
    run_documented("shaping.yaml", *TINY, FEW)
    samples = rows("runs/shaping/round-01/grpo/samples.jsonl")
    for sample in samples:
        weighted = [(sample[f"reward/{name}"], weight) for name, weight in
                    {"AnswerReward": 1.0, "brevity": 0.01, "think_format": 0.2, "number": 0.1}.items()]  # fmt: skip
        assert sample["reward"] == pytest.approx(sum(score * weight for score, weight in weighted if score is not None))
        assert sample["correct"] == (sample["reward/AnswerReward"] == 1.0)
        assert (sample["extra/last_number"] is None) == (sample["reward/number"] is None)
    assert samples
    assert max(read_column("runs/shaping", "grpo/reward/brevity_step")) < 0


def test_the_order_of_the_docs_draws_and_is_logged(example: Path) -> None:
    run_documented("weakest.yaml", *TINY, FEW, "--grpo.max_sampled_groups=6")
    assert yaml.safe_load(Path("runs/weakest/config.yaml").read_text())["grpo"]["order"] == {
        "class_path": "weakest.WeakestKind"
    }
    shares = read_column("runs/weakest", "grpo/order/short_step")
    assert shares
    assert all(0 < share < 1 for share in shares)
    assert max(read_column("runs/weakest", "grpo/sampled_groups_step")) <= 6


def test_the_teacher_of_the_docs_is_checked_like_any_other(example: Path) -> None:
    run_documented("worksheet.yaml", *TINY)
    made = {row["problem"]["id"]: row["candidates"] for row in rows("runs/worksheet/round-01/sft/bridge.jsonl")}
    teachers = {i: [c for c in found if c["trace"]["provenance"] == "teacher"] for i, found in made.items()}
    solutions = {row["id"]: row["solution"] for row in rows("worksheet.jsonl")}
    assert {i: found[0]["trace"]["text"] for i, found in teachers.items()} == {i: solutions[i] for i in teachers}
    assert "a3" in teachers
    assert [c["rejected"] for c in teachers["a3"]] == ["false equation: 3 * 5 = 16", None]
    assert teachers["a3"][1]["trace"]["text"] == "3 * 5 = 15\n15 + 2 = 17\nThe answer is \\boxed{17}."  # the dataset's
    assert all(c["rejected"] is None for i in teachers.keys() - {"a3"} for c in teachers[i])
    refused = [row["reason"] for row in rows("runs/worksheet/round-01/sft/rejects.jsonl") if row["id"] == "a3"]
    assert "false equation: 3 * 5 = 16" in refused


def test_the_engine_of_the_docs_samples_as_ours_does(example: Path, student: Student) -> None:
    from plain_engine import PlainEngine  # type: ignore[import-not-found]

    questions = ["Tom has 3 apples and buys 4.", "What is 12 + 30 - 5?", "Ann has 9 pens and loses 2 of them."]
    prompts = [student.encode_question(question) for question in questions]
    greedy, warm = Sampling(24, temperature=0.0), Sampling(24, temperature=0.8, top_p=0.9, seed=3)
    ours, theirs = (engine.generate(student, prompts, 1, greedy) for engine in (HFEngine(), PlainEngine()))
    assert [[c.token_ids for c in group] for group in theirs] == [[c.token_ids for c in group] for group in ours]
    assert [[c.truncated for c in group] for group in theirs] == [[c.truncated for c in group] for group in ours]
    # (Greedily transformers reports the scores at temperature 1, as ours does.)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.tensor(yours[0].log_probs), torch.tensor(mine[0].log_probs), rtol=1e-3, atol=1e-4
        )
    state = torch.get_rng_state()
    together = PlainEngine().generate(student, prompts, 3, warm)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(group) for group in together] == [3, 3, 3]
    assert PlainEngine().generate(student, prompts[1:2], 3, warm) == together[1:2]


def test_the_engine_of_the_docs_trains(example: Path) -> None:
    run_documented("plain_engine.yaml", *TINY, FEW)
    assert read_column("runs/plain", "grpo/sampler_mismatch")
    assert max(read_column("runs/plain", "grpo/sampler_mismatch")) < 1e-2


def test_the_loss_of_the_docs_is_trained_on(example: Path) -> None:
    run_documented("two_sided.py", *TINY, FEW)
    assert read_column("runs/two-sided", "grpo/capped")
    assert min(read_column("runs/two-sided", "grpo/gradient_norm")) > 0


def test_the_loss_of_the_docs_against_its_formula(example: Path) -> None:
    from two_sided import two_sided  # type: ignore[import-not-found]

    old, advantages, weights = (
        torch.tensor([-1.0, -2.0, -0.5]),
        torch.tensor([1.0, -1.0, 2.0]),
        torch.tensor([0.2, 0.3, 0.5]),
    )
    new = (old + torch.tensor([0.0, 1.0, -0.3])).requires_grad_()
    loss = two_sided(new, old, advantages, weights, cap=2.0)
    loss.backward()
    # Ratios 1, 2.718 and 0.741: the second is capped at 2 and pulls no more, the others are within all bounds.
    assert loss.item() == pytest.approx(-(0.2 * 1 + 0.3 * -2 + 0.5 * 2 * 0.740818), rel=1e-5)
    torch.testing.assert_close(new.grad, torch.tensor([-0.2, 0.0, -0.740818]), rtol=1e-5, atol=1e-6)


def read_column(run: str, name: str) -> list[float]:
    with open(Path(run) / "round-01" / "grpo" / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


# -- python.md ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in written("python") if name.endswith(".py")])
def test_the_scripts_of_the_python_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, text in written("python").items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(name)
    if name == "whole.py":
        assert "round 1 cft" in capsys.readouterr().out
        assert found["result"].folder == Path("runs/from-python")
    if name == "by_hand.py":
        assert len(found["data"].band_of) == 24
        assert (tmp_path / "by-hand" / "model.safetensors").is_file()
    if name == "sft_by_hand.py":
        assert found["student"].policy_version == 1


def test_the_parts_by_hand_take_under_15_lines() -> None:
    for name in ("by_hand.py", "sft_by_hand.py"):
        lines = [line for line in written("python")[name].splitlines() if line.strip()]
        assert len(lines) < 15
        assert not re.search(r"\b_\w", "\n".join(lines))  # no private names


def test_the_python_of_the_readme_asks_for_what_there_is() -> None:
    [whole] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [call] = [node for node in ast.walk(ast.parse(whole)) if isinstance(node, ast.Call) and node.keywords]
    [recipe] = [ast.literal_eval(node) for node in call.args]
    sections = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    config = parse(build_parser("fit", ""), [*as_arguments(recipe), *as_arguments(sections)])
    assert (config.sft.epochs, config.data.train) == (2, "embedded:chain/train?count=64")
