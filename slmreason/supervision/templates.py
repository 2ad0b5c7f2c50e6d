"""The texts that a student is asked with, beside its plain question: jinja files in `prompts/`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """The template of `prompts/NAME.jinja`."""
    return _environment().get_template(f"{name}.jinja")


@cache
def _environment() -> Environment:
    # Plain text for a language model, not HTML: nothing is escaped.
    loader = FileSystemLoader(Path(__file__).parent / "prompts")
    return Environment(loader=loader, undefined=StrictUndefined, autoescape=False)  # noqa: S701
