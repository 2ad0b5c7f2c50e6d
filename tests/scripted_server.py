"""An OpenAI-compatible server of our own on loopback, which fails as it is told to and counts what it is asked."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from slmreason.embedded.families import rebuild
from slmreason.records import Problem
from slmreason.teacher.procedural import ProceduralTeacher, first_wrong_step
from slmreason.teacher.prompted import PROMPTS

Messages = list[dict[str, str]]
Brain = Callable[[Messages], str]
"""What a model says next in a conversation."""
Shape = Callable[[str], dict[str, Any]]
"""What a server makes of what the model says: the fields of a choice."""

TRANSPORT = ("429", "500", "cut", "half", "html", "no choices", "slow")
"""Faults of the network and the server, which the client overcomes by asking again; `slow` is not even a fault."""
CONTENT = ("empty", "wrong", "malformed", "unclosed thought")
"""Answers that arrive and are no good."""
BAD_ANSWERS = {
    "empty": "",
    "wrong": "Let me guess ({key}).\nThe answer is \\boxed{{-77}}.",
    "malformed": '{{"wrong_step": 1, "explanation": "it is',
    "unclosed thought": "<think>I could go on like this",
}


class ScriptedServer:
    """Within it the server runs, at `base_url`. What it does to a request depends on the request and its attempt."""

    def __init__(
        self,
        brain: Brain,
        faults: Sequence[str] = (),
        rate: float = 0.3,
        delay_s: float = 0.0,
        retry_after: str = "0.05",
        shape: Shape = lambda text: {"finish_reason": "stop", "message": {"role": "assistant", "content": text}},
        refuse: Callable[[Messages, str], tuple[int, str] | None] = lambda messages, authorization: None,
        models: Sequence[str] | int = ("m",),
        port: int = 0,
    ) -> None:
        """
        Args:
            faults: what may befall a request, each as likely.
            rate: share of the attempts that something befalls.
            shape: how a choice of a completion is written.
            refuse: a status and a message in place of an answer, by the conversation and the Authorization header.
            models: that it lists, or the status that it answers with where it is asked for the list.
            port: that it listens at; any free one for 0.
        """
        self.brain, self.faults, self.rate, self.delay_s = brain, tuple(faults), rate, delay_s
        self.retry_after, self.refuse, self.shape, self.models = retry_after, refuse, shape, models
        self.listed = 0
        """How often it was asked for the list of its models."""
        self.counts: Counter[str] = Counter()
        """Attempts by request."""
        self.fates: defaultdict[str, list[str]] = defaultdict(list)
        """What befell each attempt of a request; `good` if nothing did."""
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        self.said: dict[str, str] = {}
        """The answer to each request, if it was a good one."""
        self.authorizations: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _handler(self))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def attempts(self) -> int:
        return sum(self.counts.values())

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def key(self, body: bytes) -> str:
        """What a request is known by, whatever the order of its fields."""
        return hashlib.sha256(json.dumps(json.loads(body), sort_keys=True).encode()).hexdigest()

    def begin(self, body: bytes) -> str:
        """Counts an attempt; its fate."""
        with self._lock:
            key = self.key(body)
            self.counts[key] += 1
            rng = random.Random(f"{key}/{self.counts[key]}")
            fate = rng.choice(self.faults) if self.faults and rng.random() < self.rate else "good"
            self.fates[key].append(fate)
            self.times[key].append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            return fate

    def end(self) -> None:
        with self._lock:
            self.in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news."""


def _handler(script: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet for head and body

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            script.listed += 1
            time.sleep(script.delay_s)
            if isinstance(script.models, int):
                self._send(script.models, json.dumps({"error": {"message": "no such luck"}}))
                return
            named = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in script.models]
            self._send(200, json.dumps({"object": "list", "data": named}))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            body = self.rfile.read(length)
            if len(body) < length:
                return  # the client died while it was asking
            fate = script.begin(body)
            try:
                time.sleep(script.delay_s + 0.3 * (fate == "slow"))
                messages, authorization = json.loads(body)["messages"], self.headers["Authorization"]
                script.authorizations.add(authorization)
                refusal = script.refuse(messages, authorization)
                if refusal is not None:
                    self._send(refusal[0], json.dumps({"error": {"message": refusal[1]}}))
                else:
                    self._play(fate, messages, script.key(body))
            finally:
                script.end()

        def _play(self, fate: str, messages: Messages, key: str) -> None:
            if fate == "cut":
                self.close_connection = True
            elif fate == "half":
                self._send(200, _completion(script.brain(messages), messages), cut=True)
            elif fate == "mislabelled":
                self._send(200, _completion(script.brain(messages), messages), kind="text/plain")
            elif fate == "html":
                self._send(200, "<html>the gateway is tired</html>")
            elif fate == "no choices":
                self._send(200, json.dumps({"error": {"message": "upstream"}, "choices": []}))
            elif fate in ("429", "500"):
                self._send(int(fate), json.dumps({"error": {"message": "later"}}))
            elif fate in BAD_ANSWERS:
                self._send(200, _completion(BAD_ANSWERS[fate].format(key=key[:8]), messages))
            else:
                script.said[key] = script.brain(messages)
                self._send(200, _completion(script.said[key], messages, script.shape(script.said[key])))

        def _send(self, status: int, text: str, cut: bool = False, kind: str = "application/json") -> None:
            data = text.encode()
            self.send_response(status)
            if status >= 429:
                self.send_header("Retry-After", script.retry_after)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _completion(text: str, messages: Messages, shape: dict[str, Any] | None = None) -> str:
    usage = {"prompt_tokens": sum(len(m["content"].split()) for m in messages), "completion_tokens": len(text.split())}
    usage["total_tokens"] = sum(usage.values())
    choice = {"index": 0, **(shape or {"finish_reason": "stop", "message": {"role": "assistant", "content": text}})}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                       "usage": usage})  # fmt: skip


def true_brain(problems: Sequence[Problem]) -> Brain:
    """Answers from the true program of the problem whose question is asked, in the form that its prompt asks for."""
    teacher = ProceduralTeacher()
    openings = {kind: (PROMPTS / f"ask_{kind}.jinja").read_text().splitlines()[0]
                for kind in ("solve", "bridge", "locate", "repair", "new_trace")}  # fmt: skip

    def brain(messages: Messages) -> str:
        prompt = messages[0]["content"]
        # Exemplars come before the problem itself.
        problem = max(problems, key=lambda p: prompt.rfind(p.question))
        [kind] = [kind for kind, opening in openings.items() if prompt.startswith(opening)]
        if kind == "locate":
            steps = [line.partition(": ")[2] for line in prompt.splitlines() if line.startswith("Step ")]
            found = first_wrong_step(rebuild(problem.id), "\n".join(steps))
            assert found is not None
            answer = {"wrong_step": found.wrong_step, "explanation": found.explanation, "verdict": "wrong"}
            return f"Let me see.\n```json\n{json.dumps(answer)}\n```"
        if kind == "repair":
            prefix = prompt.partition("Steps so far:\n")[2].partition("\n\nWhat was wrong")[0].replace("(none)", "")
            [rest] = teacher.repair([problem], [prefix], [])
            return f"<think>They have {prefix}</think>\n{prefix}\n{rest}"  # with the prefix, as models do
        [text] = teacher.solve([problem]) if kind == "solve" else teacher.new_trace([problem])
        return text or ""

    return brain
