"""Sending to the subscribers of topics: to the live ones as messages come, to the others from the stream.

Owns what gathers in a turn of the loop, who is live and who is behind, and the wheel on which acks are due.
A live subscriber stands at its node's head, so fan-out compares nothing; one that is behind keeps a position
and no messages, reads the stream in pieces as its socket drains, takes nothing past the node's head, and is
live again in the very turn in which it has reached it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator

from .brokers import BusMessage, History
from .compression import Compressor
from .delivery import Delivery
from .errors import Unavailable
from .eventloop import at_turn_end
from .frames import frame
from .hub import Hub
from .metrics import Metrics
from .protocol import encode_redelivery
from .reader import StreamReader
from .sink import Sink, SlowConsumer
from .tasks import Tasks
from .topic import Subscriber, Topic
from .wheel import Wheel

logger = logging.getLogger(__name__)

# Bytes of frames that go to the sockets in one call.
_BATCH = 65536
# Seconds for which a channel's messages wait at most for those that this worker has on the way to the broker.
HOLD = 0.001


class Dispatch:
    """See the module. `on_hole` is called with a topic whose stream is not what this node knows of it."""

    def __init__(
        self, hub: Hub, metrics: Metrics, reader: StreamReader, on_hole: Callable[[Topic], None]
    ) -> None:
        # Who listens, by the form of frames that they take: as they are, or compressed.
        self._hub = hub
        self._compressed = hub.sibling()
        self._compressor = Compressor()
        self._metrics = metrics
        self._reader = reader
        self._on_hole = on_hole
        # Topics with frames that have not left, in order of their first; and what is to flush them: the end
        # of this turn of the loop, or of the patience with what is held.
        self._dirty: list[Topic] = []
        self._is_flush_due = False
        self._patience: asyncio.TimerHandle | None = None
        # Topics of which live subscribers have been sent something to ack since the last turn of the wheel.
        self._active: set[Topic] = set()
        self._wheel: Wheel[Subscriber] = Wheel()
        self._tasks = Tasks(logger)

    async def close(self) -> None:
        """End what is under way."""
        await self._tasks.close()

    def forget(self, topic: Topic) -> None:
        """Nobody uses this topic any more."""
        self._active.discard(topic)

    def hub_of(self, sink: Sink) -> Hub:
        """Where this sink listens."""
        return self._compressed if sink.compressed else self._hub

    def gather(self, topic: Topic, message: BusMessage) -> None:
        if not topic.frames:
            topic.timestamp = message.timestamp
            self._dirty.append(topic)
            self.flush_soon()
        topic.frames.append(frame(message.payload))

    def flush_soon(self) -> None:
        """Send at the end of this turn of the loop what has gathered.

        Where this worker has more messages of a channel on the way to the broker, they come in a moment and
        leave with it: one call for each subscriber, and what is on its way stays together the next time too.
        """
        if not self._is_flush_due:
            self._is_flush_due = True
            at_turn_end(self._flush_all)

    def _flush_all(self) -> None:
        self._is_flush_due = False
        dirty, self._dirty = self._dirty, []
        for topic in dirty:
            if not topic.coming:
                self.flush(topic)
            elif topic.frames:
                self._dirty.append(topic)
        if self._dirty and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(HOLD, self._flush_held)

    def _flush_held(self) -> None:
        self._patience = None
        dirty, self._dirty = self._dirty, []
        for topic in dirty:
            self.flush(topic)

    def flush(self, topic: Topic) -> None:
        """Send what has gathered to the live subscribers."""
        frames, topic.frames = topic.frames, []
        if not frames:
            return
        channel = topic.channel or None
        persistent = topic.rule.persistent and channel is not None
        if persistent and topic.edge is not None and topic.seq > topic.edge:
            self._check_windows(topic)
        policy = "wait" if persistent else topic.rule.slow_consumer
        left = len(frames)
        for batch in _batches(frames):
            self._fan_out(self._hub, topic, batch, policy)
            if self._compressed.count(channel):
                batch = [self._compressor.compress(plain) for plain in batch]
                self._fan_out(self._compressed, topic, batch, policy)
            left -= len(batch)
            # Counted from the end: a publisher who knows another rule than this node sends without numbers.
            topic.flushed = max(topic.flushed, topic.seq - left)
        if topic.edge is not None:
            self._active.add(topic)

    def _fan_out(self, hub: Hub, topic: Topic, batch: list[bytes], policy: SlowConsumer) -> None:
        data = batch[0] if len(batch) == 1 else b"".join(batch)
        sent, refused = hub.fan_out(topic.channel or None, data, batch, policy)
        count = sent * len(batch)
        if count:
            self._metrics.delivered += count
            self._metrics.bytes_out += sent * len(data)
            self._metrics.observe_lag(max(0.0, time.time() - topic.timestamp / 1000), count)
        for sink in refused:
            self.fall_behind(topic.live[sink])

    def attach(self, subscriber: Subscriber) -> None:
        """Begin to send: to a live subscriber from now on, to one that is behind from its position on."""
        topic = subscriber.topic
        self._metrics.subscriptions += 1
        if subscriber.delivery is None:
            # What gathered before this subscription is not for it.
            self.flush(topic)
            self.hub_of(subscriber.sink).add(topic.channel, subscriber.sink)
        else:
            topic.behind[subscriber.sink] = subscriber
            self.advance(subscriber)

    def detach(self, subscriber: Subscriber) -> None:
        """Stop to send. What it had of a persistent channel then stands in its delivery."""
        topic, delivery = subscriber.topic, subscriber.delivery
        if delivery is not None and not delivery.behind:
            delivery.fall_behind(*topic.written)
        self._metrics.subscriptions -= 1
        subscriber.closed = True
        self.hub_of(subscriber.sink).remove(topic.channel, subscriber.sink)
        topic.live.pop(subscriber.sink, None)
        topic.behind.pop(subscriber.sink, None)
        if subscriber.slot is not None:
            self._wheel.discard(subscriber, subscriber.slot)

    def acknowledge(self, subscriber: Subscriber, epoch: str | None, seq: int) -> bool:
        """A client has processed all up to `seq`. True: its position moved."""
        topic, delivery = subscriber.topic, subscriber.delivery
        if delivery is None or not topic.knows(epoch, seq):
            return False
        if not delivery.behind:
            delivery.epoch, delivery.cursor = topic.written
        if not delivery.acknowledge(topic.epoch_of(seq), seq, _now()):
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
            self._tasks.spawn(self._read_on(subscriber, delivery))

    def _go_live(self, subscriber: Subscriber, delivery: Delivery) -> None:
        topic = subscriber.topic
        # It has all up to the head; what gathered for the live ones is a part of that.
        self.flush(topic)
        topic.behind.pop(subscriber.sink, None)
        topic.live[subscriber.sink] = subscriber
        delivery.behind = False
        self.hub_of(subscriber.sink).add(topic.channel, subscriber.sink)
        edge = delivery.edge
        if edge is not None:
            topic.edge = edge if topic.edge is None else min(edge, topic.edge)

    def fall_behind(self, subscriber: Subscriber) -> Delivery:
        """From the live ones to those behind, at the head as of the last flush."""
        topic, delivery = subscriber.topic, subscriber.delivery
        assert delivery is not None
        self.hub_of(subscriber.sink).remove(topic.channel, subscriber.sink)
        topic.live.pop(subscriber.sink, None)
        topic.behind[subscriber.sink] = subscriber
        delivery.fall_behind(*topic.written)
        delivery.watch(_now())
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
                self.fall_behind(subscriber)
            else:
                edges.append(edge)
        topic.edge = min(edges, default=None)

    async def _read_on(self, subscriber: Subscriber, delivery: Delivery) -> None:
        """Read the next piece of the stream for one that is behind, and send it."""
        topic = subscriber.topic
        place = delivery.epoch, delivery.cursor
        history = None
        try:
            history = await self._reader.piece(topic.channel, delivery.cursor)
        except Unavailable:
            await asyncio.sleep(spread(1.0))
        finally:
            subscriber.reading = False
        if subscriber.closed:
            return
        if history is None or place != (delivery.epoch, delivery.cursor):
            # An ack, a going back or a loss has moved it meanwhile: then this is not its next piece.
            self.advance(subscriber)
        elif history.epoch != topic.epoch:
            # One of the two is old. Filling finds out which, and advances all that are behind.
            self._on_hole(topic)
        else:
            self._send_piece(subscriber, delivery, history)

    def _send_piece(self, subscriber: Subscriber, delivery: Delivery, history: History) -> None:
        topic = subscriber.topic
        lost = not history.continues(delivery.epoch, delivery.cursor)
        if lost:
            self.lose(subscriber, history)
        frames: list[bytes] = []
        size = 0
        redelivered = 0
        last = delivery.cursor
        stop = last + delivery.room(topic.seq)
        for message in history.messages:
            if message.seq <= last:
                continue
            # After a loss the next one may lie before what was read.
            if message.seq > stop or message.seq != last + 1:
                break
            times = delivery.redelivered(message.seq)
            redelivered += bool(times)
            plain = frame(encode_redelivery(message.payload, times) if times else message.payload)
            frames.append(self._compressor.compress(plain) if subscriber.sink.compressed else plain)
            size += len(frames[-1])
            last = message.seq
        if frames:
            if not subscriber.sink.send(topic.channel, b"".join(frames), frames, "wait"):
                # The queue has filled meanwhile: when that has left, this is read again.
                return
            delivery.wrote(topic.epoch_of(last), last, _now())
            self._metrics.delivered += len(frames)
            self._metrics.bytes_out += size
            self._metrics.redelivered += redelivered
            self._watch(subscriber)
        elif delivery.room(topic.seq) and not lost:
            # Messages that this node has heard of are not in the stream, or were not yet when it was read.
            # Filling advances all that are behind.
            self._on_hole(topic)
            return
        self.advance(subscriber)

    def lose(self, subscriber: Subscriber, history: History) -> None:
        """Tell a subscriber of a gap that cannot be filled, and go on with the oldest message left.

        This node has taken over the line of numbers of `history`; of what it has not heard yet, nothing is
        lost to those who stand at its head.
        """
        topic, delivery = subscriber.topic, subscriber.delivery
        assert delivery is not None
        start = min(history.first - 1, topic.seq)
        delivery.lose(topic.epoch_of(start), start)
        subscriber.on_lost(topic.channel, delivery.epoch, start)

    def _watch(self, subscriber: Subscriber) -> None:
        """See to it that the wheel comes by when the subscriber's acks are due."""
        delivery = subscriber.delivery
        if delivery is None or delivery.due is None:
            return
        if subscriber.slot is not None:
            # Mostly it is due later than before, and that is seen when its slot comes. Earlier is who has
            # made progress after waits that had doubled.
            if self._wheel.slot(delivery.due) >= subscriber.slot:
                return
            self._wheel.discard(subscriber, subscriber.slot)
        subscriber.slot = self._wheel.add(subscriber, delivery.due)

    def _expire(self, subscriber: Subscriber, now: float) -> None:
        delivery = subscriber.delivery
        if subscriber.closed or delivery is None or delivery.due is None:
            return
        if delivery.due <= now:
            if subscriber.sink.queued:
                delivery.postpone(now)
            elif delivery.tries < delivery.max_redeliveries and not delivery.behind:
                self.fall_behind(subscriber)
            match delivery.expire(now):
                case "back":
                    self.advance(subscriber)
                case "give_up":
                    subscriber.on_overdue(subscriber.topic.channel)
        self._watch(subscriber)

    def turn(self) -> None:
        """A turn of the wheel; the owner calls this every TICK seconds (wheel.py)."""
        now = _now()
        active, self._active = self._active, set()
        for topic in active:
            for subscriber in topic.live.values():
                delivery = subscriber.delivery
                if delivery is not None and delivery.acks and delivery.due is None:
                    delivery.epoch, delivery.cursor = topic.written
                    delivery.watch(now)
                    self._watch(subscriber)
        for subscriber in self._wheel.expired(now):
            subscriber.slot = None
            self._expire(subscriber, now)


def spread(value: float) -> float:
    """A wait with jitter over half of it."""
    return value * random.uniform(0.5, 1.0)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _batches(frames: list[bytes]) -> Iterable[list[bytes]]:
    """Runs of frames of at most _BATCH bytes, or of one that is larger."""
    return (frames,) if len(frames) == 1 else _runs(frames)


def _runs(frames: list[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for data in frames:
        if batch and size + len(data) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    yield batch
