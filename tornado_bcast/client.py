"""Publishing from Python: `publish` sends one message over HTTP and gives up only when its time is over.

    from tornado_bcast.client import publish
    publish("news", {"title": "Hello"}, url="http://127.0.0.1:8080", key="...")

Owns the HTTP request of `POST /broadcast`, what its answers mean, and when to try again. Needs nothing but
the standard library and touches nothing of the server. Each try has the same message id, and a channel takes
an id once within `dedup_ttl`: so a retry after an answer that was lost never makes a second message.
"""

import email.utils
import http.client
import json
import random
import ssl
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from .errors import BcastError, Unavailable

DEFAULT_URL = "http://127.0.0.1:8080"
# Seconds. The server itself tries for `publish_timeout` (5 s by default) before it says `unavailable`.
_ATTEMPT_TIMEOUT = 15.0
# Error codes that another try may not meet.
PASSING_CODES = frozenset({"rate_limited", "unavailable", "internal"})
_MAX_ANSWER = 1 << 20


class Rejected(BcastError):
    """The server does not take the message and would not take it later either.

    `message` is its sentence, `code` its error code (docs/PROTOCOL.md) where it gave one, `status` that of
    HTTP (0 where no request could be made).
    """

    def __init__(self, message: str, *, code: str | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status


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


def publish(
    channel: str,
    data: Any,
    *,
    url: str = DEFAULT_URL,
    key: str | None = None,
    message_id: str | None = None,
    timeout: float = 30.0,
) -> dict[str, Any]:
    """Publish `data` (any JSON value) on `channel` and return the server's result for it.

    The result has `channel`, `messageId`, on persistent channels `seq` and `epoch`, and `duplicate: true`
    when a message with this id was taken before. `message_id` is a new UUID unless given; give one of your
    own to make a job that may run twice publish once. `timeout` (seconds) is for everything, the
    retries as well.

    Raises Rejected when the server refuses, and Unavailable when the time is over: the message may have been
    taken then, so try again with the same `message_id`. TypeError and ValueError: `data` is no JSON value.
    """
    body = encode_request(channel, data, message_id or new_id())
    return _send(Endpoint.parse(url), body, key, time.monotonic() + timeout)


def new_id() -> str:
    """A message id that nobody else has."""
    return str(uuid.uuid4())


def encode_request(channel: str, data: Any, message_id: str) -> bytes:
    """The body of a publish. Raises TypeError or ValueError when `data` is no JSON value (NaN is none)."""
    request = {"channel": channel, "data": data, "messageId": message_id}
    return json.dumps(request, allow_nan=False, separators=(",", ":")).encode()


def decode_answer(status: int, retry_after: str | None, body: bytes) -> dict[str, Any]:
    """The result in an answer to a publish; raises Rejected, or Unavailable where another try makes sense."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    results = answer.get("results") if isinstance(answer, dict) else None
    result = results[0] if isinstance(results, list) and results and isinstance(results[0], dict) else {}
    if status == 200 and result and "error" not in result:
        return result
    error = result.get("error") or (answer.get("error") if isinstance(answer, dict) else None)
    error = error if isinstance(error, dict) else {}
    code = error.get("code") if isinstance(error.get("code"), str) else None
    reason = http.client.responses.get(status, "")
    sentence = str(error.get("message") or f"The server answered {status} {reason}".rstrip() + ".")
    if status in (408, 429) or status >= 500 or (status == 200 and code in PASSING_CODES):
        raise Unavailable(sentence, int(parse_retry_after(retry_after) * 1000))
    if not error:
        sentence += " Is the URL that of a tornado-bcast server?"
    raise Rejected(sentence, code=code, status=status)


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


def read_secret(path: str) -> str:
    """The key or token in a file; ValueError with a sentence when there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            secret = file.read().strip()
    except OSError as exc:
        raise ValueError(f"{path} cannot be read: {exc.strerror}.") from None
    except UnicodeError:
        raise ValueError(f"{path} is not a text file.") from None
    if not secret:
        raise ValueError(f"{path} is empty.")
    if not (secret.isascii() and secret.isprintable()):
        raise ValueError(f"{path} holds more than one key or token, or none.")
    return secret


def _send(endpoint: Endpoint, body: bytes, key: str | None, deadline: float) -> dict[str, Any]:
    """Try until an answer counts or `deadline` (of the monotonic clock) would be passed."""
    headers = {"Content-Type": "application/json", "User-Agent": "tornado-bcast"}
    if key:
        if not (key.isascii() and key.isprintable()):
            raise Rejected("The API key has characters that no key has; is its file the right one?")
        headers["Authorization"] = f"Bearer {key}"
    backoff = Backoff()
    while True:
        left = max(deadline - time.monotonic(), 0.05)
        try:
            return _attempt(endpoint, body, headers, min(left, _ATTEMPT_TIMEOUT))
        except Unavailable as exc:
            pause = backoff.next(exc.retry_after / 1000)
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)


def _attempt(endpoint: Endpoint, body: bytes, headers: dict[str, str], timeout: float) -> dict[str, Any]:
    kind = http.client.HTTPSConnection if endpoint.secure else http.client.HTTPConnection
    connection = kind(endpoint.host, endpoint.port, timeout=timeout)
    try:
        connection.request("POST", endpoint.path + "/broadcast", body, headers)
        response = connection.getresponse()
        answer = response.read(_MAX_ANSWER)
        if response.length or (response.status == 200 and not answer):
            raise http.client.IncompleteRead(answer)
    except ssl.SSLCertVerificationError as exc:
        raise Rejected(f"The server's certificate is not trusted: {exc.verify_message}.") from exc
    except (OSError, http.client.HTTPException) as exc:
        where = endpoint.url("http", "")
        raise Unavailable(f"No answer from {where} ({_describe(exc)}).", retry_after=0) from exc
    finally:
        connection.close()
    if 300 <= response.status < 400:
        target = response.headers.get("Location", "another address")
        raise Rejected(f"The server sends us on to {target}: use that as URL.", status=response.status)
    return decode_answer(response.status, response.headers.get("Retry-After"), answer)


def _describe(exc: OSError | http.client.HTTPException) -> str:
    if isinstance(exc, TimeoutError):
        return "timed out"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, http.client.IncompleteRead):
        return "the answer was cut off"
    return str(exc) or type(exc).__name__
