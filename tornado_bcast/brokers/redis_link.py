"""One connection to Redis: how it is made, made again, and judged.

Owns the reading of Redis URLs, the handshake (version, role, memory policy), the backoff between attempts
and the two log lines of an outage. It never sees a message: `redis_pipeline.py` (commands and answers) and
`redis_bridge.py` (pub/sub) drive the connections that are opened here.
"""

import asyncio
import logging
import random
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import redis.exceptions
from redis.asyncio.connection import AbstractConnection, SSLConnection, parse_url
from redis.asyncio.connection import Connection as TcpConnection
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
)

from tornado_bcast.addresses import mask_url
from tornado_bcast.brokers.redis_wire import RedisWire
from tornado_bcast.errors import BcastError, ConfigError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds, handshake included
BACKOFF_BASE = 0.05  # seconds
BACKOFF_CAP = 1.0
OLDEST_VERSION = (6, 2)
# What goes wrong on the way to or from Redis, short of an answer that says what is wrong.
LINK_ERRORS = (RedisError, OSError, TimeoutError, BcastError)


class Connection(Protocol):
    """What is used of redis-py's asyncio connections."""

    async def connect(self) -> None: ...
    async def disconnect(self, nowait: bool = False) -> None: ...


class Unusable(BcastError):
    """The server answers, but cannot serve us; the text says what an operator should mend."""


@dataclass(slots=True)
class Server:
    """What INFO told about the other side."""

    # Of the master that takes our writes; "" where that is not known (a replica, or INFO is not allowed).
    replid: str = ""
    replica: bool = False
    loading: bool = False
    # What an operator should mend although the server can be used.
    problem: str | None = None


# Makes a connection: its name for CLIENT LIST, and what to do on it once its socket stands.
Make = Callable[[str, Callable[[Any], Awaitable[None]]], Connection]


def connection_maker(url: str) -> Make:
    """A constructor of connections to this URL. Raises ConfigError where the URL cannot be understood."""
    try:
        arguments: dict[str, Any] = dict(parse_url(url))
        make: Callable[..., Connection] = arguments.pop("connection_class", TcpConnection)
        # Ours, whatever the URL says: RESP2, for with RESP3 redis-py writes each pub/sub message to its
        # debug log; our own deadlines, backoff and health check instead of its.
        for option in (
            "timeout",
            "max_connections",
            "retry_on_timeout",
            "health_check_interval",
            "client_name",
        ):
            arguments.pop(option, None)
        arguments |= {
            "protocol": 2,
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "driver_info": None,
        }
        first = make(**arguments)
    except (ValueError, TypeError, RedisError) as error:
        reason = str(error).replace("AbstractConnection.__init__() ", "")
        raise ConfigError([f"[redis] url: {mask_url(url)} cannot be used: {reason}"]) from None

    def make_one(name: str, begin: Callable[[Any], Awaitable[None]]) -> Connection:
        connection = make(**arguments, client_name=f"tornado-bcast-{name}", redis_connect_func=begin)
        if isinstance(connection, SSLConnection) and isinstance(first, SSLConnection):
            # Reading the authorities takes tens of milliseconds, so it is done once and not at each attempt.
            connection.ssl_context = first.ssl_context
        return connection

    return make_one


def read_info(text: bytes) -> Server:
    """Judge a server by its INFO. Raises `Unusable` for one that is too old or no Redis at all."""
    fields = dict(re.findall(r"^(\w+):(.*?)\r?$", text.decode("utf-8", "replace"), re.MULTILINE))
    version = fields.get("redis_version", "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not numbers:
        raise Unusable("the server does not say which Redis it is")
    if numbers < OLDEST_VERSION:
        raise Unusable(f"Redis {version} is too old: 6.2 or newer is needed, or Valkey")
    server = Server(replid=fields.get("master_replid", ""), loading=fields.get("loading", "0") != "0")
    if fields.get("role", "master") != "master":
        server.replid = ""
        server.replica = True
        server.problem = "this Redis is a read-only replica: [redis] url must name the master"
    policy = fields.get("maxmemory_policy", "noeviction")
    if fields.get("maxmemory", "0") != "0" and policy != "noeviction":
        server.problem = (
            f"Redis may throw away keys (maxmemory-policy {policy}): set it to noeviction, every key matters"
        )
    return server


def is_refusal(error: BaseException) -> bool:
    """Whether the other side will not come right by itself."""
    # redis-py hides the cause of a failure on Unix sockets and in TLS handshakes behind its own error.
    chain = [error, error.__cause__, error.__context__]
    return any(
        isinstance(one, Unusable | AuthenticationError | NoPermissionError | InvalidResponse)
        or (isinstance(one, ssl.SSLError) and not isinstance(one, ssl.SSLEOFError | ssl.SSLZeroReturnError))
        for one in chain
    )


def explain(error: BaseException) -> str:
    """What a failed connection means, for an operator; nothing secret in it."""
    if isinstance(error, Unusable):
        return str(error)
    if isinstance(error, AuthenticationError) or isinstance(error.__cause__, AuthenticationError):
        return "Redis refuses the user name or password of [redis] url"
    if isinstance(error, InvalidResponse):
        return "what answers there is no Redis"
    if isinstance(error, NoPermissionError):
        return f"Redis does not allow its user what is needed: {error}"
    if isinstance(error, BusyLoadingError):
        return "Redis is loading its data"
    if isinstance(error, TimeoutError | redis.exceptions.TimeoutError):
        return "Redis does not answer"
    return str(error) or type(error).__name__


class Condition:
    """How the other side is, over all links of one broker, and the log lines about it: one when it goes away,
    one when it is back, one for each fault that an operator should mend."""

    def __init__(self, url: str) -> None:
        self._place = mask_url(url)
        # Names of the links that are down, since when the first one was, and why the last one was.
        self._down: set[str] = set()
        self._since = 0.0
        self._reason = ""
        # What a server that answers should have otherwise.
        self._fault: str | None = None
        # Why it refuses whatever is to be stored; None: it does not.
        self.refusal: str | None = None
        # Whether it has become a replica under our hands: what is published there reaches nobody elsewhere.
        self._replica = False

    @property
    def up(self) -> bool:
        return not self._down and not self._replica

    @property
    def problem(self) -> str | None:
        return self._reason if self._down else self.refusal or self._fault

    def lost(self, link: str, error: BaseException, now: float) -> None:
        reason = explain(error)
        news = reason != self._reason
        if not self._down:
            self._since = now
        refused = is_refusal(error)
        if not self._down or (refused and news):
            logger.log(
                logging.ERROR if refused else logging.WARNING,
                "Redis at %s cannot be used: %s",
                self._place,
                reason,
                extra={"event": "redis_down"},
            )
        self._reason = reason
        self._down.add(link)

    def found(self, link: str, now: float) -> None:
        if link in self._down:
            self._down.discard(link)
            if not self._down:
                duration = now - self._since
                logger.info(
                    "Redis at %s is back after %.1f s", self._place, duration, extra={"event": "redis_up"}
                )

    def judge(self, server: Server) -> None:
        """Take in what a server that answers says about itself."""
        if server.problem is not None and server.problem != self._fault:
            logger.error("Redis at %s: %s", self._place, server.problem, extra={"event": "redis_problem"})
        self._fault = server.problem
        self._replica = server.replica


Prepare = Callable[[RedisWire], Awaitable[None]]


class Link:
    """One connection that is kept: opened, used by its driver, dropped when it fails, opened again.

    `prepare` is what a new connection needs before it can be used; it refuses one by an exception.
    """

    def __init__(
        self,
        name: str,
        make: Make,
        condition: Condition,
        prepare: Prepare | None = None,
    ) -> None:
        self.name = name
        # What the present connection's server said of itself.
        self.server = Server()
        # Whether there is a connection that has passed its handshake.
        self.up = False
        self._make = make
        self._condition = condition
        self._prepare = prepare
        # Failures since the last success: the exponent of the backoff.
        self._failures = 0
        self._connection: Connection | None = None
        # Its transport, and the wire over it once it has greeted.
        self._transport: asyncio.WriteTransport | None = None
        self._wire: RedisWire | None = None

    async def connect(self) -> RedisWire:
        """Come back with a connection that stands, however many attempts it takes."""
        while True:
            if self._failures:
                # Full jitter: after an outage the workers of all nodes do not come at once.
                longest = min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (self._failures - 1))
                await asyncio.sleep(random.uniform(0, longest))
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    wire = await self.open()
                    if self.server.replica:
                        raise Unusable(str(self.server.problem))
                    if self.server.loading:
                        raise BusyLoadingError("Redis is loading its data")
                    if self._prepare is not None:
                        await self._prepare(wire)
            except LINK_ERRORS as error:
                await self.drop(error)
                continue
            self.up = True
            self._condition.judge(self.server)
            self._condition.found(self.name, asyncio.get_running_loop().time())
            return wire

    async def open(self) -> RedisWire:
        """Try once, as far as the server's own word on itself."""
        connection = self._connection = self._make(self.name, self._begin)
        await connection.connect()
        wire = self._wire = RedisWire(connection)
        self.server = read_info(await wire.ask("INFO"))
        return wire

    async def _begin(self, connection: AbstractConnection) -> None:
        """The socket stands: greet. As early as here, for a greeting may be broken off."""
        writer = getattr(connection, "_writer", None)
        self._transport = None if writer is None else writer.transport
        await connection.on_connect()

    async def prepare(self, wire: RedisWire) -> None:
        """Do once more what the connection was prepared with."""
        if self._prepare is not None:
            await self._prepare(wire)

    def refused(self, reason: str) -> None:
        """The server takes nothing that is to be stored, and says why."""
        self._condition.refusal = reason

    def succeeded(self) -> None:
        """The connection has done what it is for."""
        self._failures = 0

    async def drop(self, error: BaseException) -> None:
        """Give up the connection because of an error."""
        self._failures = min(self._failures + 1, 10)
        self._condition.lost(self.name, error, asyncio.get_running_loop().time())
        await self.close()

    async def close(self) -> None:
        """Give up the connection, for now or for good."""
        self.up = False
        connection, self._connection = self._connection, None
        transport, self._transport = self._transport, None
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        if transport is not None:
            # See RedisWire: for want of an answer to the greeting there is none yet.
            transport.abort()
        if connection is not None:
            await connection.disconnect(nowait=True)
            # The socket is let go in the next turn of the loop.
            await asyncio.sleep(0)


def check_server(url: str) -> str | None:
    """Look at the server once, before anything is started.

    Raises ConfigError where waiting would not help: no Redis, too old a one, a refused password or
    certificate. Returns a warning where it cannot be reached or is still loading; None where all is well.
    """
    link = Link("check", connection_maker(url), Condition(url))
    place = mask_url(url)

    async def look() -> Server:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await link.open()
                return link.server
        finally:
            await link.close()

    try:
        server = asyncio.run(look())
    except LINK_ERRORS as error:
        if is_refusal(error):
            raise ConfigError([f"[redis] url: {place}: {explain(error)}"]) from None
        return f"{place} cannot be reached yet: {explain(error)}"
    problem = "Redis is loading its data" if server.loading else server.problem
    return problem and f"{place}: {problem}"
