"""The ear: one pub/sub connection, and what this worker listens to on it.

Owns the interest in channels, its confirmation by Redis, and its standing up again after a reconnect. It
hands messages on and never looks into them.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from redis.exceptions import ConnectionError

from tornado_bcast.brokers import BrokerEvents, decode_bus
from tornado_bcast.brokers.redis_commands import CHUNK, Names
from tornado_bcast.brokers.redis_link import LINK_ERRORS, Link
from tornado_bcast.brokers.redis_wire import RedisWire, pack
from tornado_bcast.errors import Unavailable
from tornado_bcast.eventloop import at_turn_end

logger = logging.getLogger(__name__)

COMPLAINT_INTERVAL = 60.0  # seconds


class Bridge:
    """Subscriptions of one worker.

    `read_row` takes what a worker publishes about itself and gives the row in it. `on_ready` is called when
    a connection stands and Redis has confirmed what every worker hears.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        events: BrokerEvents,
        read_row: Callable[[bytes], bytes],
        on_ready: Callable[[], None],
    ) -> None:
        self._link = link
        self._names = names
        self._events = events
        self._read_row = read_row
        self._on_ready = on_ready
        self._loop = asyncio.get_running_loop()
        # Pub/sub name -> channel, for all that is wanted; the workers' own name has no channel either.
        self._wanted: dict[bytes, str | None] = {names.everybody: None, names.workers: None}
        # Those of which a SUBSCRIBE was the last word on this connection; answers that are still to come.
        self._sent: set[bytes] = set()
        self._unanswered: dict[bytes, int] = {}
        # Those that Redis has confirmed: only their messages are told.
        self._confirmed: dict[bytes, str | None] = {}
        # Those that were confirmed on an earlier connection and not yet on this one.
        self._interrupted: set[bytes] = set()
        self._gaps: list[str] = []
        # Those whose interest has changed since the last write.
        self._changed: set[bytes] = set()
        self._waiters: dict[bytes, list[asyncio.Future[None]]] = {}
        # The present connection, and what is done with the reason when it is of no more use.
        self._wire: RedisWire | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # Since when the present connection stands, with everything confirmed that every worker hears.
        self.ready_since: float | None = None
        # Messages of any kind that came; a sign of life.
        self.heard = 0
        # Messages dropped because they are not in the bus form; when that was last logged.
        self.foreign = 0
        self._complained = -COMPLAINT_INTERVAL

    async def subscribe(self, channel: str) -> None:
        name = self._names.bus(channel)
        if name in self._confirmed:
            return
        self._wanted[name] = channel
        if name in self._sent and name not in self._unanswered:
            # It was given up in this very turn, and Redis has not heard of that.
            self._confirmed[name] = channel
            return
        self._change(name)
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.setdefault(name, []).append(waiter)
        await waiter

    def unsubscribe(self, channel: str) -> None:
        name = self._names.bus(channel)
        self._wanted.pop(name, None)
        self._confirmed.pop(name, None)
        self._interrupted.discard(name)
        self._release(name, Unavailable("the subscription was given up"))
        self._change(name)

    async def run(self) -> None:
        """Drive the link until cancelled."""
        while True:
            wire = await self._link.connect()
            try:
                await self._listen(wire)
            except LINK_ERRORS as error:
                await self._link.drop(error)
            except Exception as error:
                logger.exception("Listening to Redis failed", extra={"event": "bridge_failed"})
                await self._link.drop(error)

    def replace(self) -> None:
        """Give up the present connection: it is open, but nothing comes out of it."""
        if self._wire is not None:
            self._end(ConnectionError("The pub/sub connection is open, but deaf."))

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def close(self) -> None:
        """Fail who still waits; `run` has been cancelled before."""
        for name in list(self._waiters):
            self._release(name, Unavailable("the server is stopping"))

    async def _listen(self, wire: RedisWire) -> None:
        self._wire = wire
        self._ended = self._loop.create_future()
        self._changed = set(self._wanted)
        self._write()
        try:
            wire.drive(self._hear, self._end)
            await self._ended
        finally:
            self._wire = None
            self.ready_since = None
            self._sent.clear()
            self._unanswered.clear()
            self._interrupted.update(self._confirmed)
            self._confirmed.clear()

    def _write(self) -> None:
        """Send the changes of interest, all of one turn of the loop at once."""
        if self._wire is None:
            # The next one begins with all that is wanted.
            return
        changed, self._changed = self._changed, set()
        added = [name for name in changed if name in self._wanted and name not in self._sent]
        removed = [name for name in changed if name not in self._wanted and name in self._sent]
        self._sent.update(added)
        self._sent.difference_update(removed)
        for name in (*added, *removed):
            self._unanswered[name] = self._unanswered.get(name, 0) + 1
        commands = [pack((b"SUBSCRIBE", *chunk)) for chunk in chunks(added)]
        commands += [pack((b"UNSUBSCRIBE", *chunk)) for chunk in chunks(removed)]
        if commands:
            self._wire.send(commands)

    def _hear(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            raise answer
        kind, name, data = answer
        if kind == b"message":
            self.heard += 1
            if name in self._confirmed:
                self._tell(name, data)
        elif kind == b"subscribe" or kind == b"unsubscribe":
            self._confirm(kind == b"subscribe", name)

    def _tell(self, name: bytes, data: bytes) -> None:
        try:
            if name == self._names.workers:
                row = self._read_row(data)
            else:
                message = decode_bus(data)
        except ValueError:
            self._drop()
            return
        try:
            if name == self._names.workers:
                self._events.on_peer(row)
            else:
                self._events.on_message(self._confirmed[name], message)
        except Exception:
            logger.exception("A message could not be handed on", extra={"event": "message_failed"})

    def _drop(self) -> None:
        self.foreign += 1
        if self._loop.time() - self._complained >= COMPLAINT_INTERVAL:
            self._complained = self._loop.time()
            logger.warning(
                "Somebody else publishes under the prefix %s: dropped, %d in all",
                self._names.prefix,
                self.foreign,
                extra={"event": "foreign_message"},
            )

    def _confirm(self, subscribed: bool, name: bytes) -> None:
        unanswered = self._unanswered.pop(name, 0)
        if unanswered == 0:
            raise ConnectionError("Redis ended a subscription on its own.")
        if unanswered > 1:
            self._unanswered[name] = unanswered - 1
            return
        if not subscribed or name not in self._wanted:
            return
        channel = self._confirmed[name] = self._wanted[name]
        self._release(name, None)
        if name in self._interrupted:
            self._interrupted.discard(name)
            if channel is not None:
                if not self._gaps:
                    self._loop.call_soon(self._tell_gaps)
                self._gaps.append(channel)
        if (
            self.ready_since is None
            and {self._names.everybody, self._names.workers} <= self._confirmed.keys()
        ):
            self.ready_since = self._loop.time()
            self._link.succeeded()
            self._on_ready()

    def _tell_gaps(self) -> None:
        gaps, self._gaps = self._gaps, []
        try:
            self._events.on_gap(gaps)
        except Exception:
            logger.exception("A gap could not be handed on", extra={"event": "gap_failed"})

    def _change(self, name: bytes) -> None:
        if not self._changed:
            at_turn_end(self._write)
        self._changed.add(name)

    def _release(self, name: bytes, error: Exception | None) -> None:
        for waiter in self._waiters.pop(name, ()):
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)


def chunks(names: list[bytes]) -> Iterable[list[bytes]]:
    return (names[start : start + CHUNK] for start in range(0, len(names), CHUNK))
