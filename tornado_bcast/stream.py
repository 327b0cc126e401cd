"""A client's stream once it is no longer HTTP: what comes is handed on in the turn in which it came.

Tornado's reads are futures: each costs a turn of the loop and a look at the socket more. `receive` takes
their place, and the worker's loop watches the socket itself: Tornado and asyncio have a dozen calls and half
a kilobyte for that. Writing and closing are Tornado's as ever, TLS included.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from tornado.iostream import IOStream

from .eventloop import TurnSelector, at_turn_end, turns

# What one look at a socket brings at most. A turn of the loop has up to 64 (eventloop.py), so this bounds
# what a turn makes of small frames: its length, and what comes to one subscriber at once.
_buffer = memoryview(bytearray(16 * 1024))
# Looks in a row, while a long message comes: enough for 64 KB, and the others have their turn.
_LOOKS = 4


class Closing(Protocol):
    """Who uses the descriptor."""

    def shut(self) -> None:
        """The descriptor is about to be closed; from then on it may be another's."""


class ClientStream(IOStream):
    """See the module."""

    # In slots: with more than thirty names in it the dict of Tornado's stream costs a kilobyte more.
    __slots__ = ("_ended", "_held", "_received", "_turns", "sink")

    def __init__(self, connection: socket.socket, **options: Any) -> None:
        self.sink: Closing | None = None
        self._received: Callable[[bytes], int] | None = None
        self._ended: Callable[[], None] | None = None
        # What watches the socket; None: Tornado does.
        self._turns: TurnSelector | None = None
        # Nothing is read, not even to learn of the peer's end.
        self._held = False
        super().__init__(connection, **options)

    def receive(self, received: Callable[[bytes], int], ended: Callable[[], None]) -> None:
        """Call `received` with all bytes from now on, and `ended` once, a turn after the stream has closed.

        For the rest of its life; no read may be under way. `received` must not raise. It returns how many
        bytes are missing from a message that has begun, and they are read with it, if they are there.
        """
        if self.closed():
            asyncio.get_running_loop().call_soon(ended)
            return
        if self._read_buffer_size:
            # It came with the handshake, and goes before what comes in the next turn.
            came = cast("asyncio.Future[bytes]", self.read_bytes(self._read_buffer_size))
            at_turn_end(partial(received, came.result()))
        self._received, self._ended = received, ended
        if self._state is not None:
            self.io_loop.remove_handler(self.fileno())
            self._state = None
        self._turns = turns()
        self._watch()

    def hold(self) -> None:
        """Leave what comes to the kernel, which makes the peer wait, until `go_on`."""
        self._held = True
        self._watch()

    def go_on(self) -> None:
        self._held = False
        self._watch()
        if self._pending():
            asyncio.get_running_loop().call_soon(self.on_readable)

    def _watch(self) -> None:
        """Have the loop look for what there is to do."""
        if self._turns is not None and not self.closed():
            self._turns.watch(self.socket.fileno(), self, reading=not self._held, writing=self.writing())

    def _add_io_state(self, state: int) -> None:
        if self._turns is None:
            super()._add_io_state(state)
        else:
            # More has been written than the kernel takes.
            self._watch()

    def _pending(self) -> bool:
        """Whether TLS holds something already, of which the loop would never hear."""
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0

    def reading(self) -> bool:
        return self._received is not None or super().reading()

    def on_writable(self) -> None:
        """Write what waits."""
        self._handle_write()
        if not self.writing():
            self._watch()

    def on_readable(self) -> None:
        """Hand on what has come."""
        wanted = len(_buffer)
        looks = 0
        while wanted and self._received is not None and not self._held:
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
            looks += 1
            if self._pending():
                wanted = len(_buffer)
            elif size == wanted and looks < _LOOKS:
                # No more than the rest of a long message, or small ones behind it would have no bound.
                wanted = min(missing, len(_buffer))
            else:
                return

    def close_fd(self) -> None:
        if self.sink is not None:
            self.sink.shut()
        if self._turns is not None:
            self._turns.watch(self.socket.fileno(), self, reading=False, writing=False)
        if self._ended is not None:
            asyncio.get_running_loop().call_soon(self._ended)
            self._received = self._ended = None
        super().close_fd()
