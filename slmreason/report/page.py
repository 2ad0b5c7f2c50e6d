"""`slmreason report`: one HTML page of a run, made of the run's files alone.

It needs no network and shows what a model wrote as text, never as markup.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.text import Text

from slmreason.data.pooled import Pooled
from slmreason.data.posterior import HALF_LIFE, Posterior, fitted_prior
from slmreason.data.strata import Bands, likeliest
from slmreason.evaluate.compare import ArmResult, Outcome, token_kinds
from slmreason.evaluate.curves import Curves
from slmreason.records import TOKEN_KINDS, Band, BridgeResult, Critique, Evidence, Fault, Place, from_json
from slmreason.report import pictures
from slmreason.report.terminal import area_and_since, tokens_text
from slmreason.run.files import read_lines, write_file, write_text
from slmreason.run.folder import RunFolder, StageFolder
from slmreason.runtime.redact import shown

GRPO_CURVES = {
    "reward": "grpo/reward_step",
    "informative groups": "grpo/informative_step",
    "groups that all failed": "grpo/all_zero_step",
    "entropy, nats": "grpo/entropy",
    "completion tokens": "grpo/completion_tokens_step",
    "cut at the token limit": "grpo/truncated_step",
}


def write_report(run: Path, out: Path | None = None, examples: int = 6) -> Path:
    """Writes the page of a run.

    Args:
        run: Folder of the run.
        out: The HTML file; `report.html` in that folder.
        examples: Traces, critiques and answers of each kind that are shown.

    Returns:
        Where it was written.

    Raises:
        ValueError: the folder holds no run, or a file of it cannot be read.
    """
    if examples < 1:
        raise ValueError(f"--examples must be at least 1, got {examples}")
    if not RunFolder(run).summary.exists():
        raise ValueError(f"{run}: no run there, or none that has finished a stage (summary.json is missing)")
    path = out or run / "report.html"
    write_text(path, _page("run", contents(run, examples)))
    return path


def write_comparison(
    folder: Path,
    results: Sequence[ArmResult],
    outcomes: Sequence[Outcome],
    budget: int,
    curves: Sequence[Curves] = (),
) -> None:
    """Writes the page of a comparison, `report.html`, and its pictures, `arms.png` and, with curves, `curves.png`."""
    drawn = [(curve, _markup(pictures.budgets(curve))) for curve in curves]
    shown_as = {"name": folder.resolve().name, "results": results, "outcomes": outcomes, "budget": budget,
                "token_kinds": token_kinds(outcomes),
                "picture": _markup(pictures.arms(results)), "curves": drawn, "tokens_text": tokens_text,
                "area_and_since": area_and_since}  # fmt: skip
    write_text(folder / "report.html", _page("comparison", shown_as))
    _write_png(folder / "arms.png", pictures.arms(results))
    if curves:
        _write_png(folder / "curves.png", pictures.budgets(curves[0]))


def _markup(figure: Figure) -> Markup:
    return Markup(pictures.as_svg(figure))  # noqa: S704 - our own, names in it are escaped


def _write_png(path: Path, figure: Figure) -> None:
    """Writes a picture that lies on a white page."""
    for text in figure.findobj(Text):
        text.set_color("black")
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _page(name: str, shown_as: Mapping[str, Any]) -> str:
    """A template filled in. What it is given is text, but for pictures: markup in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: value if isinstance(value, Markup) else shown(str(value)),
    )  # fmt: skip
    return environment.get_template(f"{name}.html.jinja").render(shown_as) + "\n"


def contents(run: Path, examples: int) -> dict[str, Any]:
    """What the page shows."""
    stages = json.loads(RunFolder(run).summary.read_text())
    config = yaml.safe_load(RunFolder(run).config.read_text())
    ran = [stage for stage in stages if stage["scores"]]
    names = [score["benchmark"] for score in ran[0]["scores"]] if ran else []
    spent = [_difference(now["tokens"], before["tokens"]) for before, now in zip(stages, stages[1:], strict=False)]
    labels = [stage["stage"] for stage in stages]
    drawn: dict[str, str] = {}
    if ran:
        drawn["accuracy"] = pictures.accuracy([s["stage"] for s in ran], {
            name: [_interval(stage["scores"], name) for stage in ran] for name in names
        })  # fmt: skip
    if points := list(read_lines(RunFolder(run).curve)):
        drawn["against_tokens"] = _against_tokens(points)
    if migration := _migration(run, Bands(**config["data"]["bands"])):
        drawn["flow"] = pictures.flow(*migration)
    if lines := _curves(run):
        drawn["curves"] = pictures.curves(lines)
    if spent:
        shown_kinds = [kind for kind in TOKEN_KINDS if any(kind in tokens for tokens in spent)]
        kinds = {kind: [tokens.get(kind, 0) / 1000 for tokens in spent] for kind in shown_kinds}
        drawn["tokens"] = pictures.bars(labels[1:], kinds, "thousand tokens")
        drawn["minutes"] = pictures.bars(labels[1:], {"minutes": [s["seconds"] / 60 for s in stages[1:]]}, "minutes")
    return {
        "name": run.resolve().name,
        "config": config,
        "stages": stages,
        "benchmarks": names,
        "validated": [
            (stage["stage"], stage["validated"], stage.get("kept", "")) for stage in stages if stage.get("validated")
        ],
        "scores": [(stage["stage"], {s["benchmark"]: s for s in stage["scores"]}) for stage in ran],
        "pictures": {name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704 - our own, model text is not in it
        "bridged": _bridged(run)[:examples],
        "critiques": _critiques(run)[:examples],
        "answers": _changed_answers(run, ran, examples),
        "rejects": _rejects(run),
    }


def _against_tokens(points: Sequence[Mapping[str, Any]]) -> str:
    """The picture of what the lines of curve.jsonl say."""
    tokens = [sum(point["tokens"].values()) for point in points]
    scores: dict[str, list[tuple[float, float, float]]] = {}
    for score in (score for point in points for score in point["scores"]):
        scores.setdefault(score["benchmark"], []).append((score["value"], score["low"], score["high"]))
    return pictures.against_tokens(tokens, scores)


def _difference(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {kind: now[kind] - before.get(kind, 0) for kind in now}


def _interval(scores: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float, float] | None:
    found = [score for score in scores if score["benchmark"] == name]
    return (found[0]["value"], found[0]["low"], found[0]["high"]) if found else None


def _stage_folders(run: Path) -> Iterator[tuple[Place, StageFolder]]:
    """The stages that were begun, in the order they were run, each with its folder."""
    order, files = {"sft": 0, "grpo": 1, "cft": 2}, RunFolder(run)
    places = [place for place in files.stages() if place.stage in order]
    for place in sorted(places, key=lambda place: (place.round, order[place.stage])):
        yield place, files.stage(place)


def _migration(
    run: Path, bands: Bands
) -> tuple[list[tuple[str, dict[str, int]]], list[dict[tuple[str, str], int]]] | None:
    """Columns of the flow picture, and how many problems went from which band to which between them.

    The first column is each problem's first evidence, the others what was known by the end of each stage.
    """
    known: dict[str, Band] = {}
    first: dict[str, Band] = {}
    columns: list[tuple[str, dict[str, Band]]] = []
    pooled = Pooled(bands.fading or HALF_LIFE)
    place = None
    for row in read_lines(RunFolder(run).ledger):
        label = Place(row["round"], row["stage"]).label
        if place not in (None, label):
            columns.append((place or "", _known(known, pooled, bands)))
        place = label
        band = bands.of(row["successes"] / row["attempts"])
        first.setdefault(row["problem_id"], band)
        known[row["problem_id"]] = band
        pooled.add(Evidence(row["problem_id"], row["attempts"], row["successes"], row["policy_version"]))
    if place is not None:
        columns.append((place, _known(known, pooled, bands)))
    if not columns:
        return None
    columns = [("at first", first), *columns][: pictures.FLOW_COLUMNS]
    moves: list[dict[tuple[str, str], int]] = [
        dict(Counter((str(before.get(i, "unknown")), str(band)) for i, band in after.items()))
        for (_, before), (_, after) in zip(columns, columns[1:], strict=False)
    ]
    return [(label, dict(Counter(found.values()))) for label, found in columns], moves


def _known(newest: Mapping[str, Band], pooled: Pooled, bands: Bands) -> dict[str, Band]:
    """The bands as the run saw them: by the newest evidence, or by the posterior."""
    if bands.fading is None:
        return dict(newest)
    rows = pooled.rows(list(newest))
    found, _ = likeliest(Posterior.of(pooled.counts_in(rows), fitted_prior(pooled.first_in(rows))), bands)
    return dict(zip(newest, found, strict=True))


def _curves(run: Path) -> dict[str, dict[str, pictures.Points]]:
    """What was logged of each optimizer step: title -> stage -> points."""
    found: dict[str, dict[str, pictures.Points]] = {}
    for place, folder in _stage_folders(run):
        if not folder.metrics.exists():
            continue
        with open(folder.metrics, newline="") as file:
            rows = list(csv.DictReader(file))
        wanted = GRPO_CURVES if place.stage == "grpo" else {f"{place.stage} loss": f"{place.stage}/loss_step"}
        for title, column in wanted.items():
            if points := [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]:
                found.setdefault(title, {})[place.label] = points
    return found


def _bridged(run: Path) -> list[BridgeResult]:
    """Problems whose chosen trace is not the raw one, those that it helped most first."""
    found = [
        from_json(BridgeResult, row)
        for _, folder in _stage_folders(run) if folder.bridge.exists()
        for row in read_lines(folder.bridge)
    ]  # fmt: skip
    changed = [r for r in found if r.chosen and r.chosen.provenance != "teacher" and len(r.candidates) > 1]
    return sorted(changed, key=lambda r: r.band != "hard")


def _critiques(run: Path) -> list[tuple[Critique, list[tuple[str, bool]]]]:
    """Critiques with all their parts, and the attempt's lines, each with whether it is the located one."""
    found = []
    for _, folder in _stage_folders(run):
        for row in read_lines(folder.critiques):
            critique = from_json(Critique, row)
            if critique.diagnosis and critique.repair and critique.new_trace:
                lines = [line for line in critique.attempt.splitlines() if line.strip()]
                marked = [(line, number == critique.diagnosis.wrong_step) for number, line in enumerate(lines, start=1)]
                found.append((critique, marked))
    return found


def _changed_answers(run: Path, ran: Sequence[Mapping[str, Any]], count: int) -> dict[str, list[dict[str, Any]]]:
    """Problems that the student gets right now and did not at first, and the other way round, with both answers."""
    if len(ran) < 2:
        return {}
    before, after = (
        {(row["benchmark"], row["problem_id"]): row for row in read_lines(RunFolder(run).answers(stage["stage"]))}
        for stage in (ran[0], ran[-1])
    )
    pairs = [{"before": before[key], "after": after[key]} for key in after if key in before]
    won = [pair for pair in pairs if pair["after"]["correct"] and not pair["before"]["correct"]]
    lost = [pair for pair in pairs if pair["before"]["correct"] and not pair["after"]["correct"]]
    return {
        f"right now, wrong at first ({len(won)})": won[:count],
        f"wrong now, right at first ({len(lost)})": lost[:count],
    }


def _rejects(run: Path) -> list[tuple[str, str, int]]:
    """(where, reason, how many) of what was rejected; numbers in a reason are left out: like stands by like."""
    counts: Counter[tuple[str, str]] = Counter()
    stages = [(place.label, folder.rejects) for place, folder in _stage_folders(run)]
    for location, path in [("pool", RunFolder(run).rejects), *stages]:
        for row in read_lines(path):
            reason = Fault.read(row["reason"]).kind
            what = row["where"] if location != "pool" else "data"
            counts[f"{location}: {what}", re.sub(r"\d+", "N", reason)] += 1
    return [(location, reason, count) for (location, reason), count in counts.most_common()]
