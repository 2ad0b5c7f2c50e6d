"""Every command is one file, found by its name."""

from __future__ import annotations

import pytest

from slmreason.cli.command import COMMANDS, find
from slmreason.cli.config import build_parser, command_parser


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_found_by_its_name_and_its_help_is_the_listed_line(name: str) -> None:
    command = find(name)
    assert (command.name, command.help) == (name, COMMANDS[name])
    assert command_parser(command).description == COMMANDS[name]


OPTIONS = {
    "fit": {"resume"},
    "test": {"out"},
    "compare": {"arms", "seeds", "jobs", "out"},
    "report": {"run", "out", "examples"},
    "export": {"run", "out", "form", "dtype"},
    "data": {"rows"},
    "stratify": {"recorded", "out", "dry_run"},
    "bridge": {"out", "dry_run"},
    "critique": {"harvest", "out", "dry_run"},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_own(name: str) -> None:
    assert set(command_parser(find(name)).own_options) == OPTIONS[name]


def test_a_config_that_one_command_wrote_has_no_option_that_another_does_not_know() -> None:
    parser = command_parser(find("stratify"))
    written = parser.dump(parser.parse_args(["--out=x.jsonl", "--dry_run", "--recorded=y.jsonl"]))
    assert not {"out", "dry_run", "recorded"} & set(build_parser("fit", "").parse_string(written).keys())
