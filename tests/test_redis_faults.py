"""What may happen to Redis, and what its users see of it: one test over a table of faults.

Four publishers (over WebSocket and over HTTP, to a persistent channel and to another one) go on all the
time, and `/health` is asked all the time. Each time: a clear `unavailable`, nothing acknowledged that is not
stored, full recovery without a restart, `/health` true within DELAY, and clients that stay connected.
"""

import asyncio
import itertools
import os
import shutil
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from broker_kit import Proxy, asynchronous, until
from client import Client, Event, http
from daemon import Daemon
from redis_server import RedisServer, binaries, free_port

BINARY = next(iter(binaries().values()))
# Seconds after which `/health` says what publishers have seen (docs/PROTOCOL.md, "HTTP").
DELAY = 3.0
INI = (
    "[channel p]\npersistent = yes\nhistory_size = 100000\n[channel n]\ndedup_ttl = 0s\n[limits]\nrate = 0\n"
)
# What a fault may bring into the log beside `redis_down`.
EVENTS = ("redis_down", "redis_problem", "redis_refused")


# Faults


@dataclass
class Fault:
    """How a server comes into trouble and out of it again. `url` is where the daemon finds it."""

    url: str
    begin: Callable[[], object]
    end: Callable[[], object]
    # A part of what /health says to the operator meanwhile.
    problem: str
    # Whether other channels than persistent ones may still be published to.
    partly: bool = False


def slow(server: RedisServer) -> Fault:
    """Everything waits, CLIENT UNPAUSE too, so it ends when its time is over."""
    return Fault(
        server.url, lambda: server.do("CLIENT", "PAUSE", 7000, "ALL"), server.wait, "does not answer"
    )


def full(server: RedisServer) -> Fault:
    return Fault(
        server.url,
        lambda: server.do("CONFIG", "SET", "maxmemory", 1),
        lambda: server.do("CONFIG", "SET", "maxmemory", 0),
        "out of memory",
        partly=True,
    )


def read_only(server: RedisServer) -> Fault:
    return Fault(
        server.url,
        # Of a master that is not there, so it keeps what it has.
        lambda: server.do("REPLICAOF", "127.0.0.1", free_port()),
        lambda: server.do("REPLICAOF", "NO", "ONE"),
        "read-only replica",
    )


def restarted(server: RedisServer) -> Fault:
    return Fault(server.url, server.stop, server.start, "")


def wrong_password(server: RedisServer) -> Fault:
    def change(password: str) -> None:
        server.do("CONFIG", "SET", "requirepass", password)
        with server.client(password=password or None) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")

    def mend() -> None:
        with server.client(password="another") as client:
            client.execute_command("CONFIG", "SET", "requirepass", "")

    return Fault(server.url, lambda: change("another"), mend, "password")


PLAIN = (slow, full, read_only, restarted, wrong_password)


@asynccontextmanager
async def wrong_version() -> AsyncIterator[tuple[RedisServer, Fault]]:
    """A way to the server that lets it say another version; of the same length, for INFO tells its own."""
    with stored() as server:
        version = str(server.do("INFO", "server")["redis_version"]).encode()  # type: ignore[index]
        old = b"6.0." + b"9" * (len(version) - 4)
        async with Proxy(server.socket) as proxy:

            def begin() -> None:
                proxy.filter = lambda way, data: data.replace(
                    b"redis_version:" + version, b"redis_version:" + old
                )
                for way in list(proxy.connections):
                    way.abort()

            def end() -> None:
                proxy.filter = lambda way, data: data

            yield server, Fault(proxy.url, begin, end, "too old")


@asynccontextmanager
async def unreachable(tmp_path: Path) -> AsyncIterator[tuple[RedisServer, Fault]]:
    """A server in a network namespace of its own, that loses its address: packets go, and none comes back."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("NOT TESTED: an unreachable Redis needs root and iproute2, for a network namespace")
    name = f"bcast{os.getpid()}"
    net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)

    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"NOT TESTED: no network namespace can be made here: {error.stderr!r}")
    try:
        # Names of interfaces have at most 15 characters.
        ip("link", "add", f"{name}a"[-15:], "type", "veth", "peer", "name", f"{name}b"[-15:], "netns", name)
        ip("addr", "add", f"{net}.1/24", "dev", f"{name}a"[-15:])
        ip("link", "set", f"{name}a"[-15:], "up")
        address = ("addr", "add", f"{net}.2/24", "dev", f"{name}b"[-15:])
        ip("-n", name, *address)
        ip("-n", name, "link", "set", f"{name}b"[-15:], "up")
        inside = tmp_path / "server"
        inside.write_text(f'#!/bin/sh\nexec ip netns exec {name} {BINARY} "$@"\n')
        inside.chmod(inside.stat().st_mode | stat.S_IXUSR)
        with stored(str(inside), "--bind", f"{net}.2", "--protected-mode", "no") as server:
            yield (
                server,
                Fault(
                    server.url.replace("127.0.0.1", f"{net}.2"),
                    lambda: ip("-n", name, "addr", "del", *address[2:]),
                    lambda: ip("-n", name, *address),
                    "does not answer",
                ),
            )
    finally:
        # The interfaces go with it.
        ip("netns", "del", name)


@contextmanager
def stored(binary: str = BINARY, *options: str) -> Iterator[RedisServer]:
    """A server that has on its disk what it has acknowledged."""
    server = RedisServer(binary, "--appendonly", "yes", "--appendfsync", "always", *options)
    try:
        yield server.start()
    finally:
        server.close()


# Witnesses


@dataclass
class Outcome:
    sent_at: float
    answered_at: float
    # The receipt, or the error.
    answer: Event
    taken: bool


class Publisher:
    """Publishes one message after the other and notes what becomes of each."""

    def __init__(self, name: str, publish: Callable[[str, str], Awaitable[tuple[bool, Event]]], channel: str):
        self.name = name
        self.channel = channel
        self.outcomes: list[Outcome] = []
        self._publish = publish

    async def run(self) -> None:
        for number in itertools.count():
            sent_at = time.monotonic()
            taken, answer = await self._publish(self.channel, f"{self.name}-{number}")
            self.outcomes.append(Outcome(sent_at, time.monotonic(), answer, taken))
            await asyncio.sleep(0.02)

    def since(self, moment: float, *, taken: bool) -> list[Outcome]:
        """Of what was sent since then."""
        return [one for one in self.outcomes if one.sent_at >= moment and one.taken is taken]


def over_websocket(client: Client) -> Callable[[str, str], Awaitable[tuple[bool, Event]]]:
    async def publish(channel: str, message_id: str) -> tuple[bool, Event]:
        answer = await client.ask("broadcast", channel=channel, data=message_id, messageId=message_id)
        if answer["type"] != "ack":
            assert answer["code"] == "unavailable" and answer["messageId"] == message_id, answer
            assert answer["message"] and 0 < answer["retryAfter"] < 60_000, answer
        return answer["type"] == "ack", answer

    return publish


def over_http(url: str) -> Callable[[str, str], Awaitable[tuple[bool, Event]]]:
    async def publish(channel: str, message_id: str) -> tuple[bool, Event]:
        body = {"channel": channel, "data": message_id, "messageId": message_id}
        answer = await http(url, "POST", "/broadcast", body)
        if answer.status != 200:
            assert answer.status == 503 and 1 <= int(answer.headers["retry-after"]) < 60, answer
            assert answer.json["error"]["code"] == "unavailable" and answer.json["error"]["message"]
        result: Event = answer.json["results"][0]
        assert result["messageId"] == message_id
        return answer.status == 200, result

    return publish


class Health:
    """`/health`, asked all the time."""

    def __init__(self, url: str) -> None:
        self._url = url
        # When it was asked, and what it said: the status, and the body.
        self.answers: list[tuple[float, int, Event]] = []

    async def run(self) -> None:
        while True:
            asked_at = time.monotonic()
            answer = await http(self._url, "GET", "/health")
            assert (answer.status == 200) is (answer.json["status"] == "ok"), answer
            self.answers.append((asked_at, answer.status, answer.json))
            await asyncio.sleep(0.05)

    async def says(self, status: int, since: float) -> float:
        """When it was first asked, after some moment, and said so."""
        asked: list[float] = []
        while not asked:
            await asyncio.sleep(0.02)
            asked = [when for when, said, _ in self.answers if when >= since and said == status]
        return asked[0]

    def between(self, begin: float, end: float) -> set[int]:
        return {status for asked_at, status, _ in self.answers if begin <= asked_at < end}


async def history(url: str) -> dict[str, int]:
    """What is stored of the persistent channel: message id to seq."""
    found: dict[str, int] = {}
    since = 0
    while True:
        body = (await http(url, "GET", f"/channels/p/history?since={since}&limit=1000")).json
        if not body["messages"]:
            return found
        found |= {message["messageId"]: message["seq"] for message in body["messages"]}
        since = body["messages"][-1]["seq"]


@pytest.mark.parametrize("make", [*PLAIN, wrong_version, unreachable], ids=lambda make: make.__name__)
@asynchronous
async def test_fault(make: Callable[..., Any], tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        if make in PLAIN:
            server = stack.enter_context(stored())
            fault = make(server)
        else:
            place = [tmp_path] if make is unreachable else []
            server, fault = await stack.enter_async_context(make(*place))
        daemon = Daemon(INI, redis=fault.url, BCAST_REDIS_PUBLISH_TIMEOUT="1s")
        daemon.expect(*EVENTS)
        # In threads: the way to the server may lead through this loop.
        await asyncio.to_thread(daemon.__enter__)
        stack.push_async_callback(asyncio.to_thread, daemon.__exit__, None, None, None)
        reader = await stack.enter_async_context(Client(daemon.ws_url))
        for channel in ("p", "n"):
            assert (await reader.ask("subscribe", channel=channel))["type"] == "ack"
        publishers = []
        for channel in ("p", "n"):
            client = await stack.enter_async_context(Client(daemon.ws_url))
            publishers.append(Publisher(f"ws-{channel}", over_websocket(client), channel))
            publishers.append(Publisher(f"http-{channel}", over_http(daemon.url), channel))
        health = Health(daemon.url)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one.run()) for one in (*publishers, health)]
            await _watch(fault, publishers, health, reader)
            for task in running:
                task.cancel()

        # What was acknowledged is stored, under that number; and it has reached who listens, in order.
        found = await history(daemon.url)
        for publisher in publishers:
            for outcome in publisher.outcomes:
                if outcome.taken and publisher.channel == "p":
                    assert found.get(outcome.answer["messageId"]) == outcome.answer["seq"], outcome
        last = max(found.values())
        await reader.find(lambda event: event.get("seq") == last and event["type"] == "message")
        heard = [event for event in reader.frames if event["type"] == "message" and event["channel"] == "p"]
        assert {event["messageId"]: event["seq"] for event in heard} == found
        assert [event["seq"] for event in heard] == sorted(found.values())
        assert not [event for event in reader.frames if event["type"] == "error"]


async def _watch(fault: Fault, publishers: list[Publisher], health: Health, reader: Client) -> None:
    """Begin and end the fault, and compare at every moment what publishers see with what /health says."""
    concerned = [one for one in publishers if one.channel == "p" or not fault.partly]
    await until(lambda: all(len(one.outcomes) > 3 for one in publishers))
    begun = time.monotonic()
    assert health.between(0, begun) == {200} and not [one for one in publishers if one.since(0, taken=False)]

    await asyncio.to_thread(fault.begin)
    broken = time.monotonic()
    await until(lambda: all(one.since(broken, taken=False) for one in concerned))
    # Whoever was told first, /health says it DELAY later at the latest, and as long as it lasts.
    first = min(one.since(begun, taken=False)[0].answered_at for one in concerned)
    told = await health.says(503, begun)
    assert told <= first + DELAY
    await asyncio.sleep(max(0.0, first + 1 - time.monotonic()))
    mended = time.monotonic()
    assert health.between(told, mended) == {503}
    assert fault.problem in health.answers[-1][2]["problem"], health.answers[-1]
    for one in concerned:
        assert not [outcome for outcome in one.since(told, taken=True) if outcome.answered_at < mended]
    if fault.partly:
        assert not [one for one in publishers if one not in concerned and one.since(begun, taken=False)]

    await asyncio.to_thread(fault.end)
    await until(lambda: all(len(one.since(mended, taken=True)) > 3 for one in publishers), 15)
    # And ok again DELAY after all are served at the latest; from then on nobody is refused any more.
    back = max(one.since(mended, taken=True)[0].answered_at for one in publishers)
    well = await health.says(200, mended)
    assert well <= back + DELAY
    await asyncio.sleep(1)
    assert health.between(well, time.monotonic()) == {200}
    for one in publishers:
        assert not one.since(max(well, back), taken=False)
    # It is heard as well, also where nothing is filled from a stream.
    now = 1000 * time.time()
    await reader.next(lambda event: event.get("channel") == "n" and event["timestamp"] > now)
