"""A small world around a daemon: publishers that retry, and subscribers that are a model of the SDK.

Everybody here knows the protocol and nothing of the package. What must never happen is written into the
`Ledger` by whoever sees it; what only shows at the end is found by chaos_check.py.

    world = World(daemon.url, CHANNELS)
    async with world:
        ... faults ...
"""

import asyncio
import json
import random
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple, Self
from uuid import uuid4

import websockets
from client import http
from websockets.asyncio.client import ClientConnection, connect

Event = dict[str, Any]

# What may go wrong on the way to a server that is killed: the publisher does not know then what was taken.
TROUBLE = (OSError, EOFError, TimeoutError, AssertionError, websockets.WebSocketException)
# Messages of the WebSocket publisher that may be without an answer.
WINDOW = 30
# Seconds between two tries, at most; of the first one a tenth of a second.
LONGEST_PAUSE = 2.0


class Position(NamedTuple):
    epoch: str
    seq: int


class Receipt(NamedTuple):
    """An acknowledged publish. `order`: by connection or request, and by the place in it."""

    publisher: str
    channel: str
    message_id: str
    place: Position
    duplicate: bool
    order: tuple[int, int]


class Ledger:
    """What is known to all: who was given which number, what was acknowledged, what went wrong."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        # Every message id that was ever sent.
        self.sent: set[str] = set()
        self.receipts: list[Receipt] = []
        self._pairs: dict[tuple[str, Position], str] = {}

    def complain(self, text: str) -> None:
        self.wrong.append(text)

    def note(self, channel: str, place: Position, message_id: str) -> None:
        """Somebody says that this message has this number. No number is given to two."""
        known = self._pairs.setdefault((channel, place), message_id)
        if known != message_id:
            self.complain(f"{channel} {place} is {known} and {message_id}")


def _pause(failures: int) -> float:
    return random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**failures))


def _connect(url: str, session: str | None = None) -> Any:
    protocols = ["bcast.v1", *([f"session.{session}"] if session else [])]
    return connect(
        url + "/ws",
        subprotocols=protocols,  # type: ignore[arg-type]
        compression=None,
        ping_interval=None,
        max_size=None,
        max_queue=None,
        # Longer than a resume waits for Redis.
        open_timeout=15,
        close_timeout=1,
        proxy=None,
    )


# Publishers


class Outbox:
    """The messages of one publisher that have no answer yet, by id and in order."""

    def __init__(self, name: str, channels: list[str], ledger: Ledger) -> None:
        self.name = name
        self.open: dict[str, Event] = {}
        self._channels = channels
        self._ledger = ledger
        self._numbers = count()

    def new(self) -> Event:
        message_id = str(uuid4())
        data = {"from": self.name, "number": next(self._numbers)}
        message = {"channel": random.choice(self._channels), "data": data, "messageId": message_id}
        self.open[message_id] = message
        self._ledger.sent.add(message_id)
        return message

    def take(self, answer: Event, order: tuple[int, int]) -> None:
        """A message is acknowledged."""
        message = self.open.pop(answer["messageId"], None)
        if message is None:
            self._ledger.complain(f"{self.name}: an ack for what was not sent, or a second one: {answer}")
            return
        place = Position(answer["epoch"], answer["seq"])
        duplicate = answer.get("duplicate", False)
        channel = message["channel"]
        if answer["channel"] != channel:
            self._ledger.complain(f"{self.name}: sent to {channel}, acknowledged as {answer}")
        self._ledger.note(channel, place, answer["messageId"])
        self._ledger.receipts.append(
            Receipt(self.name, channel, answer["messageId"], place, duplicate, order)
        )
        self._ledger.counts["acknowledged"] += 1
        self._ledger.counts["duplicates answered"] += duplicate


class SocketPublisher:
    """Publishes over one WebSocket connection at a time, without waiting for each answer."""

    def __init__(self, world: "World", rate: float) -> None:
        self._world = world
        self._ledger = world.ledger
        self._outbox = Outbox("ws", world.channels, world.ledger)
        self._rate = rate
        self._connections = count()
        # Message id -> its place among what was sent on this connection.
        self._orders: dict[str, tuple[int, int]] = {}
        # Message id -> when it is sent again.
        self._again: dict[str, float] = {}
        # In a tunnel: what is answered is lost with the connection.
        self._tunnel = False

    async def run(self) -> None:
        failures = 0
        while self._world.publishing or self._outbox.open:
            try:
                async with _connect(self._world.ws_url) as socket:
                    await self._talk(socket)
                failures = 0
            except TROUBLE:
                failures += 1
            await asyncio.sleep(_pause(failures))

    async def _talk(self, socket: ClientConnection) -> None:
        writer = asyncio.create_task(self._write(socket))
        try:
            async for text in socket:
                self._hear(json.loads(text))
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, socket: ClientConnection) -> None:
        number = next(self._connections)
        places = count()
        outbox = self._outbox
        self._tunnel = False
        self._again = dict.fromkeys(outbox.open, 0.0)
        cut_at = time.monotonic() + random.uniform(1, 5)
        while self._world.publishing or outbox.open:
            now = time.monotonic()
            self._tunnel = self._tunnel or (now > cut_at and not self._world.calm)
            if self._tunnel and now > cut_at + 0.2:
                socket.transport.abort()
            due = [message_id for message_id, at in self._again.items() if at <= now]
            for message_id in due:
                del self._again[message_id]
            messages = [outbox.open[message_id] for message_id in due if message_id in outbox.open]
            self._ledger.counts["publishes repeated"] += len(messages)
            if self._world.publishing and len(outbox.open) < WINDOW:
                messages.append(outbox.new())
            for message in messages:
                self._orders[message["messageId"]] = number, next(places)
                await socket.send(json.dumps({"type": "broadcast", **message}))
            await asyncio.sleep(1 / self._rate)
        await socket.close()

    def _hear(self, event: Event) -> None:
        if self._tunnel:
            return
        if event["type"] == "ack" and event["op"] == "broadcast":
            self._outbox.take(event, self._orders[event["messageId"]])
        elif event["type"] == "error":
            if event["code"] != "unavailable":
                self._ledger.complain(f"the WebSocket publisher got {event}")
            self._ledger.counts["publishes unavailable"] += 1
            self._again[event["messageId"]] = time.monotonic() + event["retryAfter"] / 1000


class HttpPublisher:
    """Publishes over HTTP, `size` messages in a request; what was not taken goes into the next one."""

    def __init__(self, world: "World", size: int, rate: float) -> None:
        self._world = world
        self._ledger = world.ledger
        self._size = size
        self._rate = rate
        self._outbox = Outbox(f"http {size}", world.channels, world.ledger)
        self._requests = count()

    async def run(self) -> None:
        outbox, failures = self._outbox, 0
        while self._world.publishing or outbox.open:
            self._ledger.counts["publishes repeated"] += len(outbox.open)
            while self._world.publishing and len(outbox.open) < self._size:
                outbox.new()
            try:
                await self._post(list(outbox.open.values()))
                failures = 0
            except TROUBLE:
                failures += 1
            await asyncio.sleep(_pause(failures) if failures else self._size / self._rate)

    async def _post(self, messages: list[Event]) -> None:
        number = next(self._requests)
        body = {"messages": messages} if self._size > 1 else messages[0]
        # Now and then it does not wait for the answer.
        patience = 0.01 if random.random() < 0.05 and not self._world.calm else 30
        async with asyncio.timeout(patience):
            answer = await http(self._world.url, "POST", "/broadcast", body)
        if answer.status not in (200, 503):
            self._ledger.complain(f"POST /broadcast was answered {answer}")
            return
        self._ledger.counts["publishes unavailable"] += answer.status == 503
        for index, result in enumerate(answer.json.get("results", ())):
            if "error" not in result:
                self._outbox.take(result, (number, index))
            elif result["error"]["code"] != "unavailable":
                self._ledger.complain(f"the HTTP publisher got {result}")
        if answer.status == 503:
            await asyncio.sleep(min(float(answer.headers["retry-after"]), LONGEST_PAUSE))


# Subscribers


class Span:
    """What a subscriber has processed on one channel from `start` on, until it is told of a loss."""

    def __init__(self, start: Position) -> None:
        self.start = start
        self.messages: list[tuple[Position, str]] = []


class Line:
    """One subscriber's channel."""

    def __init__(self, name: str) -> None:
        # For complaints: whose it is.
        self.name = name
        self.spans: list[Span] = []
        # All up to here has been processed; None before the first subscribe.
        self.position: Position | None = None
        # Epochs that the present span has gone through: their messages up to `position` are processed.
        self.known: set[str] = set()
        # The subscribe that is under way: until its answer nothing is taken from the channel.
        self.pending: str | None = None
        # The last message that came and is processed, now or earlier; None when that is acked. What comes
        # again is acked by its own place: the server may not know how far we are.
        self.unacked: Position | None = None
        # The server restored an older position than ours, so it cannot know what we have seen since.
        self.ahead = False
        # What happened last, for the complaint that it got stuck there.
        self.trace: deque[str] = deque(maxlen=12)

    def note(self, what: str) -> None:
        self.trace.append(f"{time.monotonic():.3f} at {self.position}: {what}")

    def begin(self, start: Position) -> None:
        self.spans.append(Span(start))
        self.position = start
        self.known = {start.epoch}

    def add(self, place: Position, message_id: str) -> None:
        self.spans[-1].messages.append((place, message_id))
        self.position = place
        self.known.add(place.epoch)
        self.unacked = place


class Kind(NamedTuple):
    """How a subscriber behaves."""

    # With explicit acks.
    acks: bool = True
    # Resumes its session.
    resumes: bool = True
    # Now and then it acks nothing for up to so many seconds.
    stall: float = 0


class Subscriber:
    """A faithful small model of the SDK on a network that cuts its connections now and then."""

    def __init__(self, world: "World", name: str, channels: Iterable[str], kind: Kind) -> None:
        self.lines = {channel: Line(f"{name} {kind} {channel}") for channel in channels}
        self._world = world
        self._ledger = world.ledger
        self._name = name
        self._kind = kind
        self._session: str | None = None
        self._ids = count()
        # In a tunnel: what the server sends is lost with the connection.
        self._tunnel = False

    async def run(self) -> None:
        failures = 0
        while True:
            try:
                async with _connect(self._world.ws_url, self._session) as socket:
                    failures = 0 if await self._live(socket) else failures + 1
                wait = self._judge(socket.close_code, socket.close_reason or "")
            except TROUBLE:
                failures += 1
                wait = 0.0
            await asyncio.sleep(max(wait, _pause(failures)))

    def _judge(self, code: int | None, reason: str) -> float:
        """What the end of a connection means; how many seconds to stay away."""
        self._ledger.counts[f"closed {code}"] += 1
        if code == 4009:
            self._session = None
        if code in (1012, 1013, 4008, 4029):
            return float(json.loads(reason)["retryAfter"]) / 1000
        if code not in (1000, 1001, 1006, 4001, 4002, 4009):
            self._ledger.complain(f"{self._name}: closed with {code} {reason}")
        return 0.0

    async def _live(self, socket: ClientConnection) -> bool:
        """One connection. Whether it was begun by a `connect`."""
        self._tunnel = False
        moods = None
        try:
            async for text in socket:
                event = json.loads(text)
                if moods is None:
                    await self._begin(event, socket)
                    moods = asyncio.create_task(self._moods(socket))
                elif not self._tunnel:
                    await self._hear(event, socket)
        except websockets.ConnectionClosed:
            pass
        finally:
            if moods is not None:
                moods.cancel()
                await asyncio.gather(moods, return_exceptions=True)
        return moods is not None

    async def _moods(self, socket: ClientConnection) -> None:
        """Acks in batches; and what makes life hard."""
        stalled_until = 0.0
        cut_at = time.monotonic() + random.uniform(0.5, 6)
        while True:
            await asyncio.sleep(random.uniform(0.04, 0.12))
            now = time.monotonic()
            if self._world.calm:
                stalled_until, cut_at = 0.0, float("inf")
            if self._kind.stall:
                stalled_until = max(stalled_until, self._world.stalled_until)
            if now >= stalled_until and self._kind.stall and random.random() < 0.03:
                stalled_until = now + random.uniform(0.6, self._kind.stall)
                cut_at = max(cut_at, stalled_until - 1)
            if now >= stalled_until:
                for channel, line in self.lines.items():
                    if line.unacked is not None and self._kind.acks:
                        await self._ack(channel, line, line.unacked, socket)
                if random.random() < 0.02:
                    await self._stay(socket)
            if now >= cut_at:
                self._tunnel = True
                await asyncio.sleep(random.uniform(0, 0.4))
                if random.random() < 0.2:
                    await socket.close()
                socket.transport.abort()
                return

    async def _begin(self, event: Event, socket: ClientConnection) -> None:
        """`connect` is answered: what was restored goes on, the rest is subscribed."""
        if event["type"] != "ack" or event["op"] != "connect":
            self._ledger.complain(f"{self._name}: the first frame is {event}")
        self._ledger.counts["connections"] += 1
        self._ledger.counts["resumed"] += event["resumed"]
        self._ledger.counts["not resumed"] += self._session is not None and not event["resumed"]
        if self._kind.resumes:
            self._session = event["session"]
        entries = {entry["channel"]: entry for entry in event["subscriptions"]}
        for channel, line in self.lines.items():
            line.pending = None
            line.ahead = False
            entry = entries.get(channel)
            line.note(f"connected, resumed {event['resumed']}, {entry}")
            if entry is None or not self._kind.acks:
                if event["resumed"] and entry is None and line.position is not None:
                    self._ledger.complain(f"{line.name}: an acknowledged subscription was not restored")
                await self._subscribe(channel, line, socket)
                continue
            place = Position(entry["epoch"], entry["seq"])
            if line.position is None:
                # Its answer was lost on the way.
                line.begin(place)
            elif not entry["recovered"]:
                # What the server knows of us is lost, but that may be old: ask with what we know.
                self._ledger.counts["restored with a loss"] += 1
                await self._subscribe(channel, line, socket)
            elif place.seq > line.position.seq or place.epoch not in line.known:
                # A session from before a loss does not know that we went back for it.
                if not self._world.old_sessions:
                    self._ledger.complain(f"{line.name}: at {line.position}, restored at {place} in silence")
                await self._subscribe(channel, line, socket)
            elif place != line.position:
                line.ahead = True
                await self._ack(channel, line, line.position, socket)

    async def _subscribe(self, channel: str, line: Line, socket: ClientConnection) -> None:
        line.pending = f"{self._name} {next(self._ids)}"
        fields: Event = {"ack": True} if self._kind.acks else {}
        if line.position is not None:
            fields["since"] = line.position._asdict()
        line.note(f"subscribe {line.pending}")
        await self._send(socket, type="subscribe", channel=channel, messageId=line.pending, **fields)

    async def _stay(self, socket: ClientConnection) -> None:
        """Subscribe a second time to where we are already; nothing is lost by that."""
        channel, line = random.choice(list(self.lines.items()))
        if line.pending is None:
            fields: Event = {"ack": True} if self._kind.acks else {}
            await self._send(socket, type="subscribe", channel=channel, messageId="stay", **fields)

    async def _ack(self, channel: str, line: Line, place: Position, socket: ClientConnection) -> None:
        line.unacked = None
        await self._send(socket, type="ack", channel=channel, **place._asdict())

    async def _send(self, socket: ClientConnection, **frame: Any) -> None:
        await socket.send(json.dumps(frame))

    async def _hear(self, event: Event, socket: ClientConnection) -> None:
        match event:
            case {"type": "message"}:
                await self._message(event, self.lines[event["channel"]], socket)
            case {"type": "ack", "op": "subscribe"}:
                line = self.lines[event["channel"]]
                line.note(f"{event}")
                if line.pending == event["messageId"]:
                    self._subscribed(event, line)
            case {"type": "error", "code": "history_lost"}:
                line = self.lines[event["channel"]]
                line.note(f"{event}")
                if line.pending is None:
                    self._lose(line, Position(event["epoch"], event["seq"]), "history_lost")
            case {"type": "error", "code": "unavailable"}:
                line = self.lines[event["channel"]]
                self._ledger.counts["subscribes unavailable"] += 1
                if event["messageId"] != line.pending:
                    return
                await asyncio.sleep(event["retryAfter"] / 1000)
                await self._subscribe(event["channel"], line, socket)
            case {"type": "ping"}:
                await self._send(socket, type="pong")
            case _:
                self._ledger.complain(f"{self._name}: unexpected {event}")

    def _subscribed(self, event: Event, line: Line) -> None:
        line.pending = None
        head = Position(event["epoch"], event["seq"])
        if not event["persistent"]:
            self._ledger.complain(f"{line.name}: {event}")
        if line.position is None:
            line.begin(head)
        elif not event["recovered"]:
            self._lose(line, Position(head.epoch, head.seq - event["replayed"]), "subscribe")
        elif event["replayed"] != max(0, head.seq - line.position.seq):
            self._ledger.complain(f"{line.name}: at {line.position}, subscribed with {event}")

    def _lose(self, line: Line, place: Position, how: str) -> None:
        """We are told of a loss, and go on after `place`."""
        self._ledger.counts[f"told of a loss by {how}"] += 1
        line.begin(place)
        line.unacked = place

    async def _message(self, event: Event, line: Line, socket: ClientConnection) -> None:
        counts = self._ledger.counts
        place = Position(event["epoch"], event["seq"])
        self._ledger.note(event["channel"], place, event["messageId"])
        counts["messages received"] += 1
        counts["redelivered"] += "redelivered" in event
        if line.pending is not None or line.position is None:
            return
        if place.seq == line.position.seq + 1:
            counts["messages processed"] += 1
            line.add(place, event["messageId"])
        elif place.seq <= line.position.seq and place.epoch in line.known:
            counts["messages dropped"] += 1
            line.unacked = place
        else:
            # We have processed what is not of the line that the server follows now, or there is a hole.
            counts["asked"] += 1
            if not (line.ahead and self._world.old_sessions) or place.seq > line.position.seq:
                self._ledger.complain(f"{line.name}: at {line.position} came {place}, in silence")
            await self._subscribe(event["channel"], line, socket)


# The whole


class World:
    """Three publishers and twenty subscribers. All run inside `async with`, the publishers until
    `finish_publishing`."""

    SUBSCRIBERS = 20

    def __init__(self, url: str, channels: list[str], *, old_sessions: bool = False) -> None:
        self.url = url
        self.ws_url = "ws" + url.removeprefix("http")
        self.channels = channels
        self.ledger = Ledger()
        self.publishing = True
        # Redis will forget what it was told last, of sessions too.
        self.old_sessions = old_sessions
        # Nobody makes trouble any more: no cut connections, no late acks.
        self.calm = False
        self.stalled_until = 0.0
        self.subscribers = [self._subscriber(number) for number in range(self.SUBSCRIBERS)]
        self._publishers: list[asyncio.Task[None]] = []
        self._readers: list[asyncio.Task[None]] = []

    def _subscriber(self, number: int) -> Subscriber:
        kinds = (
            *[Kind()] * 8,
            *[Kind(stall=2.5)] * 2,
            # So long that the server gives the connection up.
            Kind(stall=9.0),
            *[Kind(stall=2.5)] * 2,
            *[Kind(acks=False)] * 3,
            *[Kind(resumes=False)] * 2,
            *[Kind(acks=False, resumes=False)] * 2,
        )
        wide = len(self.channels) if number % 5 == 0 else 2
        channels = [self.channels[(number + step) % len(self.channels)] for step in range(wide)]
        return Subscriber(self, f"s{number}", channels, kinds[number])

    def lines(self) -> Iterator[tuple[str, Line]]:
        for subscriber in self.subscribers:
            yield from subscriber.lines.items()

    async def __aenter__(self) -> Self:
        self._readers = [asyncio.create_task(one.run()) for one in self.subscribers]
        # Nobody publishes before everybody listens: so each line's first span begins at 0.
        async with asyncio.timeout(30):
            while any(line.position is None for _, line in self.lines()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        publishers = SocketPublisher(self, 80), HttpPublisher(self, 1, 30), HttpPublisher(self, 12, 80)
        self._publishers = [asyncio.create_task(one.run()) for one in publishers]
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in (*self._publishers, *self._readers):
            task.cancel()
        ends = await asyncio.gather(*self._publishers, *self._readers, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                self.ledger.complain(f"one of our own failed: {end!r}")

    def stall(self, seconds: float) -> None:
        """All who do that now and then do it at once: they ack nothing for so long."""
        self.stalled_until = time.monotonic() + seconds

    async def finish_publishing(self) -> None:
        """No new messages; wait until those that were sent are acknowledged."""
        self.publishing = False
        self.calm = True
        async with asyncio.timeout(30):
            await asyncio.gather(*self._publishers)
