"""What is said to Redis: names of keys, the commands with their Lua scripts, and the meaning of answers.

Owns no connection and no queue; `redis_pipeline.py` sends these.
"""

import hashlib
import re
import secrets
from importlib import resources
from itertools import count
from typing import Any

from tornado_bcast.brokers import History, Publication, Receipt, decode_bus
from tornado_bcast.brokers.redis_link import Server, read_info
from tornado_bcast.brokers.redis_pipeline import Command
from tornado_bcast.brokers.redis_wire import RedisWire, pack

# Milliseconds for which the state of a persistent channel outlives its last publish or head check: far
# longer than stream, sessions and dedup keys.
STATE_TTL = 30 * 86_400_000
# The same of a channel to which nothing has been published: somebody has subscribed, to whatever name.
EMPTY_TTL = 3_600_000
# One answer to `read`; a piece, and who reads asks for the next.
READ_BYTES = 1 << 20
# Names in one SUBSCRIBE; heads in one round.
CHUNK = 500

# The receipt of all that is neither numbered nor a duplicate.
TAKEN = Receipt()


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, name: str) -> None:
        self.text = resources.files(__package__).joinpath(name).read_bytes()
        self.digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


PUBLISH = Script("publish.lua")
READ = Script("read.lua")
RESUME = Script("resume.lua")
SAVE = Script("save.lua")


async def load_scripts(wire: RedisWire) -> None:
    for script in (PUBLISH, READ, RESUME, SAVE):
        await wire.ask("SCRIPT", "LOAD", script.text)


class Names:
    """The names of keys and pub/sub channels under one prefix. All of one channel share its hash tag."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        # Heard by every worker: messages to all, and the workers' own rows.
        self.everybody = f"{prefix}:$all".encode()
        self.workers = f"{prefix}:$workers".encode()

    def bus(self, channel: str | None) -> bytes:
        return self.everybody if channel is None else f"{self.prefix}:{{{channel}}}".encode()

    def key(self, channel: str | None, kind: str) -> str:
        return f"{self.prefix}:{{{'$all' if channel is None else channel}}}:{kind}"

    def session(self, name: str) -> str:
        return f"{self.prefix}:session:{name}"

    def pattern(self) -> str:
        """A glob for the pub/sub names of all channels."""
        escaped = "".join("\\" + char if char in "*?[]^\\" else char for char in self.prefix)
        return escaped + ":{*}"

    def channel(self, bus: bytes) -> str:
        return bus.decode()[len(self.prefix) + 2 : -1]


class Tokens:
    """Names that are never given twice, over all processes: a random part and a count."""

    def __init__(self) -> None:
        self._random = secrets.token_hex(6)
        self._count = count()

    def next(self) -> str:
        return f"{self._random}{next(self._count):x}"


class PlainPublish(Command[Receipt]):
    """PUBLISH: at most once, never a second time."""

    __slots__ = ("_data", "_name")

    def __init__(self, name: bytes, data: bytes) -> None:
        super().__init__(len(data), repeatable=False)
        self._name = name
        self._data = data

    def pack(self, server: Server) -> bytes:
        return pack((b"PUBLISH", self._name, self._data))

    def decode(self, answer: Any, server: Server) -> Receipt:
        return TAKEN


class ScriptPublish(Command[Receipt]):
    """publish.lua: once within the dedup time, and on persistent channels numbered and stored.

    `retry_window` (seconds) is how long one try may follow another. It is repeated only where the dedup key
    outlives that; a persistent message without deduplication gets a key of its own for the time.
    """

    __slots__ = ("_dedup_ms", "_names", "_publication", "_token", "_tokens")

    replicated = True

    def __init__(self, publication: Publication, names: Names, tokens: Tokens, retry_window: float) -> None:
        alone = publication.dedup_ttl <= 0
        super().__init__(len(publication.payload), alone or publication.dedup_ttl >= retry_window)
        self._publication = publication
        self._names = names
        self._tokens = tokens
        # Tells another try of this publication from another publication with its id.
        self._token = tokens.next()
        self._dedup_ms = max(int((retry_window if alone else publication.dedup_ttl) * 1000), 1)

    def pack(self, server: Server) -> bytes:
        publication, names = self._publication, self._names
        channel = publication.channel
        message_id = publication.message_id if publication.dedup_ttl > 0 else self._token
        dedup = names.key(channel, "id:" + message_id)
        message = (
            names.bus(channel),
            publication.payload,
            publication.timestamp,
            self._token,
            self._dedup_ms,
        )
        if not publication.persistent:
            return pack((b"EVALSHA", PUBLISH.digest, 1, dedup, *message))
        history_ms = int(publication.history_ttl * 1000) or STATE_TTL
        state_ms = max(STATE_TTL, 2 * history_ms, 2 * self._dedup_ms)
        keys = (dedup, names.key(channel, "h"), names.key(channel, "s"))
        # Each try may begin an epoch, and no two may begin the same.
        history = (self._tokens.next(), server.replid, publication.history_size, history_ms, state_ms)
        return pack((b"EVALSHA", PUBLISH.digest, 3, *keys, *message, *history))

    def decode(self, answer: Any, server: Server) -> Receipt:
        duplicate, seq, epoch, *asked = answer
        if asked and asked[0]:
            server.replid = asked[0].decode()
        if epoch == b"-":
            return Receipt(duplicate == 1)
        return Receipt(duplicate == 1, int(seq), epoch.decode())


class ProbeWrite(Command[None]):
    """A write that means nothing: whether Redis takes one."""

    __slots__ = ("_key",)

    replicated = True

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._key = f"{names.prefix}:probe"

    def pack(self, server: Server) -> bytes:
        return pack((b"SET", self._key, b"", b"PX", 1000))

    def decode(self, answer: Any, server: Server) -> None:
        """It was taken."""


class Read(Command[History]):
    """read.lua. Done twice it is the same."""

    __slots__ = ("_after", "_hash", "_limit", "_stream", "_tokens")

    def __init__(self, channel: str, after: int, limit: int, names: Names, tokens: Tokens) -> None:
        super().__init__()
        self._hash = names.key(channel, "h")
        self._stream = names.key(channel, "s")
        self._after = after
        self._limit = limit
        self._tokens = tokens

    def pack(self, server: Server) -> bytes:
        wanted = (self._after, self._limit, READ_BYTES)
        epoch = self._tokens.next()
        keys = (self._hash, self._stream)
        times = (STATE_TTL, EMPTY_TTL)
        return pack((b"EVALSHA", READ.digest, 2, *keys, epoch, server.replid, *wanted, *times))

    def decode(self, answer: Any, server: Server) -> History:
        epoch, seq, ends, first, messages, *asked = answer
        if asked and asked[0]:
            server.replid = asked[0].decode()
        return History(
            epoch.decode(),
            int(seq),
            int(first),
            {name: int(end) for name, end in re.findall(r"([^,:]+):(\d+)", ends.decode())},
            [decode_bus(bus) for bus in messages],
        )


class Channels(Command[list[str]]):
    """PUBSUB CHANNELS: those that some worker of some node has subscribed."""

    __slots__ = ("_names",)

    def __init__(self, names: Names) -> None:
        super().__init__()
        self._names = names

    def pack(self, server: Server) -> bytes:
        return pack((b"PUBSUB", b"CHANNELS", self._names.pattern()))

    def decode(self, answer: Any, server: Server) -> list[str]:
        return sorted(self._names.channel(bus) for bus in answer)


class Info(Command[Server]):
    """INFO, once more: a server changes its role and its settings while we are connected."""

    def pack(self, server: Server) -> bytes:
        return pack((b"INFO",))

    def decode(self, answer: Any, server: Server) -> Server:
        return read_info(answer)
