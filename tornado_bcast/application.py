"""What one worker is made of, behind its sockets: broker, node, hub, heartbeat, statistics, handlers.

`make_application` is called in the forked process; the rest is the context that the handlers see.
"""

import asyncio
import json
import logging
import resource
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tornado.web import Application

from .auth import Authenticator
from .board import Board, State
from .brokers import Broker
from .brokers.memory import MemoryBroker
from .brokers.redis import RedisBroker
from .config import Config
from .errors import CloseCode
from .eventloop import EVENTS_A_TURN, LagMeter, until_tick
from .handlers import make_routes
from .handlers.base import Connection, now_ms
from .handlers.wire import ping_frames
from .heartbeat import TICK, Heartbeat
from .hub import Hub
from .keeper import Keeper
from .logs import RefusalLog
from .metrics import Metrics, Row
from .node import Node
from .overload import Overload
from .rules import ChannelRules, Origins
from .wheel import Wheel

logger = logging.getLogger(__name__)

# Seconds between two rows of statistics, and after which a row of another node is too old to be shown.
ROW_SECONDS = 1.0
_STALE_SECONDS = 2.5
# So many clients are told to come back each second after a stop, as far as `drain_seconds` allow.
_RETURNS_PER_SECOND = 100

# Connections that are looked at in one turn of the loop after a reload.
_AT_ONCE = 200
# Descriptors of a worker that are not for clients: Redis, the log, the loop, files, HTTP that comes and goes.
_RESERVED_DESCRIPTORS = 100

Close = Callable[[float], Awaitable[None]]
Configure = Callable[[Config], None]


def make_broker(config: Config) -> Broker:
    """The broker that `[redis] url` names. The URL of `embedded:` has been replaced by its socket's."""
    if config.redis.url.startswith("memory:"):
        return MemoryBroker()
    return RedisBroker(
        config.redis.url,
        prefix=config.redis.prefix,
        publish_timeout=config.redis.publish_timeout,
        wait_replicas=config.redis.wait_replicas,
    )


def _descriptors_for_clients() -> int:
    """How many WebSocket connections the descriptors of one worker allow."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(limit - _RESERVED_DESCRIPTORS, limit // 2)


async def make_application(config: Config, board: Board, index: int) -> tuple[Application, Close, Configure]:
    """Build and start a worker's inside; the second one closes it, the third takes over a configuration."""
    inside = Inside(config, board, index)
    await inside.start()
    return make_routes(inside), inside.close, inside.reconfigure


class Inside:
    """The context of the handlers (handlers.base.Context), and the owner of all that a worker runs."""

    def __init__(self, config: Config, board: Board, index: int) -> None:
        self.board = board
        self.metrics = Metrics()
        self.hub = Hub()
        self.heartbeat: Heartbeat[Connection] = Heartbeat(config.heartbeat.interval, config.heartbeat.timeout)
        self.expiries: Wheel[Connection] = Wheel(TICK)
        self.refusals = RefusalLog(logging.getLogger("tornado_bcast.refusals"))
        self.capacity = config.server.max_connections or board.workers * _descriptors_for_clients()
        self.closing = False
        self.started = time.monotonic()
        self.overload = Overload(config.limits.max_lag)
        self.configure(config)
        self.node = Node(
            make_broker(config),
            self.hub,
            self.metrics,
            everybody=config.channels.default,
            join_timeout=config.redis.publish_timeout,
        )
        self.node.on_peer = self._on_peer
        self.keeper = Keeper(self.node.broker.sessions, config.session.ttl)
        self._index = index
        self._connections: set[Connection] = set()
        # Of connections of which a message was refused for overload: they are heard again at the next tick.
        self._held: list[Callable[[], None]] = []
        # The last connection has gone.
        self._emptied = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        # From `start` on.
        self._lag_meter: LagMeter
        # The last row of each worker of all nodes, and when it came.
        self._peers: dict[tuple[str, int], tuple[float, Row]] = {}

    def configure(self, config: Config) -> None:
        """Take over keys, origins, limits and channel rules. No connection is closed for it."""
        self.config = config
        self.auth = Authenticator(config.auth)
        self.rules = ChannelRules(config.channels)
        self.origins = Origins(config.cors.origins)
        self.overload.max_lag = config.limits.max_lag

    def reconfigure(self, config: Config) -> None:
        """The same while clients are connected: what they may no longer hear ends."""
        self.configure(config)
        self.node.use_rules(self.rules)
        self.spawn(self._check_subscriptions())

    async def _check_subscriptions(self) -> None:
        for number, connection in enumerate(list(self._connections), 1):
            connection.check_subscriptions()
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)

    @property
    def draining(self) -> bool:
        return self.board.state is State.DRAINING

    async def start(self) -> None:
        await self.node.start(self._row)
        self._lag_meter = LagMeter(TICK, self._on_lag)
        self.spawn(self._turn_heartbeat())
        self.spawn(self._tell_row())
        self.spawn(self.keeper.run())
        self.spawn(self.node.listen(self.keeper.channel, self.keeper.on_notice))

    async def close(self, seconds: float) -> None:
        """Say goodbye to all clients and end everything, within `seconds`."""
        self.closing = True
        # A small site is back at once; a large one spreads its return, or it would come back all together.
        spread = min(self.config.server.drain_seconds, 0.5 + self.board.sockets() / _RETURNS_PER_SECOND)
        for connection in list(self._connections):
            connection.end_for_now(CloseCode.RESTART, round(1000 * spread))
        self._emptied.clear()
        if self._connections:
            try:
                await asyncio.wait_for(self._emptied.wait(), seconds * 0.8)
            except TimeoutError:
                pass
        try:
            await asyncio.wait_for(self.keeper.flush(), seconds * 0.1)
        except TimeoutError:
            logger.warning("not all sessions were saved", extra={"event": "sessions_unsaved"})
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lag_meter.close()
        await self.node.close()

    def connect(self, peer: Connection) -> None:
        self._connections.add(peer)
        self.heartbeat.add(peer, time.monotonic())

    def disconnect(self, peer: Connection) -> None:
        self._connections.discard(peer)
        if not self._connections:
            self._emptied.set()
        self.heartbeat.remove(peer)

    def hold(self, go_on: Callable[[], None]) -> None:
        self._held.append(go_on)

    async def _let_go(self) -> None:
        """A few in each turn of the loop: each of them may have a lot to say."""
        held, self._held = self._held, []
        for number, go_on in enumerate(held, 1):
            go_on()
            if number % EVENTS_A_TURN == 0:
                await asyncio.sleep(0)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task failed", exc_info=error, extra={"event": "internal_error"})

    # Timers

    async def _turn_heartbeat(self) -> None:
        while True:
            await asyncio.sleep(until_tick(TICK))
            now = time.monotonic()
            ping, dead = self.heartbeat.turn(now)
            if ping:
                frames = ping_frames(now_ms())
                for peer in ping:
                    peer.sink.answer(frames)
            for peer in dead:
                peer.end(CloseCode.HEARTBEAT_MISSED, "heartbeat missed", flush=False)
            # Tokens end by the clock on the wall.
            for peer in self.expiries.expired(time.time()):
                peer.expire()

    def _on_lag(self, lag: float, now: float) -> None:
        self.metrics.loop_lag = lag
        if self._held:
            self.spawn(self._let_go())
        if not self.overload.observe(lag, now):
            return
        if self.overload.active:
            logger.warning(
                "this worker is overloaded: it is %.1f s late, and refuses new connections and publishes",
                lag,
                extra={"event": "overloaded"},
            )
        else:
            logger.info("this worker is no longer overloaded", extra={"event": "overload_over"})

    async def _tell_row(self) -> None:
        """Put this worker's row on the board, for its siblings; the broker carries it to the other nodes."""
        while True:
            now = time.monotonic()
            self.metrics.tick(now)
            self.refusals.sweep(now)
            self.board.put_snapshot(self._row())
            await asyncio.sleep(until_tick(ROW_SECONDS))

    # Statistics

    def _own_row(self) -> Row:
        health = self.node.broker.health()
        return {
            "node": self.board.name,
            "worker": self._index,
            "pid": self.board.slot(self._index).pid,
            "redis": "up" if health.up else "down",
            "redisUp": int(health.up),
            "redisRoundtrip": round(health.roundtrip or 0.0, 6),
            **self.metrics.row(),
        }

    def _row(self) -> bytes:
        return json.dumps(self._own_row(), separators=(",", ":")).encode()

    def _on_peer(self, data: bytes) -> None:
        try:
            row = json.loads(data)
            key = (row["node"], row["worker"])
        except (ValueError, KeyError, TypeError):
            return
        now = time.monotonic()
        self._peers[key] = (now, row)
        for old in [key for key, (when, _) in self._peers.items() if now - when > _STALE_SECONDS]:
            del self._peers[old]

    def local_rows(self) -> list[Row]:
        rows = [json.loads(data) for index, _, data in self.board.snapshots() if index != self._index]
        return [self._own_row(), *rows]

    def rows(self) -> list[Row]:
        now = time.monotonic()
        others = [
            row
            for when, row in self._peers.values()
            if now - when <= _STALE_SECONDS and row["node"] != self.board.name
        ]
        return [*self.local_rows(), *others]
