"""`slmreason report`: what a run did, from its files alone."""

from __future__ import annotations

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import Parser
from slmreason.cli.errors import ConfigError
from slmreason.report.page import write_report


def options(parser: Parser) -> None:
    parser.add_function_arguments(write_report, sub_configs=False, as_positional=True)


def prepare(request: Request) -> Job:
    def job() -> None:
        try:
            path = write_report(**vars(request.config))
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        print(f"report: {path}")

    return Job(job)


COMMAND = Command(name="report", options=options, prepare=prepare, reads_config=False)
