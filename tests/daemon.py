"""The real daemon for tests: `tornado-bcast serve` as a process, its log, and its end.

    with Daemon(INI, workers=2, redis=server.url) as daemon:
        ... daemon.url, daemon.ws_url ...

It runs with warnings as errors, in an environment that has nothing but what is given here, and with its data
in a directory of its own. What its log says at WARNING or above, and any line that is no JSON object (a
traceback), must have been announced by `expect`, or `check_log` fails. At its end nothing that is secret may
stand in what it has written, at DEBUG unless a test wants another level (planted.py).
"""

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

from planted import PLANTED

ROOT = Path(__file__).parents[1]
_OWN = ("BCAST_", "LISTEN_", "PORT", "BIND", "REDIS_URL", "CORS_ORIGIN", "WORKERS", "NOTIFY_SOCKET")
_prefixes = count()


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait until something is so, and return it. For tests without a loop; others have broker_kit.until."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return found


class Daemon:
    """One daemon on a free port of 127.0.0.1. `variables` are environment variables.

    In a `with` it has started, and without `ready=False` it serves. `program` are the arguments of Python in
    front of `serve`.
    """

    def __init__(
        self,
        ini: str = "",
        *,
        workers: int = 1,
        redis: str = "memory:",
        program: Sequence[str] = ("-m", "tornado_bcast.cli"),
        ready: bool = True,
        **variables: str,
    ) -> None:
        self._program = program
        self._ready = ready
        self.place = Path(tempfile.mkdtemp(prefix="bcastd"))
        self._ini = self.place / "bcast.ini"
        self._ini.write_text(ini)
        self._log = self.place / "log"
        self._variables = {
            "PORT": "0",
            "WORKERS": str(workers),
            "REDIS_URL": redis,
            # So that many daemons may share a Redis and know nothing of each other.
            "BCAST_REDIS_PREFIX": f"d{os.getpid()}-{next(_prefixes)}",
            "BCAST_LOG_FORMAT": "json",
            "BCAST_LOG_LEVEL": "debug",
            **variables,
        }
        if redis == "embedded:":
            self._variables["BCAST_REDIS_DATA_DIR"] = str(self.place / "redis")
        self.prefix = self._variables["BCAST_REDIS_PREFIX"]
        self._expected: set[str] = set()
        self._checked = 0
        self._process: subprocess.Popen[bytes] | None = None
        # A program, with its arguments, that runs the daemon.
        self._wrapper: tuple[str, ...] = ()
        # Listening sockets that it inherits.
        self._sockets: tuple[socket.socket, ...] = ()
        # As they were when last asked for.
        self._workers: list[int] = []
        # http://127.0.0.1:PORT, or https:.
        self.url = ""

    @property
    def ws_url(self) -> str:
        return "ws" + self.url.removeprefix("http")

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _command(self) -> list[str]:
        return [*self._wrapper, sys.executable, "-W", "error", *self._program, "serve", "-c", str(self._ini)]

    def wrap(self, *command: str) -> Self:
        """Have this command start it, as `prlimit --nofile=100` or `sh -c` do."""
        self._wrapper = command
        return self

    def hand_over(self, *sockets: socket.socket) -> Self:
        """Have it started as systemd starts a service with a socket unit."""
        self._sockets = sockets
        return self.wrap("/bin/sh", "-c", f'LISTEN_PID=$$ LISTEN_FDS={len(sockets)} exec "$@"', "sh")

    def _pass_on(self) -> None:
        # First out of the way, then to 3 and up.
        high = [os.dup2(sock.fileno(), 200 + number) for number, sock in enumerate(self._sockets)]
        for number, fd in enumerate(high):
            os.dup2(fd, 3 + number)

    def start(self, *, ready: bool = True) -> Self:
        """Run it until it serves; with `ready`, until `/health/ready` says so."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                env=environment | self._variables,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=self._pass_on if self._sockets else None,
                pass_fds=range(3, 3 + len(self._sockets)),
            )
        try:
            url = str(self.wait_for_log("serving")["message"]).split()[1].rstrip(",")
            self.url = url.replace("//0.0.0.0:", "//127.0.0.1:")
            # The port stays the same when it is started again.
            self._variables["PORT"] = str(self.port)
            if ready:
                until(lambda: self._health("/health/ready") == 200)
        except BaseException:
            self.kill()
            raise
        return self

    def _health(self, path: str) -> int | None:
        try:
            return self.get(path)[0]
        except OSError:
            return None

    def get(self, path: str) -> tuple[int, Any]:
        """Status and parsed body of a plain GET, without a loop."""
        connection: http.client.HTTPConnection
        if self.url.startswith("https"):
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=5, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def stats(self) -> dict[str, Any]:
        status, body = self.get("/stats")
        assert status == 200, body
        assert isinstance(body, dict)
        return body

    def children(self) -> set[int]:
        """The pids of its workers, and of the embedded server if it has one."""
        return {int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()}

    def workers(self) -> list[int]:
        """The pids of this daemon's own workers, in the order of their index."""
        children = self.children()
        if len(self._workers) < int(self._variables["WORKERS"]) or not children.issuperset(self._workers):
            rows = {row["pid"]: row["worker"] for row in self.stats()["workers"]}
            self._workers = sorted(children & rows.keys(), key=rows.__getitem__)
        return self._workers

    @contextmanager
    def only(self, worker: int) -> Iterator[None]:
        """While this lasts no other worker does anything: new connections come to this one."""
        others = [pid for index, pid in enumerate(self.workers()) if index != worker]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    # The log.

    def log(self) -> list[dict[str, Any]]:
        """Its lines; one that is no JSON object has the event `no_json`."""
        lines = []
        # The last line may be half written.
        for line in self._log.read_text(errors="replace").split("\n")[:-1]:
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                lines.append({"event": "no_json", "level": "ERROR", "message": line})
        return lines

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == event]

    def wait_for_log(self, event: str, number: int = 1, seconds: float = 15) -> dict[str, Any]:
        """The `number`th line of an event."""

        def found() -> list[dict[str, Any]]:
            assert self._process is not None
            lines = self.events(event)[number - 1 :]
            assert lines or self._process.poll() is None, self._log.read_text()
            return lines

        lines: list[dict[str, Any]] = until(found, seconds)
        return lines[0]

    def expect(self, *events: str) -> None:
        """Lines of these events at WARNING or above belong to the test."""
        self._expected.update(events)

    def check_log(self) -> None:
        """Fail on each line at WARNING or above, since the last check, that was not announced."""
        lines = self.log()
        new, self._checked = lines[self._checked :], len(lines)
        loud = [
            line
            for line in new
            if line["level"] not in ("DEBUG", "INFO") and line["event"] not in self._expected
        ]
        assert not loud, loud

    # The end.

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, seconds: float = 15) -> None:
        """End it as an operator would."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.terminate()
        try:
            assert process.wait(seconds) == 0, self._log.read_text()
        finally:
            process.kill()
            process.wait()

    def wait(self, seconds: float = 15) -> int:
        """Wait for the end that was asked for by a signal; its exit code."""
        assert self._process is not None
        process, self._process = self._process, None
        return process.wait(seconds)

    def kill(self) -> None:
        """End it as a crash would; the kernel takes its children with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def written(self) -> str:
        """All that it, its workers and its own server have written for people."""
        paths = [self._log, *self.place.glob("redis/*.log*")]
        return "".join(path.read_text(errors="replace") for path in paths)

    def __enter__(self) -> Self:
        try:
            return self.start(ready=self._ready)
        except BaseException:
            shutil.rmtree(self.place, ignore_errors=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.stop()
            if kind is None:
                self.check_log()
                leaked = PLANTED.found_in(self.written())
                assert not leaked, leaked
        finally:
            shutil.rmtree(self.place, ignore_errors=True)
