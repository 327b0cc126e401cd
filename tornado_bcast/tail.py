"""The command `tail`: subscribe to channels and print each message as a line of JSON.

Two halves. `Tail` knows the channels, their positions and what each frame means (sans-I/O); `Follower` owns
the WebSocket, the clock and the output. Nothing here touches the server's side of the package.
"""

import asyncio
import json
import os
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from tornado.httpclient import HTTPError, HTTPRequest
from tornado.websocket import (
    WebSocketClientConnection,
    WebSocketClosedError,
    WebSocketError,
    websocket_connect,
)

from . import client
from .errors import CloseCode, Unavailable
from .protocol import SUBPROTOCOL

# Seconds: to connect, to hear the first frame, and beyond two heartbeats before silence is the end.
_CONNECT_TIMEOUT = 10.0
_FIRST_FRAME_TIMEOUT = 30.0
_GRACE = 5.0


@dataclass(frozen=True, slots=True)
class Print:
    """A message for standard output."""


@dataclass(frozen=True, slots=True)
class Say:
    sentence: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send `frame`, after so many seconds."""

    frame: dict[str, Any]
    after: float = 0.0


@dataclass(frozen=True, slots=True)
class Stop:
    """The server refused for good."""

    sentence: str


Action = Print | Say | Send | Stop


class Tail:
    """What a tail knows of its channels, across connections: where it stands and what to ask for."""

    def __init__(self, channels: list[str], last: int | None) -> None:
        self.channels = list(dict.fromkeys(channels))
        # Message id of a subscribe -> index of its channel.
        self._requests = {f"tail-{index}": index for index in range(len(self.channels))}
        self._last = last
        # Of persistent channels: the position up to which everything was printed.
        self._positions: dict[str, tuple[str, int]] = {}
        # Channels whose subscribe was confirmed at least once.
        self._known: set[str] = set()
        # Seconds without a frame after which the connection counts as dead.
        self.patience = _FIRST_FRAME_TIMEOUT

    def connect(self) -> Iterator[Send]:
        """What to send on a new connection."""
        self.patience = _FIRST_FRAME_TIMEOUT
        for index in range(len(self.channels)):
            yield Send(self._subscribe(index))

    def _subscribe(self, index: int) -> dict[str, Any]:
        channel = self.channels[index]
        frame: dict[str, Any] = {"type": "subscribe", "channel": channel, "messageId": f"tail-{index}"}
        if channel in self._positions:
            epoch, seq = self._positions[channel]
            frame["since"] = {"epoch": epoch, "seq": seq}
        elif self._last is not None and channel not in self._known:
            frame["last"] = self._last
        return frame

    def receive(self, frame: dict[str, Any]) -> Iterator[Action]:
        """What to do about a frame of the server."""
        kind = frame.get("type")
        channel = frame.get("channel")
        if kind == "message":
            if self._advance(channel, frame):
                yield Print()
        elif kind == "ping":
            yield Send({"type": "pong"})
        elif kind == "ack" and frame.get("op") == "connect":
            heartbeat = frame.get("heartbeat")
            if isinstance(heartbeat, (int, float)) and heartbeat > 0:
                self.patience = 2 * heartbeat / 1000 + _GRACE
        elif kind == "ack" and frame.get("op") == "subscribe" and isinstance(channel, str):
            yield from self._confirm(channel, frame)
        elif kind == "error":
            yield from self._complain(channel, frame)

    def _advance(self, channel: Any, frame: dict[str, Any]) -> bool:
        """Note the position of a message; whether it is a new one."""
        epoch, seq = frame.get("epoch"), frame.get("seq")
        if not isinstance(channel, str) or not isinstance(epoch, str) or not isinstance(seq, int):
            return True
        before = self._positions.get(channel)
        if before is not None and before[0] == epoch and seq <= before[1]:
            return False
        self._positions[channel] = (epoch, seq)
        return True

    def _confirm(self, channel: str, frame: dict[str, Any]) -> Iterator[Action]:
        again = channel in self._known
        self._known.add(channel)
        epoch, seq, replayed = frame.get("epoch"), frame.get("seq"), frame.get("replayed", 0)
        if frame.get("persistent") is not True:
            self._positions.pop(channel, None)
            yield Say(f"subscribed to {channel}{' again; what was sent meanwhile is lost' if again else ''}")
            if self._last is not None and not again:
                yield Say(f"{channel}: it keeps no history, so --last has no effect")
            return
        gap = again and channel in self._positions and frame.get("recovered") is False
        if isinstance(epoch, str) and isinstance(seq, int) and (gap or channel not in self._positions):
            # The replay has no holes, so it begins that many before the head.
            self._positions[channel] = (epoch, seq - replayed if isinstance(replayed, int) else seq)
        yield Say(f"subscribed to {channel}{' again' if again else ''}")
        if gap:
            yield Say(f"{channel}: the history does not reach back far enough, messages were missed")

    def _complain(self, channel: Any, frame: dict[str, Any]) -> Iterator[Action]:
        code, sentence = frame.get("code"), str(frame.get("message") or frame.get("code") or "an error")
        epoch, seq = frame.get("epoch"), frame.get("seq")
        if code == "history_lost" and isinstance(channel, str):
            if isinstance(epoch, str) and isinstance(seq, int):
                self._positions[channel] = (epoch, seq)
            yield Say(f"{channel}: {sentence}")
            return
        index = self._requests.get(str(frame.get("messageId")))
        if index is None:
            yield Say(sentence)
        elif code in client.PASSING_CODES:
            wait = frame.get("retryAfter")
            yield Say(f"{self.channels[index]}: {sentence}")
            yield Send(self._subscribe(index), wait / 1000 if isinstance(wait, (int, float)) else 1.0)
        else:
            yield Stop(f"{self.channels[index]}: {sentence}")


class _Ended(Exception):
    """A connection has ended. `pause`: seconds the server asked for; `final`: another try makes no sense."""

    def __init__(self, sentence: str, *, pause: float | None = None, final: bool = False) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.pause = pause
        self.final = final


class Follower:
    """The I/O of `tail`: one connection after the other, until it is refused or interrupted."""

    def __init__(
        self, tail: Tail, url: str, token_file: str | None, *, out: TextIO, say: Callable[[str], None]
    ) -> None:
        self._tail = tail
        self._url = url
        self._token_file = token_file
        self._out = out
        self._say = say
        self._backoff = client.Backoff(base=0.5, cap=20.0)
        # Set when nobody reads `out` any more.
        self._unread = False

    async def run(self) -> None:
        """Follow until nobody reads the output any more. Raises client.Rejected when the server refuses."""
        self._watch_reader()
        try:
            while True:
                await self._follow_once()
        except asyncio.CancelledError:
            if not self._unread:
                raise

    async def _follow_once(self) -> None:
        """One connection, and the pause after it."""
        try:
            await self._follow()
        except _Ended as end:
            if end.final:
                raise client.Rejected(end.sentence) from end
            pause = self._backoff.next() if end.pause is None else end.pause
            self._say(f"{end.sentence} Trying again in {pause:.1f} s.")
            await asyncio.sleep(pause)

    def _watch_reader(self) -> None:
        """End once nobody reads the output any more, also while no message comes.

        `tail | head -1` would hang until the second message otherwise. epoll tells a broken pipe to whoever
        waits at its writing end, whatever for (epoll_ctl(2), EPOLLERR); input never comes there.
        """
        if stat.S_ISFIFO(os.fstat(self._out.fileno()).st_mode):
            loop, task = asyncio.get_running_loop(), asyncio.current_task()

            def gone() -> None:
                loop.remove_reader(self._out.fileno())
                self._unread = True
                if task is not None:
                    task.cancel()

            loop.add_reader(self._out.fileno(), gone)

    async def _follow(self) -> NoReturn:
        """One connection, from the handshake to its end."""
        token = self._read_token()
        connection = await self._connect(token)
        try:
            for request in self._tail.connect():
                self._send(connection, request.frame)
            while True:
                raw = await self._read(connection)
                if raw is None:
                    raise self._why(connection.close_code, connection.close_reason, token)
                self._receive(connection, raw)
        finally:
            connection.close()

    def _read_token(self) -> str | None:
        """The token of now: the file may have been renewed since the last connection."""
        try:
            return client.read_secret(self._token_file) if self._token_file else None
        except ValueError as exc:
            raise _Ended(str(exc)) from exc

    async def _connect(self, token: str | None) -> WebSocketClientConnection:
        request = HTTPRequest(
            self._url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            connect_timeout=_CONNECT_TIMEOUT,
            request_timeout=2 * _CONNECT_TIMEOUT,
        )
        try:
            return await websocket_connect(request, subprotocols=[SUBPROTOCOL])
        except ssl.SSLCertVerificationError as exc:
            sentence = f"The server's certificate is not trusted: {exc.verify_message}."
            raise _Ended(sentence, final=True) from exc
        except HTTPError as exc:
            response = exc.response
            if exc.code == 599 or response is None:  # Tornado's own, for timeouts and lost connections.
                raise _Ended(f"No answer from {self._url} ({exc.message}).") from exc
            try:
                client.decode_answer(exc.code, response.headers.get("Retry-After"), response.body)
            except client.Rejected as refusal:
                raise _Ended(refusal.message, final=True) from exc
            except Unavailable as refusal:
                raise _Ended(str(refusal), pause=self._pause(refusal.retry_after)) from exc
            raise _Ended(f"{self._url} is no WebSocket.", final=True) from exc
        except (OSError, WebSocketError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise _Ended(f"No answer from {self._url} ({reason}).") from exc

    def _pause(self, retry_after: int) -> float | None:
        return self._backoff.next(retry_after / 1000) if retry_after else None

    async def _read(self, connection: WebSocketClientConnection) -> str | bytes | None:
        try:
            return await asyncio.wait_for(connection.read_message(), self._tail.patience)
        except TimeoutError:
            raise _Ended("The server has fallen silent.") from None

    def _why(self, code: int | None, reason: str | None, token: str | None) -> _Ended:
        """What the end of a connection means."""
        if code is None:
            return _Ended("The connection was lost.")
        name = CloseCode(code).name.lower().replace("_", " ") if code in list(CloseCode) else "closed"
        if 4500 <= code <= 4999:
            renewed = code in (CloseCode.BAD_TOKEN, CloseCode.TOKEN_EXPIRED) and self._read_token() != token
            detail = f": {reason}" if reason else ""
            return _Ended(f"The server ended the connection ({code}, {name}{detail}).", final=not renewed)
        return _Ended(f"The server closed the connection ({code}, {name}).", pause=_retry_after(reason))

    def _receive(self, connection: WebSocketClientConnection, raw: str | bytes) -> None:
        try:
            frame = json.loads(raw)
        except ValueError:
            return
        if not isinstance(frame, dict) or isinstance(raw, bytes):
            return
        if frame.get("op") == "subscribe":
            self._backoff.reset()
        for action in self._tail.receive(frame):
            match action:
                case Print():
                    self._out.write(raw if "\n" not in raw else json.dumps(frame))
                    self._out.write("\n")
                    self._out.flush()
                case Say(sentence):
                    self._say(sentence)
                case Send(reply, after):
                    asyncio.get_running_loop().call_later(after, self._send, connection, reply)
                case Stop(sentence):
                    raise _Ended(sentence, final=True)

    def _send(self, connection: WebSocketClientConnection, frame: dict[str, Any]) -> None:
        try:
            written = connection.write_message(json.dumps(frame))
        except WebSocketClosedError:
            return  # The reading side finds out and says so.
        written.add_done_callback(lambda future: future.cancelled() or future.exception())


def _retry_after(reason: str | None) -> float | None:
    """Seconds in the reason of a close, `{"retryAfter": ms}`."""
    try:
        value = json.loads(reason or "")["retryAfter"]
    except (ValueError, LookupError, TypeError):
        return None
    return max(0.0, value / 1000) if isinstance(value, (int, float)) else None
