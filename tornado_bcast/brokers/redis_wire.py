"""What goes over one connection to Redis, once it stands: commands out, and each reply to whom it is for.

redis-py makes the connection, and greets on it; then this takes its place behind the transport. Its own
streams cost a task and several turns of the loop for each answer, and are read from within a coroutine; a
reply is handed on here where it comes.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, cast

from hiredis import pack_command
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.exceptions import ConnectionError

# What one look at a connection brings at most; shared, for it is parsed at once. (asyncio's TLS takes slices
# of it to write to, which of a bytearray would be copies.)
_buffer = memoryview(bytearray(64 * 1024))

_Pack = Callable[[tuple[str | bytes | int | float, ...]], bytes]
pack: _Pack = cast(_Pack, pack_command)


class RedisWire(asyncio.BufferedProtocol):
    """See the module. What is asked by `ask` is answered there; all else is for who drives the wire.

    `connection` is one of redis-py's that has greeted, and of which nobody reads.
    """

    def __init__(self, connection: Any) -> None:
        # As redis-py has set it up: it makes the exceptions of error replies.
        self._replies = connection._parser._reader
        self._transport: asyncio.Transport = connection._writer.transport
        self._transport.set_protocol(self)
        # Who waits for the next replies, in order.
        self._asked: deque[asyncio.Future[Any]] = deque()
        self._on_reply: Callable[[Any], None] | None = None
        self._on_end: Callable[[Exception], None] | None = None
        # Why nothing comes any more.
        self._error: Exception | None = None

    def drive(self, on_reply: Callable[[Any], None], on_end: Callable[[Exception], None]) -> None:
        """Have `on_reply` called with each reply that nobody asked for by `ask`, errors among them.

        What it raises ends the wire. `on_end` is called once, with the reason: at once where there is one.
        """
        self._on_reply, self._on_end = on_reply, on_end
        if self._error is not None:
            on_end(self._error)

    async def ask(self, *command: str | bytes | int) -> Any:
        """One command, one answer; an error answer is raised. Before anybody drives the wire."""
        if self._error is not None:
            raise self._error
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self.send((pack(command),))
        return await answer

    def send(self, commands: Iterable[bytes]) -> None:
        self._transport.write(b"".join(commands))

    def get_buffer(self, sizehint: int) -> memoryview:
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._replies.feed(_buffer, 0, nbytes)
            while (reply := self._replies.gets()) is not NOT_ENOUGH_DATA and self._error is None:
                if self._asked:
                    self._answer(self._asked.popleft(), reply)
                elif self._on_reply is not None:
                    self._on_reply(reply)
        except Exception as error:
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("Connection closed by server."))

    @staticmethod
    def _answer(asked: "asyncio.Future[Any]", reply: Any) -> None:
        if asked.done():
            return
        if isinstance(reply, Exception):
            asked.set_exception(reply)
        else:
            asked.set_result(reply)

    def _end(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        # redis-py closes in good order only, and that does not end while the other side takes nothing (or
        # says nothing, with TLS): the socket and all that was written would stay, to be sent some day.
        self._transport.abort()
        for asked in self._asked:
            self._answer(asked, error)
        if self._on_end is not None:
            self._on_end(error)

    def abort(self) -> None:
        """Give it up; nobody is told."""
        self._on_reply = self._on_end = None
        self._end(ConnectionError("The connection was given up."))
