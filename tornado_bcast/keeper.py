"""Keeps sessions for after their connections: saves what changes, resumes what is asked for.

Owns the registry of this worker's sessions and their clock: a change of subscriptions is saved before its
ack, acked positions follow within SAVE_SECONDS, an idle session's time is renewed. No session is ever
deleted; it expires. A session that a newer connection has taken over is told on this worker's own channel,
or by the refusal of the next save; its connection ends with 4009.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from contextlib import suppress

from .brokers import BusMessage, SessionStore
from .errors import CloseCode, Unavailable
from .rules import Principal
from .session import Session
from .wheel import Wheel

logger = logging.getLogger(__name__)

# Acked positions are in the store so many seconds after the ack at the latest.
SAVE_SECONDS = 5.0
# A stored session is renewed after this part of its time, and stored for that much longer.
_RENEWAL = 1 / 3

End = Callable[..., None]


class _Kept:
    """A session with an open connection."""

    __slots__ = ("end", "session", "slot", "soon")

    def __init__(self, session: Session, end: End) -> None:
        self.session = session
        # Closes the connection.
        self.end = end
        # Its place on the wheel, and whether that is for a change rather than a renewal.
        self.slot = 0
        self.soon = False


class Keeper:
    """See the module. `ttl`: seconds for which a session can be resumed after its connection has ended."""

    def __init__(self, store: SessionStore, ttl: float) -> None:
        self._store = store
        self._ttl = ttl
        # The server channel on which this worker is told of sessions that were taken over.
        self.channel = f"$worker:{secrets.token_hex(8)}"
        self._kept: dict[str, _Kept] = {}
        self._wheel: Wheel[_Kept] = Wheel()
        self._saving: set[asyncio.Task[None]] = set()

    def turn(self) -> None:
        """Save what is due; the owner calls this every TICK seconds (wheel.py)."""
        for kept in self._wheel.expired(_now()):
            # A change that was to be saved may have gone with another one.
            if not kept.soon or kept.session.changed or not kept.session.is_stored:
                self._save_later(kept.session, kept.end)
            kept.soon = False
            self._schedule(kept)

    async def flush(self) -> None:
        """Wait for the saves under way."""
        while self._saving:
            await asyncio.wait(self._saving)

    async def resume(self, session_id: str, who: Principal) -> Session | None:
        """Take a session over from whoever holds it. None: there is none of this id and principal.

        Raises Unavailable when the store cannot say.
        """
        name = Session.name(session_id)
        stored = await self._store.resume(name, who.sub, self.channel, self._stored_for)
        if stored is None:
            return None
        session = Session(stored, session_id)
        session.who = who
        return session

    def add(self, session: Session, end: End) -> None:
        """A connection holds this session now; another of this worker that did is closed."""
        name = Session.name(session.id)
        old, kept = self._kept.get(name), _Kept(session, end)
        if old is not None and old.session.generation > session.generation:
            # A newer one has overtaken this one while it was restored.
            self._end(kept)
            return
        if old is not None:
            self._wheel.discard(old, old.slot)
            self._end(old)
        self._kept[name] = kept
        # Also one that is stored as it is: what was told of a newer one before now went past it.
        kept.slot = self._wheel.add(kept, _soon())

    def remove(self, session: Session) -> None:
        """The connection has ended: from now on the session's time runs."""
        name = Session.name(session.id)
        kept = self._kept.get(name)
        if kept is None or kept.session is not session:
            return
        del self._kept[name]
        self._wheel.discard(kept, kept.slot)
        self._save_later(session, kept.end, self._ttl)

    def touch(self, session: Session) -> None:
        """Something has changed that may be saved a little later."""
        kept = self._kept.get(Session.name(session.id))
        if kept is not None and not kept.soon:
            kept.soon = True
            self._wheel.discard(kept, kept.slot)
            kept.slot = self._wheel.add(kept, _soon())

    async def save(self, session: Session, end: End, ttl: float | None = None) -> None:
        """Save now what has changed. Raises Unavailable when that cannot be known to have been done."""
        name = Session.name(session.id)
        while not session.taken:
            change = session.take_change(self.channel)
            try:
                saved = await self._store.save(name, change, ttl or self._stored_for)
            except BaseException:
                session.put_back(change)
                # While the connection lives, it is tried again.
                self.touch(session)
                raise
            if saved == "saved":
                return
            if saved == "taken":
                self._end(_Kept(session, end))
                return
            session.put_back(change)
            session.is_stored = False

    def on_notice(self, message: BusMessage) -> None:
        """This worker's channel tells that a session was taken over: `NAME GENERATION`."""
        name, _, generation = message.payload.decode(errors="replace").partition(" ")
        kept = self._kept.get(name)
        if kept is not None and generation.isdecimal() and int(generation) > kept.session.generation:
            self._end(kept)

    def _end(self, kept: _Kept) -> None:
        kept.session.taken = True
        kept.end(CloseCode.SESSION_TAKEN, "session taken over", flush=False)

    @property
    def _stored_for(self) -> float:
        # Should this worker die right before a renewal, the session is still there for its whole time.
        return self._ttl * (1 + _RENEWAL)

    def _schedule(self, kept: _Kept) -> None:
        kept.slot = self._wheel.add(kept, _now() + self._ttl * _RENEWAL * random.uniform(0.8, 1.0))

    def _save_later(self, session: Session, end: End, ttl: float | None = None) -> None:
        if not session.taken:
            task = asyncio.create_task(self._save_quietly(session, end, ttl))
            self._saving.add(task)
            task.add_done_callback(self._saving.discard)

    async def _save_quietly(self, session: Session, end: End, ttl: float | None) -> None:
        with suppress(Unavailable):
            await self.save(session, end, ttl)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _soon() -> float:
    """Spread, so that the acks of one broadcast are not saved all at once."""
    return _now() + SAVE_SECONDS * random.uniform(0.4, 0.8)
