"""Two thousand clients at once, for tests of what a reload and a stop do to them.

Each is a small state machine on a bare socket that knows the protocol and nothing of the package: it listens
to one persistent channel with acks, resumes its session, and comes back when it was told to. What must never
happen is written into `wrong`; when things happened into the lists beside it.

    async with Crowd(daemon.url, clients=2000, channels=100) as crowd:
        async with crowd.publishing(100), crowd.probing():
            ... a reload ...
        await crowd.catch_up()
"""

import asyncio
import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

from client import client_frame, handshake, http

Event = dict[str, Any]


class Member(asyncio.Protocol):
    """One client, over all its connections."""

    def __init__(self, crowd: "Crowd", channel: str) -> None:
        self.channel = channel
        self.session: str | None = None
        self.position: tuple[str, int] | None = None
        # Ids of what it has received, in order; what it has sent and not seen acked, by id.
        self.received: list[str] = []
        self.unacked: dict[str, Event] = {}
        self._crowd = crowd
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._open = False
        # Where and when it may come back.
        self._wait: float | None = None
        # Since when it is away, having been told to leave.
        self._left: float | None = None
        self._failures = 0

    async def connect(self) -> None:
        crowd = self._crowd
        self._buffer, self._open, self._wait = b"", False, None
        crowd.arrivals.append(time.monotonic())
        try:
            await asyncio.get_running_loop().create_connection(lambda: self, *crowd.address)
        except OSError:
            self._failures += 1
            crowd.counts["refused"] += 1
            crowd.later(random.uniform(0, min(2.0, 0.1 * 2**self._failures)), self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        protocols = "bcast.v1" + (f", session.{self.session}" if self.session else "")
        head = handshake(self._crowd.host).removesuffix(b"\r\n")
        transport.write(head + f"Sec-WebSocket-Protocol: {protocols}\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._open:
            head, end, rest = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head:
                self._crowd.counts["not upgraded"] += 1
                assert self._transport is not None
                self._transport.abort()
                return
            self._open, self._buffer = True, rest
        for opcode, payload in self._frames():
            if opcode == 1:
                self._hear(json.loads(payload))
            elif opcode == 8:
                self._closed(payload)

    def _frames(self) -> Iterator[tuple[int, bytes]]:
        while len(self._buffer) >= 2:
            size, start = self._buffer[1], 2
            assert size < 127, "no message here is that long"
            if size == 126:
                size, start = int.from_bytes(self._buffer[2:4], "big"), 4
            if len(self._buffer) < start + size:
                return
            opcode, payload = self._buffer[0] & 15, self._buffer[start : start + size]
            self._buffer = self._buffer[start + size :]
            yield opcode, payload

    def send(self, **frame: Any) -> None:
        assert self._transport is not None
        self._transport.write(client_frame(json.dumps(frame).encode()))

    def publish(self, data: Any) -> None:
        """Send a message now or when it is connected again, until it is acked."""
        message = {"channel": self.channel, "data": data, "messageId": str(uuid4())}
        self.unacked[message["messageId"]] = message
        if self.position is not None and self._transport is not None:
            self.send(type="broadcast", **message)

    def _hear(self, event: Event) -> None:
        crowd = self._crowd
        match event:
            case {"type": "ack", "op": "connect"}:
                self._failures = 0
                if self._left is not None:
                    crowd.away.append(time.monotonic() - self._left)
                    self._left = None
                if self.session is not None and not event["resumed"]:
                    crowd.wrong.append("a session was not resumed")
                self.session = event["session"]
                if not event["subscriptions"]:
                    self.send(type="subscribe", channel=self.channel, ack=True, messageId="s")
                else:
                    self._restored(event["subscriptions"][0])
            case {"type": "ack", "op": "subscribe"}:
                self.position = event["epoch"], event["seq"]
                crowd.here.add(self)
            case {"type": "ack", "op": "broadcast"}:
                self.unacked.pop(event["messageId"], None)
                crowd.acked.add(event["messageId"])
            case {"type": "message"}:
                self._message(event)
            case {"type": "ping"}:
                self.send(type="pong")
            case _:
                crowd.wrong.append(f"came {event}")

    def _restored(self, entry: Event) -> None:
        assert self.position is not None
        if not entry["recovered"] or entry["seq"] > self.position[1]:
            self._crowd.wrong.append(f"at {self.position}, restored at {entry}")
        self._crowd.here.add(self)
        for message in self.unacked.values():
            self.send(type="broadcast", **message)

    def _message(self, event: Event) -> None:
        assert self.position is not None
        seq = self.position[1]
        self._crowd.counts["received"] += 1
        if event["seq"] == seq + 1:
            # Of another epoch when Redis was restarted meanwhile.
            self.position = event["epoch"], seq + 1
            self.received.append(event["messageId"])
        elif event["seq"] > seq:
            self._crowd.wrong.append(f"at {self.position} came {event}")
        else:
            self._crowd.counts["received again"] += 1
        self.send(type="ack", channel=self.channel, epoch=event["epoch"], seq=event["seq"])

    def _closed(self, payload: bytes) -> None:
        code = int.from_bytes(payload[:2], "big")
        if code != 1012:
            self._crowd.wrong.append(f"closed with {code} {payload[2:]!r}")
        else:
            self._wait = json.loads(payload[2:])["retryAfter"] / 1000
            self._left = time.monotonic()
            self._crowd.goodbyes.append((self._left, self._wait))
        assert self._transport is not None
        self._transport.write(client_frame(payload[:2], 8))

    def connection_lost(self, exception: Exception | None) -> None:
        crowd = self._crowd
        crowd.here.discard(self)
        self._transport = None
        if crowd.over:
            return
        if self._wait is None:
            crowd.counts["cut without a goodbye"] += 1
            self._failures += 1
            self._wait = random.uniform(0, min(2.0, 0.1 * 2**self._failures))
        crowd.later(self._wait, self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Crowd:
    """See the module."""

    def __init__(
        self, url: str, clients: int, channels: int, *, headers: Mapping[str, str | None] | None = None
    ) -> None:
        """`headers` go with each HTTP request, such as a key."""
        parts = urlsplit(url)
        self.url = url
        self.headers = headers
        self.host = parts.netloc
        self.address = parts.hostname, parts.port
        self.channels = [f"crowd.{number}" for number in range(channels)]
        self.members = [Member(self, self.channels[number % channels]) for number in range(clients)]
        self.here: set[Member] = set()
        self.over = False
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        # When somebody came; when somebody was told to leave, and to come back after how long.
        self.arrivals: list[float] = []
        self.goodbyes: list[tuple[float, float]] = []
        # For how long (seconds) each of them was away.
        self.away: list[float] = []
        # Ids of messages that were acknowledged to their publishers.
        self.acked: set[str] = set()
        # Seconds that each new connection waited for its first frame, and each HTTP publish for its answer.
        self.waits: list[float] = []
        self.answers: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()
        # How late (seconds) this loop itself was at most.
        self._lag = 0.0

    @property
    def is_starved(self) -> bool:
        """Whether so much else runs on this machine that times say nothing about the server."""
        return self._lag > 0.25 or os.getloadavg()[0] > 3 * (os.cpu_count() or 1)

    async def _watch_ourselves(self) -> None:
        while not self.over:
            begun = time.monotonic()
            await asyncio.sleep(0.02)
            self._lag = max(self._lag, time.monotonic() - begun - 0.02)

    def later(self, seconds: float, member: Member) -> None:
        def connect() -> None:
            if not self.over:
                self.spawn(member.connect())

        asyncio.get_running_loop().call_later(seconds, connect)

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.wrong.append(f"one of our own failed: {task.exception()!r}")

    async def __aenter__(self) -> Self:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * len(self.members) + 500
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(self._limits[0], needed), self._limits[1]))
        for number, member in enumerate(self.members):
            self.later(number / 800, member)
        await self.all_here(60)
        self._watching = asyncio.create_task(self._watch_ourselves())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.over = True
        await self._watching
        for member in self.members:
            member.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)

    async def all_here(self, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while len(self.here) < len(self.members):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    def busiest_second(self, since: float) -> int:
        """How many came in any one second after that moment."""
        times = sorted(moment for moment in self.arrivals if moment >= since)
        most = first = 0
        for last, moment in enumerate(times):
            while moment - times[first] >= 1:
                first += 1
            most = max(most, last - first + 1)
        return most

    @asynccontextmanager
    async def publishing(self, rate: float) -> AsyncIterator[None]:
        """So many messages a second, half over HTTP and half by members; until all are acknowledged."""
        going = True

        async def publish() -> None:
            begun = time.monotonic()
            for number in count():
                if not going:
                    return
                if number % 2:
                    self.spawn(self._post(number))
                else:
                    random.choice(self.members).publish(number)
                await asyncio.sleep(max(0.0, begun + (number + 1) / rate - time.monotonic()))

        self.spawn(publish())
        yield
        going = False

    async def _post(self, number: int) -> None:
        message = {"channel": random.choice(self.channels), "data": number, "messageId": str(uuid4())}
        begun = time.monotonic()
        while True:
            try:
                answer = await http(self.url, "POST", "/broadcast", message, self.headers)
                if answer.status == 200:
                    break
                self.counts[f"HTTP {answer.status}"] += 1
            except (OSError, AssertionError, TimeoutError):
                self.counts["HTTP without an answer"] += 1
            await asyncio.sleep(random.uniform(0.1, 0.5))
        self.answers.append(time.monotonic() - begun)
        self.acked.add(message["messageId"])

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """A new connection each 20 ms, and how long each waits for its first frame."""
        going = True

        async def probe() -> None:
            while going:
                self.spawn(self._probe())
                await asyncio.sleep(0.02)

        self.spawn(probe())
        yield
        going = False

    async def _probe(self) -> None:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection(*self.address)
                try:
                    writer.write(handshake(self.host))
                    await reader.readuntil(b'"op":"connect"')
                finally:
                    writer.transport.abort()
        except (OSError, EOFError, TimeoutError) as error:
            self.counts[f"a probe failed: {error!r}"] += 1
        self.waits.append(time.monotonic() - begun)

    async def catch_up(self, seconds: float = 30) -> None:
        """Wait until everybody has all that was acknowledged, and check that it is there once."""
        async with asyncio.timeout(seconds):
            while self.answers_are_missing() or len(self.here) < len(self.members):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        kept: list[str] = []
        for channel in self.channels:
            path = f"/channels/{channel}/history?limit=1000"
            answer = await http(self.url, "GET", path, headers=self.headers)
            ids = [message["messageId"] for message in answer.json["messages"]]
            kept += ids
            for member in self.members:
                if member.channel == channel:
                    async with asyncio.timeout(seconds):
                        while member.position is None or member.position[1] < answer.json["seq"]:  # noqa: ASYNC110
                            await asyncio.sleep(0.05)
                    if ids and member.received != ids[-len(member.received) :]:
                        self.wrong.append(f"{channel}: {member.received} of {ids}")
        if len(kept) != len(set(kept)):
            self.wrong.append("a message was taken twice")
        if lost := self.acked - set(kept):
            self.wrong.append(f"{len(lost)} acknowledged messages were lost")

    def answers_are_missing(self) -> bool:
        return any(member.unacked for member in self.members) or len(self._tasks) > 0

    def report(self, title: str, since: float) -> None:
        print(
            f"{title}: {len(self.members)} clients, busiest second {self.busiest_second(since)} returns, "
            f"worst wait of {len(self.waits)} new connections {max(self.waits, default=0) * 1000:.0f} ms, "
            f"worst of {len(self.answers)} HTTP answers {max(self.answers, default=0) * 1000:.0f} ms, "
            f"{len(self.acked)} acknowledged, our own lag {self._lag * 1000:.0f} ms, {dict(self.counts)}"
        )
