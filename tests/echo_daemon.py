"""The real daemon, but that its WebSockets send back what they are sent: what a conformance suite talks to.

    python tests/echo_daemon.py serve -c FILE

All below a message is the daemon's own: processes, handshake, framing, compression, the way out. With
`[server] compression` answers of any size are compressed, so that the suite sees as much of it as it can.
"""

import sys

from tornado_bcast import cli, compression
from tornado_bcast.compression import Compressor
from tornado_bcast.frames import BINARY, TEXT, frame
from tornado_bcast.handlers import connection, websocket
from tornado_bcast.handlers.connection import Connection
from tornado_bcast.handlers.wire import Wire


class EchoWire(Wire):
    """Hands binary messages on, which have no meaning in bcast.v1."""

    __slots__ = ()

    def _receive(self, opcode: int, payload: bytes) -> None:
        if opcode == BINARY and not self.is_closing():
            assert isinstance(self._receiver, Echo)
            self._receiver.send(payload, BINARY)
        else:
            super()._receive(opcode, payload)


class Echo(Connection):
    """A connection without a protocol: no `connect`, no heartbeat."""

    __slots__ = ()

    _compressor = Compressor()

    def start(self, head: bytes, session_id: str | None, token: str | None) -> None:
        self.sink.answer(head)
        self._wire.start()

    def on_text(self, text: str) -> None:
        self.send(text.encode(), TEXT)

    def on_too_big(self) -> None:
        pass

    def send(self, payload: bytes, opcode: int) -> None:
        plain = frame(payload, opcode)
        self.sink.answer(self._compressor.compress(plain) if self.sink.compressed else plain)


if __name__ == "__main__":
    compression.THRESHOLD = 0
    connection.Wire = EchoWire  # type: ignore[misc]
    websocket.Connection = Echo  # type: ignore[misc]
    sys.exit(cli.main())
