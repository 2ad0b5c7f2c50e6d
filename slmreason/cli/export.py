"""`slmreason export`: a run's student for other tools."""

from __future__ import annotations

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser
from slmreason.cli.errors import ConfigError
from slmreason.export.export import export


def options(parser: Parser) -> None:
    parser.add_function_arguments(export, sub_configs=False, as_positional=True)


def prepare(request: Request) -> Job:
    def job() -> None:
        try:
            export(**vars(request.config))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        print(f"student: {request.config.out}")

    return Job(job)


COMMAND = Command(name="export", options=options, prepare=prepare, reads_config=False)
