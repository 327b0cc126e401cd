"""Tornado's WebSocket protocol with our own reader and writer of frames.

The handshake, its checks and the closing handshake's timeout are Tornado's. Reading is done by `FrameParser`
(stricter, and one pass for each chunk); writing goes through the connection's `Sink`, so that everything
keeps its order and nothing is queued without a bound.
"""

import asyncio
import socket
from contextlib import suppress
from typing import Protocol

from tornado.iostream import SSLIOStream, StreamClosedError
from tornado.websocket import WebSocketHandler, WebSocketProtocol13, _WebSocketParams

from ..frames import BINARY, CLOSE, PING, PONG, TEXT, FrameParser, ProtocolViolation, frame, is_close_code
from ..sink import Sink

_CHUNK = 65536
# After so many bytes of one client in a row the others have their turn.
_FAIR_SHARE = 16384


class Receiver(Protocol):
    """The handler, as its wire sees it."""

    sink: Sink

    def on_text(self, text: str) -> None:
        """A text message."""

    def on_binary(self) -> None:
        """A binary message, which bcast.v1 has no use for."""

    def on_sign_of_life(self) -> None:
        """Bytes have come."""

    def on_too_big(self) -> None:
        """A message is longer than allowed; the connection is about to be closed for it."""

    def on_ws_connection_close(self, close_code: int | None, close_reason: str | None) -> None:
        """The connection has ended."""


class Wire(WebSocketProtocol13):
    """The framing of one connection."""

    def __init__(self, handler: WebSocketHandler, receiver: Receiver, max_message: int) -> None:
        super().__init__(
            handler, False, _WebSocketParams(max_message_size=max_message, compression_options=None)
        )
        self._receiver = receiver
        # The payload of the last ping that could not be answered at once (RFC 6455, section 5.5.3).
        self._ping: bytes | None = None

    async def _receive_frame_loop(self) -> None:
        receiver = self._receiver
        parser = FrameParser(self.params.max_message_size)
        share = 0
        try:
            while not self.client_terminated:
                data = await self.stream.read_bytes(_CHUNK, partial=True)
                receiver.on_sign_of_life()
                for opcode, payload in parser.feed(data):
                    self._receive(opcode, payload)
                    if self.client_terminated:
                        break
                share += len(data)
                if share >= _FAIR_SHARE:
                    share = 0
                    await asyncio.sleep(0)
        except StreamClosedError:
            self._abort()
        except ProtocolViolation as violation:
            if violation.code == 1009:
                receiver.on_too_big()
            self.close(violation.code, violation.reason)
            await self._discard()
        finally:
            receiver.on_ws_connection_close(self.close_code, self.close_reason)

    async def _discard(self) -> None:
        # Closing a socket with unread bytes resets it, and the peer would never see the close frame.
        try:
            while not self.stream.closed():
                self._finish_writing()
                await self.stream.read_bytes(_CHUNK, partial=True)
        except StreamClosedError:
            pass

    def _finish_writing(self) -> None:
        # The peer's own close frame cannot be found in what still comes, so nothing else tells it that all is
        # said; it would wait for us, and we for the timeout. TLS has no such half of an end.
        if self._receiver.sink.queued or isinstance(self.stream, SSLIOStream):
            return
        with suppress(OSError):
            self.stream.socket.shutdown(socket.SHUT_WR)

    def _receive(self, opcode: int, payload: bytes) -> None:
        if self.server_terminated and opcode != CLOSE:
            return
        if opcode == TEXT:
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
        elif opcode == CLOSE:
            self._receive_close(payload)

    def _receive_close(self, payload: bytes) -> None:
        if payload:
            code = int.from_bytes(payload[:2], "big")
            try:
                reason = payload[2:].decode()
            except UnicodeDecodeError:
                raise ProtocolViolation(1002, "a close reason must be UTF-8") from None
            if len(payload) == 1 or not is_close_code(code):
                raise ProtocolViolation(1002, "not a close code that a peer may send")
            self.close_code, self.close_reason = code, reason
        self.client_terminated = True
        self.close(self.close_code)

    def pong(self) -> None:
        """Answer a ping that had to wait for the queue."""
        if self._ping is not None and not self.server_terminated:
            payload, self._ping = self._ping, None
            self._receiver.sink.answer(frame(payload, PONG))

    def _write_frame(self, fin: bool, opcode: int, data: bytes, flags: int = 0) -> "asyncio.Future[None]":
        # Only Tornado's own close frame comes this way.
        self._receiver.sink.end(frame(data, opcode))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done
