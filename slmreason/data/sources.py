"""Where problems come from: embedded families, JSONL, Parquet, text, or a `datasets` hub name, all to `Problem`.

One rule for bad input. A *row* that cannot become a problem is rejected as a `Reject` with its id, file and line and
the reason, and the run goes on. A *file* that cannot be read to its end, or has no usable row at all, is refused: a
ValueError that names the file and, where known, the line. What slmreason itself wrote, and recorded rollouts, are
refused at the first bad row: a problem whose evidence has a hole would be sorted wrongly, without anybody noticing.

A reason is its kind, a colon, and what is particular to the row.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from slmreason.data.columns import Columns
from slmreason.data.files import is_file_name, local_rows
from slmreason.data.golds import as_set
from slmreason.data.gym import gym_problems
from slmreason.data.reading import Loaded, to_problems
from slmreason.data.rows import narrow_float, readable
from slmreason.embedded.families import DIALS, make_problems
from slmreason.records import Problem, Reject
from slmreason.verify.gym import PREFIX

__all__ = ["KNOWN", "Columns", "DatasetSpec", "Loaded", "as_set", "load_problems", "most_common", "split_source"]


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset by where it lies and what its columns mean."""

    path: str
    split: str = "test"
    subset: str | None = None
    revision: str | None = None
    columns: Columns = Columns()


KNOWN: dict[str, DatasetSpec] = {
    "openai/gsm8k": DatasetSpec("openai/gsm8k", "train", "main", columns=Columns(answer_format="hash")),
    "gsm8k": DatasetSpec("openai/gsm8k", "test", "main", columns=Columns(answer_format="hash")),
    "gsm8k_platinum": DatasetSpec("madrylab/gsm8k-platinum", "test", "main", columns=Columns(answer_format="hash")),
    "svamp": DatasetSpec("ChilleD/SVAMP", columns=Columns(question="{Body} {Question}", answer="Answer", id="ID")),
    "mawps": DatasetSpec("MU-NLPC/Calc-mawps", columns=Columns(question="question|input", answer="result|target")),
    "math500": DatasetSpec(
        "HuggingFaceH4/MATH-500",
        # Its lists are roots and solutions ("enter them separated by commas"); points and triples stand in brackets.
        columns=Columns(question="problem", trace="solution", id="unique_id", any_order=True),
    ),
    "amc23": DatasetSpec("math-ai/amc23", columns=Columns(question="question|problem")),
    "aime24": DatasetSpec("math-ai/aime24", columns=Columns(question="problem|question", answer="answer|solution")),
    "minerva": DatasetSpec(
        "math-ai/minervamath",
        # Its own rule: a number may be one percent off (arXiv 2206.14858, OCWCourses).
        columns=Columns(answer="answer|solution", relative_tolerance=0.01),
    ),
    "olympiadbench": DatasetSpec(
        "math-ai/olympiadbench",
        columns=Columns(answer="final_answer", any_order="is_multiple_answer", tolerance="error"),
    ),
    "logiqa": DatasetSpec(
        "lucasmccabe/logiqa",
        revision="refs/convert/parquet",
        columns=Columns(
            question="{context} {query}", answer="correct_option", choices="options", answer_format="index"
        ),
    ),
}
"""Datasets with a name of their own. `name=path` reads a local file; where its columns differ both are named."""


def most_common(rejects: Sequence[Reject]) -> str:
    """The three commonest kinds of reason, with how often and where first: `not JSON (3, first a.jsonl, line 7)`."""
    kinds = [reject.fault.kind for reject in rejects]
    shown = [
        f"{kind} ({count}, first {rejects[kinds.index(kind)].where})" for kind, count in Counter(kinds).most_common(3)
    ]
    return "; ".join([*shown, "..."] if len(set(kinds)) > 3 else shown)


def split_source(source: str) -> tuple[str, str]:
    """(name, path) of `NAME=FILE`; the path is empty where the source is a name or a file by itself.

    A `=` may stand in a path: `d/split=train/part-0.jsonl`. A source that is a file is that file, and no name of ours
    but a known dataset's has a slash or a suffix.
    """
    name, equals, path = source.partition("=")
    if source.startswith(("embedded:", PREFIX)) or not equals or (os.path.isfile(source) and name not in KNOWN):
        return source, ""
    if name not in KNOWN and (os.sep in name or not name):
        return source, ""
    return name, path


def source_of(path: str) -> str:
    """What `Problem.source` is of the problems of a source."""
    if path.startswith("embedded:"):
        family, _, split = path.removeprefix("embedded:").partition("?")[0].partition("/")
        return f"embedded:{family}/{split or 'train'}"
    if path.startswith(PREFIX):
        return path.partition("?")[0]
    return readable(split_source(path)[0])


def load_problems(
    source: str,
    columns: Columns | None = None,
    split: str | None = None,
    limit: int | None = None,
    wants: Callable[[str], bool] | None = None,
) -> Loaded:
    """Reads a source.

    Args:
        source: `embedded:FAMILY/SPLIT?count=N&difficulty=1,2`, `reasoning_gym:NAME?size=N&difficulty=1,2`, a file
            (.jsonl, .json, .parquet, .csv, .tsv, and .gz), a `KNOWN` name, `NAME=FILE` for a known dataset in a local
            file (`logiqa=Test.txt` too), or any hub name.
        columns: overrides the known dataset's.
        split: overrides the known dataset's.
        limit: reads no more than so many rows.
        wants: whether problems keep a column of their rows for a reward function, by its name; None keeps none.

    Raises:
        ValueError: the source does not exist, cannot be read to its end, or gives no problem; the message names it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{source}: a limit of {limit} rows leaves no problem; it must be at least 1")
    if source.startswith("embedded:"):
        return Loaded(source, tuple(_embedded(source)[:limit]))
    if source.startswith(PREFIX):
        loaded = gym_problems(source, limit)
    else:
        loaded = _rows_of(source, columns, split, limit, wants)
    if not loaded.problems:
        seen = f"; all {len(loaded.rejects)} rows are bad, {_described(loaded.rejects)}" if loaded.rejects else ""
        raise ValueError(f"{source}: no usable problem{seen}")
    return loaded


def _rows_of(
    source: str,
    columns: Columns | None,
    split: str | None,
    limit: int | None,
    wants: Callable[[str], bool] | None,
) -> Loaded:
    """The problems of a file, a known dataset or a hub name."""
    name, path = split_source(source)
    spec = KNOWN.get(name, DatasetSpec(name, split="train"))
    spec = replace(spec, path=path or spec.path, columns=columns or spec.columns, split=split or spec.split)
    rows = local_rows(Path(spec.path)) if is_file_name(spec.path) else _hub_rows(spec)
    return to_problems(rows, spec.columns, readable(name), limit, wants)


def _described(rejects: Sequence[Reject]) -> str:
    """The first row that was rejected, and the kinds of reason where there are several."""
    several = len({reject.fault.kind for reject in rejects}) > 1
    first = f"the first in {rejects[0].where}: {rejects[0].reason}"
    return f"{first}; all reasons: {most_common(rejects)}" if several else first


def _embedded(source: str) -> list[Problem]:
    place, _, query = source.removeprefix("embedded:").partition("?")
    family, _, split = place.partition("/")
    options = parse_qs(query)
    unknown = sorted(set(options) - {"count", "difficulty"})
    if unknown:
        raise ValueError(f"{source}: unknown options {unknown}; there are count and difficulty")
    try:
        count = int(options.get("count", ["200"])[0])
        dial = tuple(int(d) for d in options["difficulty"][0].split(",")) if "difficulty" in options else None
    except ValueError as error:
        raise ValueError(f"{source}: count and difficulty take whole numbers ({error})") from error
    if family not in DIALS:
        raise ValueError(f"{source}: families are {', '.join(sorted(DIALS))}")
    if count < 1:
        raise ValueError(f"{source}: count must be at least 1")
    return make_problems(family, split or "train", count, dial)


def _hub_rows(spec: DatasetSpec) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        table = datasets.load_dataset(spec.path, spec.subset, split=spec.split, revision=spec.revision)
    except Exception as error:  # the hub client raises many kinds; each means: this dataset cannot be had
        known = ", ".join(sorted(KNOWN))
        raise ValueError(
            f"{spec.path}: neither a local file nor a dataset that the hub gave ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); known names: {known}"
        ) from error
    narrow = [name for name, kind in (getattr(table, "features", None) or {}).items()
              if getattr(kind, "dtype", None) in ("float16", "float32")]  # fmt: skip
    for number, row in enumerate(table):
        for column in narrow:
            if isinstance(row[column], float):
                row[column] = narrow_float(row[column])
        yield f"{spec.path}/{spec.split}, row {number}", row
