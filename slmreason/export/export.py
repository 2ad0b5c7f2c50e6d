"""A run's student as a folder that other tools load: merged or as an adapter, with a card that says how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from slmreason.curriculum.resume import load_weights, newest_checkpoint
from slmreason.evaluate.benchmarks import Score
from slmreason.run.files import write_text
from slmreason.run.folder import RunFolder
from slmreason.runtime.redact import redact
from slmreason.student import Lora, Student

Form = Literal["merged", "adapter"]
Dtype = Literal["float32", "bfloat16", "float16"]


def export(run: Path, out: Path, form: Form = "merged", dtype: Dtype | None = None) -> None:
    """Writes the student of a run, as its newest checkpoint has it.

    Args:
        run: A run folder; the run may be unfinished.
        out: A folder that does not exist yet, or is empty.
        form: `merged` folds LoRA adapters into the weights; `adapter` writes them alone, in peft's form.
        dtype: Of the weights that are written; what they were trained in when not given.

    Raises:
        ValueError: there is no such run, it has no adapters to write or none that stand alone, or `out` is taken.
    """
    files = RunFolder(run)
    config_file = files.config
    if not config_file.is_file():
        raise ValueError(f"export: {run} is not a run folder ({config_file} is missing)")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"export: {out} exists already and is not an empty folder")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if form == "adapter" and config["student"]["lora"] is None:
        raise ValueError(f"export: {run} trained all weights (student.lora is not set); use --form merged")
    if form == "adapter" and Lora(**config["student"]["lora"]).changes_base:
        raise ValueError(
            f"export: {run} has student.lora.options that change the weights below the adapters, which say little "
            "without them; use --form merged"
        )
    student = trained_student(run, config)
    if dtype is not None:
        student.to(getattr(torch, dtype))
        student.base_model.config.dtype = getattr(torch, dtype)
    out.mkdir(parents=True, exist_ok=True)
    if form == "merged":
        student.save(out)
    else:
        weights = student.network.state_dict()
        if dtype is not None:  # adapters are kept in float32 whatever the student is converted to
            weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        student.network.save_pretrained(out, state_dict=weights)
        student.tokenizer.save_pretrained(out)
    summary = json.loads(files.summary.read_text(encoding="utf-8")) if files.summary.exists() else []
    write_text(out / "README.md", redact(model_card(out.resolve().name, config, summary, form)))


def trained_student(run: Path, config: dict[str, Any]) -> Student:
    """The student of a config with the weights of the run's newest checkpoint.

    Raises:
        ValueError: the run has no checkpoint yet, or the base model or the checkpoint cannot be loaded.
    """
    section = dict(config["student"])
    section["lora"] = Lora(**section["lora"]) if section["lora"] is not None else None
    student = Student(**section)
    trained_in = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(str(config["trainer"]["precision"]))
    if trained_in is not None:
        student.to(trained_in)
    found = newest_checkpoint(run)
    if found is None:
        raise ValueError(f"export: {run} has no checkpoint yet")
    load_weights(found[0], student)
    return student


def model_card(name: str, config: dict[str, Any], summary: Sequence[dict[str, Any]], form: Form) -> str:
    """Markdown with the settings, the table of stages and how to load the folder.

    Args:
        summary: what the run's `summary.json` holds.
    """
    scores = [[Score(**score) for score in row["scores"]] for row in summary]
    with_scores = next((row for row in scores if row), [])
    stages = [
        {**row, "seconds": round(row["seconds"]), "scores": [str(score) for score in mine] or [""] * len(with_scores)}
        for row, mine in zip(summary, scores, strict=True)
    ]
    # Markdown passes HTML through, so a name or an outcome is escaped; what is code stands in a code span.
    environment = Environment(
        loader=PackageLoader("slmreason", "export"), undefined=StrictUndefined, keep_trailing_newline=True,
        autoescape=True,
    )  # fmt: skip
    environment.filters["code"] = code_span
    model, system = config["student"]["model"], config["student"]["system_prompt"]
    question = "Ann has 3 apples and buys 4 more. How many apples has she?"
    instruction = config["student"]["instruction"]
    messages = [{"role": "user", "content": f"{question}\n{instruction}" if instruction else question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return environment.get_template("model_card.md.jinja").render(
        **config,
        base=hub_name(model),
        pool=pool_name(config["data"]["train"]),
        license=licence(model),
        messages=messages,
        name=name,
        form=form,
        stages=stages,
        version=version("slmreason"),
        headings=[f"{score.benchmark} (n={score.problems})" for score in with_scores],
    )


def pool_name(train: str | list[Any]) -> str:
    """What a run trained on, by the `data.train` of its config."""
    entries = [train] if isinstance(train, str) else train
    return ", ".join(str(entry["path"]) if isinstance(entry, dict) else str(entry) for entry in entries)


def hub_name(model: str) -> str | None:
    """What the hub calls a model, as far as can be told: a folder may say it in its config."""
    folder = Path(model)
    if folder.is_dir():
        config = folder / "config.json"
        said = json.loads(config.read_text(encoding="utf-8")).get("_name_or_path", "") if config.is_file() else ""
        return said if _HUB_NAME.fullmatch(said) and not Path(said).exists() else None
    return model if _HUB_NAME.fullmatch(model) else None


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def licence(model: str) -> str | None:
    """The licence that a model's own card names; None where there is no card at hand, or it names none."""
    if model.startswith("embedded:"):
        return "apache-2.0"
    card: Any = Path(model) / "README.md"
    if not Path(model).is_dir():
        name = hub_name(model)
        card = try_to_load_from_cache(name, "README.md") if name else None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    head = re.match(r"---\n(.*?)\n---\n", Path(card).read_text(encoding="utf-8"), re.DOTALL)
    fields = yaml.safe_load(head[1]) if head else None
    named = fields.get("license") if isinstance(fields, dict) else None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.-]+", named) else None


def code_span(text: str) -> Markup:
    """A text as a code span of Markdown, which shows it as it is, however many backticks it has itself."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return Markup(f"{fence}{pad}{' '.join(text.split())}{pad}{fence}")
