"""The broker on Redis: any number of workers and nodes.

Owns three connections: one that publishes, one that listens, one for everything else, and the clock that
keeps them honest. The work is done by its rooms next door: `redis_link.py` (connections), `redis_pipeline.py`
(queue and batches), `redis_commands.py` (what is said), `redis_bridge.py` (pub/sub), `redis_canary.py`.
Only these import redis.
"""

import asyncio
from collections.abc import Callable

from tornado_bcast.answer import Answer
from tornado_bcast.brokers import (
    BrokerEvents,
    BrokerHealth,
    BusMessage,
    History,
    Publication,
    Receipt,
    encode_bus,
)
from tornado_bcast.brokers.redis_bridge import Bridge
from tornado_bcast.brokers.redis_canary import INTERVAL, OWN_SILENCE, SILENCE, Canary
from tornado_bcast.brokers.redis_commands import (
    CHUNK,
    Channels,
    Info,
    Names,
    PlainPublish,
    ProbeWrite,
    Read,
    ScriptPublish,
    Tokens,
    load_scripts,
)
from tornado_bcast.brokers.redis_link import Condition, Link, Server, check_server, connection_maker
from tornado_bcast.brokers.redis_pipeline import Command, Pipeline
from tornado_bcast.brokers.redis_sessions import RedisSessions
from tornado_bcast.eventloop import until_tick

__all__ = ["RedisBroker", "check_server"]

# Seconds from one look at the server's role and settings to the next.
INFO_INTERVAL = 10.0
TICK = 0.25  # seconds


class RedisBroker:
    """See `Broker`.

    `url`: redis://, rediss:// or unix://, as redis-py reads them; ConfigError where it cannot be understood.
    `prefix` is in front of every key. A publication fails with `Unavailable` after `publish_timeout` seconds
    at the latest. `wait_replicas`: so many replicas must have it before it counts as taken.
    """

    def __init__(self, url: str, *, prefix: str, publish_timeout: float, wait_replicas: int) -> None:
        self._names = Names(prefix)
        self._tokens = Tokens()
        # A try may still be under way on a stuck server when its publication has been given up.
        self._retry_window = 2 * publish_timeout
        self._condition = Condition(url)
        make = connection_maker(url)
        self._publish_link = Link("publish", make, self._condition, load_scripts)
        self._command_link = Link("command", make, self._condition, load_scripts)
        self._listen_link = Link("listen", make, self._condition)
        self._publications = Pipeline(
            self._publish_link, timeout=publish_timeout, wait_replicas=wait_replicas
        )
        self._commands = Pipeline(self._command_link, timeout=publish_timeout)
        self.sessions = RedisSessions(self._commands, self._names)
        # From `start` on, for they need to know whom to tell.
        self._bridge: Bridge
        self._canary: Canary
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, events: BrokerEvents, row: Callable[[], bytes]) -> None:
        # Anew: a broker that was made before a fork would share them with its brothers.
        self._tokens = Tokens()
        self._canary = Canary(self._tokens.next(), self._send_row, row)
        self._bridge = Bridge(self._listen_link, self._names, events, self._canary.hear, self._greet)
        self._tasks = [
            asyncio.create_task(work, name=f"redis {name}")
            for name, work in (
                ("publish", self._publications.run()),
                ("command", self._commands.run()),
                ("listen", self._bridge.run()),
                ("watch", self._watch()),
            )
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._publications.close()
        self._commands.close()
        if self._tasks:
            self._bridge.close()
            self._canary.close()
        for link in (self._publish_link, self._command_link, self._listen_link):
            await link.close()

    def publish(self, publication: Publication) -> Answer[Receipt]:
        command: Command[Receipt]
        if publication.persistent or publication.dedup_ttl > 0:
            command = ScriptPublish(publication, self._names, self._tokens, self._retry_window)
        else:
            bus = encode_bus(BusMessage(publication.payload, publication.timestamp))
            command = PlainPublish(self._names.bus(publication.channel), bus)
        return self._publications.submit(command)

    async def subscribe(self, channel: str) -> None:
        await self._bridge.subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        self._bridge.unsubscribe(channel)

    async def read(self, channel: str, after: int, limit: int) -> History:
        return await self._commands.submit(Read(channel, after, limit, self._names, self._tokens))

    async def heads(self, channels: list[str]) -> dict[str, History]:
        heads: dict[str, History] = {}
        for start in range(0, len(channels), CHUNK):
            piece = channels[start : start + CHUNK]
            answers = [
                self._commands.submit(Read(channel, 0, 0, self._names, self._tokens)) for channel in piece
            ]
            heads.update({channel: await answer for channel, answer in zip(piece, answers, strict=True)})
        return heads

    async def channels(self) -> list[str]:
        return await self._commands.submit(Channels(self._names))

    async def probe(self) -> float:
        return await self._canary.probe()

    def health(self) -> BrokerHealth:
        if not self._tasks:
            return BrokerHealth(False)
        ready_since = self._bridge.ready_since
        up = self._condition.up and ready_since is not None and self._canary.is_fresh(ready_since)
        return BrokerHealth(up, self._canary.roundtrip, self._condition.problem)

    async def _watch(self) -> None:
        """The clock: a row each second, a look at the ear, now and then one at the server."""
        loop = asyncio.get_running_loop()
        sing_at = info_at = lively_at = 0.0
        heard = 0
        while True:
            wait = until_tick(TICK)
            due = loop.time() + wait
            await asyncio.sleep(wait)
            now = loop.time()
            if now - due > INTERVAL:
                # This process stood still: the silence was its own.
                self._canary.forgive()
            if now >= sing_at:
                sing_at = max(sing_at + INTERVAL, now)
                self._canary.sing()
                if self._condition.refusal is not None:
                    self._publications.submit(ProbeWrite(self._names)).add_done_callback(self._writes_again)
            if heard != self._bridge.heard:
                heard, lively_at = self._bridge.heard, now
            ready_since = self._bridge.ready_since
            patience = SILENCE if now - lively_at >= SILENCE else OWN_SILENCE
            if ready_since is not None and self._canary.is_missing(ready_since, patience):
                self._bridge.replace()
            if now >= info_at:
                info_at = now + INFO_INTERVAL
                self._commands.submit(Info()).add_done_callback(self._learn)

    def _learn(self, answer: Answer[Server]) -> None:
        """A server changes its role and its settings while we are connected."""
        if answer.exception() is not None:
            return
        server = answer.result()
        self._condition.judge(server)
        for link in (self._publish_link, self._command_link):
            link.server.replid = server.replid

    def _writes_again(self, probe: Answer[None]) -> None:
        if probe.exception() is None:
            self._condition.refusal = None

    def _send_row(self, data: bytes) -> Answer[Receipt]:
        return self._publications.submit(PlainPublish(self._names.workers, data))

    def _greet(self) -> None:
        """The ear is new."""
        self._canary.forgive()
        self._canary.sing()
