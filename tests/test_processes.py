"""Real processes: who gets a connection, what a dead or stuck worker costs, and that nothing is left behind.

Each test starts tests/tiny_daemon.py, on a free port and with its own data, and looks at it from outside: at
its sockets, its exit code, its log and the process table. Nothing waits for a fixed time; `until` polls.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from daemon import until
from redis_server import RedisServer

SCRIPT = Path(__file__).with_name("tiny_daemon.py")
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
# A masked, empty close frame (RFC 6455, section 5.5.1).
CLOSE_FRAME = b"\x88\x80\x00\x00\x00\x00"
# What a new connection may wait for its answer, in seconds (issue 2).
LONGEST_WAIT = 1.0


class Tiny:
    """One running daemon of tiny_daemon.py."""

    def __init__(self, directory: Path, **sections: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        sections["server"] = {"workers": "2", "port": "0", **sections.get("server", {})}
        self.bind = sections["server"].get("bind", "127.0.0.1")
        self._log = directory / f"log{random.getrandbits(40)}"
        self._arguments = [sys.executable, "-W", "error", str(SCRIPT), json.dumps(sections), str(directory)]
        self._seen: set[int] = set()

    def start(self, *prefix: str, **options: Any) -> "Tiny":
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        return self

    def wait_until_serving(self) -> "Tiny":
        until(lambda: self.events("serving") or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()
        until(lambda: all(slot["state"] == 2 for slot in self.slots()))
        return self

    @property
    def port(self) -> int:
        return int(self.events("serving")[0]["message"].split(" with ")[0].rpartition(":")[2])

    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log().splitlines(keepends=True) if line[-1] == "\n"]
        return [line for line in lines if line["event"] == name]

    def connect(self) -> socket.socket:
        return socket.create_connection((self.bind, self.port), timeout=10)

    def get(self, path: str) -> bytes:
        with self.connect() as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: test\r\n\r\n".encode())
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            assert b" 200 " in head, head
            return body

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.get("/slots"))
        return state

    def slots(self) -> list[dict[str, Any]]:
        slots: list[dict[str, Any]] = self.state()["slots"]
        return slots

    def workers(self) -> list[int]:
        return [slot["pid"] for slot in self.slots()]

    def web_socket(self) -> socket.socket:
        connection = self.connect()
        connection.sendall(HANDSHAKE)
        assert b" 101 " in connection.recv(4096)
        return connection

    def family(self) -> set[int]:
        """All processes below the parent. What was seen once is watched until the end of the test."""
        self._seen |= descendants(self.process.pid)
        return self._seen

    def stop(self, number: int = signal.SIGTERM, seconds: float = 10) -> float:
        """Send the signal to the parent and wait until nobody of the family is left; how long it took."""
        family = self.family()
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(seconds)
        until(lambda: all(gone(pid) for pid in family), 5)
        return time.monotonic() - begun

    def kill(self) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def descendants(pid: int) -> set[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return set()
    return set(children).union(*map(descendants, children))


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.fixture
def tiny(tmp_path: Path, redis_server: RedisServer) -> Iterator[Callable[..., Tiny]]:
    """Makes daemons. Unless told otherwise they have a Redis, though their application does not use it."""
    daemons: list[Tiny] = []

    def new(**sections: dict[str, Any]) -> Tiny:
        sections.setdefault("redis", {"url": redis_server.url})
        daemons.append(Tiny(tmp_path, **sections))
        return daemons[-1]

    yield new
    for daemon in daemons:
        daemon.kill()
        assert "Traceback" not in daemon.log(), daemon.log()


def embedded(tmp_path: Path) -> dict[str, dict[str, str]]:
    return {"redis": {"url": "embedded:", "data_dir": str(tmp_path / "data")}}


def redis(daemon: Tiny, *words: str) -> bytes:
    """One command to the embedded server."""
    request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(unquote(urlsplit(daemon.get("/redis").decode()).path))
        connection.sendall(request.encode())
        return connection.recv(4096)


def embedded_pid(daemon: Tiny) -> int:
    (pid,) = descendants(daemon.process.pid) - set(daemon.workers())
    return pid


class Prober(threading.Thread):
    """A new connection with one request each 20 ms; how long each took to be answered.

    `act` runs something between two of them, so that no answer is due when a worker dies of it: what a dead
    worker had in hand is lost, what comes next must not be.
    """

    def __init__(self, daemon: Tiny, hold: int = 0) -> None:
        super().__init__()
        self._address = (daemon.bind, daemon.port)
        # How many connections to keep open.
        self._held: list[socket.socket] = []
        self._hold = hold
        self._between = threading.Lock()
        self._over = threading.Event()
        self.waits: list[float] = []
        self.failures: list[Exception] = []

    def run(self) -> None:
        while not self._over.wait(0.02):
            with self._between:
                begun = time.monotonic()
                try:
                    connection = socket.create_connection(self._address, timeout=10)
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
                    assert connection.recv(4096).startswith(b"HTTP/1.1 200")
                except (OSError, AssertionError) as error:
                    self.failures.append(error)
                    continue
                self.waits.append(time.monotonic() - begun)
                self._held.append(connection)
            while len(self._held) > self._hold:
                self._held.pop(0).close()

    def act(self, action: Callable[[], Any]) -> None:
        with self._between:
            action()

    def __enter__(self) -> "Prober":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()
        for connection in self._held:
            connection.close()

    def check(self, label: str, at_least: int) -> None:
        print(f"{label}: {len(self.waits)} connections, worst wait {max(self.waits) * 1000:.0f} ms")
        assert not self.failures
        assert len(self.waits) >= at_least
        assert max(self.waits) < LONGEST_WAIT


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Who gets a connection, and when it is given back.


@pytest.mark.parametrize("workers", [2, 4])
def test_three_thousand_connections_are_shared_evenly(tiny: Callable[..., Tiny], workers: int) -> None:
    daemon = tiny(server={"workers": str(workers)}).start().wait_until_serving()
    with descriptors(4096):
        clients: list[socket.socket] = []
        # Bursts of all sizes: one by one, and as after a restart.
        while len(clients) < 3000:
            burst = [
                daemon.connect() for _ in range(min(random.choice((1, 7, 50, 300)), 3000 - len(clients)))
            ]
            for client in burst:
                client.sendall(HANDSHAKE)
            for client in burst:
                assert b" 101 " in client.recv(4096)
            clients += burst
        state = daemon.state()
        counts = [slot["connections"] for slot in state["slots"]]
        print("connections of each worker:", counts)
        # The one that asks is counted as well.
        assert sum(counts) == state["peers"] == 3001
        mean = statistics.mean(counts)
        assert max(abs(count - mean) for count in counts) <= 0.05 * mean
        for client in clients:
            client.close()
        until(lambda: daemon.state()["peers"] == 1)
    until(lambda: sum(slot["connections"] for slot in daemon.slots()) == 1)


def reset(connection: socket.socket) -> None:
    """End it by RST (socket(7), SO_LINGER)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def close_handshake(connection: socket.socket) -> None:
    connection.sendall(CLOSE_FRAME)
    assert connection.recv(2)[:1] == b"\x88"
    connection.close()


def half_a_frame(connection: socket.socket) -> None:
    connection.sendall(b"\x81\xfe\xff")
    connection.close()


def bad_frame(connection: socket.socket) -> None:
    connection.sendall(b"\xff\x80\x00\x00\x00\x00")
    assert connection.recv(1) == b""
    connection.close()


@pytest.mark.parametrize("tls", [False, True])
def test_every_way_to_leave_is_counted(tiny: Callable[..., Tiny], tmp_path: Path, tls: bool) -> None:
    if tls and shutil.which("openssl") is None:
        pytest.skip("TLS is NOT tested here: no openssl command to make a certificate with")
    server = make_certificate(tmp_path) if tls else {}
    daemon = tiny(server={"workers": "1", **server}, limits={"handshake_timeout": "300ms"}).start()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    until(lambda: daemon.events("serving"))

    def connect() -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", daemon.port), timeout=10)
        return context.wrap_socket(plain) if tls else plain

    def ask(request: bytes) -> bytes:
        with connect() as connection:
            connection.sendall(request)
            return read_all(connection)

    def counts() -> tuple[int, int]:
        state = json.loads(ask(b"GET /slots HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2])
        return state["slots"][0]["connections"], state["peers"]

    for leave in (close_handshake, reset, half_a_frame, bad_frame, socket.socket.close):
        clients = [connect() for _ in range(5)]
        for client in clients:
            client.sendall(HANDSHAKE)
            assert b" 101 " in client.recv(4096)
        until(lambda: counts() == (6, 6))
        for client in clients:
            leave(client)
        until(lambda: counts() == (1, 1))

    # HTTP: kept alive and left, in the middle of an answer, of a request, and never a word (of TLS either).
    kept = connect()
    for _ in range(2):
        kept.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert b" 200 " in kept.recv(4096)
    waiting = connect()
    waiting.sendall(b"GET /?sleep=60 HTTP/1.1\r\nHost: test\r\n\r\n")
    halfway = connect()
    halfway.sendall(b"GET / HTTP/1.1\r\nHost:")
    silent = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(5)]
    until(lambda: counts() == (9, 9))
    kept.close()
    waiting.close()
    halfway.close()
    until(lambda: counts() == (1, 1))
    for connection in silent:
        assert connection.recv(1) == b"", "the handshake timeout closes it"
        connection.close()


def make_certificate(directory: Path) -> dict[str, str]:
    files = {"certfile": str(directory / "cert.pem"), "keyfile": str(directory / "key.pem")}
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2".split()
    command += ["-out", files["certfile"], "-keyout", files["keyfile"]]
    subprocess.run(command, check=True, capture_output=True)
    return files


# What a dead, starting or stuck worker costs the others' clients.


def test_a_new_connection_never_waits_for_a_dead_worker(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    with Prober(daemon, hold=50) as prober:
        for round_ in range(4):
            until(lambda n=round_: len(prober.waits) >= 30 * (n + 1))
            victim = daemon.workers()[round_ % 2]
            prober.act(lambda pid=victim: os.kill(pid, signal.SIGKILL))
            until(lambda pid=victim: gone(pid) and pid not in daemon.workers())
            until(lambda: all(slot["state"] == 2 for slot in daemon.slots()))
        until(lambda: len(prober.waits) >= 150)
    # The connections that a victim held are gone with it; no new one was refused or late.
    prober.check("a worker killed four times", 150)
    assert daemon.state()["restarts"] == 4
    assert len(daemon.events("worker_died")) == 4


def test_a_new_connection_never_waits_for_a_starting_worker(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    (daemon.directory / "slow").write_text("2")
    victim = daemon.workers()[1]
    with Prober(daemon, hold=100) as prober:
        until(lambda: len(prober.waits) >= 20)
        prober.act(lambda: os.kill(victim, signal.SIGKILL))
        until(lambda: daemon.slots()[1]["state"] == 1)
        until(lambda: daemon.slots()[1]["state"] == 2)
    prober.check("a worker that takes 2 s to start", 80)


def test_a_new_connection_never_waits_for_a_stopped_worker(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    with Prober(daemon, hold=300) as prober:
        until(lambda: len(prober.waits) >= 50)
        # The one with fewest: until it is known not to live, the other must not go far above it.
        slots = daemon.slots()
        index = min((0, 1), key=lambda n: slots[n]["connections"])
        prober.act(lambda: os.kill(slots[index]["pid"], signal.SIGSTOP))
        until(lambda: len(prober.waits) >= 200)
        prober.act(lambda: os.kill(slots[index]["pid"], signal.SIGCONT))
        # Now it takes all that come.
        before = daemon.slots()[index]["connections"]
        until(lambda: daemon.slots()[index]["connections"] > before + 20)
    prober.check("a worker stopped for 3 s", 200)
    assert daemon.workers() == [slot["pid"] for slot in slots]


def test_a_worker_that_hangs_is_reported(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny(constants={"HUNG_SECONDS": 1}).start().wait_until_serving()
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    until(lambda: daemon.events("worker_hung"))
    assert str(victim) in daemon.events("worker_hung")[0]["message"]
    os.kill(victim, signal.SIGCONT)
    until(lambda: daemon.events("worker_heard"))


def test_the_pauses_of_a_crash_loop_grow(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    (daemon.directory / "crash").touch()
    os.kill(daemon.workers()[0], signal.SIGKILL)
    until(lambda: len(daemon.events("worker_pausing")) >= 5)
    for n, event in enumerate(daemon.events("worker_pausing")[:5]):
        match = re.search(r"(\d+) in a row .* ([\d.]+) s", event["message"])
        assert match and int(match[1]) == n + 1
        assert 0.05 * 2**n - 0.01 <= float(match[2]) <= 0.1 * 2**n + 0.01
    assert daemon.get("/") == str(daemon.workers()[1]).encode(), "the other one serves"
    # A stop does not wait for the end of a pause.
    until(lambda: len(daemon.events("worker_pausing")) >= 6)
    assert daemon.stop() < 1
    assert daemon.process.returncode == 0


# The end of everything.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all(tiny: Callable[..., Tiny], tmp_path: Path, number: signal.Signals) -> None:
    daemon = tiny(**embedded(tmp_path)).start(start_new_session=True).wait_until_serving()
    clients = [daemon.web_socket() for _ in range(20)]
    idle = daemon.connect()
    idle.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
    assert b" 200 " in idle.recv(4096)
    assert len(daemon.family()) == 3
    if number == signal.SIGINT:
        # As Ctrl-C does it: the whole process group at once.
        until(lambda: len(daemon.family()) == 3)
        os.killpg(daemon.process.pid, signal.SIGINT)
        daemon.process.wait(10)
        until(lambda: all(gone(pid) for pid in daemon.family()))
    else:
        begun = time.monotonic()
        daemon.process.send_signal(number)
        for client in clients:
            assert client.recv(4096) == b"\x88\x02\x03\xf4"  # 1012
            client.sendall(CLOSE_FRAME)
        daemon.process.wait(10)
        assert time.monotonic() - begun < 2, "nobody was waited for"
        until(lambda: all(gone(pid) for pid in daemon.family()))
    for connection in (*clients, idle):
        connection.close()
    assert daemon.process.returncode == 0
    assert [event["level"] for event in daemon.events("stopping")] == ["INFO"]
    assert "WARNING" not in daemon.log()


def test_clients_that_do_not_answer_are_not_waited_for_long(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    clients = [daemon.web_socket() for _ in range(4)]
    assert daemon.stop() < 5
    assert daemon.process.returncode == 0
    for client in clients:
        client.close()


def test_a_request_under_way_is_answered(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    connections = [daemon.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(b"GET /?sleep=0.5 HTTP/1.1\r\nHost: test\r\n\r\n")
    until(lambda: sum(slot["connections"] for slot in daemon.slots()) == 5)
    daemon.process.send_signal(signal.SIGTERM)
    for connection in connections:
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()
    daemon.process.wait(5)
    with pytest.raises(ConnectionRefusedError):
        daemon.connect()


def test_drain_delay_serves_on_for_a_while(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny(server={"drain_delay": "500ms"}).start().wait_until_serving()
    begun = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: all(slot["state"] == 3 for slot in daemon.slots()))
    assert daemon.process.wait(5) == 0
    assert 0.5 < time.monotonic() - begun < 2


def burns(pid: int) -> bool:
    """Whether a process has used up more than 0.2 s of CPU in its user mode since it was first asked."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    return ticks - _ticks.setdefault(pid, ticks) > 0.2 * os.sysconf("SC_CLK_TCK")


_ticks: dict[int, int] = {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("how", ["busy", "stopped"])
def test_a_hung_worker_leaves_no_orphan(
    tiny: Callable[..., Tiny], tmp_path: Path, how: str, number: signal.Signals
) -> None:
    daemon = tiny(**embedded(tmp_path), constants={"STOP_SECONDS": 2}).start().wait_until_serving()
    victim = daemon.workers()[0]
    assert len(daemon.family()) == 3
    connections = []
    if how == "busy":
        workers = daemon.workers()
        connections.append(daemon.connect())
        connections[-1].sendall(b"GET /hang HTTP/1.1\r\nHost: test\r\n\r\n")
        until(lambda: any([burns(pid) for pid in workers]))
    else:
        os.kill(victim, signal.SIGSTOP)
    took = daemon.stop(number)
    print(f"{how} worker, {number.name}: {took:.2f} s")
    for connection in connections:
        connection.close()
    if number == signal.SIGTERM:
        assert daemon.process.returncode == 0
        assert 2 <= took < 4
        assert len(daemon.events("worker_killed")) == 1
    else:
        assert took < 2


def test_a_second_signal_stops_at_once(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    daemon = tiny(**embedded(tmp_path)).start().wait_until_serving()
    os.kill(daemon.workers()[0], signal.SIGSTOP)
    daemon.family()
    daemon.process.send_signal(signal.SIGTERM)
    until(lambda: daemon.events("stopping"))
    assert daemon.stop(signal.SIGINT) < 1
    assert daemon.process.returncode == 0


# SIGHUP.


def test_sighup_replaces_the_workers_one_by_one(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny(server={"workers": "3"}).start().wait_until_serving()
    old = daemon.workers()
    client = daemon.web_socket()
    with Prober(daemon) as prober:
        until(lambda: len(prober.waits) >= 10)
        daemon.process.send_signal(signal.SIGHUP)
        assert client.recv(4) == b"\x88\x02\x03\xf4"
        client.sendall(CLOSE_FRAME)
        while not daemon.events("replaced"):
            assert sum(slot["state"] == 2 for slot in daemon.slots()) >= 2
        new = daemon.workers()
        enough = len(prober.waits) + 20
        until(lambda: len(prober.waits) >= enough)
    client.close()
    prober.check("three workers replaced", 30)
    assert not set(old) & set(new)
    assert len(daemon.events("worker_left")) == 3
    assert daemon.state()["restarts"] == 0
    assert "WARNING" not in daemon.log()


def test_where_no_successor_serves_the_others_stay(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    old = daemon.workers()
    (daemon.directory / "crash").touch()
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: len(daemon.events("worker_pausing")) >= 3)
    assert daemon.workers()[1] == old[1]
    assert daemon.get("/") == str(old[1]).encode()
    (daemon.directory / "crash").unlink()
    until(lambda: daemon.events("replaced"))
    assert not set(old) & set(daemon.workers())


def test_a_worker_that_is_asked_to_leave_but_stuck_is_killed(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny(server={"drain_seconds": "0s"}, constants={"GRACE_SECONDS": 1}).start().wait_until_serving()
    victim = daemon.workers()[0]
    os.kill(victim, signal.SIGSTOP)
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: daemon.events("worker_killed"))
    until(lambda: daemon.events("replaced"))
    assert victim not in daemon.workers()


def test_a_hangup_of_the_terminal_does_not_reach_the_workers(tiny: Callable[..., Tiny]) -> None:
    daemon = tiny().start().wait_until_serving()
    old = daemon.workers()
    for pid in old:
        os.kill(pid, signal.SIGHUP)
        os.kill(pid, signal.SIGINT)
    assert daemon.workers() == old
    # One that somebody tells to leave is replaced, though it left without an error.
    os.kill(old[0], signal.SIGTERM)
    until(lambda: daemon.workers()[0] != old[0])
    assert daemon.state()["restarts"] == 0


# The embedded server.


def test_a_dead_embedded_server_is_started_again(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    # The parent's clock does not find it: the death itself is told.
    constants = {"REST_SECONDS": 3600}
    daemon = tiny(**embedded(tmp_path), constants=constants).start().wait_until_serving()
    workers = daemon.workers()
    for n in range(20):
        assert redis(daemon, "SET", f"key{n}", "kept") == b"+OK\r\n"
    for round_ in range(2):
        pid = embedded_pid(daemon)
        os.kill(pid, signal.SIGKILL)
        until(lambda n=round_: len(daemon.events("embedded_back")) > n)
        assert embedded_pid(daemon) != pid
        assert redis(daemon, "GET", "key19") == b"$4\r\nkept\r\n"
    assert daemon.workers() == workers
    assert len(daemon.events("embedded_dead")) == 2
    daemon.stop()

    again = tiny(**embedded(tmp_path)).start().wait_until_serving()
    assert redis(again, "GET", "key0") == b"$4\r\nkept\r\n"


def test_a_second_daemon_waits_for_the_first_ones_server(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    first = tiny(**embedded(tmp_path)).start().wait_until_serving()
    assert redis(first, "SET", "key", "kept") == b"+OK\r\n"
    second = tiny(**embedded(tmp_path)).start()
    until(lambda: second.events("embedded_waiting"))
    assert not second.events("serving")
    first.process.kill()
    second.wait_until_serving()
    assert redis(second, "GET", "key") == b"$4\r\nkept\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_waits_can_be_stopped(
    tiny: Callable[..., Tiny], tmp_path: Path, number: signal.Signals
) -> None:
    first = tiny(**embedded(tmp_path)).start().wait_until_serving()
    second = tiny(**embedded(tmp_path)).start()
    until(lambda: second.events("embedded_waiting"))
    assert second.stop(number) < 2
    assert second.process.returncode == 0
    assert first.process.poll() is None and redis(first, "PING") == b"+PONG\r\n"


# Where it listens.


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost", "::"])
def test_it_listens_where_it_is_told(tiny: Callable[..., Tiny], bind: str) -> None:
    if bind == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    daemon = tiny(server={"bind": bind}).start()
    places = {"::": ["127.0.0.1", *["::1"] * has_ipv6()]}.get(bind, [bind])
    for daemon.bind in places:
        assert int(daemon.wait_until_serving().get("/")) in daemon.workers()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_place_that_cannot_be_had_is_told_in_one_line(tiny: Callable[..., Tiny]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        daemon = tiny(server={"port": port}).start()
        assert daemon.process.wait(10) == 1
        (event,) = daemon.events("start_failed")
        assert event["message"].startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use; ")
    for bind, word in (("192.0.2.1", "no interface here"), ("no-such-host.invalid", r"[server] bind")):
        daemon = tiny(server={"bind": bind}).start()
        assert daemon.process.wait(20) == 1
        (event,) = daemon.events("start_failed")
        assert word in event["message"]


def test_it_takes_the_sockets_of_systemd(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "sock"))
        unix.listen()
        port = tcp.getsockname()[1]

        def pass_on() -> None:
            # First out of the way, then to 3 and 4, open for the program.
            high = [os.dup2(sock.fileno(), 200 + n) for n, sock in enumerate((tcp, unix))]
            for n, fd in enumerate(high):
                os.dup2(fd, 3 + n)

        daemon = tiny().start(
            "/bin/sh",
            "-c",
            'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"',
            "sh",
            preexec_fn=pass_on,
            pass_fds=(3, 4),
        )
        until(lambda: daemon.events("serving"))
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b" 200 " in read_all(connection)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(tmp_path / "sock"))
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b" 200 " in read_all(connection)
        assert str(port) in daemon.events("serving")[0]["message"]
