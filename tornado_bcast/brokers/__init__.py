"""Brokers: what carries a message from one worker to all that listen, and what stores it.

`Broker` is the interface; `memory.py` (one process) and `redis.py` (any number of workers and nodes) fulfil
it, and both pass the one test class in tests/test_brokers.py. A broker never sees a socket or a handler:
a worker's node calls it and hears from it through `BrokerEvents`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from tornado_bcast.answer import Answer

# What the last line of a bus message's header is followed by; see `encode_bus`.
_NO_EPOCH = b"-"


# Those that each message makes are not frozen, though nobody changes them: it would triple their cost.


@dataclass(slots=True)
class Publication:
    """A message on its way in.

    `payload` is the final JSON object of the `message` event, without `seq` and `epoch`: on persistent
    channels the broker puts these in front of its closing brace.
    """

    # None: to every connection of every worker and node.
    channel: str | None
    message_id: str
    payload: bytes
    # Unix time in milliseconds, the `timestamp` inside the payload.
    timestamp: int
    # Seconds for which a second publication of this id on this channel is answered `duplicate`; 0: no
    # deduplication, and then a publication whose fate is unknown is never tried again.
    dedup_ttl: float = 0
    persistent: bool = False
    # Of persistent channels: how many messages the stream keeps, and for how many seconds after the last.
    history_size: int = 0
    history_ttl: float = 0


@dataclass(slots=True, frozen=True)
class Receipt:
    """The broker has the message. `seq` and `epoch` are set on persistent channels."""

    duplicate: bool = False
    seq: int | None = None
    epoch: str | None = None


@dataclass(slots=True)
class BusMessage:
    """A message on its way out, as it travels on the bus and lies in the stream.

    `payload` is the JSON text that goes to clients as it is; nothing in it is parsed again.
    """

    payload: bytes
    timestamp: int
    # 0 and "" on channels that are not persistent.
    seq: int = 0
    epoch: str = ""


def encode_bus(message: BusMessage) -> bytes:
    """The bus form: `SEQ EPOCH TIMESTAMP\\nJSON`, with EPOCH `-` where there is none."""
    epoch = message.epoch.encode() or _NO_EPOCH
    return b"%d %s %d\n%s" % (message.seq, epoch, message.timestamp, message.payload)


def decode_bus(data: bytes) -> BusMessage:
    """Read the bus form; ValueError where it is not one (somebody else publishes under our prefix)."""
    header, newline, payload = data.partition(b"\n")
    fields = header.split(b" ")
    if not newline or len(fields) != 3:
        raise ValueError("not a bus message")
    seq, epoch, timestamp = fields
    return BusMessage(payload, int(timestamp), int(seq), "" if epoch == _NO_EPOCH else epoch.decode())


@dataclass(slots=True, frozen=True)
class History:
    """A persistent channel as of one moment: its head, and a piece of what it keeps."""

    epoch: str
    # The head, that is the number of the last message; 0 before the first.
    seq: int
    # The oldest message that is kept; seq + 1 when there is none.
    first: int
    # Where earlier epochs of this same line of numbers ended, in their order. A position up to there goes on.
    ends: dict[str, int]
    # In order and without what was not asked for; fewer than asked for where they are too many bytes, so
    # who reads on compares the last one's seq with the head.
    messages: list[BusMessage]

    def knows(self, epoch: str, seq: int) -> bool:
        """Whether a position lies on this line of numbers: all up to it was given to these very messages."""
        return seq <= (self.seq if epoch == self.epoch else self.ends.get(epoch, -1))

    def continues(self, epoch: str, seq: int) -> bool:
        """Whether all that came after a position is still kept: it goes on as if nothing had happened."""
        return self.knows(epoch, seq) and seq + 1 >= self.first


class BrokerEvents(Protocol):
    """What a broker tells its node. All are plain calls on the loop; none may block or raise."""

    def on_message(self, channel: str | None, message: BusMessage) -> None:
        """A message of a subscribed channel (None: to everybody), in the order of the broker."""

    def on_gap(self, channels: list[str]) -> None:
        """These subscriptions were interrupted and stand again: messages may have been missed."""

    def on_peer(self, row: bytes) -> None:
        """A worker of some node, this one included, told its row of statistics (a JSON object)."""


@dataclass(slots=True, frozen=True)
class BrokerHealth:
    """`up`: publishes are taken and subscriptions are heard. `problem` says what an operator should mend."""

    up: bool
    # Seconds from the last canary's publish to its return; None before the first.
    roundtrip: float | None = None
    problem: str | None = None


@dataclass(slots=True, frozen=True)
class StoredSession:
    """A session as it was last saved. `channels`: the state of each subscription, in session.py's form."""

    client_id: str
    generation: int
    channels: dict[str, str]


@dataclass(slots=True, frozen=True)
class SessionChange:
    """What is written of a session. `channels`: "" takes one away; with `whole` nothing else stays."""

    generation: int
    principal: str
    client_id: str
    # The server channel of the worker that holds the session: who takes it over says so there.
    owner: str
    channels: dict[str, str]
    whole: bool


# `taken`: a newer connection has it. `missing`: it is gone, or an older copy is; write it whole.
SavedAs = Literal["saved", "taken", "missing"]


class SessionStore(Protocol):
    """Where sessions outlive their connections.

    `name` is made of the session's secret id and does not give it away. Generations order those who hold a
    session: a resume raises it, and a write with a lower one than is stored changes nothing. A session is
    never deleted, it expires `ttl` seconds after its last write.
    """

    async def resume(self, name: str, principal: str, owner: str, ttl: float) -> StoredSession | None:
        """Take a session over and tell its owner (`NAME GENERATION` on the owner's channel). None: no such
        session of this principal. Raises `Unavailable`."""

    async def save(self, name: str, change: SessionChange, ttl: float) -> SavedAs:
        """Write what has changed. Raises `Unavailable`: it may or may not have been written."""


class Broker(Protocol):
    """Carries and stores messages.

    Guarantees: messages of one channel reach every subscriber in one order, that of the broker; what one
    caller publishes to one channel keeps its order; a `message_id` is taken once per channel within its
    `dedup_ttl`. A message published after `subscribe` has returned is heard, or `on_gap` names its channel.
    """

    @property
    def sessions(self) -> SessionStore:
        """Where sessions are kept."""

    async def start(self, events: BrokerEvents, row: Callable[[], bytes]) -> None:
        """Begin; returns at once, also when Redis is away. `row()` is sent to all workers each second."""

    async def close(self) -> None:
        """Give back every connection and task. What is still waiting fails with `Unavailable`."""

    def publish(self, publication: Publication) -> Answer[Receipt]:
        """Take one message. The answer is the receipt, or `Unavailable`; order is the order of the calls."""

    async def subscribe(self, channel: str) -> None:
        """Listen to a channel; returns when that is confirmed. Waits while the other side is away."""

    def unsubscribe(self, channel: str) -> None:
        """Stop listening to a channel. Nothing of it is told after a later `subscribe` but new messages."""

    async def read(self, channel: str, after: int, limit: int) -> History:
        """The state of a persistent channel and up to `limit` of its messages with a seq above `after`.

        A negative `after` asks for that many of the last ones. Where the channel has no history yet, one
        begins at seq 0. Raises `Unavailable` when no answer is to be had in time.
        """

    async def heads(self, channels: list[str]) -> dict[str, History]:
        """`read` without messages, for many channels at the price of a few. `Unavailable` as there."""

    async def channels(self) -> list[str]:
        """Names of the channels that some worker of some node listens to. Raises `Unavailable`."""

    async def probe(self) -> float:
        """Send a canary through and wait for it: the seconds it took. `Unavailable` when it stays away."""

    def health(self) -> BrokerHealth:
        """What is known now, without asking anybody."""
