"""Sessions in Redis: two commands for the pipeline, each one Lua script.

The key is made of a digest of the secret id, so that nobody who sees the keys can resume a session.
"""

from typing import Any

from tornado_bcast.brokers import SavedAs, SessionChange, StoredSession
from tornado_bcast.brokers.redis_commands import RESUME, SAVE, Names
from tornado_bcast.brokers.redis_link import Server
from tornado_bcast.brokers.redis_pipeline import Command, Pipeline
from tornado_bcast.brokers.redis_wire import pack

# In front of a channel's name, so that it is no other field's.
_CHANNEL = "s:"


class _Resume(Command[StoredSession | None]):
    """resume.lua. Done twice it raises the generation twice, which harms nobody."""

    __slots__ = ("_arguments",)

    def __init__(self, *arguments: str | int) -> None:
        super().__init__()
        self._arguments = arguments

    def pack(self, server: Server) -> bytes:
        return pack((b"EVALSHA", RESUME.digest, 1, *self._arguments))

    def decode(self, answer: Any, server: Server) -> StoredSession | None:
        if not answer:
            return None
        pairs = iter(bytes(item).decode() for item in answer)
        fields = dict(zip(pairs, pairs, strict=True))
        channels = {
            name.removeprefix(_CHANNEL): value for name, value in fields.items() if name.startswith(_CHANNEL)
        }
        return StoredSession(fields["client"], int(fields["generation"]), channels)


class _Save(Command[SavedAs]):
    """save.lua. Done twice it is the same."""

    __slots__ = ("_arguments",)

    def __init__(self, *arguments: str | int) -> None:
        super().__init__(sum(len(value) for value in arguments if isinstance(value, str)))
        self._arguments = arguments

    def pack(self, server: Server) -> bytes:
        return pack((b"EVALSHA", SAVE.digest, 1, *self._arguments))

    def decode(self, answer: Any, server: Server) -> SavedAs:
        saved: SavedAs = bytes(answer).decode()  # type: ignore[assignment]
        return saved


class RedisSessions:
    """See `SessionStore`. Writes of one session keep their order: they pass one pipeline."""

    def __init__(self, pipeline: Pipeline, names: Names) -> None:
        self._pipeline = pipeline
        self._names = names

    async def resume(self, name: str, principal: str, owner: str, ttl: float) -> StoredSession | None:
        prefix = self._names.prefix
        milliseconds = int(ttl * 1000)
        return await self._pipeline.submit(
            _Resume(self._names.session(name), principal, owner, prefix, milliseconds, name)
        )

    async def save(self, name: str, change: SessionChange, ttl: float) -> SavedAs:
        fields = [text for channel, value in change.channels.items() for text in (_CHANNEL + channel, value)]
        return await self._pipeline.submit(
            _Save(
                self._names.session(name),
                change.generation,
                int(ttl * 1000),
                int(change.whole),
                change.principal,
                change.client_id,
                change.owner,
                *fields,
            )
        )
