"""The rules of publishing over HTTP: what is sent, what an answer means, when to try again, when to give up.

Knows no sockets: `Publishing` is asked for requests and fed with answers, and both ways to carry them
(client.py) are loops around it. Each try has the same message ids, and a channel takes an id once within
`dedup_ttl`: so a retry after an answer that was lost never makes a second message.

    core = Publishing([{"channel": "news", "data": 1}], timeout=30.0, now=now)
    while (pause := core.pause(now)) is not None:
        ...wait for `pause` seconds...
        body, timeout = core.request(now)
        core.receive(status, headers, body)           # or core.fail(sentence)
    core.results()
"""

import email.utils
import json
import random
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit, urlunsplit

from .errors import BcastError, Unavailable

DEFAULT_URL = "http://127.0.0.1:8080"
# Seconds. The server itself tries for `publish_timeout` (5 s by default) before it says `unavailable`.
_ATTEMPT_TIMEOUT = 15.0
# Error codes that another try may not meet.
PASSING_CODES = frozenset({"rate_limited", "unavailable", "internal"})
# Messages in one request, as the server takes them.
_MOST = 1000

_REASONS = {status.value: status.phrase for status in HTTPStatus}

Result = dict[str, Any]


class Headers(Protocol):
    """The headers of an answer, found in whatever case."""

    def get(self, name: str, /) -> Any:
        """The value, or None."""


class Rejected(BcastError):
    """The server does not take a message and would not take it later either.

    `message` is its sentence, `code` its error code (docs/PROTOCOL.md) where it gave one, `status` that of
    HTTP (0 where no request could be made). `results` has the fate of each message, where there was one.
    """

    def __init__(
        self, message: str, *, code: str | None = None, status: int = 0, results: Iterable[Result] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.results = list(results)


class GaveUp(Unavailable):
    """The time is over, and of some messages nobody knows whether they were taken.

    `results` has the fate of each: try those with an `error` again later, with the same `messageId`.
    """

    def __init__(self, message: str, retry_after: int, results: Iterable[Result]) -> None:
        super().__init__(message, retry_after)
        self.results = list(results)


class Backoff:
    """How long to wait before the next try: exponential, with full jitter. Seconds.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/ ("full jitter")
    """

    def __init__(self, base: float = 0.25, cap: float = 10.0, rng: random.Random | None = None) -> None:
        self._base = base
        self._cap = cap
        self._rng = rng or random.Random()
        # Tries since the last success.
        self._tries = 0

    def next(self, at_least: float = 0.0) -> float:
        """The next pause; never below `at_least`, what the server asked for."""
        ceiling = min(self._cap, self._base * 2 ** min(self._tries, 30))
        self._tries += 1
        return at_least + self._rng.uniform(0, ceiling)

    def reset(self) -> None:
        self._tries = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server is, from one URL: `http`, `https`, `ws` or `wss`, with or without a path before ours."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """Raises Rejected with a sentence when `url` is none."""
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise Rejected(f"The URL {url!r} cannot be read: {exc}.") from exc
        if parts.scheme not in ("http", "https", "ws", "wss") or not host:
            raise Rejected(f"The URL {url!r} is none: write one like {DEFAULT_URL}.")
        if parts.username is not None or parts.query or parts.fragment:
            raise Rejected(
                "A URL with a user, a query or a fragment is not taken: a key belongs into a file."
            )
        if any(char <= " " or char > "~" for char in f"{host}{parts.path}"):
            raise Rejected(f"The URL {url!r} has characters that none may have.")
        secure = parts.scheme in ("https", "wss")
        return cls(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"))

    def url(self, scheme: Literal["http", "ws"], path: str) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return urlunsplit((scheme + "s" * self.secure, f"{host}:{self.port}", self.path + path, "", ""))


def new_id() -> str:
    """A message id that nobody else has."""
    return str(uuid.uuid4())


def headers_for(key: str | None) -> dict[str, str]:
    """The headers of a publish; Rejected where `key` can be none."""
    headers = {"Content-Type": "application/json", "User-Agent": "tornado-bcast"}
    if key:
        if not (key.isascii() and key.isprintable()):
            raise Rejected("The API key has characters that no key has; is its file the right one?")
        headers["Authorization"] = f"Bearer {key}"
    return headers


class Publishing:
    """Messages on their way, in their order. Times are of any steady clock, in seconds.

    Each message is an object of `POST /broadcast`: `data`, and `channel` and `messageId` if wanted. One
    without an id gets a new one, which all tries have. TypeError, ValueError: `data` is no JSON value.
    """

    def __init__(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        timeout: float,
        now: float,
        rng: random.Random | None = None,
    ) -> None:
        self._messages = [{"messageId": new_id(), **message} for message in messages]
        self._encoded = [_dump(message) for message in self._messages]
        # What became of each; None: nothing yet.
        self._fates: list[Result | None] = [None] * len(self._messages)
        # The messages of the request that is under way, by their place.
        self._sent: list[int] = []
        self._deadline = now + timeout
        self._backoff = Backoff(rng=rng)
        self._pause = 0.0
        # The first message that was refused for good, and why the last try failed.
        self._refusal: Rejected | None = None
        self._trouble = Unavailable("There was no time for a single try.")

    def pause(self, now: float) -> float | None:
        """Seconds to wait before the next request; None when none is needed. GaveUp: the time is over."""
        if None not in self._fates:
            return None
        if now + self._pause >= self._deadline and self._sent:
            raise GaveUp(str(self._trouble), self._trouble.retry_after, self._told())
        return self._pause

    def request(self, now: float) -> tuple[bytes, float]:
        """The body of the next request, and how many seconds to wait for its answer."""
        self._sent = [place for place, fate in enumerate(self._fates) if fate is None][:_MOST]
        parts = [self._encoded[place] for place in self._sent]
        body = parts[0] if len(self._messages) == 1 else b'{"messages":[%s]}' % b",".join(parts)
        return body, min(max(self._deadline - now, 0.05), _ATTEMPT_TIMEOUT)

    def receive(self, status: int, headers: Headers, body: bytes) -> None:
        """The answer. Raises Rejected when it is none to any message."""
        if 300 <= status < 400:
            target = headers.get("Location") or "another address"
            raise Rejected(f"The server sends us on to {target}: use that as URL.", status=status)
        retry_after = headers.get("Retry-After")
        try:
            results = decode_answer(status, retry_after, body, len(self._sent))
        except Unavailable as unavailable:
            self._try_again(unavailable)
            return
        trouble: Unavailable | None = None
        for place, result in zip(self._sent, results, strict=True):
            error = result.get("error")
            if error is None:
                self._backoff.reset()
            elif error.get("code") in PASSING_CODES:
                trouble = Unavailable(str(error.get("message")), round(parse_retry_after(retry_after) * 1000))
                continue
            elif self._refusal is None:
                self._refusal = Rejected(str(error.get("message")), code=error.get("code"), status=status)
            self._fates[place] = result
        self._pause = 0.0
        if trouble is not None:
            self._try_again(trouble)

    def fail(self, sentence: str) -> None:
        """There was no answer."""
        self._try_again(Unavailable(sentence, 0))

    def results(self) -> list[Result]:
        """The server's result for each message, in their order. Rejected: it has refused at least one."""
        if self._refusal is not None:
            self._refusal.results = self._told()
            raise self._refusal
        return self._told()

    def _try_again(self, trouble: Unavailable) -> None:
        self._trouble = trouble
        self._pause = self._backoff.next(trouble.retry_after / 1000)

    def _told(self) -> list[Result]:
        unknown = {"code": "unavailable", "message": str(self._trouble)}
        return [
            fate or {"channel": message.get("channel"), "messageId": message["messageId"], "error": unknown}
            for message, fate in zip(self._messages, self._fates, strict=True)
        ]


def _dump(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def decode_answer(status: int, retry_after: str | None, body: bytes, count: int = 1) -> list[Result]:
    """The results in an answer, one for each of `count` messages: taken, or with an `error`.

    Where there are none: Rejected, or Unavailable where another try makes sense.
    """
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    answer = answer if isinstance(answer, dict) else {}
    results = answer.get("results")
    if isinstance(results, list) and len(results) == count and all(map(_is_result, results)):
        return results
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    code = error.get("code") if isinstance(error.get("code"), str) else None
    reason = _REASONS.get(status, "")
    sentence = str(error.get("message") or f"The server answered {status} {reason}".rstrip() + ".")
    if status in (408, 429) or status >= 500:
        raise Unavailable(sentence, int(parse_retry_after(retry_after) * 1000))
    if not error:
        sentence += " Is the URL that of a tornado-bcast server?"
    raise Rejected(sentence, code=code, status=status)


def _is_result(result: object) -> bool:
    return isinstance(result, dict) and isinstance(result.get("error", {}), dict)


def parse_retry_after(value: str | None) -> float:
    """Seconds in a `Retry-After` header (RFC 9110, section 10.2.3): a number, a date, or 0 without either."""
    if not value:
        return 0.0
    if value.strip().isdecimal():
        return float(min(int(value), 86400))
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
