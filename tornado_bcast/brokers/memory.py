"""The broker of one process: `memory:`, for tests and trials.

Owns histories, ids and subscriptions in plain dictionaries, under the same limits and times as Redis would
keep them; touches no socket. What is published is told on the next turn of the loop, as a bus would do it.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from tornado_bcast.answer import Answer
from tornado_bcast.brokers import (
    BrokerEvents,
    BrokerHealth,
    BusMessage,
    History,
    Publication,
    Receipt,
    SavedAs,
    SessionChange,
    StoredSession,
)
from tornado_bcast.errors import Unavailable
from tornado_bcast.eventloop import at_turn_end

logger = logging.getLogger(__name__)

ROW_INTERVAL = 1.0  # seconds
# Seconds for which a channel's epoch and counter are kept after the last publish or read, as on Redis.
STATE_TTL = 30 * 86400.0
# The same as long as nothing has been published.
EMPTY_TTL = 3600.0


@dataclass(slots=True)
class _Session:
    generation: int
    principal: str
    client_id: str
    owner: str
    channels: dict[str, str]
    expires_at: float = 0


class MemorySessions:
    """See `SessionStore`."""

    def __init__(self, clock: Callable[[], float], tell: Callable[[str, bytes], None]) -> None:
        self._clock = clock
        self._tell = tell
        self._sessions: dict[str, _Session] = {}

    async def resume(self, name: str, principal: str, owner: str, ttl: float) -> StoredSession | None:
        session = self._find(name)
        if session is None or session.principal != principal:
            return None
        session.generation += 1
        self._tell(session.owner, b"%s %d" % (name.encode(), session.generation))
        session.owner = owner
        session.expires_at = self._clock() + ttl
        return StoredSession(session.client_id, session.generation, dict(session.channels))

    async def save(self, name: str, change: SessionChange, ttl: float) -> SavedAs:
        session = self._find(name)
        if session is not None and session.generation > change.generation:
            return "taken"
        if change.whole:
            session = self._sessions[name] = _Session(
                change.generation, change.principal, change.client_id, change.owner, {}
            )
        elif session is None or session.generation < change.generation:
            return "missing"
        for channel, value in change.channels.items():
            if value:
                session.channels[channel] = value
            else:
                session.channels.pop(channel, None)
        session.expires_at = self._clock() + ttl
        return "saved"

    def _find(self, name: str) -> _Session | None:
        session = self._sessions.get(name)
        return session if session is not None and session.expires_at > self._clock() else None

    def forget(self, now: float) -> None:
        """Give up what has expired."""
        for name in [name for name, session in self._sessions.items() if session.expires_at <= now]:
            del self._sessions[name]


@dataclass(slots=True)
class _Line:
    """The history of one persistent channel."""

    epoch: str
    # When all this may be forgotten, and when the messages may; on the clock.
    forget_at: float
    expires_at: float = 0
    seq: int = 0
    messages: deque[BusMessage] = field(default_factory=deque)


class MemoryBroker:
    """See `Broker`. `clock` gives seconds; tests put their own in."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # The epochs of one process are told apart by a count, those of two by this.
        self._name = secrets.token_hex(6)
        self._epochs = count()
        self._lines: dict[str, _Line] = {}
        # (channel, message id) -> (when it may be taken again, the first one's receipt); oldest first.
        self._taken: dict[tuple[str | None, str], tuple[float, Receipt]] = {}
        self._subscribed: set[str] = set()
        # What the next turn of the loop tells; a channel here that nobody listens to any more is left out.
        self._bus: deque[tuple[str | None, BusMessage]] = deque()
        self._events: BrokerEvents | None = None
        self._row: Callable[[], bytes] = bytes
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._roundtrip: float | None = None
        self.sessions = MemorySessions(self._clock, self._tell_owner)

    async def start(self, events: BrokerEvents, row: Callable[[], bytes]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = events
        self._row = row
        self._tick()

    async def close(self) -> None:
        self._events = None
        self._bus.clear()
        if self._timer is not None:
            self._timer.cancel()

    def publish(self, publication: Publication) -> Answer[Receipt]:
        answer: Answer[Receipt] = Answer()
        if self._events is None:
            answer.set_exception(Unavailable("the server is stopping"))
        else:
            answer.set_result(self._take(publication))
        return answer

    async def subscribe(self, channel: str) -> None:
        self._subscribed.add(channel)

    def unsubscribe(self, channel: str) -> None:
        if channel in self._subscribed:
            self._subscribed.discard(channel)
            self._bus = deque(entry for entry in self._bus if entry[0] != channel)

    async def read(self, channel: str, after: int, limit: int) -> History:
        now = self._clock()
        line = self._line(channel, now)
        if line.expires_at <= now:
            line.messages.clear()
        if after < 0:
            after = max(line.seq + after, 0)
        kept = line.messages
        first = kept[0].seq if kept else line.seq + 1
        wanted = [message for message in kept if message.seq > after][:limit] if limit else []
        return History(line.epoch, line.seq, first, {}, wanted)

    async def heads(self, channels: list[str]) -> dict[str, History]:
        return {channel: await self.read(channel, 0, 0) for channel in channels}

    async def channels(self) -> list[str]:
        return sorted(self._subscribed)

    async def probe(self) -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned
        self._roundtrip = loop.time() - start
        return self._roundtrip

    def health(self) -> BrokerHealth:
        return BrokerHealth(up=self._events is not None, roundtrip=self._roundtrip)

    def _take(self, publication: Publication) -> Receipt:
        now = self._clock()
        key = (publication.channel, publication.message_id)
        if publication.dedup_ttl > 0:
            expires, first = self._taken.get(key, (0.0, Receipt()))
            if expires > now:
                return replace(first, duplicate=True)
        message = BusMessage(publication.payload, publication.timestamp)
        receipt = Receipt()
        if publication.persistent and publication.channel is not None:
            line = self._line(publication.channel, now)
            message = self._store(line, publication, now)
            receipt = Receipt(seq=line.seq, epoch=line.epoch)
        if publication.dedup_ttl > 0:
            self._taken.pop(key, None)
            self._taken[key] = (now + publication.dedup_ttl, receipt)
        self._tell(publication.channel, message)
        return receipt

    def _store(self, line: _Line, publication: Publication, now: float) -> BusMessage:
        if line.expires_at <= now:
            line.messages.clear()
        line.seq += 1
        position = b',"seq":%d,"epoch":"%s"}' % (line.seq, line.epoch.encode())
        message = BusMessage(publication.payload[:-1] + position, publication.timestamp, line.seq, line.epoch)
        line.messages.append(message)
        while len(line.messages) > publication.history_size:
            line.messages.popleft()
        line.expires_at = now + publication.history_ttl
        line.forget_at = now + max(STATE_TTL, 2 * publication.history_ttl)
        return message

    def _line(self, channel: str, now: float) -> _Line:
        line = self._lines.get(channel)
        if line is None:
            line = self._lines[channel] = _Line(f"{self._name}{next(self._epochs):x}", now)
        line.forget_at = max(line.forget_at, now + (STATE_TTL if line.seq else EMPTY_TTL))
        return line

    def _tell_owner(self, owner: str, notice: bytes) -> None:
        self._tell(owner, BusMessage(notice, 0))

    def _tell(self, channel: str | None, message: BusMessage) -> None:
        if channel is None or channel in self._subscribed:
            if not self._bus:
                at_turn_end(self._deliver)
            self._bus.append((channel, message))

    def _deliver(self) -> None:
        bus, self._bus = self._bus, deque()
        for channel, message in bus:
            if self._events is not None and (channel is None or channel in self._subscribed):
                self._events.on_message(channel, message)

    def _tick(self) -> None:
        if self._events is None or self._loop is None:
            return
        self._timer = self._loop.call_later(ROW_INTERVAL, self._tick)
        self._forget(self._clock())
        try:
            self._events.on_peer(self._row())
        except Exception:
            logger.exception("A row of statistics failed", extra={"event": "row_failed"})

    def _forget(self, now: float) -> None:
        """Give up what has expired: once a second, and what is left is what may still be asked for."""
        for key in [key for key, (expires, _) in self._taken.items() if expires <= now]:
            del self._taken[key]
        self.sessions.forget(now)
        for channel, line in list(self._lines.items()):
            if line.expires_at <= now:
                line.messages.clear()
            if line.forget_at <= now:
                del self._lines[channel]
