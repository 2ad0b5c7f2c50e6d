"""The page of a run: what it shows, that it is whole in itself, that nothing a model wrote is markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from slmreason.cli import main
from slmreason.data.strata import Bands
from slmreason.report import page as report
from slmreason.report.page import write_report
from tests.runs import SMALL

pytestmark = pytest.mark.slow
CHROMIUM = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)
HOSTILE = '</pre><script>alert(1)</script><img src="http://example.org/x.png">&amp;\x1b[31m'


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    args = [
        "--curriculum.evaluate=stage",
        "--benchmarks=[embedded:chain/test?count=30]",
        "--critique.max_trace_tokens=200",
    ]
    assert main(["fit", *SMALL, *args, f"--run_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    assert main(["report", str(run_dir)]) == 0
    return Page((run_dir / "report.html").read_text())


def test_every_part_of_a_run_is_there(run_dir: Path, page: Page) -> None:
    ids = {attributes.get("id") for tag, attributes in page.tags if tag == "figure"}
    assert ids == {"accuracy", "flow", "curves", "tokens", "minutes"}
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    for stage in json.loads((run_dir / "summary.json").read_text()):
        assert stage["stage"] in page.text
        for score in stage["scores"]:
            assert f"{100 * score['value']:.1f}" in page.text
    for heading in (
        "Accuracy",
        "How the problems moved",
        "Training",
        "Bridged traces beside the raw ones",
        "Set aside",
    ):
        assert heading in page.text
    bridged = [
        row for row in rows(run_dir / "round-01/sft/bridge.jsonl") if row["chosen"] and len(row["candidates"]) > 1
    ]
    assert any(row["problem"]["question"] in page.text for row in bridged)


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    outside = [
        v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href") and v and v[0] != "#"
    ]
    assert outside == []


def test_problems_in_the_flow_are_all_there_and_move_as_the_ledger_says(run_dir: Path) -> None:
    bands = Bands()
    found = report._migration(run_dir, bands)
    assert found is not None
    columns, moves = found
    ledger = rows(run_dir / "ledger.jsonl")
    pool = {row["problem_id"] for row in ledger}
    assert all(sum(counts.values()) == len(pool) for _, counts in columns)
    for (_, before), between, (_, after) in zip(columns, moves, columns[1:], strict=False):
        assert Counter({b: sum(n for (s, _), n in between.items() if s == b) for b in before}) == Counter(before)
        assert Counter({b: sum(n for (_, e), n in between.items() if e == b) for b in after}) == Counter(after)
    newest = {row["problem_id"]: bands.of(row["successes"] / row["attempts"]) for row in ledger}
    assert columns[-1][1] == dict(Counter(newest.values()))


def test_what_a_model_wrote_is_text(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / HOSTILE.replace("/", "").replace("\x1b", "")
    shutil.copytree(run_dir, copy)
    for name in ("base", "round-1-cft", "round-1-grpo", "round-1-sft"):
        path = copy / "answers" / f"{name}.jsonl"
        if path.exists():
            changed = [row | {"text": HOSTILE, "question": HOSTILE, "correct": name != "base"} for row in rows(path)]
            path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    out = write_report(copy, tmp_path / "x.html")
    text = out.read_text()
    seen = Page(text)
    assert HOSTILE.replace("\x1b", "\ufffd") in seen.text
    assert not [tag for tag, _ in seen.tags if tag in ("script", "img")]
    assert "\x1b" not in text


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no run there" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--examples=0"]) == 2
    assert "--examples must be at least 1" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_complaint(run_dir: Path, page: Page, tmp_path: Path, width: int) -> None:
    """Every picture has a size, nothing is wider than the window, and the console is silent."""
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify({
        wide: document.documentElement.scrollWidth - innerWidth,
        pictures: [...document.querySelectorAll("figure svg")].map(s => s.getBoundingClientRect().height)
    }) })</script>"""
    looked = tmp_path / "looked.html"
    looked.write_text((run_dir / "report.html").read_text().replace("</body>", probe + "</body>"))
    done = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},2000",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", looked.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None, done.stderr[-1000:]
    measured = json.loads(title[1].replace("&quot;", '"'))
    assert measured["wide"] <= 0
    assert len(measured["pictures"]) == 5
    assert all(height > 50 for height in measured["pictures"])
