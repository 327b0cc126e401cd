"""What CONTRACT section 3 promises, with real processes: the daemon, its workers, and Redis servers that die.

Three publishers and twenty subscribers (chaos.py) run while workers are killed, Redis is restarted, loses its
data, gets an older file back, or is replaced by its replica. At the end the world must be whole again
(chaos_check.py). BCAST_TEST_SOAK=SECONDS makes the first test that long.
"""

import asyncio
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import redis
from broker_kit import Proxy
from chaos import World
from chaos_check import catch_up, check, read_streams, report
from daemon import Daemon, until
from redis_server import RedisServer, binaries

CHANNELS = ["room.0", "room.1", "room.2", "room.3"]
_ROOM = """
persistent = yes
history_size = 1000000
ack_timeout = 500ms
"""
INI = f"""
[limits]
rate = 0
[channel room.2]
max_in_flight = 40
{_ROOM}
[channel room.3]
max_redeliveries = 2
{_ROOM}
[channel room.*]
{_ROOM}
"""
SOAK = float(os.environ.get("BCAST_TEST_SOAK", "0"))
KILLING = max(SOAK, 30.0)
# How much longer the killing may go on, on a machine that is too busy to show anything in that time.
MORE = 30.0
# Long enough for the daemon not to think that its server dies young.
RESTART_EVERY = 11.0
# A run in which less happened shows nothing.
LEAST = {"workers killed": 12, "acknowledged": 3000, "resumed": 50, "redelivered": 20}
LEAST |= {"duplicates answered": 20}

pytestmark = pytest.mark.timeout(180 + SOAK)


def finish(world: World, needed: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    """Print what has happened; fail where something was wrong, or too little of it."""
    with capsys.disabled():
        print(f"\n{report(world)}")
    wrong = world.ledger.wrong
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])
    few = {
        name: world.ledger.counts[name] for name, least in needed.items() if world.ledger.counts[name] < least
    }
    assert not few, f"too little happened: {few}"


async def rest(world: World, server: "redis.Redis[bytes]", prefix: str, *, losses: int = 0) -> None:
    """Bring the world to rest and look at it."""
    await world.finish_publishing()
    streams = read_streams(world, server, prefix)
    await catch_up(world, streams)
    check(world, streams, losses=losses)


# What goes wrong


def children(daemon: Daemon) -> tuple[list[int], list[int]]:
    """The pids of a daemon's workers, and of its embedded server."""
    workers, servers = [], []
    python = os.path.realpath(sys.executable)
    for pid in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
        try:
            executable = os.readlink(f"/proc/{pid}/exe")
        except OSError:
            continue
        (workers if os.path.realpath(executable) == python else servers).append(int(pid))
    return workers, servers


def kill_worker(daemon: Daemon) -> None:
    """Kill one at random that serves, if that can be known in all this."""
    try:
        workers = daemon.workers()
    except (OSError, HTTPException, ValueError, AssertionError):
        workers = []
    os.kill(random.choice(workers or children(daemon)[0]), signal.SIGKILL)


def restart_embedded(daemon: Daemon, number: signal.Signals) -> None:
    """End the embedded server; the daemon starts it again."""
    for pid in children(daemon)[1]:
        os.kill(pid, number)


def put_back(server: RedisServer, copy: Path) -> None:
    """Have a server lose what it has learned since its append-only files were copied."""
    server.stop()
    # Long enough for publishers, subscribers and resumes to be refused meanwhile.
    time.sleep(1.5)
    shutil.rmtree(server.place / "appendonlydir")
    copy.rename(server.place / "appendonlydir")
    server.start()


# The tests


def test_killed_workers_and_a_restarted_redis(capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon(INI, workers=3, redis="embedded:") as daemon:
        daemon.expect("worker_died", "worker_pausing", "redis_down", "embedded_dead")
        world = World(daemon.url, CHANNELS)
        counts = world.ledger.counts

        async def run() -> None:
            async with world:
                begun = time.monotonic()
                restarts = cycle((signal.SIGTERM, signal.SIGKILL))
                while (spent := time.monotonic() - begun) < KILLING or (
                    spent < KILLING + MORE and any(counts[name] < least for name, least in LEAST.items())
                ):
                    await asyncio.sleep(2)
                    await asyncio.to_thread(kill_worker, daemon)
                    counts["workers killed"] += 1
                    if spent > RESTART_EVERY * (counts["redis restarted"] + 1):
                        restart_embedded(daemon, next(restarts))
                        counts["redis restarted"] += 1
                socket = str(daemon.place / "redis" / "redis.sock")
                with redis.Redis(unix_socket_path=socket, protocol=2) as server:
                    await rest(world, server, daemon.prefix)

        asyncio.run(run())
        finish(world, LEAST | {"redis restarted": 2}, capsys)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with RedisServer(next(iter(binaries().values())), *options) as server:
        yield server


def test_lost_pubsub_and_a_flushed_redis(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon(INI, workers=2, redis=server.url) as daemon:
        daemon.expect("redis_down", "history_lost")
        world = World(daemon.url, CHANNELS)
        counts = world.ledger.counts

        async def run() -> None:
            async with world:
                with server.client() as client:
                    for _ in range(20):
                        await asyncio.sleep(random.uniform(0.2, 0.4))
                        counts["pub/sub connections cut"] += client.execute_command("CLIENT KILL TYPE pubsub")
                        counts["cuts"] += 1
                    world.stall(2.5)
                    await asyncio.sleep(1)
                    client.flushall()
                    await asyncio.sleep(4)
                    await rest(world, client, daemon.prefix, losses=1)

        asyncio.run(run())
        lines = len(list(world.lines()))
        assert counts["losses told"] == lines, (counts, lines)
        needed = {"cuts": 20, "pub/sub connections cut": 20, "acknowledged": 500, "resumed": 20}
        finish(world, needed, capsys)


def test_an_older_file(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon(INI, workers=2, redis=server.url, BCAST_REDIS_PUBLISH_TIMEOUT="500ms") as daemon:
        daemon.expect("redis_down", "history_lost")
        world = World(daemon.url, CHANNELS, old_sessions=True)

        async def run() -> None:
            async with world:
                await asyncio.sleep(3)
                copy = server.place / "older"
                await asyncio.to_thread(shutil.copytree, server.place / "appendonlydir", copy)
                await asyncio.sleep(2)
                world.stall(2.5)
                await asyncio.sleep(1)
                await asyncio.to_thread(put_back, server, copy)
                await asyncio.sleep(4)
                with server.client() as client:
                    await rest(world, client, daemon.prefix, losses=1)

        asyncio.run(run())
        needed = {"acknowledged": 500, "acknowledged and lost": 100, "losses told": 20, "resumed": 20}
        needed |= {"publishes unavailable": 1, "closed 1013": 1}
        finish(world, needed, capsys)


def test_a_promoted_replica(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    world_counts: dict[str, Any] = {}

    async def run(replica: RedisServer) -> None:
        async with Proxy(server.socket) as proxy:
            daemon = Daemon(INI, workers=2, redis=proxy.url)
            # In a thread: the proxy has to run meanwhile.
            await asyncio.to_thread(daemon.__enter__)
            try:
                daemon.expect("redis_down", "history_lost")
                world = world_counts["world"] = World(daemon.url, CHANNELS, old_sessions=True)
                async with world:
                    await asyncio.sleep(3)
                    # Right before the server goes back with them, and has sent them more than will be left.
                    world.stall(2.5)
                    await asyncio.sleep(0.45)
                    # From here on the old master acknowledges what the new one will never have.
                    replica.do("REPLICAOF", "NO", "ONE")
                    await asyncio.sleep(1.5)
                    proxy.path = replica.socket
                    for way in proxy.connections:
                        way.abort()
                    await asyncio.sleep(4)
                    with replica.client() as client:
                        await rest(world, client, daemon.prefix, losses=1)
            finally:
                await asyncio.to_thread(daemon.__exit__, *sys.exc_info())

    with RedisServer(server.binary, "--replicaof", "127.0.0.1", str(server.port)) as replica:
        until_linked(replica)
        asyncio.run(run(replica))
    needed = {"acknowledged": 500, "acknowledged and lost": 50, "losses told": 20, "resumed": 20}
    finish(world_counts["world"], needed, capsys)


def until_linked(replica: RedisServer) -> None:
    with replica.client() as client:
        until(lambda: client.info("replication").get("master_link_status") == "up")
