"""A command from its arguments to its exit status, and what is said where it did not come to its end."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException

from slmreason.cli.command import Command, Job, Request
from slmreason.cli.config import command_parser, parse
from slmreason.cli.errors import ConfigError, fail
from slmreason.cli.help import group_help, group_of
from slmreason.cli.screen import quiet, tell
from slmreason.rollout.engine import EngineError
from slmreason.run.files import NO_ROOM
from slmreason.runtime import preemption
from slmreason.teacher.prompted import TeacherError
from slmreason.verify.verdicts import RewardError

MISTAKES = (ConfigError, ValueError, FileNotFoundError, MisconfigurationException)
"""What is raised before the long part begins: a mistake in the arguments, the config or the data."""
LATE_MISTAKES = (ConfigError, MisconfigurationException, RewardError)
"""Of the same kind, found in the long part: other errors there are no mistake of the user, and show their traceback."""


def run(command: Command, args: Sequence[str]) -> int:
    """Does what a command is asked for.

    Returns:
        0; 2 with one clear message when the arguments, the config or the data they name are wrong; 1 with one when the
        disk is full, the teacher cannot be asked, the rollout engine failed or a run of a comparison did; 130 after
        Ctrl-C.

    Raises:
        SystemExit: with 143, after SIGTERM.
    """
    quiet()
    asks_for_help = any(arg == "-h" or arg.partition("=")[0].endswith("help") for arg in args)
    if asks_for_help:  # what stands under the settings' fields, which takes a while to read
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        group = group_of(args)
        if group is not None and command.reads_config:
            page = command_parser(command).format_help()
            print(page if group == "all" else group_help(page, group))
            return 0
        job = prepared(command, args)
    except MISTAKES as error:
        return fail(error)
    preemption.listen()
    try:
        return job.do() or 0
    except BaseException as error:
        status = explained(error, job)
        if status is None:
            raise
        return status


def prepared(command: Command, args: Sequence[str]) -> Job:
    """What there is to do.

    Raises:
        ConfigError, ValueError, FileNotFoundError, MisconfigurationException: the arguments, the config or the data
            they name are wrong.
    """
    return command.prepare(requested(command, args))


def requested(command: Command, args: Sequence[str]) -> Request:
    """A command with its parsed arguments; random numbers are seeded as they say.

    Raises:
        ConfigError: the arguments or the config are wrong.
    """
    parser = command_parser(command)
    config = parse(parser, command.arguments(args))
    if command.reads_config:
        L.seed_everything(config.seed_everything, verbose=False)
    return Request(parser, tuple(args), config)


def explained(error: BaseException, job: Job) -> int | None:
    """Says to a person what ended a job, and how to go on with it.

    Returns:
        The exit status; None where the error is to be raised.
    """
    if isinstance(error, LATE_MISTAKES):
        return fail(error)
    go_on = job.go_on()
    if isinstance(error, SystemExit) and error.code == preemption.EXIT_STATUS:
        tell(f"stopped by SIGTERM; what has been done is kept, {go_on}")
        return None
    if _is_from_the_keyboard(error):
        tell(f"stopped from the keyboard; what has been done is kept, {go_on}")
        return 128 + signal.SIGINT
    if isinstance(error, TeacherError | EngineError):
        return fail(f"{error}\nwhat has been done is kept, {go_on}", status=1)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        file = f" ({error.filename})" if error.filename else ""
        return fail(
            f"{error.strerror or error}{file}: what was written before is whole, the newest checkpoint too; make room "
            f"and {go_on}",
            status=1,
        )
    if isinstance(error, Exception):
        error.add_note(f"what has been done is kept, {go_on}")  # stands below the traceback
    return None


def _is_from_the_keyboard(error: BaseException) -> bool:
    """Within a fit Lightning catches the key and leaves with a status of its own."""
    left_by_lightning = isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    return isinstance(error, KeyboardInterrupt) or left_by_lightning
