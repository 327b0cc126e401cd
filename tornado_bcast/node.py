"""The middle of a worker: joins the hub (who listens here) and the broker (what is said everywhere).

Owns the topics: interest by reference count, the node's head of each persistent channel, holes and their
filling, and those subscribers that are behind. Never touches sockets or requests. One way for every message:
`on_message` -> a topic's frames of this turn of the loop -> one `fan_out` for all its live subscribers.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator

from .brokers import Broker, BusMessage, History, Publication, Receipt
from .config import ChannelRule
from .delivery import Delivery
from .errors import Unavailable
from .frames import frame
from .hub import Hub
from .metrics import Metrics
from .protocol import Position, encode_redelivery
from .topic import Subscriber, Topic
from .wheel import Wheel

logger = logging.getLogger(__name__)

# Seconds between the turns of the wheel on which subscribers wait for acks.
TICK = 0.25
# Seconds for which a channel stays subscribed on the broker after the last user has gone.
LINGER = 1.0
# Seconds in which the head of each persistent channel is compared with the broker's once.
HEAD_CHECK = 30.0
# Messages read from the stream at a time, and how many such reads run at once on a node: with the broker's
# bound on the bytes of a read, this bounds the memory of all that are behind.
PIECE = 128
MAX_READS = 32
# Seconds for which a list of all channels is given out again.
LIST_AGE = 1.0
# Bytes of frames that go to the sockets in one call.
_BATCH = 65536


class Node:
    """One worker's share of all channels. See the module for what it owns."""

    def __init__(
        self, broker: Broker, hub: Hub, metrics: Metrics, *, everybody: ChannelRule, join_timeout: float
    ) -> None:
        self._broker = broker
        self._hub = hub
        self._metrics = metrics
        # `everybody` is the rule by which messages to all connections are sent.
        # Seconds that a subscription waits for the broker before it is `unavailable`.
        self._join_timeout = join_timeout
        self._topics: dict[str, Topic] = {}
        self._everybody = Topic("", everybody)
        # Topics with frames of this turn of the loop, in order of their first.
        self._dirty: list[Topic] = []
        # Persistent topics with deliveries since the last turn of the wheel.
        self._active: set[Topic] = set()
        self._wheel: Wheel[Subscriber] = Wheel(TICK)
        # Reads of the stream under way, by channel and position: those who stand at one place share one.
        self._pieces: dict[tuple[str, int, int], asyncio.Task[History]] = {}
        self._reads = asyncio.Semaphore(MAX_READS)
        self._check: Iterator[list[Topic]] = iter(())
        # The channels of all nodes: a walk over all of them for Redis, so asked for by one at a time.
        self._listing = asyncio.Lock()
        self._listed: list[str] = []
        self._listed_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Task[None] | None = None
        # The server's own channels that this worker listens to, and who hears them.
        self._own: dict[str, Callable[[BusMessage], None]] = {}
        self.on_peer: Callable[[bytes], None] = lambda row: None

    async def start(self, row: Callable[[], bytes]) -> None:
        """Begin to hear the broker. `row()` is this worker's row of statistics, for all others."""
        await self._broker.start(self, row)
        self._timer = asyncio.create_task(self._turn())

    async def close(self) -> None:
        """End every task; the broker is closed last."""
        tasks = [*self._tasks, *self._pieces.values()]
        tasks += [topic.joining for topic in self._topics.values() if topic.joining is not None]
        if self._timer is not None:
            tasks.append(self._timer)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._broker.close()

    @property
    def broker(self) -> Broker:
        return self._broker

    @property
    def channel_count(self) -> int:
        """How many channels somebody on this node uses."""
        return sum(1 for topic in self._topics.values() if topic.users)

    async def channels(self) -> list[str]:
        """Those with subscribers over all nodes, at most a second old. Raises Unavailable."""
        async with self._listing:
            if self._now() - self._listed_at > LIST_AGE:
                names = await self._broker.channels()
                self._listed = [name for name in names if not name.startswith("$")]
                self._listed_at = self._now()
        return self._listed

    # Publishing

    def publish(
        self,
        channel: str | None,
        rule: ChannelRule,
        message_id: str,
        payload: bytes,
        timestamp: int,
        *,
        given: bool,
    ) -> "asyncio.Future[Receipt]":
        """Hand a message to the broker. `given`: the id is the publisher's, so it may be sent twice."""
        persistent = rule.persistent and channel is not None
        return self._broker.publish(
            Publication(
                channel,
                message_id,
                payload,
                timestamp,
                rule.dedup_ttl if given or persistent else 0,
                persistent,
                rule.history_size,
                rule.history_ttl,
            )
        )

    # Hearing: BrokerEvents

    def on_message(self, channel: str | None, message: BusMessage) -> None:
        if channel is None:
            topic = self._everybody
        else:
            found = self._topics.get(channel)
            if found is None:
                own = self._own.get(channel)
                if own is not None:
                    own(message)
                return
            topic = found
            if message.seq and topic.rule.persistent and not topic.accept(message):
                if topic.heard is not None and topic.filling is None and topic.epoch:
                    self._fill_soon(topic)
                return
        self._gather(topic, message)

    def on_gap(self, channels: list[str]) -> None:
        topics = [topic for name in channels if (topic := self._topics.get(name)) is not None]
        self._spawn(self._check_heads([topic for topic in topics if topic.rule.persistent and topic.epoch]))

    def _gather(self, topic: Topic, message: BusMessage) -> None:
        if not topic.frames:
            topic.timestamp = message.timestamp
            if not self._dirty:
                asyncio.get_running_loop().call_soon(self._flush_all)
            self._dirty.append(topic)
        topic.frames.append(frame(message.payload))

    def _flush_all(self) -> None:
        dirty, self._dirty = self._dirty, []
        for topic in dirty:
            self._flush(topic)

    def _flush(self, topic: Topic) -> None:
        """Send what has gathered to the live subscribers."""
        frames, topic.frames = topic.frames, []
        if not frames:
            return
        channel = topic.channel or None
        persistent = topic.rule.persistent and channel is not None
        if persistent and topic.edge is not None and topic.seq > topic.edge:
            self._check_windows(topic)
        policy = "wait" if persistent else topic.rule.slow_consumer
        for batch in _batches(frames):
            data = batch[0] if len(batch) == 1 else b"".join(batch)
            sent, refused = self._hub.fan_out(channel, data, batch, policy)
            count = sent * len(batch)
            if count:
                self._metrics.delivered += count
                self._metrics.bytes_out += sent * len(data)
                self._metrics.observe_lag(max(0.0, time.time() - topic.timestamp / 1000), count)
            for sink in refused:
                self._fall_behind(topic.live[sink])
            topic.flushed += len(batch)
        if topic.edge is not None:
            self._active.add(topic)

    # Interest

    async def join(self, channel: str, rule: ChannelRule) -> Topic:
        """Hold a channel: what is published from now on is heard. `leave` gives it back.

        Raises Unavailable when the broker does not confirm in time; then nothing is held.
        """
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = Topic(channel, rule)
        topic.users += 1
        if topic.joining is None:
            topic.joining = asyncio.create_task(self._join(topic))
        if not topic.joining.done():
            done, _ = await asyncio.wait({topic.joining}, timeout=self._join_timeout)
            if not done:
                self.leave(topic)
                raise Unavailable("Redis does not answer; subscribe again.", int(_spread(1000)))
        return topic

    async def _join(self, topic: Topic) -> None:
        await self._broker.subscribe(topic.channel)
        if topic.rule.persistent:
            await self._fill(topic)

    async def listen(self, channel: str, hear: Callable[[BusMessage], None]) -> None:
        """Hear one of the server's own channels from now on; returns when the broker has confirmed that."""
        self._own[channel] = hear
        await self._broker.subscribe(channel)

    def leave(self, topic: Topic) -> None:
        """Give back what `join` gave. The broker's subscription goes a moment after the last user."""
        topic.users -= 1
        if topic.users == 0:
            asyncio.get_running_loop().call_later(LINGER, self._drop, topic)

    def _drop(self, topic: Topic) -> None:
        if topic.users or self._topics.get(topic.channel) is not topic:
            return
        del self._topics[topic.channel]
        self._active.discard(topic)
        for task in (topic.joining, topic.filling):
            if task is not None:
                task.cancel()
        self._broker.unsubscribe(topic.channel)

    def attach(self, subscriber: Subscriber) -> None:
        """Begin to send: to a live subscriber from now on, to one that is behind from its position on."""
        topic = subscriber.topic
        self._metrics.subscriptions += 1
        if subscriber.delivery is None:
            # What gathered before this subscription is not for it.
            self._flush(topic)
            self._hub.add(topic.channel, subscriber.sink)
        else:
            topic.behind[subscriber.sink] = subscriber
            self.advance(subscriber)

    def detach(self, subscriber: Subscriber) -> None:
        """Stop to send."""
        topic = subscriber.topic
        self._metrics.subscriptions -= 1
        subscriber.closed = True
        self._hub.remove(topic.channel, subscriber.sink)
        topic.live.pop(subscriber.sink, None)
        topic.behind.pop(subscriber.sink, None)

    # Positions

    async def locate(self, topic: Topic, since: Position | None, last: int | None) -> tuple[int, bool]:
        """Where a subscription to a persistent channel begins: after which seq, and whether it was there.

        False: the position is gone, and the start is before the oldest message that is left.
        """
        if since is None and not last:
            return topic.seq, True
        if since is not None and since.seq == topic.seq and topic.knows(since.epoch, since.seq):
            return since.seq, True
        history = await self._piece(topic.channel, topic.seq, 0)
        if history.epoch != topic.epoch or (since is not None and topic.seq < since.seq <= history.seq):
            # This node has not heard all of it yet.
            await self._caught_up(topic)
        oldest = min(history.first - 1, topic.seq)
        if since is None:
            return max(topic.seq - (last or 0), oldest), True
        if topic.knows(since.epoch, since.seq) and history.continues(since.epoch, since.seq):
            return since.seq, True
        return oldest, False

    async def _caught_up(self, topic: Topic) -> None:
        if topic.filling is None:
            self._fill_soon(topic)
        assert topic.filling is not None
        done, _ = await asyncio.wait({topic.filling}, timeout=self._join_timeout)
        if not done:
            raise Unavailable("Redis does not answer; subscribe again.", int(_spread(1000)))

    def acknowledge(self, subscriber: Subscriber, epoch: str | None, seq: int) -> bool:
        """A client has processed all up to `seq`. True: its position moved."""
        topic, delivery = subscriber.topic, subscriber.delivery
        if delivery is None or not topic.knows(epoch, seq):
            return False
        if not delivery.behind:
            delivery.epoch, delivery.cursor = topic.epoch, topic.flushed
        if not delivery.acknowledge(epoch or topic.epoch, seq, self._now(), chain=topic.epoch):
            return False
        self._watch(subscriber)
        self.advance(subscriber)
        return True

    def advance(self, subscriber: Subscriber) -> None:
        """Take one that is behind a step on: to the live ones, or to its next piece of the stream."""
        topic, delivery = subscriber.topic, subscriber.delivery
        if delivery is None or not delivery.behind:
            return
        if subscriber.closed or subscriber.reading or subscriber.sink.queued:
            return
        if delivery.cursor == topic.seq and topic.knows(delivery.epoch, delivery.cursor):
            if not delivery.tries:
                self._go_live(subscriber, delivery)
            return
        if delivery.room(topic.seq) or not topic.knows(delivery.epoch, delivery.cursor):
            subscriber.reading = True
            self._spawn(self._read_on(subscriber, delivery))

    def _go_live(self, subscriber: Subscriber, delivery: Delivery) -> None:
        topic = subscriber.topic
        # It has all up to the head; what gathered for the live ones is a part of that.
        self._flush(topic)
        topic.behind.pop(subscriber.sink, None)
        topic.live[subscriber.sink] = subscriber
        delivery.behind = False
        self._hub.add(topic.channel, subscriber.sink)
        edge = delivery.edge
        if edge is not None:
            topic.edge = edge if topic.edge is None else min(edge, topic.edge)

    def _fall_behind(self, subscriber: Subscriber) -> Delivery:
        """From the live ones to those behind, at the head as of the last flush."""
        topic, delivery = subscriber.topic, subscriber.delivery
        assert delivery is not None
        self._hub.remove(topic.channel, subscriber.sink)
        topic.live.pop(subscriber.sink, None)
        topic.behind[subscriber.sink] = subscriber
        delivery.fall_behind(topic.epoch, topic.flushed)
        delivery.watch(self._now())
        self._watch(subscriber)
        asyncio.get_running_loop().call_soon(self.advance, subscriber)
        return delivery

    def _check_windows(self, topic: Topic) -> None:
        """Let those fall behind whose window the gathered messages would overflow."""
        edges: list[int] = []
        for subscriber in list(topic.live.values()):
            assert subscriber.delivery is not None
            edge = subscriber.delivery.edge
            if edge is None:
                continue
            if edge < topic.seq:
                self._fall_behind(subscriber)
            else:
                edges.append(edge)
        topic.edge = min(edges, default=None)

    async def _read_on(self, subscriber: Subscriber, delivery: Delivery) -> None:
        """Read the next piece of the stream for one that is behind, and send it."""
        topic = subscriber.topic
        history = None
        try:
            history = await self._piece(topic.channel, delivery.cursor)
        except Unavailable:
            await asyncio.sleep(_spread(1.0))
        finally:
            subscriber.reading = False
        if subscriber.closed:
            return
        if history is None:
            self.advance(subscriber)
        elif history.epoch != topic.epoch:
            # One of the two is old. Filling finds out which, and advances all that are behind.
            if topic.filling is None:
                self._fill_soon(topic)
        else:
            self._send_piece(subscriber, delivery, history)

    def _send_piece(self, subscriber: Subscriber, delivery: Delivery, history: History) -> None:
        topic = subscriber.topic
        if not history.continues(delivery.epoch, delivery.cursor):
            self._lose(subscriber, delivery, history)
        frames: list[bytes] = []
        size = 0
        redelivered = 0
        last = delivery.cursor
        stop = last + delivery.room(topic.seq)
        for message in history.messages:
            if message.seq <= last:
                continue
            if message.seq > stop:
                break
            times = delivery.redelivered(message.seq)
            redelivered += bool(times)
            frames.append(frame(encode_redelivery(message.payload, times) if times else message.payload))
            size += len(frames[-1])
            last = message.seq
        if frames:
            subscriber.sink.send(topic.channel, b"".join(frames), frames, "wait")
            delivery.wrote(history.epoch, last, self._now())
            self._metrics.delivered += len(frames)
            self._metrics.bytes_out += size
            self._metrics.redelivered += redelivered
            self._watch(subscriber)
        elif delivery.room(topic.seq) and topic.filling is None:
            # Messages that this node has heard of are not in the stream, or were not yet when it was read.
            self._fill_soon(topic)
        self.advance(subscriber)

    async def _piece(self, channel: str, after: int, limit: int = PIECE) -> History:
        """Read a piece of the stream; those who want the same one share the read."""
        key = channel, after, limit
        task = self._pieces.get(key)
        if task is None:
            task = self._pieces[key] = asyncio.create_task(self._read(*key))
            task.add_done_callback(lambda _: self._pieces.pop(key, None))
        return await asyncio.shield(task)

    async def _read(self, channel: str, after: int, limit: int) -> History:
        async with self._reads:
            return await self._broker.read(channel, after, limit)

    def _lose(self, subscriber: Subscriber, delivery: Delivery, history: History) -> None:
        """Tell a subscriber of a gap that cannot be filled, and go on with the oldest message left."""
        start = history.first - 1
        delivery.restart(history.epoch, start)
        subscriber.on_lost(subscriber.topic.channel, history.epoch, start)

    # Holes

    def _fill_soon(self, topic: Topic) -> None:
        topic.filling = asyncio.create_task(self._fill(topic))

    async def _fill(self, topic: Topic) -> None:
        """Read the stream until the node's head has caught up; at the first time, only where it stands."""
        if topic.filling is None:
            topic.filling = asyncio.current_task()
        delay = 0.05
        while True:
            topic.heard = None
            try:
                known = bool(topic.epoch)
                history = await self._read(topic.channel, topic.seq, PIECE if known else 0)
            except Unavailable:
                # As long as somebody listens: without the stream nothing newer may be sent.
                await asyncio.sleep(_spread(delay))
                delay = min(delay * 2, 2.0)
                continue
            self._take(topic, history)
            if topic.is_caught_up(history):
                break
        topic.filling = topic.heard = None
        for subscriber in list(topic.behind.values()):
            self.advance(subscriber)

    def _take(self, topic: Topic, history: History) -> None:
        """Move the node's head by what a read has shown."""
        self._flush(topic)
        if not topic.epoch:
            topic.adopt(history, history.seq)
            return
        if history.continues(topic.epoch, topic.seq):
            topic.adopt(history, topic.seq)
            for message in history.messages:
                if message.seq == topic.seq + 1:
                    topic.seq = message.seq
                    self._gather(topic, message)
            self._flush(topic)
            return
        for subscriber in list(topic.live.values()):
            self._lose(subscriber, self._fall_behind(subscriber), history)
        logger.warning(
            "history of a channel was lost; %d live subscribers were told",
            len(topic.behind),
            extra={"event": "history_lost", "channel": topic.channel},
        )
        topic.adopt(history, history.seq)

    async def _check_heads(self, topics: list[Topic]) -> None:
        """Compare heads with the broker's, and fill where a message was missed."""
        topics = [topic for topic in topics if topic.epoch and topic.filling is None]
        for index in range(0, len(topics), 256):
            some = topics[index : index + 256]
            try:
                heads = await self._broker.heads([topic.channel for topic in some])
            except Unavailable:
                heads = {}
            for topic in some:
                head = heads.get(topic.channel)
                if head is not None and head.epoch == topic.epoch and head.seq <= topic.seq:
                    continue
                # Where the heads are not to be had, filling is what goes on asking.
                if topic.filling is None and topic.users:
                    self._fill_soon(topic)

    # Timers

    def _watch(self, subscriber: Subscriber) -> None:
        """See to it that the wheel comes by when the subscriber's acks are due."""
        delivery = subscriber.delivery
        if delivery is not None and delivery.due is not None and not subscriber.watched:
            subscriber.watched = True
            self._wheel.add(subscriber, delivery.due)

    async def _turn(self) -> None:
        """The node's one timer."""
        while True:
            await asyncio.sleep(TICK)
            now = self._now()
            active, self._active = self._active, set()
            for topic in active:
                for subscriber in topic.live.values():
                    delivery = subscriber.delivery
                    if delivery is not None and delivery.acks and delivery.due is None:
                        delivery.epoch, delivery.cursor = topic.epoch, topic.flushed
                        delivery.watch(now)
                        self._watch(subscriber)
            for subscriber in self._wheel.expired(now):
                subscriber.watched = False
                self._expire(subscriber, now)
            some = next(self._check, None)
            if some is None:
                self._check = self._head_checks()
            elif some:
                self._spawn(self._check_heads(some))

    def _head_checks(self) -> Iterator[list[Topic]]:
        """All persistent topics, spread over the turns of HEAD_CHECK seconds."""
        topics = [topic for topic in self._topics.values() if topic.rule.persistent]
        turns = int(HEAD_CHECK / TICK)
        for turn in range(turns):
            yield topics[turn::turns]

    def _expire(self, subscriber: Subscriber, now: float) -> None:
        delivery = subscriber.delivery
        if subscriber.closed or delivery is None or delivery.due is None:
            return
        if delivery.due <= now:
            if subscriber.sink.queued:
                delivery.postpone(now)
            elif delivery.tries < delivery.max_redeliveries and not delivery.behind:
                self._fall_behind(subscriber)
            match delivery.expire(now):
                case "back":
                    self.advance(subscriber)
                case "give_up":
                    subscriber.on_overdue(subscriber.topic.channel)
        self._watch(subscriber)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _spread(value: float) -> float:
    """A wait with full jitter above half of it."""
    return value * random.uniform(0.5, 1.0)


def _batches(frames: list[bytes]) -> Iterator[list[bytes]]:
    """Runs of frames of at most _BATCH bytes, or of one that is larger."""
    batch: list[bytes] = []
    size = 0
    for data in frames:
        if batch and size + len(data) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    yield batch
