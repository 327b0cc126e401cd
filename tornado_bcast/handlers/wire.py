"""From Tornado's handshake to frames: the way of bytes for one connection after its upgrade.

`Handshake` is Tornado's own, but hands the stream on and keeps nothing: the request and its handler are free
when it is done. `Wire` reads by callbacks, so that an idle connection holds no coroutine; parsing is done by
`FrameParser`, and everything goes out through the connection's `Sink`, so that it keeps its order and nothing
is queued without a bound.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from typing import Protocol, cast

from tornado.iostream import IOStream, SSLIOStream
from tornado.websocket import WebSocketHandler, WebSocketProtocol13, _WebSocketParams

from ..compression import inflate
from ..errors import CloseCode
from ..frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    FrameParser,
    ProtocolViolation,
    Unmask,
    frame,
    is_close_code,
    unmask,
)
from ..protocol import encode_ping
from ..sink import Sink
from ..stream import ClientStream

_unmask: Unmask
try:
    # Tornado's own, in C.
    from tornado.speedups import websocket_mask as _unmask
except ImportError:
    _unmask = unmask

logger = logging.getLogger(__name__)

_NO_COMPRESSION = _WebSocketParams(compression_options=None)
# Seconds for the closing handshake; then the connection is cut.
_CLOSE_SECONDS = 5.0


def ping_frames(timestamp: int) -> bytes:
    """A heartbeat: the JSON ping and a WebSocket PING frame, in one write."""
    return frame(encode_ping(timestamp)) + frame(b"", PING)


class Upgrading(Protocol):
    """What the handshake asks of its handler beyond Tornado's."""

    def accept(self, accept_value: str) -> IOStream:
        """Take the stream, with the head of the 101 as its first bytes to send."""


class Handshake(WebSocketProtocol13):
    """RFC 6455, section 4, by Tornado. `handler.open` takes the stream."""

    def __init__(self, handler: WebSocketHandler) -> None:
        super().__init__(handler, False, _NO_COMPRESSION)

    async def accept_connection(self, handler: WebSocketHandler) -> None:
        """As Tornado's, but the answer leaves with the connection's first event, in one write."""
        headers = handler.request.headers
        key = headers.get("Sec-WebSocket-Key")
        if not key or not headers.get("Host"):
            # It says what is missing.
            await super().accept_connection(handler)
            return
        self.stream = cast("Upgrading", handler).accept(self.compute_accept_value(key))
        try:
            handler.open()
        except Exception:
            handler.log_exception(*sys.exc_info())
            self.stream.close()
            return
        await self._receive_frame_loop()

    def start_pinging(self) -> None:
        """Not here: one timer serves all connections."""

    async def _receive_frame_loop(self) -> None:
        """Not here: `Wire` has the stream by now. What held the request together lets go of it."""
        del self.handler, self.stream


class Receiver(Protocol):
    """The connection, as its wire sees it."""

    sink: Sink

    def on_text(self, text: str) -> None:
        """A text message."""

    def on_binary(self) -> None:
        """A binary message, which bcast.v1 has no use for."""

    def on_sign_of_life(self) -> None:
        """Bytes have come."""

    def on_too_big(self) -> None:
        """A message is longer than allowed; the connection is about to be closed for it."""

    def on_close(self) -> None:
        """The connection has ended. Told once."""


class Wire:
    """The framing of one connection, and its closing handshake."""

    __slots__ = ("_frames", "_held", "_parser", "_ping", "_receiver", "_said_close", "_stream", "_timer")

    def __init__(
        self, stream: ClientStream, receiver: Receiver, max_message: int, *, compressed: bool = False
    ) -> None:
        self._stream = stream
        self._receiver = receiver
        # None: nothing that comes is looked at any more.
        self._parser: FrameParser | None = FrameParser(max_message, _unmask, inflate if compressed else None)
        # What has been read before the connection was held.
        self._frames: Iterator[tuple[int, bytes]] | None = None
        self._held = False
        # The payload of the last ping that could not be answered at once (RFC 6455, section 5.5.3).
        self._ping: bytes | None = None
        # A close frame was sent; nothing may follow it.
        self._said_close = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to read."""
        self._stream.receive(self._on_data, self._end)

    def is_closing(self) -> bool:
        """Whether no more can be said."""
        return self._said_close or self._stream.closed()

    def close(self, code: int | None, reason: str = "") -> None:
        """Say goodbye after all that is queued; the connection ends when the peer has done so too."""
        if self._said_close:
            return
        self._said_close = True
        payload = b"" if code is None else code.to_bytes(2, "big") + reason.encode()
        self._receiver.sink.end(frame(payload, CLOSE))
        self._timer = asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._stream.close)

    def on_drained(self) -> None:
        """The queue has emptied: an answer to a ping may follow, or the end."""
        if self._ping is not None and not self._said_close:
            payload, self._ping = self._ping, None
            self._receiver.sink.answer(frame(payload, PONG))
        if self._said_close and self._parser is None:
            self._hang_up()

    def hold(self) -> None:
        """Look at nothing more that comes, nor at what has been read already, until `go_on`."""
        self._held = True
        self._stream.hold()

    def go_on(self) -> None:
        """Receive what has been read, then read on."""
        self._held = False
        frames, self._frames = self._frames, None
        if frames is not None:
            self._take(frames)
        if not self._held:
            self._stream.go_on()

    def _on_data(self, chunk: bytes) -> int:
        self._receiver.on_sign_of_life()
        if self._parser is not None:
            self._take(self._parser.feed(chunk))
        return 0 if self._parser is None else self._parser.missing

    def _take(self, frames: Iterator[tuple[int, bytes]]) -> None:
        try:
            for opcode, payload in frames:
                self._receive(opcode, payload)
                if self._held:
                    self._frames = frames
                    return
        except ProtocolViolation as violation:
            self._parser = None
            if violation.code == CloseCode.TOO_BIG:
                self._receiver.on_too_big()
            self.close(violation.code, violation.reason)
            self._finish()
        except Exception:
            logger.exception("unexpected error on a connection", extra={"event": "internal_error"})
            self._parser = None
            self.close(1011, "internal error")
            self._finish()

    def _receive(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            self._receive_close(payload)
        elif self._said_close:
            # Said before our goodbye was heard.
            pass
        elif opcode == TEXT:
            try:
                text = payload.decode()
            except UnicodeDecodeError:
                raise ProtocolViolation(1007, "a text message must be UTF-8") from None
            self._receiver.on_text(text)
        elif opcode == BINARY:
            self._receiver.on_binary()
        elif opcode == PING:
            if self._receiver.sink.queued:
                self._ping = payload
            else:
                self._receiver.sink.answer(frame(payload, PONG))

    def _receive_close(self, payload: bytes) -> None:
        code = None
        if payload:
            code = int.from_bytes(payload[:2], "big")
            try:
                payload[2:].decode()
            except UnicodeDecodeError:
                raise ProtocolViolation(1007, "a close reason must be UTF-8") from None
            if len(payload) == 1 or not is_close_code(code):
                raise ProtocolViolation(1002, "not a close code that a peer may send")
        self._parser = None
        self.close(code)
        self._finish()

    def _finish(self) -> None:
        """Nothing is expected of the peer any more: hang up when the last frame has left."""
        if not self._receiver.sink.queued:
            self._hang_up()

    def _hang_up(self) -> None:
        # Closing a socket with unread bytes resets it, and the peer might never see the last frame: so only
        # our half is closed, and what still comes is read away until the peer hangs up or the time is over.
        if self._stream.closed():
            # The peer has hung up, and the last frame told us so.
            return
        if isinstance(self._stream, SSLIOStream):
            self._stream.close()
            return
        try:
            self._stream.socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._stream.close()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._receiver.on_close()
