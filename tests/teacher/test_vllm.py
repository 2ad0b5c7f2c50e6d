"""Teachers on the real vLLM: in a worker of our own, and behind its OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from slmreason.embedded.families import make_problems
from slmreason.records import Problem
from slmreason.rollout.engine import Sampling
from slmreason.student import EMBEDDED, Student
from slmreason.teacher.openai import APITeacher
from slmreason.teacher.prompted import Answer, Failure, TeacherError
from slmreason.teacher.vllm import VLLMTeacher

# Not by importing it: it changes the process it is in.
INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")

PROBLEMS = make_problems("chain", "test", 8, (1, 2, 3))
START_S = 150


@pytest.fixture(scope="module")
def plain_prompt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The question and no more: all that the embedded students understand."""
    path = tmp_path_factory.mktemp("prompts") / "plain.jinja"
    path.write_text("{{ question }}")
    return {"solve": str(path)}


@pytest.fixture(scope="module")
def teacher(plain_prompt: dict[str, str]) -> Iterator[VLLMTeacher]:
    if not INSTALLED:
        pytest.skip("vLLM is not installed")
    made = VLLMTeacher("embedded:qwen2", dtype="float32", max_completion_tokens=60, cache_gib=0.1, prompts=plain_prompt)
    yield made
    made.close()


def greedy(problem: Problem, limit: int = 60) -> Answer:
    """What transformers' own generate makes of the question."""
    student = Student("embedded:qwen2", instruction="")
    prompt = torch.tensor([student.encode_question(problem.question)])
    [ids] = student.network.generate(prompt, max_new_tokens=limit, do_sample=False).tolist()  # type: ignore[operator]
    return Answer(student.decode(ids[prompt.shape[1] :]), ids[-1] not in student.eos_ids)


def test_its_answers_are_those_of_transformers(teacher: VLLMTeacher) -> None:
    expected = [greedy(problem) for problem in PROBLEMS]
    conversations = teacher.expected("solve", PROBLEMS)
    assert teacher.chat("solve", conversations) == expected
    assert teacher.chat("solve", [conversations[1], conversations[0], conversations[1]]) == [
        expected[1], expected[0], expected[1],
    ]  # fmt: skip
    finished = [None if answer.truncated else answer.text for answer in expected]
    assert teacher.solve(PROBLEMS) == finished
    assert len(teacher.drain_rejects()) == finished.count(None)


def test_a_prompt_that_leaves_no_room_is_set_aside(teacher: VLLMTeacher) -> None:
    long = Problem("long", "How many pens are 3 pens and 4 pens? " * 200, "7")
    answers = teacher.solve([long, PROBLEMS[0]])
    assert answers[0] is None
    [reject] = [reject for reject in teacher.drain_rejects() if reject.id == "long"]
    assert "exceed teacher.max_model_len = 1024; raise it" in reject.reason
    [failure] = teacher.chat("solve", teacher.expected("solve", [long]))
    assert isinstance(failure, Failure)


def test_it_starts_again_after_it_was_closed_and_samples_by_its_seed(teacher: VLLMTeacher) -> None:
    conversations = teacher.expected("solve", PROBLEMS)
    before = teacher.chat("solve", conversations)
    assert teacher._worker is not None
    process = teacher._worker._process
    teacher.close()
    assert process.returncode == 0
    answers = []
    for seed in (1, 1, 2):
        teacher.sampling = Sampling(60, temperature=1.5, seed=seed)
        answers.append(teacher.chat("solve", conversations))
    teacher.sampling = Sampling(60, temperature=0.0)
    assert answers[0] == answers[1] != answers[2]
    assert teacher.chat("solve", conversations) == before != answers[0]


@needs_vllm
def test_what_a_turn_spells_does_not_end_it(teacher: VLLMTeacher) -> None:
    tokenizer = Student("embedded:qwen2").tokenizer
    ids = teacher.encode([{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"},
                          {"role": "user", "content": "d"}])  # fmt: skip
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@needs_vllm
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "/nowhere/at/all"}, "teacher.model: cannot load '/nowhere/at/all'"),
        ({"temperature": 3.0}, r"teacher\.temperature must be within 0 and 2, got 3"),
        ({"max_completion_tokens": 1024}, "teacher.max_completion_tokens: 1024 is not below 1024"),
        ({"max_sequences": 0}, r"teacher\.max_sequences must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VLLMTeacher(**{"model": "embedded:qwen2"} | options)  # type: ignore[arg-type]


def test_without_vllm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"VLLMTeacher needs vLLM, .*slmreason\[vllm\]' on a GPU"):
        VLLMTeacher("embedded:qwen2")


# -- vLLM's own server ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `vllm serve` with an embedded student, which wants a key."""
    if not INSTALLED or importlib.util.find_spec("openai") is None:
        pytest.skip("vLLM or openai is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("served") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(EMBEDDED / "qwen2"),
               "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
               "--max-model-len", "512", "--enforce-eager", "--generation-config", "vllm"]  # fmt: skip
    environ = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1",
                            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_API_KEY": "local-secret-key"}  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not is_up(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("vllm serve did not start:\n" + "\n".join(log.read_text().splitlines()[-30:]))
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_up(url: str) -> bool:
    try:
        with urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def test_vllm_serve_answers_an_api_teacher(
    served: str, plain_prompt: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(model: str = "tiny") -> APITeacher:
        return APITeacher(served, model, "TINY_KEY", max_completion_tokens=60, prompts=plain_prompt, max_retries=0,
                          answers=str(tmp_path / "answers.jsonl"))  # fmt: skip

    monkeypatch.setenv("TINY_KEY", "not-the-right-key")
    with pytest.raises(TeacherError, match="HTTP 401 Unauthorized: .*check teacher.api_key_env"):
        made().solve(PROBLEMS)
    monkeypatch.setenv("TINY_KEY", "local-secret-key")
    with pytest.raises(TeacherError, match="HTTP 404 Not Found: .*check teacher.base_url and teacher.model"):
        made("another").solve(PROBLEMS)
    expected = [greedy(problem) for problem in PROBLEMS]
    teacher = made()
    conversations = teacher.expected("solve", PROBLEMS)
    assert teacher.chat("solve", conversations) == expected
    student = Student("embedded:qwen2", instruction="")
    assert teacher.spent.input_tokens == sum(len(student.encode_question(p.question)) for p in PROBLEMS)
    assert teacher.spent.attempts == len(PROBLEMS)
    long = teacher.expected("solve", [Problem("long", "How many pens are 3 pens and 4 pens? " * 200, "7")])
    [failure] = teacher.chat("solve", long)
    assert isinstance(failure, Failure)
    assert "HTTP 400" in failure.reason
    monkeypatch.setenv("TINY_KEY", "not-the-right-key")
    assert made().chat("solve", conversations) == expected  # from disk
