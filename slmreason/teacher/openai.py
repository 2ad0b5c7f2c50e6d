"""A teacher behind an OpenAI-compatible API: asked in parallel, within a budget, and never twice for the same thing.

Every answer is on disk before it is used. A run that was stopped, crashed or is started anew finds it there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmreason.records import Problem
from slmreason.run.folder import checked_folder
from slmreason.run.progress import counting
from slmreason.runtime.redact import hide
from slmreason.teacher.access import checked_url, is_loopback, read_key, redaction
from slmreason.teacher.answers import AnswerFile
from slmreason.teacher.completions import content_text, is_content, refusal_in
from slmreason.teacher.patience import NotAsked, Patience, failure_of
from slmreason.teacher.prompted import Answer, Conversation, Failure, LLMTeacher, TeacherError
from slmreason.teacher.reach import TO_CHECK, TRIES, WAIT_S, first_failure

log = logging.getLogger(__name__)

NOT_INSTALLED = "teacher: APITeacher needs the package openai, which is not installed: pip install 'slmreason[api]'"
STOPPED = "the teacher was stopped"
CHARS_PER_TOKEN = 4
CONNECT_S = 10.0
"""An API that is there takes a connection at once, however long it thinks afterwards."""


@dataclass
class Spent:
    """What was asked of the API and what it said that it took."""

    attempts: int = 0
    """HTTP requests, retries included."""
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def __sub__(self, before: Spent) -> Spent:
        return Spent(
            self.attempts - before.attempts,
            self.input_tokens - before.input_tokens,
            self.output_tokens - before.output_tokens,
        )


class _Halt(BaseException):
    """Stops a request between two attempts. Not an Exception: older versions of the library would retry on it."""


class APITeacher(LLMTeacher):
    """A model behind an OpenAI-compatible API, over the network or served on this machine."""

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_completion_tokens: int | None = 4096,
        extra_body: dict[str, Any] | None = None,
        concurrency: int = 16,
        max_retries: int = 5,
        timeout_s: float = 300.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        input_price: float = 0.0,
        output_price: float = 0.0,
        answers: str = "runs/teacher-answers.jsonl",
        prompts: dict[str, str] | None = None,
    ) -> None:
        """
        Args:
            base_url: Where the API is, such as http://127.0.0.1:8000/v1.
            model: The model's name there.
            api_key_env: Environment variable that holds the key; an API on this machine may do without.
            temperature: 0 is greedy; null leaves it to the API.
            max_completion_tokens: Longest answer, thoughts included; null leaves it to the API.
            extra_body: Further parameters of every request, such as {top_p: 0.95}.
            concurrency: Requests in flight at most.
            max_retries: How often a request is tried again after a time-out, a lost connection, a rate limit, an error
                of the server or a broken body; with growing pauses, or as long as the API's Retry-After says.
            timeout_s: Seconds without a sign of an answer before a request counts as lost.
            max_requests: Budget of one run, in HTTP requests, retries included.
            max_tokens: Budget of one run, in tokens of prompts and answers as the API counts them. Requests in flight
                are finished, so that it may be exceeded by theirs.
            input_price: USD per million prompt tokens, for the estimated cost.
            output_price: USD per million answer tokens, for the estimated cost.
            answers: JSONL file of all answers; what is in it is not asked for again.
            prompts: Paths of jinja files that replace the prompts solve, bridge, locate, repair or new_trace.

        Raises:
            ValueError: openai is not installed, the key is missing, or a value is wrong; the message names it.
        """
        super().__init__(prompts)
        if Path(answers).is_dir():
            raise ValueError(f"teacher.answers: {answers} is a folder; a file is needed")
        checked_folder("teacher.answers", str(Path(answers).absolute().parent / "x"))
        if importlib.util.find_spec("openai") is None:
            raise ValueError(NOT_INSTALLED)
        if min(concurrency, timeout_s) <= 0 or min(max_retries, input_price, output_price) < 0:
            raise ValueError(
                "teacher: concurrency and timeout_s must be above 0, max_retries and prices must not be below 0"
            )
        self.base_url, self.model, self.api_key_env = checked_url(base_url), model, api_key_env
        self.concurrency, self.max_retries, self.timeout_s = concurrency, max_retries, timeout_s
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.input_price, self.output_price = input_price, output_price
        own = {"temperature": temperature, "max_completion_tokens": max_completion_tokens}
        self.parameters = {name: value for name, value in own.items() if value is not None} | (extra_body or {})
        self.spent = Spent()
        self._max_completion_tokens = max_completion_tokens
        self._answers = AnswerFile(Path(answers))
        key = read_key(api_key_env, self.base_url)
        self._client = self._connect(key)
        self._redacted = redaction(key, api_key_env)
        hide(key or "", api_key_env)
        self._lock = threading.Lock()
        self._stopped = False
        self._patience = Patience()

    def chat(self, kind: str, conversations: Sequence[Conversation]) -> list[Answer | Failure]:
        """See `LLMTeacher.chat`. What is on disk is not asked for, and nothing is asked for twice.

        Raises:
            TeacherError: the API refuses the key or does not know the model, or has stopped answering.
        """
        keys = [self._digest(conversation) for conversation in conversations]
        results: dict[str, Answer | Failure] = {key: kept for key in keys if (kept := self._answers.get(key))}
        self._patience.heard |= bool(results)
        wanted = {key: c for key, c in zip(keys, conversations, strict=True) if key not in results}
        began, before, on_disk = time.monotonic(), replace(self.spent), len(results)
        if wanted:
            self._answers.prepare()
        try:
            self._ask_all(kind, wanted, results)
        finally:
            self._report(kind, list(results.values())[on_disk:], on_disk, before, time.monotonic() - began)
        return [results[key] for key in keys]

    def check(self) -> None:
        """Looks whether the API lists the model, and asks a short question where that does not tell.

        Nothing is asked on a budget of no request: what is on disk is answered from there.

        Raises:
            TeacherError: the API does not answer, refuses the key or the parameters, or does not know the model.
        """
        if self._no_more() is not None:
            return
        import openai

        seconds = min(self.timeout_s, WAIT_S)
        wait = openai.Timeout(seconds, connect=min(seconds, CONNECT_S))
        patient = self._client.with_options(max_retries=min(self.max_retries, TRIES), timeout=wait)
        try:
            with self._http_client() as plain:  # a list is not paid for, and is no completion
                listing = patient.with_options(http_client=plain)
                failure = first_failure(patient, listing, self.model, self.parameters, seconds)
        except _Halt as halt:
            failure = NotAsked(str(halt))
        if failure is None:
            return
        if (to_check := TO_CHECK.get(type(failure))) is not None:
            raise self._not_to_be_asked(f"{failure.reason}{to_check}")
        log.warning("%s; that may pass, and the run goes on", self._not_to_be_asked(failure.reason))

    def _not_to_be_asked(self, why: str) -> TeacherError:
        return TeacherError(f"the teacher {self.model} at {self.base_url} cannot be asked: {why}")

    def estimate(self, requests: Mapping[str, Sequence[Problem]]) -> str:
        """What it would take to be asked for these, by method name: requests, answers on disk, tokens and USD.

        Tokens are guessed: four characters each. An answer is taken to be as long as those on disk are on average; if
        there are none, as long as it may be.
        """
        expected, parts = Spent(), []
        answer_tokens = self._answers.mean_tokens() or self._max_completion_tokens or 0
        for method, problems in requests.items():
            digests = {self._digest(c): c for c in self.expected(method, problems)}
            new = [conversation for digest, conversation in digests.items() if self._answers.get(digest) is None]
            expected.input_tokens += sum(map(guess_tokens, new))
            expected.output_tokens += len(new) * answer_tokens
            parts.append(f"{method}: {len(new)} requests, {len(digests) - len(new)} answers on disk")
        guess = f"estimated at {CHARS_PER_TOKEN} characters a token and {answer_tokens} tokens an answer"
        return f"{'; '.join(parts)}; {guess}: {self._words(expected)}"

    def cost(self, spent: Spent) -> float:
        """USD, at the prices given."""
        return (spent.input_tokens * self.input_price + spent.output_tokens * self.output_price) / 1e6

    def close(self) -> None:
        """Closes the connections; the teacher cannot be asked any more."""
        self._client.close()

    # -- asking -----------------------------------------------------------------------------------------------------

    def _ask_all(self, kind: str, wanted: Mapping[str, Conversation], results: dict[str, Answer | Failure]) -> None:
        """Asks for all that is wanted, `concurrency` at a time, and fills in the results.

        However it ends, what is in flight is finished and kept.
        """
        began, before = time.monotonic(), replace(self.spent)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher")
        self._stopped, self._patience.given_up = False, None
        with counting(f"teacher {kind}", len(wanted)) as advance:
            try:
                asked = {pool.submit(self._request, key, conversation): key for key, conversation in wanted.items()}
                for number, future in enumerate(as_completed(asked), start=1):
                    results[asked[future]] = future.result()
                    rate = number / max(time.monotonic() - began, 1e-3)
                    advance(1, f"{rate:.1f} requests/s, {self._words(self.spent - before)}")
                    # A server that never answered anything is not there, however few have asked.
                    is_silent = number == len(wanted) and not self._patience.heard
                    hopeless = self._patience.given_up or (is_silent and self._patience.last_failure)
                    if hopeless:
                        raise self._not_to_be_asked(str(hopeless))
            finally:
                self._stopped = True
                pool.shutdown(cancel_futures=True)

    def _request(self, key: str, conversation: Conversation) -> Answer | Failure:
        """One request with its retries, in a thread of its own; its answer is on disk when this returns."""
        result = self._answer(key, conversation)
        with self._lock:
            self._patience.learn_from(result)
            self._stopped |= self._patience.given_up is not None
        return result

    def _answer(self, key: str, conversation: Conversation) -> Answer | Failure:
        if (reason := self._no_more()) is not None:
            return NotAsked(reason)
        import openai

        try:
            # Whatever the parameters are, the library need not know them.
            completion = self._client.chat.completions.create(
                model=self.model, messages=conversation, extra_body=self.parameters
            )
        except openai.OpenAIError as error:
            return failure_of(error, self._patience.heard, self.timeout_s)
        except _Halt as halt:
            return NotAsked(str(halt))
        # Servers leave out what they have nothing to say about.
        choice, usage = completion.choices[0], completion.usage
        content, ended = getattr(choice.message, "content", None), getattr(choice, "finish_reason", None)
        text = self._redacted(content_text(content))
        refusal = refusal_in(content, getattr(choice.message, "refusal", None), ended)
        answer = Answer(text, ended == "length", None if refusal is None else self._redacted(refusal)[:500])
        tokens_in = getattr(usage, "prompt_tokens", None) or guess_tokens(conversation)
        tokens_out = getattr(usage, "completion_tokens", None) or len(text) // CHARS_PER_TOKEN
        with self._lock:
            self.spent.input_tokens += tokens_in
            self.spent.output_tokens += tokens_out
        self._answers.put(key, answer, {"model": self.model, "input_tokens": tokens_in, "output_tokens": tokens_out})
        return answer

    def _digest(self, conversation: Conversation) -> str:
        """What a request is known by: all of it but the key."""
        request = {"base_url": self.base_url, "model": self.model, "messages": conversation,
                   "parameters": self.parameters}  # fmt: skip
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def _connect(self, key: str | None) -> Any:
        import openai

        hooks: dict[str, list[Callable[..., Any]]] = {"request": [self._count], "response": [_refuse_broken]}
        return openai.OpenAI(
            base_url=self.base_url,
            api_key=key or "none",
            max_retries=self.max_retries,
            timeout=openai.Timeout(self.timeout_s, connect=min(self.timeout_s, CONNECT_S)),
            http_client=self._http_client(event_hooks=hooks),
        )

    def _http_client(self, **options: Any) -> Any:
        """Nothing on this machine is reached through a proxy."""
        import openai

        return openai.DefaultHttpxClient(trust_env=not is_loopback(self.base_url), **options)

    def _count(self, request: Any) -> None:
        """Before each HTTP request, a retry too: takes it from the budget, or stops it."""
        with self._lock:
            reason = self._no_more()
            if reason is None:
                self.spent.attempts += 1
        if reason is not None:
            raise _Halt(reason)

    def _no_more(self) -> str | None:
        """Why nothing more is asked, or None."""
        if self.max_requests is not None and self.spent.attempts >= self.max_requests:
            return f"budget of {self.max_requests} requests is used up"
        if self.max_tokens is not None and self.spent.tokens >= self.max_tokens:
            return f"budget of {self.max_tokens} tokens is used up"
        return STOPPED if self._stopped else None

    # -- reports ----------------------------------------------------------------------------------------------------

    def _words(self, spent: Spent) -> str:
        cost = f", about {self.cost(spent):.2f} USD" if self.cost(spent) else ""
        return f"{spent.input_tokens:,} tokens in, {spent.output_tokens:,} out{cost}"

    def _report(
        self, kind: str, results: Sequence[Answer | Failure], on_disk: int, before: Spent, seconds: float
    ) -> None:
        not_asked = sum(isinstance(result, NotAsked) for result in results)
        failed = sum(isinstance(result, Failure) for result in results) - not_asked
        asked, spent = len(results) - not_asked, self.spent - before
        log.info(
            "teacher %s: %d requests (%.1f/s), %d failed, %d not asked, %d answered from disk; %d HTTP requests, %s",
            kind, asked, asked / max(seconds, 1e-3), failed, not_asked, on_disk, spent.attempts, self._words(spent),
        )  # fmt: skip


def _refuse_broken(response: Any) -> None:
    """Makes an error of the server's out of a success that holds no chat completion, so that it is tried again."""
    if not response.is_success:
        return
    try:
        message = json.loads(response.read())["choices"][0]["message"]
        sound = is_content(message.get("content"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if sound:  # the library believes the header more than the body
        response.headers["Content-Type"] = "application/json"
    else:
        response.status_code, response.extensions["reason_phrase"] = 502, b"no chat completion in the body"


def guess_tokens(conversation: Conversation) -> int:
    """Tokens of a conversation, estimated from its characters."""
    return sum(len(message["content"]) for message in conversation) // CHARS_PER_TOKEN
