"""A whole worker without sockets, Redis or time: for tests that look at every order of events.

The real node, dispatch, subscriptions and keeper run on a loop whose clock is turned by hand, over a `Store`
that stands for Redis (streams, epochs, pub/sub, all that can be lost there) and `Peer`s that stand for
connections and their clients. A `Watcher` holds each client's view against what the store knows, and fails at
the first message that is lost, out of order or wrongly sent again.
"""

import asyncio
import errno
import json
import logging
import zlib
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary

from tornado_bcast.answer import Answer
from tornado_bcast.brokers import (
    BrokerHealth,
    BusMessage,
    History,
    Publication,
    Receipt,
    SavedAs,
    SessionChange,
    SessionStore,
    StoredSession,
)
from tornado_bcast.brokers.memory import MemorySessions
from tornado_bcast.config import ChannelRule, ChannelsConfig, default_config
from tornado_bcast.errors import CloseCode, Refusal, Unavailable
from tornado_bcast.eventloop import WorkerLoop, until_tick
from tornado_bcast.frames import frame
from tornado_bcast.handlers.subscriptions import Restored, Subscriptions
from tornado_bcast.hub import Hub
from tornado_bcast.keeper import Keeper
from tornado_bcast.metrics import Metrics
from tornado_bcast.node import Node
from tornado_bcast.protocol import Ack, Subscribe, Unsubscribe, encode_error
from tornado_bcast.rules import NOBODY, ChannelRules, Principal
from tornado_bcast.session import Session, decode_subscription
from tornado_bcast.sink import Sink, SlowConsumer
from tornado_bcast.stream import ClientStream
from tornado_bcast.topic import Topic
from tornado_bcast.wheel import TICK

Event = dict[str, Any]
SESSION_TTL = 600.0
# As in publish.lua.
ENDS_KEPT = 16


def make_rule(*, persistent: bool = True, **fields: Any) -> ChannelRule:
    """The default rule, persistent unless said otherwise, with other values."""
    return replace(default_config().channels.default, persistent=persistent, **fields)


class Clockwork(WorkerLoop):
    """A loop on which time stands still unless it is turned on, and nothing goes wrong in silence."""

    def __init__(self) -> None:
        self.now = 1000.0
        # What was raised where nobody waited for it.
        self.faults: list[BaseException] = []
        super().__init__()
        self.set_exception_handler(self._note)
        self._ear = _Ear(self.faults)
        logging.getLogger("tornado_bcast").addHandler(self._ear)

    def close(self) -> None:
        logging.getLogger("tornado_bcast").removeHandler(self._ear)
        super().close()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or AssertionError(context["message"]))

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        """Let everything run that need not wait."""

        async def turns() -> None:
            for _ in range(16):
                await asyncio.sleep(0)

        self.run_until_complete(turns())
        if self.faults:
            raise self.faults.pop()

    def turn_on(self, seconds: float, step: float = TICK) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + step, end)
            self.settle()


class _Ear(logging.Handler):
    """Hears of exceptions that were logged."""

    def __init__(self, faults: list[BaseException]) -> None:
        super().__init__()
        self._faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._faults.append(record.exc_info[1])


@dataclass
class Line:
    """A channel's history in the store."""

    epoch: str
    seq: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    messages: dict[int, BusMessage] = field(default_factory=dict)
    # Epoch, seq and ends before each message.
    past: list[tuple[str, int, dict[str, int]]] = field(default_factory=list)
    # Another server than the one that gave the last seq has it: the next message begins an epoch.
    moved: bool = False


class Store:
    """What Redis is to all workers. Whatever was given stays in `lines`, whatever is lost afterwards."""

    def __init__(self, loop: Clockwork, size: int = 1000, sessions: SessionStore | None = None) -> None:
        self.loop = loop
        self.size = size
        self.sessions = sessions or MemorySessions(lambda: loop.now, self.tell_worker)
        self.brokers: list[StoreBroker] = []
        # Epoch -> seq -> the number of the message, for each epoch that there ever was.
        self.lines: dict[str, dict[int, int]] = {}
        # The first message of the longest that a channel was trimmed to: an older file has others again.
        self.trimmed: dict[str, int] = defaultdict(int)
        self._now: dict[str, Line] = {}
        self._count = 0

    def line(self, channel: str) -> Line:
        line = self._now.get(channel)
        if line is None:
            line = self._now[channel] = Line(self._new_epoch({}))
        return line

    def _new_epoch(self, kept: dict[int, int]) -> str:
        epoch = f"e{len(self.lines)}"
        self.lines[epoch] = kept
        return epoch

    def publish(self, channel: str) -> None:
        line = self.line(channel)
        line.past.append((line.epoch, line.seq, dict(line.ends)))
        if line.moved:
            line.moved = False
            line.ends[line.epoch] = line.seq
            if len(line.ends) > ENDS_KEPT:
                del line.ends[next(iter(line.ends))]
            kept = {seq: number for seq, number in self.lines[line.epoch].items() if seq <= line.seq}
            line.epoch = self._new_epoch(kept)
        line.seq += 1
        self._count += 1
        self.lines[line.epoch][line.seq] = self._count
        payload = json.dumps(
            {
                "type": "message",
                "channel": channel,
                "data": self._count,
                "seq": line.seq,
                "epoch": line.epoch,
            }
        )
        message = BusMessage(payload.encode(), 0, line.seq, line.epoch)
        line.messages[line.seq] = message
        self.trim(channel, self.size)
        for broker in self.brokers:
            if channel in broker.subscribed:
                broker.bus.append((channel, message))

    def trim(self, channel: str, size: int) -> None:
        messages = self.line(channel).messages
        for seq in list(messages)[: max(0, len(messages) - size)]:
            del messages[seq]
            self.trimmed[channel] = max(self.trimmed[channel], seq + 1)

    def move(self, channel: str) -> None:
        """A replica that had everything is the master now."""
        self.line(channel).moved = True

    def roll_back(self, channel: str, count: int) -> None:
        """The last messages are gone: an older file, or a replica that was behind."""
        line = self.line(channel)
        line.moved = True
        for _ in range(min(count, len(line.past))):
            line.messages.pop(line.seq, None)
            line.epoch, line.seq, line.ends = line.past.pop()

    def flush(self, channel: str) -> None:
        """FLUSHALL, as far as a channel is concerned."""
        self.trimmed.pop(channel, None)
        self._now.pop(channel, None)

    def read(self, channel: str, after: int, limit: int) -> History:
        line = self.line(channel)
        if after < 0:
            after = max(line.seq + after, 0)
        first = next(iter(line.messages), line.seq + 1)
        wanted = [message for seq, message in line.messages.items() if seq > after][:limit]
        return History(line.epoch, line.seq, first, dict(line.ends), wanted)

    def continues(self, channel: str, epoch: str, seq: int) -> bool:
        return self.read(channel, 0, 0).continues(epoch, seq)

    def knows(self, channel: str, epoch: str, seq: int) -> bool:
        return self.read(channel, 0, 0).knows(epoch, seq)

    def tell_worker(self, owner: str, notice: bytes) -> None:
        for broker in self.brokers:
            if owner in broker.subscribed:
                broker.bus.append((owner, BusMessage(notice, 0)))


class StoreBroker:
    """One worker's way to the store. What it carries arrives when the test says so, or at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sessions = _Sessions(self)
        self.subscribed: set[str] = set()
        # What was published and is not heard yet.
        self.bus: deque[tuple[str, BusMessage]] = deque()
        # With `manual` what is asked waits in here until `execute`, and its answer until `answer`.
        self.manual = False
        self.asked: deque[tuple[asyncio.Future[Any], Callable[[], Any]]] = deque()
        self.executed: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self.reads = 0
        self._events: Any = None
        store.brokers.append(self)

    async def start(self, events: Any, row: Callable[[], bytes]) -> None:
        self._events = events

    async def close(self) -> None:
        self.fail()

    def publish(self, publication: Publication) -> Answer[Receipt]:
        raise NotImplementedError

    async def subscribe(self, channel: str) -> None:
        await asyncio.sleep(0)
        self.subscribed.add(channel)

    def unsubscribe(self, channel: str) -> None:
        self.subscribed.discard(channel)
        self.bus = deque(entry for entry in self.bus if entry[0] != channel)

    async def ask(self, question: Callable[[], Any]) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.append((future, question))
        if not self.manual:
            self.execute()
            self.answer()
        return await future

    async def read(self, channel: str, after: int, limit: int) -> History:
        self.reads += 1
        history: History = await self.ask(lambda: self.store.read(channel, after, limit))
        return history

    async def heads(self, channels: list[str]) -> dict[str, History]:
        return {channel: await self.read(channel, 0, 0) for channel in channels}

    async def channels(self) -> list[str]:
        return sorted(self.subscribed)

    async def probe(self) -> float:
        return 0.0

    def health(self) -> BrokerHealth:
        return BrokerHealth(True)

    # What a test does.

    def execute(self, count: int = -1) -> None:
        while self.asked and count:
            future, question = self.asked.popleft()
            self.executed.append((future, question()))
            count -= 1

    def answer(self, count: int = -1) -> None:
        while self.executed and count:
            future, result = self.executed.popleft()
            if not future.done():
                future.set_result(result)
            count -= 1

    def fail(self) -> None:
        """All that is under way fails, whether it was done or not."""
        for future in [entry[0] for entry in (*self.asked, *self.executed)]:
            if not future.done():
                future.set_exception(Unavailable("away"))
        self.asked.clear()
        self.executed.clear()

    def hear(self, count: int = -1) -> None:
        while self.bus and count:
            channel, message = self.bus.popleft()
            self._events.on_message(channel, message)
            count -= 1

    def cut(self, *, noticed: bool = True) -> None:
        """Pub/sub is interrupted: what was on its way is lost, and it stands again."""
        self.bus.clear()
        if noticed:
            self._events.on_gap(sorted(self.subscribed))


class _Sessions:
    """The store's sessions, on the way on which everything waits."""

    def __init__(self, broker: StoreBroker) -> None:
        self._broker = broker

    async def resume(self, name: str, principal: str, owner: str, ttl: float) -> StoredSession | None:
        sessions = self._broker.store.sessions
        stored: StoredSession | None = await self._broker.ask(
            lambda: result_of(sessions.resume(name, principal, owner, ttl))
        )
        return stored

    async def save(self, name: str, change: SessionChange, ttl: float) -> SavedAs:
        sessions = self._broker.store.sessions
        saved: SavedAs = await self._broker.ask(lambda: result_of(sessions.save(name, change, ttl)))
        return saved


def result_of(work: Coroutine[Any, Any, Any]) -> Any:
    """Of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


class Worker:
    """One worker: what the subscriptions of a connection see as their context."""

    def __init__(self, store: Store, channels: ChannelsConfig, *, session_ttl: float = SESSION_TTL) -> None:
        self.loop = store.loop
        self.config = replace(default_config(), channels=channels)
        self.rules = ChannelRules(channels)
        self.broker = StoreBroker(store)
        self.metrics = Metrics()
        self.hub = Hub(_send_each)
        self.node = Node(self.broker, self.hub, self.metrics, everybody=channels.default, join_timeout=5.0)
        self.keeper = Keeper(self.broker.sessions, session_ttl)
        self.peers: list[Peer] = []
        self.killed = False
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> "Worker":
        async def start() -> None:
            await self.node.start(bytes)
            await self.node.listen(self.keeper.channel, self.keeper.on_notice)
            self.spawn(self._turn())

        self.loop.run_until_complete(start())
        return self

    async def _turn(self) -> None:
        """As application.py has it, until it is killed."""
        while True:
            await asyncio.sleep(until_tick(TICK))
            self.keeper.turn()
            self.node.turn()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def run(self, work: Callable[[], object]) -> None:
        """Call something as the loop would, and let what follows from it happen."""

        async def call() -> None:
            work()

        self.loop.run_until_complete(call())
        self.loop.settle()

    def kill(self) -> None:
        """End it as kill -9 would: nothing more is saved, nobody says goodbye."""
        if self.killed:
            return
        self.killed = True
        for peer in self.peers:
            peer.closed = True

        async def close() -> None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.node.close()
            for task in list(self.keeper._saving):
                task.cancel()
            await asyncio.gather(*self.keeper._saving, return_exceptions=True)

        self.loop.run_until_complete(close())
        self.broker.store.brokers.remove(self.broker)

    def topic(self, channel: str) -> Topic:
        return self.node._topics[channel]


# By descriptors that no process has.
_pipes: "WeakValueDictionary[int, Pipe]" = WeakValueDictionary()
_numbers = count(1 << 24)


class Pipe:
    """An IOStream over a kernel that takes `room` bytes, and a peer that reads at once what it has taken."""

    def __init__(self, received: Callable[[bytes], None]) -> None:
        self._number = next(_numbers)
        _pipes[self._number] = self
        self.room = 1 << 40
        self.socket = self
        self._received = received
        self._buffer = bytearray()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    def fileno(self) -> int:
        return self._number

    def send(self, data: bytes | memoryview) -> int:
        assert not self._buffer, "bytes would overtake others"
        taken = min(len(data), self.room)
        if not taken:
            raise BlockingIOError(errno.EAGAIN, "")
        self.room -= taken
        self._received(bytes(data[:taken]))
        return taken

    def write(self, data: memoryview) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffer += data
        self._waiting.append((len(data), future))
        self._flush()
        return future

    def writing(self) -> bool:
        return bool(self._buffer)

    def closed(self) -> bool:
        return False

    def drain(self, room: int = 1 << 40) -> None:
        self.room = room
        self._flush()

    def _flush(self) -> None:
        taken = min(len(self._buffer), self.room)
        self.room -= taken
        data = bytes(self._buffer[:taken])
        del self._buffer[:taken]
        if data:
            self._received(data)
        while self._waiting:
            size, future = self._waiting[0]
            if size > taken:
                self._waiting[0] = size - taken, future
                return
            taken -= size
            del self._waiting[0]
            future.set_result(None)


def _send_each(descriptors: "array[int]", slots: "array[int]", data: bytes) -> list[tuple[int, int | None]]:
    """The hub's, into pipes."""
    rest: list[tuple[int, int | None]] = []
    for index, slot in enumerate(slots):
        if descriptors[slot] < 0:
            rest.append((index, None))
            continue
        try:
            sent = _pipes[descriptors[slot]].send(data)
        except BlockingIOError:
            sent = -errno.EAGAIN
        if sent != len(data):
            rest.append((index, sent))
    return rest


class Peer:
    """A connection and the client at its other end, which has a `Watcher` for each channel.

    `heir` of another peer: it resumes that one's session.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        queue: int = 1 << 20,
        heir: "Peer | None" = None,
        who: Principal = NOBODY,
        compressed: bool = False,
    ) -> None:
        self.worker = worker
        self.store = worker.broker.store
        self.pipe = Pipe(self._receive)
        self.sink = Sink(cast(ClientStream, self.pipe), self, queue, direct=True, compressed=compressed)
        self.session = Session()
        self.session.admit(who)
        self.subscriptions = Subscriptions(cast(Any, worker), self)
        self.heir_of = heir
        self.closed = False
        # By the server, if it did; what is sent afterwards is not sent.
        self.code: CloseCode | None = None
        # It could not be said whether there is a session.
        self.turned_away = False
        self.resumed = False
        self.watchers: dict[str, Watcher] = {}
        # Whether what comes is checked.
        self.is_watched = True
        # The last subscribe of each channel that was not answered.
        self.asked: dict[str, Subscribe] = {}
        # What the session had stored of each channel.
        self.stored: dict[str, str] = {}
        # What was acked of each channel: subscribed (with acks or without), or not any more.
        self.promised: dict[str, bool | None] = {}
        # Channels of which it is not known what became of the last command.
        self.unsure: set[str] = set()
        self.events: list[Event] = []
        self._bytes = bytearray()

    # The connection

    async def _open(self) -> None:
        try:
            if self.heir_of is not None:
                session = await self.worker.keeper.resume(self.heir_of.session.id, self.session.who)
                self.resumed = session is not None
                self.session = session or self.session
            self.stored = dict(self.session.restorable)
            restored, refused = await self.subscriptions.restore(self.session)
        except Unavailable:
            self.turned_away = self.closed = True
            return
        self._begin(restored, refused)

    def _begin(self, restored: list[Restored], refused: list[Refusal]) -> None:
        self.worker.peers.append(self)
        for one in restored:
            acks = one.subscription.acks
            self._tell({"type": "restored", "acks": acks, **self.subscriptions.entry(one)})
        for refusal in refused:
            self.refuse_command(refusal)
        self.subscriptions.begin(restored)
        self.worker.node.connect(self.sink)
        self.worker.keeper.add(self.session, self.end)

    def on_close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self.opened:
            return
        self.worker.peers.remove(self)
        self.worker.node.disconnect(self.sink)
        self.subscriptions.close()
        self.worker.keeper.remove(self.session)

    def answer(self, payload: bytes) -> None:
        if self.code is None:
            self.sink.answer(frame(payload))

    def refuse_command(self, refusal: Refusal) -> None:
        channel, message_id = refusal.channel, refusal.message_id
        self.answer(encode_error(refusal.code, refusal.message, 0, channel=channel, message_id=message_id))

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        if self.closed or self.code is not None:
            return
        self.code = code
        if code == CloseCode.ACKS_OVERDUE:
            assert any(watcher.is_overdue for watcher in self.watchers.values())
        asyncio.get_running_loop().call_soon(self.on_close)

    def on_slow(self) -> None:
        self.end(CloseCode.SLOW_CONSUMER, flush=False)

    def on_drained(self) -> None:
        if self.opened:
            self.subscriptions.advance()

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        raise AssertionError("a message was dropped")

    # The client

    def _receive(self, data: bytes) -> None:
        self._bytes += data
        while len(self._bytes) >= 2:
            length, start = self._bytes[1], 2
            if length == 126:
                length, start = int.from_bytes(self._bytes[2:4], "big"), 4
            elif length == 127:
                length, start = int.from_bytes(self._bytes[2:10], "big"), 10
            if len(self._bytes) < start + length:
                return
            payload = self._bytes[start : start + length]
            if self._bytes[0] & 0x40:
                assert self.sink.compressed
                payload = zlib.decompressobj(-15).decompress(payload + b"\x00\x00\xff\xff")
            event = json.loads(payload)
            del self._bytes[: start + length]
            if self.code is None:
                self._tell(event)

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        channel = event.get("channel", "")
        match event["type"], event.get("op", event.get("code")):
            case "ack", "subscribe":
                self.promised[channel] = event["persistent"] and self.asked[channel].ack
                self.unsure.discard(channel)
                self._begin_watching(channel, event)
            case "ack", "unsubscribe":
                self.promised[channel] = None
                self.unsure.discard(channel)
                self.watchers.pop(channel, None)
            case "restored", _:
                self._go_on_watching(channel, event)
            case ("message", _) | ("error", "history_lost") if self.is_watched:
                self.watchers[channel].check(event)
            case "error", _ if (asked := self.asked.get(channel)) is not None:
                if event.get("messageId") == asked.message_id:
                    del self.asked[channel]
                else:
                    # An unsubscribe that could not be saved, but nothing is heard any more.
                    self.watchers.pop(channel, None)

    def _begin_watching(self, channel: str, event: Event) -> None:
        command, old = self.asked.pop(channel), self.watchers.get(channel)
        rule = self.worker.rules.find(channel)
        assert event["persistent"] == rule.persistent
        if not rule.persistent:
            return
        epoch, seq = event["epoch"], event["seq"] - event["replayed"]
        new = Watcher(self.store, channel, rule, command.ack, epoch, seq)
        wanted = None
        if command.since is not None:
            wanted = command.since.epoch, command.since.seq
        elif command.last is not None:
            assert event["replayed"] <= command.last
        elif old is None:
            assert event["replayed"] == 0
        elif old.acks and command.ack:
            wanted = old.acked_epoch, old.acked
        else:
            # It stays at what was written last, or in a stretch that comes again; or that is gone.
            back = old.acks and old.acked <= seq < old.seq
            there = back or new.number == old.number
            assert there or not self.store.continues(channel, old.epoch, old.seq)
            new.past = old.epoch, old.seq
            if not back:
                # There is no number before the first message, so that a line of another epoch looks the same.
                new.begin(old.epoch, old.seq)
            new.was_lost = old.was_lost
        if wanted is None:
            pass
        elif not event["recovered"]:
            trimmed = wanted[1] + 1 < self.store.trimmed[channel]
            assert trimmed or not self.store.continues(channel, *wanted)
            new.was_lost = True
        else:
            # From there on, or it is gone since: that will be told.
            assert seq == wanted[1] or not self.store.continues(channel, *wanted)
            new.begin(*wanted)
            if command.since is None and old is not None:
                new.go_on(old)
        new.limited = new.blocked = old is not None and old.blocked
        self.watchers[channel] = new

    def _go_on_watching(self, channel: str, event: Event) -> None:
        """What the session says. What was acked and not saved comes again; nothing is skipped."""
        assert self.heir_of is not None
        rule = self.worker.rules.find(channel)
        if not rule.persistent:
            assert not event["recovered"]
            self.promised[channel] = False
            return
        epoch, seq = event["epoch"], event["seq"]
        new = Watcher(self.store, channel, rule, event["acks"], epoch, seq)
        # Where a subscribe was under way it is not known what became of it.
        old = None if channel in self.heir_of.unsure else self.heir_of.watchers[channel]
        self.promised[channel] = event["acks"]
        if old is not None and event["recovered"]:
            assert old.acks and seq <= old.acked
            assert new.number == new.number_of(old.acked_epoch, seq)
        elif old is not None and old.acks:
            # What is stored may be of before the last ack, or a loss: then that is told again.
            stored = decode_subscription(self.stored[channel])
            assert stored is not None
            trimmed = stored.seq + 1 < self.store.trimmed[channel]
            assert trimmed or not self.store.continues(channel, stored.epoch, stored.seq)
        new.was_lost = event["acks"] and not event["recovered"]
        self.watchers[channel] = new

    # What a test does

    def open(self) -> "Peer":
        """Begin to connect; `opened` when that is done."""
        self.worker.run(lambda: self.worker.spawn(self._open()))
        return self

    @property
    def opened(self) -> bool:
        return self in self.worker.peers

    @property
    def alive(self) -> bool:
        return self.opened and self.code is None and not self.worker.killed

    def subscribe(self, channel: str, **fields: Any) -> None:
        command = self.asked[channel] = Subscribe(channel, message_id=f"m{len(self.events)}", **fields)
        self.unsure.add(channel)
        self.worker.run(lambda: self.subscriptions.receive(command))

    def unsubscribe(self, channel: str) -> None:
        self.unsure.add(channel)
        self.worker.run(lambda: self.subscriptions.receive(Unsubscribe(channel)))

    def ack(self, channel: str, seq: int, epoch: str | None = None) -> None:
        subscription = self.session.subscriptions.get(channel)
        watcher = self.watchers.get(channel)
        if watcher is not None and subscription is not None and subscription.held is not None:
            topic = subscription.held.topic
            if topic.knows(epoch, seq):
                delivery, tries = subscription.held.delivery, watcher.tries
                if watcher.ack(epoch or topic.epoch, seq):
                    watcher.going_back |= delivery.tries > tries
                    watcher.going_back &= seq < delivery.sent
        self.worker.run(lambda: self.subscriptions.acknowledge(Ack(channel, seq, epoch)))

    def block(self, room: int = 0) -> None:
        """The kernel takes so many bytes more."""
        self.pipe.room = room
        for watcher in self.watchers.values():
            watcher.limited = watcher.blocked = True

    def drain(self, room: int = 1 << 40) -> None:
        for watcher in self.watchers.values():
            watcher.limited = False
        self.worker.run(lambda: self.pipe.drain(room))

    def disconnect(self) -> None:
        self.worker.run(self.on_close)

    def errors(self) -> list[str]:
        return [event["code"] for event in self.events if event["type"] == "error"]

    @property
    def data(self) -> list[Any]:
        return [event["data"] for event in self.events if event["type"] == "message"]


@dataclass
class Watcher:
    """A client's view of one channel, from when it is told where it begins.

    `check` takes each event; it fails at the first that must not be. `rule` says what the server may do.
    """

    store: Store
    channel: str
    rule: ChannelRule
    acks: bool
    # The place of the newest message that came, and its number in the store (None: before the first).
    epoch: str
    seq: int
    number: int | None = None
    # What was acked, as far as the server must have heeded it.
    acked_epoch: str = ""
    acked: int = 0
    acked_at: float = 0.0
    # Numbers of what came since the last loss.
    seen: set[int] = field(default_factory=set)
    # The last message written, new or not.
    written: int = 0
    # Goings-back since the last ack that moved the position, and how much of time the last step took.
    tries: int = 0
    since: float | None = None
    # What it had from an earlier subscription of this connection.
    past: tuple[str, int] | None = None
    # The server had gone back when an ack came, and what it sends for that is still to come.
    going_back: bool = False
    # The connection may have a backlog, or had one since an ack: waits are not what they seem from here.
    limited: bool = False
    blocked: bool = False
    # The last event was a loss, or nothing was acked since.
    was_lost: bool = False
    lost: int = 0
    redelivered: int = 0

    def __post_init__(self) -> None:
        self.begin(self.epoch, self.seq)

    def begin(self, epoch: str, seq: int) -> None:
        self.epoch, self.seq = self.acked_epoch, self.acked = epoch, seq
        self.written = seq
        self.number = self.number_of(epoch, seq)
        self.seen = set()
        self.tries = 0
        self.since = None

    def go_on(self, old: "Watcher") -> None:
        """The client has asked for what it has not acked once more: it comes as any redelivery."""
        self.epoch, self.seq, self.number = old.epoch, old.seq, old.number
        self.seen, self.written, self.was_lost = old.seen, old.seq, old.was_lost
        self.going_back = self.seq > self.acked

    def number_of(self, epoch: str, seq: int) -> int | None:
        """Which message stands at a place."""
        return self.store.lines[epoch].get(seq)

    @property
    def now(self) -> float:
        return self.store.loop.now

    def check(self, event: Event) -> None:
        if event["type"] == "message":
            self._check_message(event["epoch"], event["seq"], event["data"], event.get("redelivered", 0))
        elif event["type"] == "error":
            assert event["code"] == "history_lost", event
            self._check_lost(event["epoch"], event["seq"])

    def _check_message(self, epoch: str, seq: int, number: int, redelivered: int) -> None:
        assert self.number_of(epoch, seq) == number, "a place that belongs to another message"
        if seq <= self.acked and self.blocked and redelivered:
            # It was on its way when it was acked.
            assert number in self.seen
            return
        assert seq > self.acked, f"{seq} comes again, though {self.acked} is acked"
        if number in self.seen:
            assert self.acks and redelivered, f"{seq} comes again"
            if seq == self.acked + 1 and self.written >= seq:
                self._check_back()
            else:
                assert seq == self.written + 1, f"{seq} comes again after {self.written}"
            self.redelivered += 1
        else:
            assert not redelivered, f"{seq} never came before"
            before = self.number_of(epoch, seq - 1)
            assert before == self.number, f"{before} is missing, between {self.number} and {number}"
            assert self.written + 1 == seq
            self.seen.add(number)
            self.epoch, self.seq, self.number = epoch, seq, number
        self.written = seq
        if self.acks:
            window = self.rule.max_in_flight
            if self.tries:
                window = min(window, 16)
            assert seq <= self.acked + window, f"{seq} is beyond {self.acked} + {window}"
            if self.since is None:
                self.since = self.now

    def _check_back(self) -> None:
        """It begins again after the acked position."""
        if self.going_back:
            self.going_back = False
            self.since = self.now
            return
        assert self.since is not None
        wait = self.rule.ack_timeout * 2**self.tries
        assert self.blocked or self.now - self.since >= wait, f"after {self.now - self.since} s, not {wait}"
        assert self.tries < self.rule.max_redeliveries
        self.tries += 1
        self.since = self.now

    def _check_lost(self, epoch: str, seq: int) -> None:
        start = (self.acked_epoch, self.acked) if self.acks else (self.epoch, self.seq)
        high = max((self.epoch, self.seq), self.past or ("", 0), key=lambda place: place[1])
        trimmed = start[1] + 1 < self.store.trimmed[self.channel]
        gone = not self.store.continues(self.channel, *start) or not self.store.knows(self.channel, *high)
        assert trimmed or gone, "nothing is lost"
        self.lost += 1
        self.begin(epoch, seq)
        self.was_lost = True

    def ack(self, epoch: str, seq: int) -> bool:
        """The client acks a position that its server knows. True: that moves it."""
        if not self.acks or seq < self.acked or (seq == self.acked and not self.was_lost):
            return False
        if self.was_lost and seq > self.seq:
            # It was on its way when the loss was told.
            return False
        self.was_lost = False
        self.acked_epoch, self.acked, self.acked_at = epoch, seq, self.now
        self.tries = 0
        if seq > self.seq:
            # It knew these from elsewhere.
            self.epoch, self.seq, self.number = epoch, seq, self.number_of(epoch, seq)
        self.written = max(self.written, seq)
        self.since = self.now if self.written > seq else None
        self.blocked = self.limited
        return True

    @property
    def is_overdue(self) -> bool:
        """Whether the server may give up waiting for acks."""
        if not self.acks or self.since is None:
            return False
        wait = self.rule.ack_timeout * 2**self.tries
        return self.blocked or (self.tries == self.rule.max_redeliveries and self.now - self.since >= wait)
