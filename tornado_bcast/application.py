"""What one worker is made of, behind its sockets: broker, node, hub, heartbeat, statistics, handlers.

`make_application` is called in the forked process and gives the worker its handles (worker.Handles); the rest
is the context that the handlers see.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from .auth import Authenticator
from .board import Board, State
from .brokers import Broker
from .brokers.memory import MemoryBroker
from .brokers.redis import RedisBroker
from .capacity import most_clients
from .config import Config
from .errors import CloseCode
from .eventloop import EVENTS_A_TURN, LagMeter, until_tick
from .farewell import Farewell
from .handlers import make_routes
from .handlers.context import Connection, now_ms
from .handlers.wire import ping_frames
from .heartbeat import Heartbeat
from .hub import Hub
from .keeper import Keeper
from .logs import RefusalLog
from .metrics import Metrics, Row
from .node import Node
from .overload import Overload
from .rules import ChannelRules, Origins
from .tasks import Tasks
from .wheel import TICK, Wheel
from .worker import Handles

logger = logging.getLogger(__name__)

# Seconds between two rows of statistics, and after which a row of another node is too old to be shown.
ROW_SECONDS = 1.0
_STALE_SECONDS = 2.5
# Seconds between two looks at whose turn it is to leave; how long clients that have been told may take for
# what is still to be answered and saved, and then for the closing handshake.
_FAREWELL_TICK = 0.02
_ANSWER_SECONDS = 1.2
_GONE_SECONDS = 0.8
# How long the sessions may take to be saved at the end.
_SAVE_SECONDS = 0.5

# Connections that are looked at in one turn of the loop after a reload.
_AT_ONCE = 200


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


async def make_application(config: Config, board: Board, index: int) -> Handles:
    """Build and start a worker's inside."""
    inside = Inside(config, board, index)
    await inside.start()
    return Handles(make_routes(inside), inside.reconfigure, inside.send_away, inside.close)


class Inside:
    """The context of the handlers (handlers.base.Context), and the owner of all that a worker runs."""

    def __init__(self, config: Config, board: Board, index: int) -> None:
        self.board = board
        self.metrics = Metrics()
        self.hub = Hub()
        self.heartbeat: Heartbeat[Connection] = Heartbeat(config.heartbeat.interval, config.heartbeat.timeout)
        self.expiries: Wheel[Connection] = Wheel()
        self.refusals = RefusalLog(logging.getLogger("tornado_bcast.refusals"))
        self.own_capacity = most_clients()
        self.capacity = config.server.max_connections or board.workers * self.own_capacity
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
        # The clients are on their way out.
        self._farewell: Farewell[Connection] | None = None
        # Of connections of which a message was refused for overload: they are heard again at the next tick.
        self._held: list[Callable[[], None]] = []
        self._tasks = Tasks(logger)
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
        self._lag_meter = LagMeter(TICK, self._turn)
        self.spawn(self._tell_row())
        self.spawn(self.node.listen(self.keeper.channel, self.keeper.on_notice))

    async def send_away(self, over: float, back: float) -> None:
        """Send all clients away over so many seconds, each to be back within `back` more.

        Who comes meanwhile leaves as well. Returns when they have gone, at most 2 s after `over`.
        """
        begun = time.monotonic()
        self._farewell = farewell = Farewell(self._connections, over, back, begun)
        for patience in (_ANSWER_SECONDS, _ANSWER_SECONDS + _GONE_SECONDS):
            while (now := time.monotonic()) < begun + over + patience:
                for number, (peer, retry_after) in enumerate(farewell.due(now), 1):
                    peer.leave(retry_after)
                    if number % _AT_ONCE == 0:
                        await asyncio.sleep(0)
                if not self._connections:
                    return
                await asyncio.sleep(_FAREWELL_TICK)
            for peer in list(self._connections):
                peer.leave_now()

    async def close(self) -> None:
        """End everything; the clients have gone."""
        try:
            await asyncio.wait_for(self.keeper.flush(), _SAVE_SECONDS)
        except TimeoutError:
            logger.warning("not all sessions were saved", extra={"event": "sessions_unsaved"})
        self._lag_meter.close()
        await self._tasks.close()
        await self.node.close()

    def connect(self, peer: Connection) -> None:
        self._connections.add(peer)
        self.heartbeat.add(peer, time.monotonic())
        if self._farewell is not None:
            self._farewell.add(peer)
            # After the answer to `connect`.
            asyncio.get_running_loop().call_soon(self._tell_due)

    def _tell_due(self) -> None:
        assert self._farewell is not None
        for peer, retry_after in self._farewell.due(time.monotonic()):
            peer.leave(retry_after)

    def disconnect(self, peer: Connection) -> None:
        self._connections.discard(peer)
        if self._farewell is not None:
            self._farewell.discard(peer)
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
        self._tasks.spawn(work)

    # Timers

    def _turn(self, lag: float, now: float) -> None:
        """What is to be done every TICK seconds, all in one turn of the loop, which came so late."""
        for work in (
            partial(self._on_lag, lag, now),
            self._turn_heartbeat,
            self._expire_tokens,
            self.keeper.turn,
            self.node.turn,
        ):
            try:
                work()
            except Exception:
                # The others go on, and this one at the next tick.
                logger.exception("an error in a regular turn", extra={"event": "internal_error"})

    def _turn_heartbeat(self) -> None:
        ping, dead = self.heartbeat.turn(time.monotonic())
        if ping:
            frames = ping_frames(now_ms())
            for peer in ping:
                peer.sink.answer(frames)
        for peer in dead:
            peer.end(CloseCode.HEARTBEAT_MISSED, "heartbeat missed", flush=False)

    def _expire_tokens(self) -> None:
        # They end by the clock on the wall.
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
