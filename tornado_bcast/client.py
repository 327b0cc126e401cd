"""Publishing from Python: `publish`, and `async_publish` on an asyncio loop, give up only when time is over.

    from tornado_bcast.client import publish
    publish("news", {"title": "Hello"}, url="http://127.0.0.1:8080", key="...")
    publish(messages=[{"channel": "news", "data": 1}, {"channel": "sport", "data": 2}], key="...")

Owns the two ways on which the requests of publishing.py travel: `http.client` of the standard library, which
is all that `publish` needs, and Tornado's client. When to try again, and what an answer means, stands there.
"""

import http.client
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any, overload

from .errors import Unavailable
from .publishing import (
    DEFAULT_URL,
    PASSING_CODES,
    Backoff,
    Endpoint,
    GaveUp,
    Headers,
    Publishing,
    Rejected,
    Result,
    decode_answer,
    headers_for,
    new_id,
    parse_retry_after,
)

__all__ = [
    "DEFAULT_URL",
    "PASSING_CODES",
    "Backoff",
    "Endpoint",
    "GaveUp",
    "Rejected",
    "Unavailable",
    "async_publish",
    "decode_answer",
    "new_id",
    "parse_retry_after",
    "publish",
    "read_secret",
]

_MAX_ANSWER = 1 << 20
_NOTHING = object()


@overload
def publish(
    channel: str,
    data: Any,
    *,
    url: str = DEFAULT_URL,
    key: str | None = None,
    message_id: str | None = None,
    timeout: float = 30.0,
) -> Result: ...
@overload
def publish(
    *,
    messages: Iterable[Mapping[str, Any]],
    url: str = DEFAULT_URL,
    key: str | None = None,
    timeout: float = 30.0,
) -> list[Result]: ...
def publish(
    channel: str | None = None,
    data: Any = _NOTHING,
    *,
    messages: Iterable[Mapping[str, Any]] | None = None,
    url: str = DEFAULT_URL,
    key: str | None = None,
    message_id: str | None = None,
    timeout: float = 30.0,
) -> Result | list[Result]:
    """Publish `data` (any JSON value) on `channel` and return the server's result for it.

    The result has `channel`, `messageId`, on persistent channels `seq` and `epoch`, and `duplicate: true`
    when a message with this id was taken before. `message_id` is a new UUID unless given; give one of your
    own to make a job that may run twice publish once. `timeout` (seconds) is for everything, the
    retries as well.

    Or publish `messages`, any number, each `{"channel", "data", "messageId"?}` as in `POST /broadcast`, and
    return a list of their results. They keep their order, but one that had to be tried again comes later.

    Raises Rejected when the server refuses one for good, after all others were tried, and GaveUp (an
    Unavailable) when the time is over: some may have been taken then, so try again with the same ids. Both
    have `results`. TypeError and ValueError: the arguments make no sense, or `data` is no JSON value.
    """
    endpoint, headers = Endpoint.parse(url), headers_for(key)
    batch = _batch(channel, data, messages, message_id)
    core = Publishing(batch, timeout=timeout, now=time.monotonic())
    while (pause := core.pause(time.monotonic())) is not None:
        time.sleep(pause)
        body, patience = core.request(time.monotonic())
        try:
            status, answered, answer = _exchange(endpoint, headers, body, patience)
        except ssl.SSLCertVerificationError as exc:
            raise _distrusted(exc) from exc
        except (OSError, http.client.HTTPException) as exc:
            core.fail(_no_answer(endpoint, exc))
        else:
            core.receive(status, answered, answer)
    return core.results() if messages is not None else core.results()[0]


@overload
async def async_publish(
    channel: str,
    data: Any,
    *,
    url: str = DEFAULT_URL,
    key: str | None = None,
    message_id: str | None = None,
    timeout: float = 30.0,  # noqa: ASYNC109
) -> Result: ...
@overload
async def async_publish(
    *,
    messages: Iterable[Mapping[str, Any]],
    url: str = DEFAULT_URL,
    key: str | None = None,
    timeout: float = 30.0,  # noqa: ASYNC109
) -> list[Result]: ...
async def async_publish(
    channel: str | None = None,
    data: Any = _NOTHING,
    *,
    messages: Iterable[Mapping[str, Any]] | None = None,
    url: str = DEFAULT_URL,
    key: str | None = None,
    message_id: str | None = None,
    timeout: float = 30.0,  # noqa: ASYNC109
) -> Result | list[Result]:
    """As `publish`, on the running asyncio loop. When it is cancelled nobody knows what was taken."""
    import asyncio

    from tornado.httpclient import AsyncHTTPClient, HTTPError, HTTPRequest

    endpoint, headers = Endpoint.parse(url), headers_for(key)
    batch = _batch(channel, data, messages, message_id)
    core = Publishing(batch, timeout=timeout, now=time.monotonic())
    client = AsyncHTTPClient(force_instance=True)
    try:
        while (pause := core.pause(time.monotonic())) is not None:
            await asyncio.sleep(pause)
            body, patience = core.request(time.monotonic())
            request = HTTPRequest(
                endpoint.url("http", "/broadcast"),
                "POST",
                headers,
                body,
                connect_timeout=patience,
                request_timeout=patience,
                follow_redirects=False,
            )
            try:
                response = await client.fetch(request, raise_error=False)
            except ssl.SSLCertVerificationError as exc:
                raise _distrusted(exc) from exc
            except (OSError, HTTPError) as exc:
                core.fail(_no_answer(endpoint, exc))
            else:
                core.receive(response.code, response.headers, response.body)
    finally:
        client.close()
    return core.results() if messages is not None else core.results()[0]


def _batch(
    channel: str | None,
    data: Any,
    messages: Iterable[Mapping[str, Any]] | None,
    message_id: str | None,
) -> Iterable[Mapping[str, Any]]:
    if messages is None:
        if channel is None or data is _NOTHING:
            raise TypeError("give a channel and its data, or `messages`")
        return [{"channel": channel, "data": data, "messageId": message_id or new_id()}]
    if channel is not None or data is not _NOTHING or message_id is not None:
        raise TypeError("`messages` stands alone: channel, data and messageId belong into each")
    return messages


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


def _exchange(
    endpoint: Endpoint, headers: Mapping[str, str], body: bytes, timeout: float
) -> tuple[int, Headers, bytes]:
    """One request: status, headers and body of its answer."""
    kind = http.client.HTTPSConnection if endpoint.secure else http.client.HTTPConnection
    connection = kind(endpoint.host, endpoint.port, timeout=timeout)
    try:
        connection.request("POST", endpoint.path + "/broadcast", body, dict(headers))
        response = connection.getresponse()
        answer = response.read(_MAX_ANSWER)
        if response.length or (response.status == 200 and not answer):
            raise http.client.IncompleteRead(answer)
        return response.status, response.headers, answer
    finally:
        connection.close()


def _distrusted(exc: ssl.SSLCertVerificationError) -> Rejected:
    return Rejected(f"The server's certificate is not trusted: {exc.verify_message}.")


def _no_answer(endpoint: Endpoint, exc: Exception) -> str:
    return f"No answer from {endpoint.url('http', '')} ({_describe(exc)})."


def _describe(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "timed out"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    if isinstance(exc, http.client.IncompleteRead):
        return "the answer was cut off"
    return str(exc) or type(exc).__name__
