"""systemd's protocol, against a datagram socket in systemd's place. The real one: `make systemd-test`."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from broker_kit import asynchronous
from client import Client
from crowd import Crowd
from daemon import Daemon, until
from redis_server import RedisServer, binaries

from tornado_bcast.board import Board, State
from tornado_bcast.systemd import Notifier, inherited_sockets
from tornado_bcast.watch import READY_SECONDS, Watch


class Manager:
    """Hears what a service tells. `heard` has each datagram as its fields."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(path)
        self._heard: list[dict[str, str]] = []
        self.senders: set[int] = set()

    def heard(self) -> list[dict[str, str]]:
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(4096, 256, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return self._heard
            lines = data.decode().splitlines()
            self._heard.append(dict(line.split("=", 1) for line in lines))
            for _, _, credentials in ancillary:
                self.senders.add(int.from_bytes(credentials[:4], "little"))

    def count(self, name: str) -> int:
        return sum(name in fields for fields in self.heard())

    def position(self, name: str, after: int = -1) -> int:
        """Where the first datagram with this field is, behind another one; waits for it."""
        return until(lambda: self._find(name, after + 1)) - 1

    def _find(self, name: str, start: int) -> int:
        found = [n for n, fields in enumerate(self.heard()) if n >= start and name in fields]
        return found[0] + 1 if found else 0

    def status(self) -> str:
        return [fields["STATUS"] for fields in self.heard() if "STATUS" in fields][-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as one:
        yield one


@pytest.fixture
def notify_socket(manager: Manager, tmp_path: Path) -> str:
    return str(tmp_path / "notify")


# The protocol


def test_fields_are_lines_of_one_datagram(manager: Manager, notify_socket: str) -> None:
    environ = {"NOTIFY_SOCKET": notify_socket, "WATCHDOG_USEC": "3000000", "HOME": "/"}
    notifier = Notifier(environ)
    assert environ == {"HOME": "/"}, "they are not for children"
    assert notifier.watchdog == 3
    notifier.send(READY=1, STATUS="all is well")
    assert manager.heard() == [{"READY": "1", "STATUS": "all is well"}]


def test_an_abstract_address() -> None:
    name = f"bcast-test-{os.getpid()}"
    with Manager("\0" + name) as manager:
        Notifier({"NOTIFY_SOCKET": "@" + name}).send(READY=1)
        assert manager.heard() == [{"READY": "1"}]


def test_without_systemd_nothing_is_sent() -> None:
    notifier = Notifier({})
    notifier.send(READY=1)
    assert notifier.watchdog is None


def test_a_systemd_that_is_not_there_is_told_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}).send(READY=1)
    (record,) = caplog.records
    assert record.__dict__["event"] == "notify_failed"


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_whose_watchdog_it_is(variables: dict[str, str], seconds: float | None) -> None:
    assert Notifier(variables).watchdog == seconds
    assert not variables


def test_what_systemd_hands_to_another_process_is_not_ours() -> None:
    environ = {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert inherited_sockets(environ) == []
    assert environ == {"HOME": "/"}


# When what is told, with workers that are slots of the board.


class Stage:
    """A parent's watch over two workers that the test plays, at a time that the test sets."""

    def __init__(self, path: str, watchdog: str = "") -> None:
        self.now = 100.0
        self.board = Board(2, lambda: self.now)
        self.served = 0
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": watchdog})
        self.watch = Watch(self.board, notifier, self._on_serving)

    def _on_serving(self) -> None:
        self.served += 1

    def worker(self, index: int, state: State) -> None:
        """What a worker writes that is alive."""
        if self.board.slot(index).pid:
            self.board.index, self.board._own = index, self.board._base(index)
        else:
            self.board.claim(index)
        self.board.state = state
        self.board.beat()

    def tick(self, seconds: float, *alive: int) -> None:
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            for index in alive:
                self.worker(index, self.board.slot(index).state)
            self.watch.tick(self.now)


def test_ready_is_said_when_all_serve(manager: Manager, notify_socket: str) -> None:
    stage = Stage(notify_socket)
    stage.tick(5)
    stage.worker(0, State.SERVING)
    stage.worker(1, State.STARTING)
    stage.tick(5, 0, 1)
    assert stage.served == 1
    assert manager.heard() == []
    stage.worker(1, State.SERVING)
    stage.tick(5, 0, 1)
    assert manager.heard()[0] == {"READY": "1"}
    assert manager.count("READY") == stage.served == 1


def test_one_that_cannot_start_does_not_hold_the_others_up(manager: Manager, notify_socket: str) -> None:
    stage = Stage(notify_socket)
    stage.worker(0, State.SERVING)
    stage.worker(1, State.STARTING)
    stage.tick(READY_SECONDS, 0, 1)
    assert manager.count("READY") == 0
    stage.tick(1, 0, 1)
    assert manager.count("READY") == 1


@pytest.mark.logs("worker_hung")
def test_the_watchdog_barks_for_a_stuck_worker_alone(manager: Manager, notify_socket: str) -> None:
    stage = Stage(notify_socket, watchdog="2000000")
    stage.worker(0, State.SERVING)
    stage.worker(1, State.SERVING)

    def told(seconds: float, *alive: int) -> int:
        before = manager.count("WATCHDOG")
        stage.tick(seconds, *alive)
        return manager.count("WATCHDOG") - before

    assert 9 <= told(10, 0, 1) <= 11
    # Stuck: at most one more, which was due before that could be known.
    assert told(10, 0) <= 1
    assert 9 <= told(10, 0, 1) <= 11
    for state in (State.DRAINING, State.STARTING, State.GONE):
        stage.worker(1, state)
        assert 9 <= told(10, 0) <= 11, state
    # Everything stops: the parent's own deadline holds.
    stage.worker(1, State.SERVING)
    stage.board.stopping = True
    assert 9 <= told(10, 0) <= 11


# The daemon


@asynchronous
async def test_a_life_under_systemd(manager: Manager, notify_socket: str, redis_server: RedisServer) -> None:
    with Daemon(
        "[server]\ndrain_seconds = 1s\n", workers=2, redis=redis_server.url, NOTIFY_SOCKET=notify_socket
    ) as daemon:
        ready = manager.position("READY")
        assert len(daemon.events("worker_serving")) == 2
        async with Client(daemon.ws_url):
            until(lambda: "workers: 2, connections: 1," in manager.status())
            assert manager.status().endswith("Redis: up")
            (daemon.place / "bcast.ini").write_text("[server]\nport = nonsense\n")
            daemon.signal(signal.SIGHUP)
            reloading = manager.position("RELOADING", ready)
            assert abs(int(manager.heard()[reloading]["MONOTONIC_USEC"]) / 1e6 - time.monotonic()) < 10
            daemon.expect("reload_failed")
            ready = manager.position("READY", reloading)
            assert daemon.events("reload_failed")
        (daemon.place / "bcast.ini").write_text("[server]\ndrain_seconds = 1s\n[limits]\nrate = 7\n")
        daemon.signal(signal.SIGHUP)
        ready = manager.position("READY", manager.position("RELOADING", ready))
        assert not daemon.events("replacing")
        daemon.signal(signal.SIGHUP)
        ready = manager.position("READY", manager.position("RELOADING", ready))
        assert len(daemon.events("worker_left")) == 2 and daemon.events("replaced")
        until(lambda: manager.status().startswith("workers: 2"))
        pid = daemon.pid
        daemon.stop()
        stopping = manager.position("STOPPING", ready)
        assert int(manager.heard()[stopping]["EXTEND_TIMEOUT_USEC"]) >= 5_000_000
    assert manager.senders == {pid}, "only the parent tells"


def test_a_stopped_worker_is_found_and_a_dead_one_is_none(
    manager: Manager, notify_socket: str, redis_server: RedisServer
) -> None:
    options = {"NOTIFY_SOCKET": notify_socket, "WATCHDOG_USEC": "1000000"}
    with Daemon(workers=2, redis=redis_server.url, **options) as daemon:  # type: ignore[arg-type]
        until(lambda: manager.count("WATCHDOG") >= 3)
        victim = daemon.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        before = manager.count("WATCHDOG")
        # Longer than the watchdog waits: a real systemd would have ended the service.
        until(lambda: time.monotonic() - stopped > 1.6)
        assert manager.count("WATCHDOG") - before <= 1
        os.kill(victim, signal.SIGCONT)
        until(lambda: manager.count("WATCHDOG") - before >= 3)
        daemon.expect("worker_died", "worker_pausing")
        told = longest_silence(manager, lambda: os.kill(victim, signal.SIGKILL))
        assert daemon.events("worker_died")
        assert told < 1


def longest_silence(manager: Manager, act: Callable[[], object]) -> float:
    """How long the watchdog was not fed at most, in the 2 s after something was done."""
    act()
    begun = last = time.monotonic()
    longest, seen = 0.0, manager.count("WATCHDOG")
    while time.monotonic() - begun < 2:
        time.sleep(0.01)
        if manager.count("WATCHDOG") > seen:
            seen, now = manager.count("WATCHDOG"), time.monotonic()
            longest, last = max(longest, now - last), now
    return max(longest, time.monotonic() - last)


@asynchronous
async def test_a_redis_that_is_away_restarts_nothing(manager: Manager, notify_socket: str) -> None:
    options = {"NOTIFY_SOCKET": notify_socket, "WATCHDOG_USEC": "1000000"}
    with RedisServer(next(iter(binaries().values()))) as redis:
        with Daemon(workers=2, redis=redis.url, **options) as daemon:  # type: ignore[arg-type]
            daemon.expect("redis_down", "sessions_unsaved")
            workers = daemon.workers()
            async with Client(daemon.ws_url) as one, Client(daemon.ws_url) as two:
                assert longest_silence(manager, redis.stop) < 1
                until(lambda: manager.status().endswith("Redis: down"))
                assert daemon.get("/health")[1]["redis"] == "down"
                assert await one.is_alive() and await two.is_alive()
                assert daemon.workers() == workers
                redis.start()
                until(lambda: manager.status().endswith("Redis: up"), 15)
                assert await one.is_alive() and await two.is_alive()


# Socket activation


@asynchronous
async def test_a_restart_loses_no_connection_attempt(redis_server: RedisServer, tmp_path: Path) -> None:
    """The sockets are systemd's, so who comes in between waits for the new daemon."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "sock"))
        unix.listen()
        ini = "[server]\ndrain_seconds = 2s\n[channel crowd.*]\npersistent = yes\n"
        daemon = Daemon(ini, workers=2, redis=redis_server.url, PORT="1", BIND="192.0.2.1")
        with daemon.hand_over(tcp, unix):
            assert daemon.port == tcp.getsockname()[1]
            (line,) = daemon.events("socket_activation")
            assert "2 sockets; [server] bind and port are not used" in line["message"]
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(5)
                connection.connect(str(tmp_path / "sock"))
                connection.sendall(b"GET /health/live HTTP/1.0\r\nHost: localhost\r\n\r\n")
                assert b" 200 " in connection.recv(4096)
            async with Crowd(daemon.url, 100, channels=10) as crowd:
                async with crowd.publishing(50), crowd.probing():
                    await asyncio.sleep(0.5)
                    daemon.signal(signal.SIGTERM)
                    assert await asyncio.to_thread(daemon.wait) == 0
                    await asyncio.to_thread(daemon.start)
                    await crowd.all_here(10)
                await crowd.catch_up()
            crowd.report("restart under a socket unit", 0)
            assert not crowd.wrong, crowd.wrong[:5]
            assert not set(crowd.counts) - {"received", "received again"}, "somebody was refused or cut off"
            assert len(crowd.goodbyes) == 100 and max(wait for _, wait in crowd.goodbyes) <= 2
