"""Reload and stop at size: two thousand clients, a hundred messages a second, new connections all along."""

import asyncio
import signal
import time
from functools import partial

import pytest
from broker_kit import asynchronous
from crowd import Crowd
from daemon import Daemon, until
from redis_server import RedisServer

CLIENTS = 2000
INI = "[limits]\nmax_lag = 0s\n[server]\ndrain_seconds = {}s\n[channel crowd.*]\npersistent = yes\n"


async def in_a_thread(function, *arguments):  # type: ignore[no-untyped-def]
    """So that the clients' loop goes on meanwhile."""
    return await asyncio.to_thread(function, *arguments)


@pytest.mark.parametrize(("workers", "seconds"), [(2, 8), (1, 6)])
@partial(asynchronous, seconds=110)
async def test_a_reload_loses_nothing_and_nobody_waits(
    redis_server: RedisServer, workers: int, seconds: int
) -> None:
    with Daemon(INI.format(seconds), workers=workers, redis=redis_server.url) as daemon:
        async with Crowd(daemon.url, CLIENTS, channels=100) as crowd:
            async with crowd.publishing(100), crowd.probing():
                await asyncio.sleep(1)
                begun = time.monotonic()
                daemon.signal(signal.SIGHUP)
                await in_a_thread(daemon.wait_for_log, "replaced", 1, 60)
                took = time.monotonic() - begun
                await crowd.all_here(2 * seconds + 40)
            await crowd.catch_up()
        crowd.report(f"reload of {workers} workers in {took:.1f} s", begun)
        assert not crowd.wrong, crowd.wrong[:5]
        assert len(crowd.goodbyes) >= CLIENTS
        assert len(daemon.events("worker_left")) == workers and not daemon.events("worker_killed")
        if crowd.is_starved:
            pytest.skip("only the messages are checked: this machine had no time for its own clients")
        assert not set(crowd.counts) - {"received", "received again"}, "nobody was refused or cut off"
        assert crowd.busiest_second(begun) <= 1.5 / seconds * CLIENTS
        assert max(crowd.waits) < 1 and max(crowd.answers) < 1


@partial(asynchronous, seconds=110)
async def test_a_stop_is_quick_and_the_return_is_spread(redis_server: RedisServer) -> None:
    """`drain_delay` first, in which all goes on; then a few seconds for everything, and a restart."""
    delay, seconds = 2, 6
    ini = INI.format(seconds).replace("[channel", f"drain_delay = {delay}s\n[channel", 1)
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:
        async with Crowd(daemon.url, CLIENTS, channels=100) as crowd:
            async with crowd.publishing(100):
                await asyncio.sleep(1)
                begun = time.monotonic()
                daemon.signal(signal.SIGTERM)
                async with crowd.probing():
                    status, body = await in_a_thread(until, lambda: draining(daemon))
                    assert (status, body["status"]) == (503, "draining")
                    await asyncio.sleep(delay - 0.5)
                    assert max(crowd.waits) < 1 and not crowd.goodbyes and len(crowd.here) == CLIENTS
                assert await in_a_thread(daemon.wait) == 0
                took = time.monotonic() - begun - delay
                await in_a_thread(daemon.start)
                started = time.monotonic()
                await crowd.all_here(seconds + 40)
                back = time.monotonic() - begun - delay
            await crowd.catch_up()
        told = [moment - begun - delay for moment, _ in crowd.goodbyes]
        waits = [wait for _, wait in crowd.goodbyes]
        crowd.report(f"stopped in {took:.1f} s, told within {max(told):.1f} s, back in {back:.1f} s", started)
        assert not crowd.wrong, crowd.wrong[:5]
        assert len(told) == CLIENTS and -0.1 < min(told)
        # Whoever heeds it is back in time, and nobody comes in a crowd.
        assert 0.9 * seconds < max(waits) <= seconds and len(set(waits)) > CLIENTS / 2
        assert (
            max(sum(low <= wait < low + 1 for wait in waits) for low in range(seconds))
            < CLIENTS * 1.2 / seconds
        )
        if crowd.is_starved:
            pytest.skip("only the messages are checked: this machine had no time for its own clients")
        assert max(told) < 2 and took < 5 and back < seconds + 3


def draining(daemon: Daemon) -> tuple[int, dict[str, str]] | None:
    status, body = daemon.get("/health/ready")
    return (status, body) if status == 503 else None
