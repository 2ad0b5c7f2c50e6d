"""The teacher behind an API, against a server of our own that fails three times out of ten."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slmreason.cli import main
from slmreason.cli.config import build_parser, parse
from slmreason.cli.runs import program
from slmreason.embedded.families import make_problems, rebuild
from slmreason.records import Exemplar, Fault, Problem, Rollout, RolloutGroup
from slmreason.rollout.engine import Sampling
from slmreason.rollout.transformers import HFEngine
from slmreason.run import bars
from slmreason.student import Student
from slmreason.supervision.bridge import Bridge, Material
from slmreason.supervision.critique import Critic, CritiqueSettings
from slmreason.supervision.settings import BridgeSettings
from slmreason.teacher.openai import APITeacher
from slmreason.teacher.patience import PATIENCE
from slmreason.teacher.procedural import ProceduralTeacher
from slmreason.teacher.prompted import Answer, TeacherError
from slmreason.verify.answers import is_correct
from slmreason.verify.rewards import AnswerReward
from tests.runs import SMALL
from tests.scripted_server import CONTENT, TRANSPORT, Messages, ScriptedServer, true_brain

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")

PROBLEMS = make_problems("chain", "train", 120, (3, 4))
TRUTH = ProceduralTeacher()
SECRET = "sk-proj-Very_Secret.0123456789"

Make = Callable[..., APITeacher]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """An APITeacher of a server, its answers in the test's own folder."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def made(server: ScriptedServer | str, **options: Any) -> APITeacher:
        url = server if isinstance(server, str) else server.base_url
        return APITeacher(url, "m", **{"answers": str(tmp_path / "answers.jsonl")} | options)

    return made


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines() if line]


def one_word(_: Messages) -> str:
    return "\\boxed{1}"


# -- shapes of an answer --------------------------------------------------------------------------------------------

THOUGHTS = {"type": "reasoning", "text": "I think it is \\boxed{-1}"}
SHAPES: dict[str, Callable[[str], dict[str, Any]]] = {
    "parts": lambda text: {"message": {"content": [{"type": "text", "text": text}]}},
    "two parts": lambda text: {"message": {"content": [{"type": "text", "text": t} for t in (text[:5], text[5:])]}},
    "thoughts as a part": lambda text: {"message": {"content": [THOUGHTS, {"type": "text", "text": text}]}},
    "thinking of parts": lambda text: {
        "message": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "no"}]},
                                {"type": "text", "text": text}]}
    },
    "output_text": lambda text: {"message": {"content": [{"type": "output_text", "text": text, "annotations": []}]}},
    "a part without a type": lambda text: {"message": {"content": [{"text": text}]}},
    "a value in a part": lambda text: {"message": {"content": [{"type": "text", "text": {"value": text}}]}},
    "texts as parts": lambda text: {"message": {"content": [text]}},
    "one part": lambda text: {"message": {"content": {"type": "text", "text": text}}},
    "thoughts beside it": lambda text: {
        "message": {"content": text, "reasoning_content": "\\boxed{-1}", "refusal": None}
    },
    "no finish reason": lambda text: {"finish_reason": None, "message": {"content": text}},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_is_taken_in_whatever_shape_and_asked_for_once(make: Make, name: str) -> None:
    with ScriptedServer(true_brain(PROBLEMS), shape=SHAPES[name]) as server:
        assert make(server).solve(PROBLEMS[:3]) == TRUTH.solve(PROBLEMS[:3])
        assert server.attempts == 3


NO_ANSWERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "refusal": ({"message": {"content": None, "refusal": "I may not"}}, "the model refused: I may not", 1),
    "refusal as a part": (
        {"message": {"content": [{"type": "refusal", "refusal": "I may not"}]}}, "the model refused: I may not", 1
    ),
    "filtered": (
        {"finish_reason": "content_filter", "message": {"content": None}},
        "the server's content filter withheld the answer", 1,
    ),
    "filtered in its middle": (
        {"finish_reason": "content_filter", "message": {"content": "\\boxed{1"}},
        "the server's content filter withheld the answer", 1,
    ),
    "thoughts alone, cut off": (
        {"finish_reason": "length", "message": {"content": None, "reasoning_content": "so"}},
        "the answer was cut off at the token limit", 1,
    ),
    "thoughts alone": ({"message": {"content": None, "reasoning_content": "so"}}, "the answer is empty", 2),
    "thoughts as the only part": ({"message": {"content": [THOUGHTS]}}, "the answer is empty", 2),
    "no parts": ({"message": {"content": []}}, "the answer is empty", 2),
    "a call of a tool": (
        {"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": []}}, "the answer is empty", 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_is_set_aside_with_the_reason_and_not_paid_for_again(make: Make, name: str) -> None:
    choice, reason, asked = NO_ANSWERS[name]
    with ScriptedServer(one_word, shape=lambda _: choice) as server:
        teacher = make(server, max_retries=3)
        assert teacher.solve(PROBLEMS[:1]) == [None]
        assert [reject.reason for reject in teacher.drain_rejects()] == [reason]
        assert server.attempts == asked
        again = make(server)
        assert again.solve(PROBLEMS[:1]) == [None]
        assert [reject.reason for reject in again.drain_rejects()] == [reason]
        assert server.attempts == asked  # it is on disk


@pytest.mark.parametrize("content", [7, True, [7], [None], [["text"]]])
def test_a_content_of_another_kind_is_an_error_of_the_server(make: Make, content: Any) -> None:
    with (
        ScriptedServer(one_word, shape=lambda _: {"message": {"content": content}}) as server,
        pytest.raises(TeacherError, match="no chat completion in the body"),
    ):
        make(server, max_retries=0).solve(PROBLEMS[:1])


# -- thirty percent of all requests fail ----------------------------------------------------------------------------


def test_faults_of_network_and_server_are_overcome_and_nothing_is_asked_too_often(make: Make) -> None:
    with ScriptedServer(true_brain(PROBLEMS), TRANSPORT) as server:
        teacher = make(server, concurrency=16, max_retries=8)
        assert teacher.solve(PROBLEMS) == TRUTH.solve(PROBLEMS)  # all of them, in order
    assert teacher.drain_rejects() == []
    assert teacher.spent.attempts == server.attempts > len(PROBLEMS)
    assert {fate for fates in server.fates.values() for fate in fates} == {"good", *TRANSPORT}
    for fates in server.fates.values():  # asked until there was an answer, and not once more
        assert [fate in ("good", "slow") for fate in fates] == [False] * (len(fates) - 1) + [True]


def test_every_problem_is_answered_or_set_aside_with_a_reason(make: Make) -> None:
    with ScriptedServer(true_brain(PROBLEMS), TRANSPORT + CONTENT, rate=0.6) as server:
        teacher = make(server, concurrency=16, max_retries=1)
        answers = teacher.new_trace(PROBLEMS)
    rejects = teacher.drain_rejects()
    assert [reject.id for reject in rejects] == [p.id for p, a in zip(PROBLEMS, answers, strict=True) if a is None]
    assert 5 < len(rejects) < 60
    assert {reject.where for reject in rejects} == {"teacher new_trace"}
    reasons = {re.sub(r"[:.].*", "", reject.reason) for reject in rejects}
    assert reasons <= {
        "HTTP 429 Too Many Requests", "HTTP 500 Internal Server Error", "HTTP 502 no chat completion in the body",
        "Connection error", "the answer is empty", "the block of thoughts never closes",
        "there is no final answer in \\boxed{}",
    }  # fmt: skip
    assert len(reasons) > 3
    truth = TRUTH.new_trace(PROBLEMS)
    others = [a for a, right in zip(answers, truth, strict=True) if a not in (None, right)]
    assert others
    assert all(answer is not None and "-77" in answer for answer in others)  # only the checks can know that it is wrong
    assert max(server.counts.values()) <= 2
    assert len(server.counts) <= 2 * len(PROBLEMS)  # each asked, and asked once more where it could not be read


def test_a_completion_under_a_wrong_content_type_is_taken(make: Make) -> None:
    with ScriptedServer(true_brain(PROBLEMS), ("mislabelled",), rate=1.0) as server:
        assert make(server, max_retries=0).solve(PROBLEMS[:5]) == TRUTH.solve(PROBLEMS[:5])


def test_a_server_that_hangs_is_given_up_and_asked_again(make: Make) -> None:
    with ScriptedServer(one_word, ("slow",), rate=0.7) as server:
        teacher = make(server, timeout_s=0.15, max_retries=2, concurrency=8)
        answers = teacher.solve(PROBLEMS[:16])
        assert {fates[-1] for fates in server.fates.values()} == {"good", "slow"}
        assert [answer is None for answer in answers].count(True) == sum(
            fates == ["slow"] * 3 for fates in server.fates.values()
        )
    assert all(reject.reason == "no answer within 0.15 s" for reject in teacher.drain_rejects())


@pytest.mark.parametrize("concurrency", [1, 5])
def test_no_more_requests_are_in_flight_than_allowed(make: Make, concurrency: int) -> None:
    with ScriptedServer(one_word, delay_s=0.02) as server:
        make(server, concurrency=concurrency).solve(PROBLEMS[:40])
        assert server.most_in_flight == concurrency


def test_retry_after_is_waited_for(make: Make) -> None:
    with ScriptedServer(one_word, ("429",), rate=0.5, retry_after="1") as server:
        assert None not in make(server, max_retries=8).solve(PROBLEMS[:4])
        gaps = [b - a for times in server.times.values() for a, b in zip(times, times[1:], strict=False)]
    assert gaps
    assert min(gaps) >= 0.99  # the library's own first pause would be half a second at most


# -- nothing is paid for twice --------------------------------------------------------------------------------------


def test_what_is_on_disk_is_not_asked_for_and_failures_are_not_kept(make: Make, tmp_path: Path) -> None:
    with ScriptedServer(true_brain(PROBLEMS), ("500",), rate=0.5, retry_after="0.01") as server:
        first = make(server, max_retries=0)
        answers = first.solve(PROBLEMS)
        good = len(PROBLEMS) - len(first.drain_rejects())
        assert 20 < good == len(rows(tmp_path)) < 100
        again = make(server, max_retries=9)
        for ours, before in zip(again.solve(PROBLEMS), answers, strict=True):
            assert before in (None, ours)
        assert sum(fates.count("good") for fates in server.fates.values()) == len(PROBLEMS)
    gone = make(server.base_url, max_retries=0)  # the server is gone
    assert gone.solve(PROBLEMS) == TRUTH.solve(PROBLEMS)
    assert gone.spent.attempts == 0


def test_another_request_is_another_answer(make: Make) -> None:
    with ScriptedServer(one_word) as server:
        for options in ({}, {"temperature": 0.5}, {"extra_body": {"top_p": 0.9}}, {"max_completion_tokens": 9}):
            make(server, **options).solve(PROBLEMS[:3])
        APITeacher(server.base_url + "/", "m", answers=str(make(server)._answers.path)).solve(PROBLEMS[:3])
        assert server.attempts == len(server.counts) == 12


def test_the_same_question_twice_is_asked_once(make: Make) -> None:
    with ScriptedServer(true_brain(PROBLEMS)) as server:
        assert make(server).new_trace([PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]) == TRUTH.new_trace(
            [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]
        )
        assert server.attempts == 2


def test_a_torn_last_line_costs_one_answer(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedServer(true_brain(PROBLEMS)) as server:
        make(server, concurrency=1).solve(PROBLEMS[:10])
        path = tmp_path / "answers.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        assert make(server).solve(PROBLEMS[:12]) == TRUTH.solve(PROBLEMS[:12])
        assert server.attempts == 10 + 1 + 2
        assert "1 lines cannot be read" in caplog.text
        assert len(path.read_bytes().splitlines()) == 13
        make(server).solve(PROBLEMS[:12])
        assert server.attempts == 13


def test_killed_and_started_again_it_asks_nothing_again_that_was_answered(tmp_path: Path) -> None:
    script, path, concurrency = tmp_path / "ask.py", tmp_path / "answers.jsonl", 4
    script.write_text(
        "import sys\n"
        "from slmreason.embedded.families import make_problems\n"
        "from slmreason.teacher.openai import APITeacher\n"
        f"teacher = APITeacher(sys.argv[1], 'm', answers=sys.argv[2], concurrency={concurrency}, max_retries=9)\n"
        "answers = teacher.solve(make_problems('chain', 'train', 60, (3, 4)))\n"
        "print(len(answers) - answers.count(None), len(teacher.drain_rejects()), teacher.spent.attempts)\n"
    )
    with ScriptedServer(true_brain(PROBLEMS), ("cut", "500"), delay_s=0.03) as server:
        command = [sys.executable, str(script), server.base_url, str(path)]
        with subprocess.Popen(command) as child:
            while len(path.read_bytes().splitlines() if path.exists() else []) < 20:
                assert child.poll() is None
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
        kept = {json.loads(line)["text"] for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"}
        answered = {key: count for key, count in server.counts.items() if server.said.get(key) in kept}
        assert len(answered) == len(kept) < 50
        time.sleep(0.1)
        before = server.attempts
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        assert done.stdout.split() == ["60", "0", str(server.attempts - before)]
        for key, count in answered.items():
            assert server.counts[key] == count
        delivered = [fates.count("good") for fates in server.fates.values()]
        assert len(delivered) == 60
        assert sum(delivered) <= 60 + concurrency  # those that were on their way when it was killed


# -- budgets --------------------------------------------------------------------------------------------------------


def test_a_budget_of_requests_counts_every_attempt_and_stops_cleanly(make: Make, tmp_path: Path) -> None:
    with ScriptedServer(true_brain(PROBLEMS), ("500", "cut"), retry_after="0.01") as server:
        teacher = make(server, max_requests=50, max_retries=9, concurrency=8)
        answers = teacher.solve(PROBLEMS)
        assert server.attempts == teacher.spent.attempts == 50
        answered = [answer for answer in answers if answer is not None]
        assert 25 < len(answered) == len(rows(tmp_path)) < 50
        rejects = teacher.drain_rejects()
        assert {reject.reason for reject in rejects} == {"budget of 50 requests is used up"}
        assert len(answers) == len(answered) + len(rejects) == len(PROBLEMS)
        assert teacher.new_trace(PROBLEMS[:5]) == [None] * 5  # of the run, not of each call
        assert teacher.solve(PROBLEMS) == answers  # what is on disk is free
        assert server.attempts == 50
        rest = make(server, max_retries=9)
        assert rest.solve(PROBLEMS) == TRUTH.solve(PROBLEMS)
        assert sum(fates.count("good") for fates in server.fates.values()) == len(PROBLEMS)


def test_a_budget_of_tokens_ends_with_what_is_in_flight(make: Make) -> None:
    with ScriptedServer(one_word, delay_s=0.02) as server:
        teacher = make(server, max_tokens=1000, concurrency=4)
        answers = teacher.solve(PROBLEMS)
        largest = max(len(teacher.expected("solve", [p])[0][0]["content"].split()) + 1 for p in PROBLEMS)
        assert 1000 <= teacher.spent.tokens <= 1000 + 4 * largest
        assert server.attempts == len(answers) - answers.count(None)
    assert {reject.reason for reject in teacher.drain_rejects()} == {"budget of 1000 tokens is used up"}


def test_nothing_is_asked_on_a_budget_of_none(make: Make) -> None:
    with ScriptedServer(one_word) as server:
        assert make(server, max_requests=0).solve(PROBLEMS) == [None] * len(PROBLEMS)
        assert server.attempts == 0


# -- mistakes that more requests will not mend ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "HTTP 401 Unauthorized: .*; check teacher.api_key_env"),
        (403, "HTTP 403 Forbidden: .*; check teacher.api_key_env"),
        (404, "HTTP 404 Not Found: .*; check teacher.base_url and teacher.model"),
        (402, "HTTP 402 Payment Required: .*; check the account"),
        (400, rf"{PATIENCE} requests in a row got no answer, the last one: HTTP 400 Bad Request"),
        (500, rf"{PATIENCE} requests in a row got no answer, the last one: HTTP 500 Internal Server Error"),
    ],
)
def test_what_ails_every_request_ends_in_one_error(make: Make, status: int, words: str) -> None:
    with ScriptedServer(one_word, refuse=lambda *_: (status, "no such luck")) as server:
        teacher = make(server, concurrency=4, max_retries=0)
        with pytest.raises(TeacherError, match=rf"the teacher m at {server.base_url} cannot be asked: .*{words}"):
            teacher.solve(PROBLEMS)
        assert server.attempts <= 4 + (PATIENCE if status in (400, 500) else 0)  # what was in flight


def test_a_server_that_is_not_there_is_an_error_however_few_ask(make: Make) -> None:
    with ScriptedServer(one_word) as server:
        url = server.base_url
    with pytest.raises(TeacherError, match="2 requests in a row got no answer, .*Connection error.*refused"):
        make(url, max_retries=0).solve(PROBLEMS[:2])


# -- before a run ---------------------------------------------------------------------------------------------------


def test_an_api_that_lists_the_model_is_asked_nothing_more(make: Make) -> None:
    with ScriptedServer(one_word, models=("other", "m")) as server:
        make(server).check()
        assert (server.listed, server.attempts) == (1, 0)


@pytest.mark.parametrize("models", [("other",), (), 403, 404, 500])
def test_where_the_list_does_not_tell_one_question_does_and_is_counted(make: Make, models: Any, tmp_path: Path) -> None:
    with ScriptedServer(one_word, models=models, retry_after="0.01") as server:
        teacher = make(server)
        teacher.check()
        assert server.attempts == teacher.spent.attempts == 1
    assert not (tmp_path / "answers.jsonl").exists()  # no answer that anybody wants


@pytest.mark.parametrize(
    ("models", "status", "words"),
    [
        (401, 200, "HTTP 401 Unauthorized: .*; check teacher.api_key_env"),
        ((), 401, "HTTP 401 Unauthorized: .*; check teacher.api_key_env"),
        (404, 404, "HTTP 404 Not Found: .*; check teacher.base_url and teacher.model"),
        ((), 402, "HTTP 402 Payment Required: .*; check the account"),
        ((), 400, "HTTP 400 Bad Request: .*; check teacher.temperature, teacher.max_completion_tokens and"),
    ],
)
def test_an_api_that_would_answer_no_question_is_found_by_the_first(
    make: Make, models: Any, status: int, words: str
) -> None:
    refuse = lambda *_: None if status == 200 else (status, "no such luck")  # noqa: E731
    with ScriptedServer(one_word, refuse=refuse, models=models) as server:
        with pytest.raises(TeacherError, match=f"^the teacher m at {server.base_url} cannot be asked: {words}"):
            make(server).check()
        assert server.attempts == (status != 200)


def test_an_api_that_is_not_there_or_hangs_is_told_with_its_address(make: Make) -> None:
    with ScriptedServer(one_word, delay_s=1.0) as server:
        with pytest.raises(TeacherError, match="cannot be asked: no answer within 0.2 s; check teacher.base_url"):
            make(server, max_retries=0, timeout_s=0.2).check()
        url = server.base_url
    with pytest.raises(TeacherError, match=f"m at {url} cannot be asked: Connection error.*; check teacher.base_url"):
        make(url, max_retries=0).check()


def test_an_api_that_has_a_bad_moment_is_let_pass_with_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedServer(one_word, refuse=lambda *_: (500, "later"), models=500, retry_after="0.01") as server:
        make(server).check()
        assert server.attempts <= 3
    assert "cannot be asked: HTTP 500 Internal Server Error: Error code: 500 - later; that may pass, and" in caplog.text


def test_on_a_budget_of_none_the_api_need_not_be_there(make: Make) -> None:
    make("http://127.0.0.1:1/v1", max_requests=0).check()
    with ScriptedServer(one_word, refuse=lambda *_: (500, "later"), models=(), retry_after="0.01") as server:
        make(server, max_requests=1).check()  # the first try again is one too many
        assert server.attempts == 1


def test_a_request_that_the_api_refuses_is_set_aside_where_it_takes_others(make: Make) -> None:
    def too_long(messages: Messages, _: str) -> tuple[int, str] | None:
        return (400, "the context is too long") if PROBLEMS[7].question in messages[0]["content"] else None

    with ScriptedServer(one_word, refuse=too_long) as server:
        teacher = make(server, concurrency=4)
        answers = teacher.solve(PROBLEMS[:20])
        assert [i for i, answer in enumerate(answers) if answer is None] == [7]
        [reject] = teacher.drain_rejects()
        assert "the context is too long" in reject.reason
        assert server.attempts == 20  # not tried again


def test_a_single_prompt_that_is_forbidden_does_not_end_the_run(make: Make) -> None:
    def indecent(messages: Messages, _: str) -> tuple[int, str] | None:
        return (403, "flagged") if PROBLEMS[7].question in messages[0]["content"] else None

    with ScriptedServer(one_word, refuse=indecent) as server:
        teacher = make(server, concurrency=1)
        assert [i for i, answer in enumerate(teacher.solve(PROBLEMS[:20])) if answer is None] == [7]
    assert [reject.reason for reject in teacher.drain_rejects()][0].startswith("HTTP 403 Forbidden")


def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_asked(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with ScriptedServer(one_word) as server:
        with pytest.raises(ValueError, match="teacher.answers: .* is a file; a folder is needed there"):
            make(server, answers=str(tmp_path / "file" / "answers.jsonl")).solve(PROBLEMS[:2])
        assert server.attempts == 0


def test_halves_of_characters_do_no_harm(make: Make) -> None:
    with ScriptedServer(lambda messages: "\ud83d" + ("\\boxed{1}" if len(messages) > 1 else "")) as server:
        assert make(server).solve([Problem("p", "\ud83d?", "1")]) == ["?\\boxed{1}"]
        assert make(server).solve([Problem("p", "\ud83d?", "1")]) == ["?\\boxed{1}"]
        assert server.attempts == 2


def test_an_interrupted_batch_keeps_what_was_answered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(one_word, delay_s=0.05) as server:
        teacher = make(server, concurrency=4)
        put, seen = teacher._answers.put, []

        def interrupt(*args: Any) -> None:
            put(*args)
            seen.append(args)
            if len(seen) == 6:
                raise OSError("the disk is full")

        monkeypatch.setattr(teacher._answers, "put", interrupt)
        with pytest.raises(OSError, match="the disk is full"):
            teacher.solve(PROBLEMS)
        attempts = server.attempts
        assert attempts <= 6 + 2 * 4
        assert make(server).estimate({"solve": PROBLEMS}).startswith(f"solve: {120 - attempts} requests, {attempts} ")


# -- the key --------------------------------------------------------------------------------------------------------


def everything(error: BaseException | None, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> str:
    """All that a user, a log or a file could come to see."""
    shown = [repr(error), str(error), *traceback.format_exception(error)] if error else []
    while error is not None:
        shown.append(repr(vars(error)))
        error = error.__cause__ or error.__context__
    logs = [f"{record.getMessage()} {record.__dict__}" for record in caplog.records]
    return "\n".join([*shown, *logs, *(p.read_text() for p in tmp_path.rglob("*") if p.is_file())])


@pytest.mark.parametrize("status", [401, 403, 404, 400, 429, 500, 200])
def test_the_key_is_shown_nowhere_though_the_server_repeats_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    error: BaseException | None = None

    def refuse(_: Messages, authorization: str) -> tuple[int, str] | None:
        return None if status == 200 else (status, f"Incorrect API key provided: {authorization}. Try another.")

    with ScriptedServer(lambda _: f"\\boxed{{{SECRET}}}", refuse=refuse) as server:
        teacher = make(server, concurrency=2, max_retries=1)
        try:
            answers = teacher.solve(PROBLEMS[:2])
        except TeacherError as caught:
            error, answers = caught, []
        assert server.authorizations == {f"Bearer {SECRET}"}
    seen = everything(error, caplog, tmp_path)
    seen += repr(teacher) + str(vars(teacher)) + str(teacher.drain_rejects()) + str(answers)
    assert "[OPENAI_API_KEY]" in seen
    assert SECRET not in seen
    assert caplog.records


def test_the_key_is_no_part_of_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    parser = build_parser("fit", "")
    config = parse(parser, ["--teacher=slmreason.teacher.APITeacher", "--teacher.base_url=https://api.test/v1",
                            "--teacher.model=m", "--teacher.extra_body={top_p: 0.9}"])  # fmt: skip
    teacher = parser.instantiate_classes(config).teacher
    assert isinstance(teacher, APITeacher)
    assert teacher.parameters == {"temperature": 0.0, "max_completion_tokens": 4096, "top_p": 0.9}
    assert "api_key_env: OPENAI_API_KEY" in parser.dump(config)
    assert SECRET not in parser.dump(config) + str(config)


def test_a_missing_key_is_named_unless_the_api_is_on_this_machine(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for url in ("http://127.0.0.1:9/v1", "http://localhost:9/v1", "http://[::1]:9/v1"):
        make(url)
    for url in ("https://api.openai.com/v1", "http://10.0.0.7:8000/v1", "http://localhost.evil.com/v1"):
        with pytest.raises(ValueError, match=f"environment variable MY_KEY .*has no key for {url}"):
            make(url, api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", SECRET)
    make("https://api.openai.com/v1", api_key_env="MY_KEY")
    assert list(tmp_path.iterdir()) == []  # no file is made before there is an answer


@pytest.mark.parametrize("word", ["EMPTY", "1"])
def test_a_placeholder_for_a_key_does_not_spoil_answers(make: Make, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", word)
    with ScriptedServer(lambda _: f"EMPTY 11 \\boxed{{{word}}}") as server:
        assert make(server).solve(PROBLEMS[:1]) == [f"EMPTY 11 \\boxed{{{word}}}"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_url": "127.0.0.1:8000"}, "teacher.base_url: '127.0.0.1:8000' is no address"),
        ({"base_url": f"http://me:{SECRET}@127.0.0.1/v1"}, "keys and passwords do not belong here"),
        ({"base_url": f"http://127.0.0.1/v1?key={SECRET}"}, "keys and passwords do not belong here"),
        ({"api_key_env": SECRET}, "teacher.api_key_env: this is no name of an environment variable"),
        ({"api_key_env": "ODD_KEY"}, "what the environment variable ODD_KEY holds is no key"),
        ({"concurrency": 0}, "concurrency and timeout_s must be above 0"),
        ({"timeout_s": 0}, "concurrency and timeout_s must be above 0"),
        ({"max_retries": -1}, "max_retries and prices must not be below 0"),
        ({"prompts": {"solve": "/nowhere.jinja"}}, "teacher.prompts.solve"),
    ],
)
def test_wrong_options_are_refused_without_showing_a_key(
    make: Make, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("ODD_KEY", f"{SECRET} and 'more'")
    options = {"base_url": "http://127.0.0.1:9/v1"} | options
    with pytest.raises(ValueError, match=words) as caught:
        make(options.pop("base_url"), **options)
    assert SECRET not in str(caught.value)


def test_without_openai_the_error_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"APITeacher needs the package openai, .*pip install 'slmreason\[api\]'"):
        make("http://127.0.0.1:9/v1")


# -- what is said of it ---------------------------------------------------------------------------------------------


def test_each_batch_is_one_line_in_the_log(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="slmreason")
    with ScriptedServer(lambda _: "three words \\boxed{1}") as server:
        make(server).solve(PROBLEMS[:10])
        teacher = make(server, input_price=1000.0, output_price=2000.0, max_requests=25)
        teacher.solve(PROBLEMS[:40])
    lines = [record.getMessage() for record in caplog.records if record.name == "slmreason.teacher.openai"]
    assert len(lines) == 2
    found = re.fullmatch(
        r"teacher solve: 25 requests \([\d.]+/s\), 0 failed, 5 not asked, 10 answered from disk; 25 HTTP requests, "
        r"([\d,]+) tokens in, 75 out, about ([\d.]+) USD",
        lines[1],
    )
    assert found, lines[1]
    tokens = int(found[1].replace(",", ""))
    assert tokens == teacher.spent.input_tokens
    assert float(found[2]) == pytest.approx(tokens / 1000 + 75 * 2 / 1000, abs=0.01)


def test_an_estimate_asks_for_nothing(make: Make) -> None:
    with ScriptedServer(lambda _: "three words \\boxed{1}") as server:
        make(server).solve(PROBLEMS[:10])
        teacher = make(server, input_price=1.0, max_completion_tokens=4096)
        estimate = teacher.estimate({"solve": PROBLEMS, "locate": PROBLEMS[:7] * 2})
        assert server.attempts == 10
    conversations = [*teacher.expected("solve", PROBLEMS[10:]), *teacher.expected("locate", PROBLEMS[:7] * 2)]
    tokens = sum(len(c[0]["content"]) // 4 for c in conversations)
    assert estimate == (
        "solve: 110 requests, 10 answers on disk; locate: 14 requests, 0 answers on disk; estimated at "
        f"4 characters a token and 3 tokens an answer: "
        f"{tokens:,} tokens in, {124 * 3:,} out, about {tokens / 1e6:.2f} USD"
    )
    fresh = make("http://127.0.0.1:9/v1", answers="nowhere.jsonl").estimate({"solve": PROBLEMS})
    assert "4096 tokens an answer: " in fresh
    assert fresh.endswith(f"{120 * 4096:,} out")


def test_on_a_terminal_there_is_a_progress_line(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Console(force_terminal=True, width=160)  # rich makes its own once, as the first test found the screen
    monkeypatch.setattr(bars, "get_console", lambda: terminal)
    monkeypatch.setattr(bars, "REFRESHED", 100)  # so that a busy machine draws it too
    with ScriptedServer(one_word, delay_s=0.05) as server:
        make(server, concurrency=2, input_price=10.0).solve(PROBLEMS[:30])
    shown = capsys.readouterr().out
    assert "teacher solve" in shown
    assert re.search(r"requests/s, [\d,]+ tokens in, [\d,]+ out, about [\d.]+ USD", shown)


def test_an_answer_that_was_cut_off_is_known_as_such_from_disk_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(one_word) as server:
        teacher = make(server)
        [conversation] = teacher.expected("solve", PROBLEMS[:1])
        teacher._answers.prepare()
        teacher._answers.put(teacher._digest(conversation), Answer("\\boxed{1}", True), {"output_tokens": 9})
        assert make(server).solve(PROBLEMS[:1]) == [None]
        assert server.attempts == 0


# -- through the real Bridge and critique builder -------------------------------------------------------------------


def test_the_bridge_refuses_wrong_answers_and_counts_them(make: Make, student: Student) -> None:
    problems, known = PROBLEMS[:24], PROBLEMS[24:26]
    exemplars = [Exemplar(p, text or "") for p, text in zip(known, TRUTH.new_trace(known), strict=True)]
    with ScriptedServer(true_brain(PROBLEMS), ("wrong", "500", "malformed"), rate=0.4, retry_after="0.01") as server:
        teacher = make(server)
        bridge = Bridge(student, HFEngine(), teacher, AnswerReward(), BridgeSettings(max_trace_tokens=400))
        results = bridge.make(problems, Sampling(60, temperature=0.0), Material(exemplars))
        wrong = sum(fates[-1] == "wrong" for fates in server.fates.values())
    candidates = [c for result in results for c in result.candidates if c.trace.provenance in ("teacher", "bridged")]
    faults = [candidate.rejected for candidate in candidates if candidate.rejected]
    assert len(faults) == wrong > 3
    assert set(faults) == {Fault("final answer does not verify")}
    assert {c.trace.provenance for c in candidates} == {"teacher", "bridged"}
    for problem, result in zip(problems, results, strict=True):
        assert result.problem == problem
        assert result.chosen is None or is_correct(result.chosen.text, problem.answer)
    assert sum(result.chosen is not None for result in results) > 15


def spoiled(problem: Problem, step: int) -> str:
    lines = (TRUTH.new_trace([problem])[0] or "").splitlines()
    left, _, value = lines[step].partition("=")
    lines[step] = f"{left}={int(value) + 1}"
    return "\n".join(lines)


def test_critiques_are_made_of_what_the_checks_let_through(make: Make, student: Student) -> None:
    problems = PROBLEMS[:30]
    groups = [
        RolloutGroup(p, (Rollout((1,), (1, 2), (), spoiled(p, 1), 0.0, False, False, 0),)) for p in problems
    ]  # fmt: skip
    with ScriptedServer(true_brain(PROBLEMS), ("wrong", "cut", "malformed", "empty")) as server:
        teacher = make(server)
        records = Critic(teacher, student, AnswerReward(), CritiqueSettings()).make(groups)
        assert server.counts
    rejects = teacher.drain_rejects()
    faults = [fault for record in records for fault in record.rejected]
    assert [record.problem for record in records] == problems
    assert sum(fault.kind == "no diagnosis" for fault in faults) == sum(r.where == "teacher locate" for r in rejects)
    assert sum(fault.kind == "no new trace" for fault in faults) == sum(r.where == "teacher new_trace" for r in rejects)
    assert any(fault.kind == "final answer does not verify" for fault in faults)
    for record in records:
        for kind in record.kinds:
            if kind == "diagnosis":
                assert record.diagnosis == TRUTH.locate([record.problem], [record.attempt])[0]
            if kind == "repair":
                assert is_correct(record.prefix + (record.repair or ""), record.problem.answer)
                assert not (record.repair or "").startswith(record.prefix)
                steps = [step.text for step in rebuild(record.problem.id).steps]
                assert (record.repair or "").splitlines()[: len(steps) - 1] == steps[1:]
    kinds = [kind for record in records for kind in record.kinds]
    assert min(kinds.count(kind) for kind in ("diagnosis", "repair", "new_trace")) > 15


def test_two_runs_may_share_the_file_and_each_line_is_whole(tmp_path: Path) -> None:
    script, path = tmp_path / "put.py", tmp_path / "answers.jsonl"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from slmreason.teacher.answers import AnswerFile\n"
        "from slmreason.teacher.prompted import Answer\n"
        "file = AnswerFile(Path(sys.argv[1]))\n"
        "file.prepare()\n"
        "for i in range(40):\n"
        "    file.put(f'{sys.argv[2]}/{i}', Answer('x' * 20_000), {'output_tokens': 1})\n"
    )
    children = [subprocess.Popen([sys.executable, str(script), str(path), str(n)], env=os.environ) for n in range(2)]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert sorted(row["key"] for row in rows(tmp_path)) == sorted(f"{n}/{i}" for n in range(2) for i in range(40))


def test_a_run_whose_teacher_cannot_be_asked_ends_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*SMALL, "--teacher=APITeacher", "--teacher.base_url=http://127.0.0.1:1", "--teacher.model=m",
            "--teacher.max_retries=0", "--benchmarks=[]", f"--run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(["fit", *args]) == 1
    message = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert message[0].startswith("the teacher m at http://127.0.0.1:1 cannot be asked: Connection error")
    assert message[0].endswith("; check teacher.base_url")
    goes_on = f"{program()} fit --resume {tmp_path / 'run'}"
    assert message[1:] == [f"what has been done is kept, go on with: {goes_on}"]
    assert not (tmp_path / "run" / "ledger.jsonl").exists()  # nothing has been measured
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_needs_no_teacher_does_not_look_for_it(tmp_path: Path) -> None:
    args = [*SMALL, "--teacher=APITeacher", "--teacher.base_url=http://127.0.0.1:1", "--teacher.model=m",
            "--curriculum.stages=[grpo]", "--benchmarks=[]", f"--run_dir={tmp_path / 'run'}"]  # fmt: skip
    assert main(["fit", *args]) == 0
