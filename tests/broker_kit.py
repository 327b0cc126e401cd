"""What the tests of brokers share: a recording node, a loop that notices what is left over, and a proxy."""

import asyncio
import functools
import json
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Self

from tornado_bcast.brokers import Broker, BusMessage, Publication
from tornado_bcast.eventloop import WorkerLoop

TEST_TIMEOUT = 60.0


def asynchronous(
    test: Callable[..., Coroutine[Any, Any, None]], seconds: float = TEST_TIMEOUT
) -> Callable[..., None]:
    """Run a test in a loop of its own, which must be empty at its end and must not have complained."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        complaints: list[dict[str, Any]] = []

        async def whole() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
            async with asyncio.timeout(seconds):
                await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        with asyncio.Runner(loop_factory=WorkerLoop) as runner:
            runner.run(whole())
        assert not complaints, complaints

    return run


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


class Node:
    """Records what a broker tells, in order."""

    def __init__(self, broker: Broker, name: str = "node") -> None:
        self.broker = broker
        self.name = name
        self.messages: list[tuple[str | None, BusMessage]] = []
        self.gaps: list[str] = []
        self.rows: list[bytes] = []

    def on_message(self, channel: str | None, message: BusMessage) -> None:
        self.messages.append((channel, message))

    def on_gap(self, channels: list[str]) -> None:
        self.gaps += channels

    def on_peer(self, row: bytes) -> None:
        self.rows.append(row)

    def heard(self, channel: str | None) -> list[Any]:
        """The `data` of what came on a channel."""
        return [json.loads(message.payload)["data"] for name, message in self.messages if name == channel]

    def seqs(self, channel: str) -> list[int]:
        return [message.seq for name, message in self.messages if name == channel]

    async def __aenter__(self) -> Self:
        await self.broker.start(self, lambda: b'{"name":"%s"}' % self.name.encode())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.broker.close()


def publication(channel: str | None, data: object, message_id: str | None = None, **more: Any) -> Publication:
    """A message; `persistent=True` alone gives it the times that most tests want."""
    if more.get("persistent"):
        more = {"dedup_ttl": 60, "history_size": 1000, "history_ttl": 60} | more
    payload = json.dumps({"type": "message", "data": data}, separators=(",", ":")).encode()
    return Publication(channel, message_id or f"id {data}", payload, 1_700_000_000_000, **more)


class Proxy:
    """A way to a Redis server that can be broken, each connection by itself. With `tls` it speaks TLS."""

    def __init__(self, path: Path, tls: ssl.SSLContext | None = None) -> None:
        # Where new connections go.
        self.path = path
        self._tls = tls
        self.port = 0
        # Of each open connection: both writers, and what came from the client on it.
        self.connections: list[Way] = []
        # Called with each piece from the server; what it returns is passed on.
        self.filter: Callable[[Way, bytes], bytes] = lambda way, data: data
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis{'s' if self._tls else ''}://127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for way in self.connections:
            way.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            back, forth = await asyncio.open_unix_connection(self.path)
        except OSError:
            writer.transport.abort()
            return
        way = Way(writer, forth)
        self.connections.append(way)

        async def up() -> None:
            while data := await reader.read(1 << 16):
                way.said += data
                forth.write(data)

        async def down() -> None:
            while data := await back.read(1 << 16):
                if passed := self.filter(way, data):
                    writer.write(passed)

        works: list[Awaitable[None]] = [asyncio.create_task(up()), asyncio.create_task(down())]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        finally:
            way.abort()
            await asyncio.gather(*works, return_exceptions=True)
            self.connections.remove(way)


class Way:
    """One connection through the proxy."""

    def __init__(self, outside: asyncio.StreamWriter, inside: asyncio.StreamWriter) -> None:
        self.said = b""
        self._writers = (outside, inside)

    def abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
