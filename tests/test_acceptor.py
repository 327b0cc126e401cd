"""Accepting by count, with real sockets on a loop; the other workers are slots of the board."""

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from broker_kit import until
from tornado.iostream import StreamClosedError

from tornado_bcast import acceptor as module
from tornado_bcast.acceptor import BATCH, SEND_BUFFER, SLACK, Acceptor, listening_sockets
from tornado_bcast.board import Board, State
from tornado_bcast.errors import ConfigError
from tornado_bcast.worker import Connections, CountedStream


class Bench:
    """One worker (slot 1) that accepts, and another (slot 0) that the test plays."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.now = 100.0
        self.board = Board(2, lambda: self.now)
        self.other(0)
        self.board.state = State.SERVING
        self.accepted: list[socket.socket] = []
        self.clients: list[socket.socket] = []
        self.acceptor = Acceptor([listener], self.board, self.on_connection, most=10_000)

    def other(self, connections: int, state: State = State.SERVING) -> None:
        """What the other worker writes on the board."""
        mine = self.board.slot(1)
        self.board.claim(0)
        self.board.own_connections, self.board.state, self.board.accepting = connections, state, True
        self.board.claim(1)
        self.board.own_connections, self.board.state, self.board.accepting = mine[3:]

    def on_connection(self, connection: socket.socket, address: Any) -> None:
        self.accepted.append(connection)
        self.board.own_connections += 1

    async def connect(self, count: int) -> None:
        for _ in range(count):
            client = socket.socket()
            client.setblocking(False)
            self.clients.append(client)
            await asyncio.get_running_loop().sock_connect(client, self.listener.getsockname())

    def close(self) -> None:
        self.acceptor.close()
        for sock in (*self.accepted, *self.clients):
            sock.close()


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1000)
    listener.setblocking(False)
    with listener:
        one = Bench(listener)
        try:
            yield one
        finally:
            one.close()


async def settled(one: Bench) -> int:
    """How many it has accepted when it takes no more for a while."""
    count = -1
    while count != len(one.accepted):
        count = len(one.accepted)
        await asyncio.sleep(0.05)
    return count


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        async with bench() as one:
            await test(one)

    asyncio.run(main())


def test_it_stops_a_little_above_the_lowest_and_goes_on_when_that_has_more() -> None:
    async def test(one: Bench) -> None:
        one.acceptor.resume()
        await one.connect(60)
        assert await settled(one) == SLACK + 1
        one.other(20)
        assert await settled(one) == 20 + SLACK + 1
        one.other(1000)
        await until(lambda: len(one.accepted) == 60)

    run(test)


def test_the_slack_grows_with_the_number_of_connections() -> None:
    async def test(one: Bench) -> None:
        one.other(2000)
        one.board.own_connections = 2000
        one.acceptor.resume()
        await one.connect(60)
        assert await settled(one) == 40 + 1

    run(test)


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.GONE])
def test_one_that_does_not_serve_is_not_waited_for(state: State) -> None:
    async def test(one: Bench) -> None:
        one.other(0, state)
        one.acceptor.resume()
        await one.connect(60)
        await until(lambda: len(one.accepted) == 60)

    run(test)


def test_one_that_is_not_heard_is_not_waited_for() -> None:
    async def test(one: Bench) -> None:
        one.acceptor.resume()
        await one.connect(60)
        assert await settled(one) == SLACK + 1
        one.now += 1
        one.board.beat()
        await until(lambda: len(one.accepted) == 60)

    run(test)


def test_others_get_their_turn_between_two_batches() -> None:
    async def test(one: Bench) -> None:
        one.other(1000)
        await one.connect(3 * BATCH)
        turns = []

        def turn() -> None:
            turns.append(len(one.accepted))
            if len(one.accepted) < 3 * BATCH:
                asyncio.get_running_loop().call_soon(turn)

        one.acceptor.resume()
        turn()
        await until(lambda: turns[-1] == 3 * BATCH)
        assert {0, BATCH, 2 * BATCH, 3 * BATCH} <= set(turns)

    run(test)


def test_pause_resume_and_close() -> None:
    async def test(one: Bench) -> None:
        one.other(1000)
        one.acceptor.resume()
        one.acceptor.pause()
        assert not one.board.accepting
        await one.connect(1)
        assert await settled(one) == 0
        one.acceptor.resume()
        one.acceptor.resume()
        assert one.board.accepting
        await until(lambda: len(one.accepted) == 1)
        one.acceptor.close()
        assert one.listener.fileno() == -1 and not one.board.accepting

    run(test)


def test_a_connection_may_pause_it() -> None:
    async def test(one: Bench) -> None:
        one.other(1000)
        await one.connect(5)
        plain = one.acceptor._on_connection

        def pausing(connection: socket.socket, address: Any) -> None:
            plain(connection, address)
            one.acceptor.pause()

        one.acceptor._on_connection = pausing
        one.acceptor.resume()
        assert await settled(one) == 1
        assert not one.board.accepting

    run(test)


def test_a_connection_that_cannot_be_served_costs_itself_only(caplog: pytest.LogCaptureFixture) -> None:
    async def test(one: Bench) -> None:
        one.other(1000)
        plain = one.acceptor._on_connection
        calls = []

        def failing(connection: socket.socket, address: Any) -> None:
            calls.append(address)
            if len(calls) == 1:
                raise RuntimeError("no")
            plain(connection, address)

        one.acceptor._on_connection = failing
        one.acceptor.resume()
        await one.connect(3)
        await until(lambda: len(one.accepted) == 2)
        assert await asyncio.get_running_loop().sock_recv(one.clients[0], 1) == b""

    run(test)
    assert [record.__dict__["event"] for record in caplog.records] == ["connection_failed"]


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """The process may open no more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    # All numbers below the limit must be in use.
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_without_descriptors_it_leaves_the_queue_to_others_and_recovers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)

    async def test(one: Bench) -> None:
        one.other(1000)
        await one.connect(3)
        tries: list[bool] = []
        with no_descriptor_left():
            one.acceptor.resume()
            while len(tries) < 200:
                tries.append(one.board.accepting)
                await asyncio.sleep(0.001)
            assert not one.accepted
        assert tries.count(False) > 150, "mostly it is known not to accept"
        await until(lambda: len(one.accepted) == 3)
        assert one.board.accepting

    with caplog.at_level(logging.INFO):
        run(test)
    record, resumed = caplog.records
    assert resumed.__dict__["event"] == "accept_resumed"
    assert record.__dict__["event"] == "accept_paused" and record.levelno == logging.ERROR
    assert "Too many open files" in record.getMessage() and "LimitNOFILE" in record.getMessage()


def test_some_descriptors_are_left_for_other_things(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)

    async def test(one: Bench) -> None:
        one.other(1000)
        one.acceptor._most = 5
        one.acceptor.resume()
        await one.connect(8)
        assert await settled(one) == 5
        one.board.own_connections -= 2
        await until(lambda: len(one.accepted) == 7)

    with caplog.at_level(logging.INFO):
        run(test)
    # Once, though it was so twice within a minute.
    assert [record.__dict__["event"] for record in caplog.records] == ["accept_paused", "accept_resumed"]
    assert "LimitNOFILE" in caplog.records[0].getMessage()


class Grumbling:
    """A listening socket whose first calls fail with the given errors."""

    def __init__(self, sock: socket.socket, *errors: int) -> None:
        self._sock = sock
        self._errors = list(errors)

    def accept(self) -> tuple[socket.socket, Any]:
        if self._errors:
            number = self._errors.pop(0)
            raise OSError(number, os.strerror(number))
        return self._sock.accept()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()


def test_broken_connections_are_passed_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)

    async def test(one: Bench) -> None:
        errors = (errno.ECONNABORTED, errno.EPROTO, errno.EINVAL)
        one.acceptor._sockets = [Grumbling(one.listener, *errors)]  # type: ignore[list-item]
        one.acceptor.resume()
        await one.connect(2)
        await until(lambda: len(one.accepted) == 2)

    run(test)
    # What nobody foresaw is no reason for a hot loop.
    assert [record.__dict__["event"] for record in caplog.records] == ["accept_paused"]


def test_a_stream_is_counted_under_one_address_until_it_is_closed() -> None:
    async def main() -> None:
        board = Board(1)
        board.claim(0)
        connections = Connections(board, 0)
        pair = socket.socketpair()
        stream = CountedStream(pair[0], connections, "192.0.2.1")
        stream.count_as("192.0.2.2")
        assert (board.own_connections, board.peers("192.0.2.1"), board.peers("192.0.2.2")) == (1, 0, 1)
        pair[1].close()
        stream.close()
        stream.close()
        stream.count_as("192.0.2.1")
        assert (board.own_connections, board.peers("192.0.2.1"), board.peers("192.0.2.2")) == (0, 0, 0)
        assert not connections.streams

    asyncio.run(main())


def test_who_sends_no_request_is_cut_in_time_and_nobody_else() -> None:
    async def main() -> None:
        board = Board(1)
        board.claim(0)
        connections = Connections(board, 0.1)
        pairs = [socket.socketpair() for _ in range(4)]
        silent, prompt, late, again = (CountedStream(near, connections, "") for near, _ in pairs)
        pairs[1][1].send(b"head\n")
        heads = [stream.read_until_regex(b"\n") for stream in (silent, prompt, late, again)]
        assert await heads[1] == b"head\n"
        for _, far in pairs[2:]:
            far.send(b"head\n")
        assert await heads[2] == await heads[3] == b"head\n"
        await asyncio.sleep(0.05)
        # From now on it waits for another.
        second = again.read_until_regex(b"\n")
        with pytest.raises(StreamClosedError):
            await heads[0]
        assert connections.streams == {prompt, late, again}
        # A new patience holds for who waits already.
        connections.set_patience(0)
        await asyncio.sleep(0.15)
        assert again in connections.streams
        connections.set_patience(0.02)
        with pytest.raises(StreamClosedError):
            await second
        await asyncio.sleep(0.05)
        assert connections.streams == {prompt, late}
        for stream in (prompt, late):
            stream.close()
        for _, far in pairs:
            far.close()

    asyncio.run(main())


def test_listening_on_both_families_with_one_port() -> None:
    sockets = listening_sockets("::", 0, {})
    families = [sock.family for sock in sockets]
    ports = {sock.getsockname()[1] for sock in sockets}
    assert len(ports) == 1
    assert families in ([socket.AF_INET, socket.AF_INET6], [socket.AF_INET])
    for sock in sockets:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not sock.getblocking() and not sock.get_inheritable()
        sock.close()


def test_accepted_sockets_send_without_delay_and_hold_little() -> None:
    (listener,) = listening_sockets("127.0.0.1", 0, {})
    with listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * SEND_BUFFER


@pytest.mark.parametrize(
    ("bind", "hint"),
    [("192.0.2.1", r"192\.0\.2\.1:0: .*\[server\] bind"), ("2001:db8::1", r"\[2001:db8::1\]")],
)
def test_an_address_of_another_machine(bind: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        listening_sockets(bind, 0, {})
