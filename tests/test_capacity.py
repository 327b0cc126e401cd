"""How much room there is, what is said of it, and what happens where it ends."""

import os
import resource
import socket
import time
from pathlib import Path

import pytest
from broker_kit import asynchronous
from client import Client, Raw, eventually, http
from daemon import Daemon, until
from redis_server import RedisServer

from tornado_bcast import capacity


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("limit", [40, 256, 1024, 65536])
def test_the_rest_of_the_descriptors_is_for_other_things(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    assert limit // 2 <= capacity.most_clients() < capacity.most_connections() < limit


def test_what_limits_it_is_said_in_one_line(tmp_path: Path) -> None:
    for name, text in (
        ("proc/sys/net/core/somaxconn", "4096\n"),
        ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000000 kB\n"),
        ("sys/fs/cgroup/memory.max", "200000000\n"),
        ("sys/fs/cgroup/memory.current", "50000000\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    sentence = capacity.measure(2, 10_000, tmp_path).sentence()
    assert sentence.startswith("room for 10000 connections, limited by [server] max_connections: ")
    assert "4096 may wait to be accepted (somaxconn); idle they take 103 MB of memory" in sentence
    assert sentence.endswith("and 150 MB are available")
    assert "TOO LITTLE" in capacity.measure(2, 20_000, tmp_path).sentence()
    # Not every system tells.
    sentence = capacity.measure(1, 0, tmp_path / "nothing").sentence()
    assert "limited by descriptors" in sentence and "somaxconn" not in sentence


def daemon_with(limit: int, redis: RedisServer) -> Daemon:
    """A daemon that may have so many descriptors and no more."""
    return Daemon(redis=redis.url).wrap("prlimit", f"--nofile={limit}:{limit}").start()


@asynchronous
async def test_where_there_is_no_room_it_is_said_politely(redis_server: RedisServer) -> None:
    """With 200 descriptors there is room for 100 clients, and HTTP still goes on."""
    daemon = daemon_with(200, redis_server)
    try:
        (line,) = daemon.events("capacity")
        assert (
            "room for 100 connections, limited by descriptors: each of 1 workers may have 200"
            in line["message"]
        )
        clients = [Raw(daemon.ws_url) for _ in range(100)]
        for client in clients:
            await client.__aenter__()
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        answer = await http(
            daemon.url, "GET", "/ws", headers={**upgrade, "Sec-WebSocket-Key": "A" * 22 + "=="}
        )
        assert (answer.status, answer.json["error"]["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1 and "room" in answer.json["error"]["message"]
        assert (await http(daemon.url, "POST", "/broadcast", {"channel": "a", "data": 1})).status == 200
        clients.pop().abort()
        await eventually(
            lambda: http(daemon.url, "GET", "/stats"), lambda got: got.json["totals"]["connections"] == 99
        )
        async with Client(daemon.ws_url) as late:
            assert await late.is_alive()
        for client in clients:
            client.abort()
        daemon.stop()
        daemon.check_log()
    finally:
        daemon.kill()


@pytest.mark.parametrize("limit", [60, 200])
def test_without_descriptors_it_lives_and_recovers(redis_server: RedisServer, limit: int) -> None:
    """More connections than descriptors, and each says nothing. 60 are too few for the worker's own, too."""
    daemon = daemon_with(limit, redis_server)
    try:
        (worker,) = daemon.workers()
        with socket.create_connection(("127.0.0.1", daemon.port)) as first:
            first.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in first.recv(4096)
            crowd = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(limit + 20)]
            daemon.wait_for_log("accept_paused")
            before, begun = cpu_seconds(worker), time.monotonic()
            # Who was there before is served all the while.
            while time.monotonic() - begun < 2:
                first.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b" 200 " in first.recv(4096)
                time.sleep(0.05)
            used = cpu_seconds(worker) - before
            print(f"CPU of the worker in 2 s without descriptors: {used:.2f} s")
            assert used < 0.25, "a busy loop"
            for one in crowd:
                one.close()
        until(lambda: daemon.get("/health/ready")[0] == 200)
        daemon.wait_for_log("accept_resumed")
        assert daemon.workers() == [worker]
        assert len(daemon.events("accept_paused")) == 1
        daemon.expect("accept_paused")
        daemon.stop()
        daemon.check_log()
    finally:
        daemon.kill()
