"""Too much of everything, on the real daemon: more than a worker can carry, readers that stop, floods.

What is asserted are counts and bounds, which hold however fast the machine is; `make stress` is the same on a
large scale, with times (bench/stress.py).
"""

import json
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from client import client_frame, handshake
from daemon import Daemon, until
from plain_crowd import Crowd, Member
from redis_server import RedisServer

# A ping in between would be taken for a piece of a message where bytes are compared.
QUIET = "[heartbeat]\ninterval = 1h\ntimeout = 1h\n"
MB = 1 << 20


def memory(daemon: Daemon) -> int:
    """Bytes that its workers have in memory."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in daemon.workers())
    return pages * resource.getpagesize()


def get(daemon: Daemon, path: str) -> tuple[int, str]:
    """Status and body, however long a worker takes that has too much to do."""
    with closing(socket.create_connection(("127.0.0.1", daemon.port), 30)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]


def dropped(daemon: Daemon) -> dict[str, int]:
    """`bcast_dropped_total`, by reason."""
    text = get(daemon, "/metrics")[1]
    lines = [line for line in text.splitlines() if line.startswith("bcast_dropped_total{")]
    return {line.partition('reason="')[2].partition('"')[0]: int(float(line.split()[-1])) for line in lines}


# Overload

BUSY = """[limits]
rate = 0
max_lag = 100ms
max_queue_bytes = 32m
"""


def test_more_than_a_worker_can_carry() -> None:
    with Daemon(BUSY + QUIET) as daemon, Crowd(daemon.port) as crowd:
        daemon.expect("overloaded", "worker_hung")
        listeners = crowd.join(30, "news")
        publishers = crowd.join(150)
        for member in (listeners[0], *publishers):
            member.counts = True
        crowd.saturate(publishers, "news", window=20, seconds=1)
        begun = time.monotonic()
        at_first = memory(daemon)
        rate = 2 * sum(member.taken for member in publishers)

        def refused() -> int:
            return sum(member.refused for member in publishers)

        # As long as it takes: 2 s, and until everybody has been refused something.
        while refused() < len(publishers):
            assert time.monotonic() < begun + 40, "never overloaded"
            crowd.publish(publishers, "news", rate=rate, seconds=0.25)
        status, body = get(daemon, "/health")
        health = json.loads(body)
        assert (status, health["status"], health["overloaded"]) == (503, "degraded", True)
        assert get(daemon, "/health/ready")[0] == 200
        before = listeners[0].messages
        crowd.publish(publishers, "news", rate=rate, seconds=1)
        # What is held for publishers is bounded by what is read of one at a time.
        assert memory(daemon) < at_first + 60 * MB
        crowd.until(lambda: all(one.sent == one.taken + one.refused for one in publishers), 60)
        assert listeners[0].messages > before, "it goes on delivering"

        # It ends by itself, and everybody has heard all that was taken.
        daemon.wait_for_log("overload_over")
        until(lambda: get(daemon, "/health")[0] == 200)
        crowd.until(lambda: listeners[0].messages == sum(member.taken for member in publishers))
        crowd.quiet()
        assert not [member.closed for member in crowd.members if member.closed is not None]
        assert {member.bytes for member in listeners} == {listeners[0].bytes}
        taken = publishers[0].taken
        crowd.publish(publishers[:1], "news", rate=100, seconds=0.1)
        crowd.until(lambda: publishers[0].taken > taken)


# Readers that stop

QUEUE = 256 << 10
POLICIES = f"""[limits]
rate = 0
max_queue_bytes = {QUEUE}
[channel drop_oldest]
slow_consumer = drop_oldest
[channel latest]
slow_consumer = latest
[channel persistent]
persistent = yes
history_size = 100000
"""
SIZE = 10_000
# More than the kernel holds for one who does not read (tcp_wmem, 4 MB).
MESSAGES = 800


@pytest.fixture(scope="module")
def policies(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(POLICIES + QUIET, redis=redis_server.url) as daemon:
        yield daemon


@pytest.mark.parametrize("channel", ["disconnect", "drop_oldest", "latest", "persistent"])
def test_readers_that_stop(policies: Daemon, channel: str) -> None:
    with Crowd(policies.port) as crowd:
        readers = crowd.join(10, channel)
        stopped = crowd.join(5, channel, window=4096)
        (publisher,) = crowd.join(1)
        for member in crowd.members:
            member.counts = True
        counted = dropped(policies)
        at_first = memory(policies)
        crowd.stop_reading(stopped)
        while publisher.taken < MESSAGES:
            # So many at once that one who reads never has a full queue.
            publisher.publish(channel, 10, SIZE)
            crowd.until(lambda: publisher.taken == publisher.sent)
            crowd.until(lambda: all(member.messages == publisher.sent for member in readers))
        assert memory(policies) < at_first + len(stopped) * QUEUE + 16 * MB

        # Bytes first: what one has missed shows only when it has read what waits for it.
        crowd.read_again(stopped)
        if channel == "persistent":
            crowd.until(lambda: all(member.messages == MESSAGES for member in stopped))
        crowd.quiet()
        missed = sum(MESSAGES - member.messages for member in stopped)
        grown = {reason: count - counted.get(reason, 0) for reason, count in dropped(policies).items()}
        grown = {reason: count for reason, count in grown.items() if count}
        codes = {member.closed for member in stopped}
        if channel == "persistent":
            assert (grown, codes) == ({}, {None})
            assert {member.bytes for member in stopped} == {member.bytes for member in readers}
        elif channel == "disconnect":
            assert (grown, codes) == ({"disconnected": len(stopped)}, {4008})
        else:
            assert missed > 0 and (grown, codes) == ({channel: missed}, {None})
        assert {member.messages for member in readers} == {MESSAGES}
        assert {member.closed for member in readers} == {None}


# Floods

# Connections.
ROOM = 60
CROWDED = """[limits]
handshake_timeout = 1s
max_subscriptions = 50
"""


@pytest.fixture(scope="module")
def crowded(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(CROWDED + QUIET, redis=redis_server.url) as daemon:
        yield daemon


def serves(crowd: Crowd, publisher: Member, listeners: list[Member]) -> None:
    """Those who are connected get their messages as if nobody else were there."""
    before = [member.messages for member in listeners]
    publisher.publish("news", 5, 100)
    crowd.until(
        lambda: (
            [member.messages for member in listeners] == [number + 5 for number in before]
            and publisher.taken == publisher.sent
        )
    )


def join(crowd: Crowd, number: int) -> tuple[Member, list[Member]]:
    listeners = crowd.join(number, "news")
    (publisher,) = crowd.join(1)
    for member in (publisher, *listeners):
        member.counts = True
    return publisher, listeners


def ask_to_connect(daemon: Daemon) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", daemon.port), 10)
    connection.sendall(handshake("127.0.0.1"))
    return connection


@pytest.mark.parametrize(
    ("setting", "status"),
    [("max_connections", b"503 Service Unavailable"), ("max_connections_per_ip", b"429 Too Many Requests")],
)
def test_more_connections_than_there_is_room_for(
    setting: str, status: bytes, redis_server: RedisServer
) -> None:
    with (
        Daemon(f"[server]\n{setting} = {ROOM}\n" + QUIET, redis=redis_server.url) as daemon,
        Crowd(daemon.port) as crowd,
        ExitStack() as stack,
    ):
        publisher, listeners = join(crowd, 20)
        at_first = memory(daemon)
        answers = []
        for _ in range(5):
            flood = [stack.enter_context(closing(ask_to_connect(daemon))) for _ in range(100)]
            serves(crowd, publisher, listeners)
            answers += [connection.recv(4096) for connection in flood]
        heads = [answer.split(b"\r\n")[0] for answer in answers]
        let_in = heads.count(b"HTTP/1.1 101 Switching Protocols")
        # Of one address those count as well that are still to be refused.
        assert let_in <= ROOM - 21 and (let_in == ROOM - 21 or setting == "max_connections_per_ip")
        assert heads.count(b"HTTP/1.1 " + status) == len(answers) - let_in
        assert all(b"\r\nRetry-After: " in answer for answer in answers if status in answer)
        assert memory(daemon) < at_first + 16 * MB
        stack.close()

        # When they have gone there is room again.
        def is_let_in() -> bool:
            with closing(ask_to_connect(daemon)) as connection:
                return connection.recv(4096).startswith(b"HTTP/1.1 101 ")

        until(is_let_in)
        serves(crowd, publisher, listeners)


def test_peers_that_finish_no_handshake(crowded: Daemon) -> None:
    """Silent ones, and those that send a byte now and then, are cut when the time is over, not before."""
    request = handshake("127.0.0.1")
    with Crowd(crowded.port) as crowd, ExitStack() as stack:
        publisher, listeners = join(crowd, 20)
        begun = time.monotonic()
        peers = [
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", crowded.port), 10)))
            for _ in range(200)
        ]
        for peer in peers:
            peer.setblocking(False)
        # When each was found to be cut.
        cut: dict[int, float] = {}
        for byte in range(len(request)):
            serves(crowd, publisher, listeners)
            for number, peer in enumerate(peers):
                if number in cut:
                    continue
                try:
                    if number % 2:
                        peer.send(request[byte : byte + 1])
                    if not peer.recv(1000):
                        cut[number] = time.monotonic() - begun
                except BlockingIOError:
                    pass
                except OSError:
                    cut[number] = time.monotonic() - begun
            if len(cut) == len(peers):
                break
            time.sleep(0.2)
        assert len(cut) == len(peers) and byte < len(request) - 1
        assert min(cut.values()) >= 0.9
        serves(crowd, publisher, listeners)


def test_floods_of_subscribes_and_publishes(crowded: Daemon) -> None:
    """Whoever sends more than `limits` allow is told, then closed; the others do not notice."""

    def request(number: int, kind: str) -> bytes:
        frame = {"type": kind, "channel": f"flood{number}"} | ({"data": 1} if kind == "broadcast" else {})
        return client_frame(json.dumps(frame).encode())

    with Crowd(crowded.port) as crowd:
        publisher, listeners = join(crowd, 20)
        with Crowd(crowded.port) as flood:
            subscribers, publishers = flood.join(10), flood.join(10)
            for members, kind in ((subscribers, "subscribe"), (publishers, "broadcast")):
                for member in members:
                    member.out += b"".join(request(number, kind) for number in range(2000))
            for _ in range(4):
                flood.turn(0.01)
                serves(crowd, publisher, listeners)
            flood.until(lambda: {member.closed for member in flood.members} == {4029})
            assert crowded.stats()["totals"]["subscriptions"] <= 20 + 10 * 50
        until(lambda: crowded.stats()["totals"]["subscriptions"] == 20)
        until(lambda: crowded.stats()["totals"]["channels"] == 1)
        serves(crowd, publisher, listeners)
