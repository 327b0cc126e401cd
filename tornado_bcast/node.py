"""The middle of a worker: joins those who listen here and the broker, which hears everything.

Owns the topics: interest by reference count, the node's head of each persistent channel, holes and how they
are filled. Never touches sockets or requests. One way for every message: `on_message` -> a topic's frames of
this turn of the loop -> one `fan_out` for all its live subscribers (dispatch.py).
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial

from .answer import Answer
from .brokers import Broker, BusMessage, History, Publication, Receipt
from .config import ChannelRule
from .dispatch import Dispatch, spread
from .errors import Unavailable
from .hub import Hub
from .metrics import Metrics
from .protocol import Position
from .reader import PIECE, StreamReader
from .rules import ChannelRules
from .sink import Sink
from .tasks import Tasks
from .topic import Topic
from .wheel import TICK

logger = logging.getLogger(__name__)

# Seconds for which a channel stays subscribed on the broker after the last user has gone.
LINGER = 1.0
# Seconds in which the head of each persistent channel is compared with the broker's once.
HEAD_CHECK = 30.0
# Heads that are asked for in one go.
_HEADS = 256
# With so many subscriptions a channel's messages are worth being sent together (Dispatch.flush_soon).
MANY = 16
# Seconds for which a list of all channels is given out again.
LIST_AGE = 1.0


class Node:
    """One worker's share of all channels. See the module for what it owns."""

    def __init__(
        self, broker: Broker, hub: Hub, metrics: Metrics, *, everybody: ChannelRule, join_timeout: float
    ) -> None:
        self._broker = broker
        self._reader = StreamReader(broker)
        self.dispatch = Dispatch(hub, metrics, self._reader, self._fill_soon)
        # Seconds that a subscription waits for the broker before it is `unavailable`.
        self._join_timeout = join_timeout
        self._topics: dict[str, Topic] = {}
        # Messages to all connections, under the rule for those.
        self._everybody = Topic("", everybody)
        # The server's own channels that this worker listens to, and who hears them.
        self._own: dict[str, Callable[[BusMessage], None]] = {}
        self._head_checks = self._next_head_checks()
        # The channels of all nodes: a walk over all of them for Redis, so asked for by one at a time.
        self._listing = asyncio.Lock()
        self._listed: list[str] = []
        self._listed_at = float("-inf")
        # Who waits for a task hears that Redis is away.
        self._tasks = Tasks(logger, quiet=(Unavailable,))
        # Told the rows of all workers of all nodes.
        self.on_peer: Callable[[bytes], None] = lambda row: None

    async def start(self, row: Callable[[], bytes]) -> None:
        """Begin to hear the broker. `row()` is this worker's row of statistics, for all others."""
        await self._broker.start(self, row)

    async def close(self) -> None:
        """End every task; the broker is closed last."""
        await self._tasks.close()
        await self.dispatch.close()
        await self._reader.close()
        await self._broker.close()

    def connect(self, sink: Sink) -> None:
        """A connection is there: what is broadcast to all reaches it from now on."""
        self.dispatch.hub_of(sink).connect(sink)

    def disconnect(self, sink: Sink) -> None:
        """It has gone."""
        self.dispatch.hub_of(sink).disconnect(sink)

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
            if asyncio.get_running_loop().time() - self._listed_at > LIST_AGE:
                names = await self._broker.channels()
                self._listed = [name for name in names if not name.startswith("$")]
                self._listed_at = asyncio.get_running_loop().time()
        return self._listed

    def use_rules(self, rules: ChannelRules) -> None:
        """Take over new rules for the channels in use. What is persistent stays so as long as it is used."""
        self._everybody.rule = rules.everybody
        for topic in self._topics.values():
            rule = rules.find(topic.channel)
            if rule.persistent == topic.rule.persistent:
                topic.rule = rule

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
    ) -> Answer[Receipt]:
        """Hand a message to the broker. `given`: the id is the publisher's, so it may be sent twice."""
        persistent = rule.persistent and channel is not None
        answer = self._broker.publish(
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
        topic = None if channel is None else self._topics.get(channel)
        if topic is not None and topic.users >= MANY and not answer.done():
            topic.coming += 1
            answer.add_done_callback(partial(self._came, topic))
        return answer

    def _came(self, topic: Topic, _: Answer[Receipt]) -> None:
        topic.coming -= 1
        if topic.frames and not topic.coming:
            self.dispatch.flush_soon()

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
                if topic.heard is not None and topic.epoch:
                    self._fill_soon(topic)
                return
        self.dispatch.gather(topic, message)

    def on_gap(self, channels: list[str]) -> None:
        topics = [topic for name in channels if (topic := self._topics.get(name)) is not None]
        for topic in topics:
            if topic.filling is not None:
                # What is being read may be of before the gap.
                topic.doubt()
        self._tasks.spawn(self._check_heads([topic for topic in topics if topic.rule.persistent]))

    # Interest

    async def join(self, channel: str, rule: ChannelRule) -> Topic:
        """Hold a channel: what is published from now on is heard. `leave` gives it back.

        Raises Unavailable when the broker does not confirm in time; then nothing is held.
        """
        topic = self._topics.get(channel)
        if topic is None:
            topic = self._topics[channel] = Topic(channel, rule)
        topic.users += 1
        if topic.joining is None or (topic.joining.done() and not _succeeded(topic.joining)):
            topic.joining = self._tasks.spawn(self._join(topic))
        if not topic.joining.done():
            await asyncio.wait({topic.joining}, timeout=self._join_timeout)
        if not _succeeded(topic.joining):
            self.leave(topic)
            raise Unavailable("Redis does not answer; subscribe again.", int(spread(1000)))
        return topic

    async def _join(self, topic: Topic) -> None:
        await self._broker.subscribe(topic.channel)
        if topic.rule.persistent:
            topic.filling = asyncio.current_task()
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
        self.dispatch.forget(topic)
        for task in (topic.joining, topic.filling):
            if task is not None:
                task.cancel()
        self._broker.unsubscribe(topic.channel)

    # Positions

    async def locate(self, topic: Topic, since: Position | None, last: int | None) -> tuple[int, bool]:
        """Where a subscription begins: after which seq, and whether it was there; of others than persistent
        channels that means nothing.

        False: the position is gone, and the start is before the oldest message that is left.
        """
        if not topic.rule.persistent or (since is None and not last):
            return topic.seq, True
        if since is not None and since.seq == topic.seq and topic.knows(since.epoch, since.seq):
            return since.seq, True
        if since is None or topic.knows(since.epoch, since.seq):
            history = await self._reader.piece(topic.channel, topic.seq, 0)
        else:
            # It may be newer than what this node has heard, and than a read that somebody else has begun.
            history = await self._reader.read(topic.channel, topic.seq, 0)
        if history.epoch != topic.epoch or (since is not None and topic.seq < since.seq <= history.seq):
            await self._caught_up(topic, history)
        oldest = min(history.first - 1, topic.seq)
        if since is None:
            return max(topic.seq - (last or 0), oldest), True
        if topic.knows(since.epoch, since.seq) and history.continues(since.epoch, since.seq):
            return since.seq, True
        return oldest, False

    async def _caught_up(self, topic: Topic, history: History) -> None:
        """Wait until this node has heard what a read has shown, or what came in its place since."""
        # What is being filled already may have been read before that; the next time it is not.
        for _ in range(2):
            if topic.epoch == history.epoch and topic.seq >= history.seq:
                return
            self._fill_soon(topic)
            assert topic.filling is not None
            done, _ = await asyncio.wait({topic.filling}, timeout=self._join_timeout)
            if not done:
                raise Unavailable("Redis does not answer; subscribe again.", int(spread(1000)))

    # Holes

    def _fill_soon(self, topic: Topic) -> None:
        """Read what this node has missed, unless that is under way."""
        under_way = topic.filling is not None and not topic.filling.done()
        if not under_way and self._topics.get(topic.channel) is topic:
            topic.filling = self._tasks.spawn(self._fill(topic))

    async def _fill(self, topic: Topic) -> None:
        """Read the stream until the node's head has caught up; at the first time, only where it stands."""
        delay = 0.05
        while True:
            topic.heard = None
            try:
                history = await self._reader.read(topic.channel, topic.seq, PIECE if topic.epoch else 0)
            except Unavailable:
                # As long as somebody listens: without the stream nothing newer may be sent.
                await asyncio.sleep(spread(delay))
                delay = min(delay * 2, 2.0)
                continue
            self._take(topic, history)
            if topic.is_caught_up(history):
                break
        topic.filling = topic.heard = None
        for subscriber in list(topic.behind.values()):
            self.dispatch.advance(subscriber)

    def _take(self, topic: Topic, history: History) -> None:
        """Move the node's head by what a read has shown."""
        dispatch = self.dispatch
        dispatch.flush(topic)
        if not topic.epoch:
            topic.adopt(history, history.seq)
        elif history.continues(topic.epoch, topic.seq):
            topic.adopt(history, topic.seq)
            for message in history.messages:
                if message.seq == topic.seq + 1:
                    topic.seq = message.seq
                    dispatch.gather(topic, message)
            dispatch.flush(topic)
        else:
            shared = topic.shared(history)
            for subscriber in list(topic.live.values()):
                dispatch.fall_behind(subscriber)
            topic.adopt(history, history.seq)
            # Who is behind and has seen nothing that is gone goes on; should what it needs be trimmed away,
            # reading tells.
            lost = [one for one in topic.behind.values() if one.delivery and one.delivery.sent > shared]
            logger.warning(
                "history of a channel was lost; %d subscribers are told",
                len(lost),
                extra={"event": "history_lost", "channel": topic.channel},
            )
            for subscriber in lost:
                dispatch.lose(subscriber, history)
        for message in topic.take_ahead():
            dispatch.gather(topic, message)

    async def _check_heads(self, topics: list[Topic]) -> None:
        """Compare heads with the broker's, and fill where a message was missed, or Redis has lost some."""
        topics = [topic for topic in topics if topic.epoch and topic.filling is None]
        for index in range(0, len(topics), _HEADS):
            some = topics[index : index + _HEADS]
            before = [topic.seq for topic in some]
            try:
                heads = await self._broker.heads([topic.channel for topic in some])
            except Unavailable:
                heads = {}
            for topic, seq in zip(some, before, strict=True):
                head = heads.get(topic.channel)
                # Where the heads are not to be had, filling is what goes on asking.
                if head is None or head.epoch != topic.epoch or not seq <= head.seq <= topic.seq:
                    self._fill_soon(topic)

    # The clock

    def turn(self) -> None:
        """See to what is due; the owner calls this every TICK seconds (wheel.py)."""
        self.dispatch.turn()
        topics = next(self._head_checks)
        if topics:
            self._tasks.spawn(self._check_heads(topics))

    def _next_head_checks(self) -> Iterator[list[Topic]]:
        """All persistent topics, again and again, spread over the turns of HEAD_CHECK seconds."""
        turns = int(HEAD_CHECK / TICK)
        while True:
            topics = [topic for topic in self._topics.values() if topic.rule.persistent]
            for turn in range(turns):
                yield topics[turn::turns]


def _succeeded(task: "asyncio.Task[None]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
