"""One channel on one node: who uses it, how far it has been heard, and what this turn of the loop brought.

Sans-I/O: the node feeds it what the broker tells and asks it what to do. For a persistent channel it holds
the node's head, the place up to which every message has been seen without a hole; `accept` says whether a
message is the next one.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .brokers import BusMessage, History
from .config import ChannelRule
from .delivery import Delivery
from .sink import Sink

if TYPE_CHECKING:
    import asyncio


# Messages that are kept while the stream is read, at most.
AHEAD = 128


class Topic:
    """A channel that somebody on this node uses or has just used. Owner: the node."""

    __slots__ = (
        "ahead",
        "behind",
        "channel",
        "coming",
        "edge",
        "ends",
        "epoch",
        "filling",
        "flushed",
        "frames",
        "heard",
        "joining",
        "live",
        "rule",
        "seq",
        "timestamp",
        "users",
    )

    def __init__(self, channel: str, rule: ChannelRule) -> None:
        self.channel = channel
        self.rule = rule
        # Subscriptions that hold the broker's: joined or joining.
        self.users = 0
        # The broker's subscription, and of a persistent channel its head, on their way; None before.
        self.joining: asyncio.Task[None] | None = None
        # Publishes of this worker that the broker has not answered yet.
        self.coming = 0
        # Frames for the live subscribers, of this turn of the loop; and the first one's publishing time, ms.
        self.frames: list[bytes] = []
        self.timestamp = 0

        # The rest is of persistent channels alone.
        self.live: dict[Sink, Subscriber] = {}
        self.behind: dict[Sink, Subscriber] = {}
        # The node's head: every message up to here has been seen. "" until it is known.
        self.epoch = ""
        self.seq = 0
        # Where earlier epochs of this line of numbers ended, in their order.
        self.ends: dict[str, int] = {}
        # The head when the frames above began to gather.
        self.flushed = 0
        # The highest message that may be written before some live subscriber's window is full.
        self.edge: int | None = None
        # The stream is being read because of a hole: what comes meanwhile has to wait.
        self.filling: asyncio.Task[None] | None = None
        # The last message that came so; None when none did.
        self.heard: tuple[str, int] | None = None
        # It and those right before it, a few: where messages come all the time no read would ever show all.
        self.ahead: list[BusMessage] = []

    def accept(self, message: BusMessage) -> bool:
        """Whether a message is the next one; the head then moves. False: an old one, or `heard` is set."""
        if message.epoch == self.epoch and message.seq <= self.seq:
            return False
        if self.filling is not None or message.epoch != self.epoch or message.seq != self.seq + 1:
            self.heard = (message.epoch, message.seq)
            self._keep(message)
            return False
        self.seq = message.seq
        return True

    def _keep(self, message: BusMessage) -> None:
        if self.ahead:
            last = self.ahead[-1]
            if (message.epoch, message.seq) != (last.epoch, last.seq + 1) or len(self.ahead) == AHEAD:
                # What is dropped here is in the stream.
                self.ahead.clear()
        self.ahead.append(message)

    def take_ahead(self) -> Iterator[BusMessage]:
        """Those of `ahead` that come next now; the head moves with them."""
        ahead, self.ahead = self.ahead, []
        for message in ahead:
            if message.epoch == self.epoch and message.seq == self.seq + 1:
                self.seq = message.seq
                yield message

    def knows(self, epoch: str | None, seq: int) -> bool:
        """Whether the position is of this line of numbers and not past its head."""
        if epoch is None or epoch == self.epoch:
            return seq <= self.seq
        return seq <= self.ends.get(epoch, -1)

    def epoch_of(self, seq: int) -> str:
        """The epoch in which a number of this line was given, as far back as that is remembered.

        By this name a place is still known when the epochs that came after it are lost.
        """
        for epoch, end in self.ends.items():
            if seq <= end:
                return epoch
        return self.epoch

    @property
    def written(self) -> tuple[str, int]:
        """The place up to which live subscribers have been sent everything."""
        return self.epoch_of(self.flushed), self.flushed

    def adopt(self, history: History, seq: int) -> None:
        """Take over the line of numbers that a read has shown, with `seq` as the node's head."""
        self.epoch = history.epoch
        self.ends = history.ends
        self.seq = self.flushed = seq

    def shared(self, history: History) -> int:
        """The last seq up to which this line of numbers and the one that a read has shown are the same."""
        here = {**self.ends, self.epoch: self.seq}
        there = {**history.ends, history.epoch: history.seq}
        return max((min(here[epoch], there[epoch]) for epoch in here.keys() & there.keys()), default=0)

    def doubt(self) -> None:
        """Messages may have been missed: what was read before now does not show that this node has all."""
        self.heard = ("", 0)

    def is_caught_up(self, history: History) -> bool:
        """Whether a read has shown everything, also what was dropped while it was under way.

        `heard` was cleared before the read. A message of an epoch that the read did not know may be of one
        that has begun since.
        """
        if self.seq < history.seq:
            return False
        if self.heard is None:
            return True
        epoch, seq = self.heard
        return seq <= self.seq if epoch == history.epoch else epoch in history.ends


class Subscriber:
    """One connection's subscription to a channel, as the node sees it. `delivery` None: not persistent."""

    __slots__ = ("closed", "delivery", "on_lost", "on_overdue", "reading", "sink", "slot", "topic")

    def __init__(
        self,
        topic: Topic,
        sink: Sink,
        delivery: Delivery | None,
        on_lost: Callable[[str, str, int], None],
        on_overdue: Callable[[str], None],
    ) -> None:
        self.topic = topic
        self.sink = sink
        self.delivery = delivery
        # Called with channel, epoch, seq: there is a gap; it goes on after that position.
        self.on_lost = on_lost
        # Called with the channel: too many tries without an ack.
        self.on_overdue = on_overdue
        # A piece of the stream is being read for it.
        self.reading = False
        # Its place on the wheel; None while it is not there.
        self.slot: int | None = None
        self.closed = False
