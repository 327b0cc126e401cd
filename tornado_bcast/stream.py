"""A client's stream once it is no longer HTTP: what comes is handed on in the turn in which it came.

Tornado's reads are futures: each costs a turn of the loop and a look at the socket more. `receive` takes
their place, within Tornado's own watching of the socket, so that writing and closing are as ever, TLS
included.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from tornado.iostream import IOStream

from .eventloop import WorkerLoop, at_turn_end

# What one look at a socket brings at most. A turn of the loop has up to 64 (eventloop.py), so this bounds
# what a turn makes of small frames: its length, and what comes to one subscriber at once.
_buffer = memoryview(bytearray(16 * 1024))


class Closing(Protocol):
    """Who uses the descriptor."""

    def shut(self) -> None:
        """The descriptor is about to be closed; from then on it may be another's."""


class ClientStream(IOStream):
    """See the module."""

    # In slots: with more than thirty names in it the dict of Tornado's stream costs a kilobyte more.
    __slots__ = ("_ended", "_held", "_received", "sink")

    def __init__(self, connection: socket.socket, **options: Any) -> None:
        self.sink: Closing | None = None
        self._received: Callable[[bytes], int] | None = None
        self._ended: Callable[[], None] | None = None
        # Nothing is read, not even to learn of the peer's end.
        self._held = False
        super().__init__(connection, **options)

    def receive(self, received: Callable[[bytes], int], ended: Callable[[], None]) -> None:
        """Call `received` with all bytes from now on, and `ended` once, a turn after the stream has closed.

        For the rest of its life; no read may be under way. `received` must not raise. It returns how many
        bytes are missing from a message that has begun, and they are read with it, if they are there.
        """
        loop = asyncio.get_running_loop()
        if self.closed():
            loop.call_soon(ended)
            return
        if self._read_buffer_size:
            # It came with the handshake, and goes before what comes in the next turn.
            came = cast("asyncio.Future[bytes]", self.read_bytes(self._read_buffer_size))
            at_turn_end(partial(received, came.result()))
        self._received, self._ended = received, ended
        self._add_io_state(self.io_loop.READ)
        if isinstance(loop, WorkerLoop):
            loop.readers[self.socket.fileno()] = self

    def hold(self) -> None:
        """Leave what comes to the kernel, which makes the peer wait, until `go_on`."""
        self._held = True
        self._look_away()

    def go_on(self) -> None:
        self._held = False
        if not self.closed():
            self._add_io_state(self.io_loop.READ)
            if self._pending():
                asyncio.get_running_loop().call_soon(self._handle_read)

    def _look_away(self) -> None:
        if not self.closed() and self._state is not None and self._state & self.io_loop.READ:
            self._state &= ~self.io_loop.READ
            self.io_loop.update_handler(self.fileno(), self._state)

    def _handle_events(self, fd: Any, events: int) -> None:
        super()._handle_events(fd, events)
        if self._held:
            # It has taken up reading again, if only to see the end.
            self._look_away()

    def _pending(self) -> bool:
        """Whether TLS holds something already, of which the loop would never hear."""
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0

    def reading(self) -> bool:
        return self._received is not None or super().reading()

    def _handle_read(self) -> None:
        if self._received is None:
            super()._handle_read()
        else:
            self.on_readable()

    def on_readable(self) -> None:
        """Hand on what has come, once it is no longer HTTP."""
        assert self._received is not None
        wanted = len(_buffer)
        while wanted and not self._held and not self.closed():
            try:
                size = self.read_from_fd(_buffer[:wanted])
            except OSError as error:
                self.close(exc_info=error)
                return
            if not size:
                if size == 0:
                    self.close()
                return
            missing = self._received(bytes(_buffer[:size]))
            if self._pending():
                wanted = len(_buffer)
            elif size == wanted:
                # No more than the rest of a long message, or small ones behind it would have no bound.
                wanted = min(missing, len(_buffer))
            else:
                return

    def close_fd(self) -> None:
        if self.sink is not None:
            self.sink.shut()
        if self._ended is not None:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._ended)
            if isinstance(loop, WorkerLoop):
                del loop.readers[self.socket.fileno()]
            self._received = self._ended = None
        super().close_fd()
