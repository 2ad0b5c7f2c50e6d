"""`slmreason data FILE`: how a data set is read, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser, instantiate
from slmreason.cli.errors import ConfigError
from slmreason.cli.screen import tell
from slmreason.report.data_view import data_view, lines


def options(parser: Parser) -> None:
    parser.add_argument("--rows", type=int, default=3, help="So many rows are shown whole.")


def arguments(args: Sequence[str]) -> Sequence[str]:
    """The data set may be named before all options, as anything that `data.train` takes."""
    if not args or args[0].startswith("-"):
        return args
    return [*args[1:], f"--data.train={args[0]}"]


def prepare(request: Request) -> Job:
    num_rows = request.config.pop("rows")
    if num_rows < 0:
        raise ConfigError(f"--rows must be at least 0, got {num_rows}")
    made = instantiate(request.parser, request.config, sections=("student", "data"))
    limit = made.data.max_prompt_tokens
    views = []
    for entry in made.data.entries:
        loaded = entry.read("data.train").within(
            made.student.prompt_length, limit, f"data.max_prompt_tokens is {limit}"
        )
        views.append(data_view(entry.path, loaded, made.student, num_rows))

    def job() -> None:
        for view in views:
            for line in lines(view):
                tell(line)

    return Job(job)


COMMAND = Command(name="data", options=options, prepare=prepare, arguments=arguments)
