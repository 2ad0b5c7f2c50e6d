"""What a request without an answer means, and when an API is given up."""

from __future__ import annotations

from slmreason.runtime.redact import redact
from slmreason.teacher.prompted import Answer, Failure

PATIENCE = 20
"""So many requests in a row without an answer, each with all its retries, and the API is given up."""
HOPELESS = {401: "teacher.api_key_env", 402: "the account", 403: "teacher.api_key_env",
            404: "teacher.base_url and teacher.model"}  # fmt: skip
"""Statuses that every further request would get too, and what to check then."""


class NotAsked(Failure):
    """A budget is used up, or the teacher was stopped."""


class Unreachable(Failure):
    """Nobody answered, not even to refuse."""


class Refused(Failure):
    """The API does not like this request. It may like others, if it has liked any."""


class Hopeless(Failure):
    """No other request will fare better."""


class Patience:
    """What the requests so far say of the next: whether the API is there, and whether asking on is of any use."""

    def __init__(self) -> None:
        self.heard = False
        """Some request has been answered, now or in an earlier run: the API is there and the parameters are right."""
        self.last_failure: str | None = None
        self.given_up: str | None = None
        """Why asking on is of no use."""
        self._in_a_row = 0

    def learn_from(self, result: Answer | Failure) -> None:
        """Gives up where further requests would fare no better than this one."""
        if isinstance(result, Answer):
            self._in_a_row, self.heard = 0, True
        elif not isinstance(result, NotAsked) and not (isinstance(result, Refused) and self.heard):
            self._in_a_row += 1
            self.last_failure = f"{self._in_a_row} requests in a row got no answer, the last one: {result.reason}"
            if isinstance(result, Hopeless):
                self.given_up = self.given_up or result.reason
            elif self._in_a_row >= PATIENCE:
                self.given_up = self.given_up or self.last_failure


def failure_of(error: Exception, heard: bool, timeout_s: float) -> Failure:
    """What an error of the library means, without the key: servers quote it, whole or in part.

    Args:
        heard: some request has been answered.
        timeout_s: how long an answer was waited for.
    """
    import openai

    if isinstance(error, openai.APIStatusError):
        status, phrase = error.status_code, error.response.reason_phrase
        reason = redact(f"HTTP {status} {phrase}: {error.message}")[:500]
        if status == 403 and heard:
            return Failure(reason)  # some refuse with it what they take for indecent
        if status in HOPELESS or error.code == "insufficient_quota":
            return Hopeless(f"{reason}; check {HOPELESS.get(status, 'the account')}")
        return Failure(reason) if status >= 500 or status in (408, 409, 429) else Refused(reason)
    if isinstance(error, openai.APITimeoutError):
        return Unreachable(f"no answer within {timeout_s:g} s")
    kind = Unreachable if isinstance(error, openai.APIConnectionError) else Failure
    return kind(redact(f"{error} {error.__cause__ or ''}".strip())[:500])
