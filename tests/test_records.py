"""Records in their JSON form."""

from __future__ import annotations

import json

import pytest

from slmreason.records import Problem, RolloutGroup, Turn, from_json, problem_key, to_json

PLAIN = Problem("p", "How many?", "3")
AFTER = Problem("p", "How many?", "3", turns=(Turn("system", "Count."), Turn("user", "Hi."), Turn("assistant", "Yes?")))


def test_turns_are_in_the_json_form_where_there_are_any_and_read_back() -> None:
    assert "turns" not in to_json(PLAIN)
    assert "turns" not in to_json(RolloutGroup(PLAIN, ()))["problem"]
    assert to_json(AFTER)["turns"][0] == {"role": "system", "text": "Count."}
    for problem in (PLAIN, AFTER):
        assert from_json(Problem, json.loads(json.dumps(to_json(problem)))) == problem


def test_a_turn_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="Turn: role must be one of system, user, assistant, not 'tool'"):
        from_json(Problem, to_json(PLAIN) | {"turns": [{"role": "tool", "text": "3"}]})


def test_the_key_tells_problems_apart_by_what_was_said_before_and_not_by_spacing() -> None:
    assert PLAIN.key == problem_key(" How  many?", "3 ")
    assert AFTER.key != PLAIN.key
    assert AFTER.key == problem_key("How many?", "3", AFTER.turns)
    swapped = (AFTER.turns[0], Turn("assistant", "Hi."), Turn("user", "Yes?"))
    assert problem_key("How many?", "3", swapped) != AFTER.key


def test_the_key_of_a_problem_without_turns_is_that_of_files_written_before_there_were_any() -> None:
    assert PLAIN.key == "e6acd46b663c08e2"


def test_a_whole_question_says_who_said_what() -> None:
    assert PLAIN.whole_question == "How many?"
    assert AFTER.whole_question == "system: Count.\n\nuser: Hi.\n\nassistant: Yes?\n\nuser: How many?"
