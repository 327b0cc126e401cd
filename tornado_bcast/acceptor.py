"""Listening, and accepting by count: all workers share the sockets, and who has the fewest takes the next.

Owns the listening sockets, which are made before the fork, and their place in each worker's event loop. Never
reads a byte; what an accepted socket becomes is the business of `on_connection`.

No queue is bound to a worker. A connection waits in the kernel's one queue until a worker takes it, and each
worker takes some only while it has not more than a small slack above the lowest of those that live
(board.py). So a dead, stopped or leaving worker swallows nothing, and a new one fills up first. A worker
without room takes the sockets out of its loop, or every connection that is not for it would wake it.
"""

import asyncio
import errno
import logging
import os
import resource
import socket
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from .board import Board
from .errors import ConfigError
from .systemd import inherited_sockets

logger = logging.getLogger(__name__)

BACKLOG = 4096
# Bytes; the kernel takes twice as many. Left to itself it gave a reader that stops up to 4 MB.
SEND_BUFFER = 128 * 1024
# Accepted in one go, so that the loop serves others in between.
BATCH = 16
# How far above the lowest of the others a worker may be: so many connections, or this part of them. Few, so
# that a handful of clients does not end up on one core; one that lags is waited for until it is stale.
SLACK = 2
SLACK_PART = 0.02
# Seconds until a worker without room looks again, and until one without descriptors tries again.
LOOK_SECONDS = 0.01
RETRY_SECONDS = 0.25
# "Out of descriptors" is said at most this often (seconds).
SAY_AGAIN_SECONDS = 60.0

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# The connection in question is broken, the next may be well (accept(2), "Error handling").
_BROKEN = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.EPERM,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
)


def listening_sockets(
    bind: str, port: int, environ: MutableMapping[str, str] = os.environ
) -> list[socket.socket]:
    """The sockets that systemd hands over, if it does, else new ones on all addresses of `bind`."""
    sockets = inherited_sockets(environ)
    if sockets:
        logger.info(
            "systemd has handed over %d sockets; [server] bind and port are not used",
            len(sockets),
            extra={"event": "socket_activation"},
        )
    try:
        sockets = sockets or _bind(bind, port)
    except OSError as error:
        raise ConfigError([_cannot_listen(bind, port, error)]) from error
    for sock in sockets:
        # For a socket that listens already this changes the length of its queue (listen(2)).
        sock.listen(BACKLOG)
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            # Accepted sockets inherit both: frames go out when they are written, and what waits for a slow
            # reader waits where it is bounded, not in megabytes of the kernel's.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return sockets


def _bind(bind: str, port: int) -> list[socket.socket]:
    """One socket for each address. Tornado's `bind_sockets` leaves open what it has when another fails."""
    # An IPv6 socket takes no IPv4 here; for `::`, which means both, there are two.
    host = None if bind == "::" else bind
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    # IPv4 first; the same port for all, also when the kernel chooses it.
    for family, address in sorted({(row[0], row[4]) for row in found}):
        number = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(
                socket.create_server((address[0], number, *address[2:]), family=family, backlog=BACKLOG)
            )
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                missing = error  # IPv6 may be switched off, though names resolve to it.
                continue
            for sock in sockets:
                sock.close()
            raise
    if missing is not None and not sockets:
        raise missing
    return sockets


_HINTS = {
    errno.EADDRINUSE: "; another process has this port: stop it, or set [server] port (or PORT)",
    errno.EACCES: "; ports below 1024 need CAP_NET_BIND_SERVICE, or set [server] port (or PORT)",
    errno.EADDRNOTAVAIL: "; no interface here has this address: set [server] bind (or BIND)",
}


def _cannot_listen(bind: str, port: int, error: OSError) -> str:
    unknown = isinstance(error, socket.gaierror)  # Its numbers are of another kind.
    hint = "; set [server] bind (or BIND)" if unknown else _HINTS.get(error.errno or 0, "")
    reason = error.strerror if unknown else os.strerror(error.errno or 0)
    return f"cannot listen on {place(bind, port)}: {reason}{hint}"


def place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Acceptor:
    """Takes connections off `sockets` on the running loop and hands each to `on_connection(socket, address)`.

    The worker counts them on the board (`own_connections`) before `on_connection` returns. An exception
    of it is logged and costs that connection only. The board's `accepting` is written here alone.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        board: Board,
        on_connection: Callable[[socket.socket, Any], None],
        most: int,
    ) -> None:
        self._sockets = list(sockets)
        # How many connections this worker may have, so that some descriptors stay for other things.
        self._most = most
        self._board = board
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        # Whether the loop watches the sockets.
        self._watching = False
        # Runs `_look` or `_retry`; None while the sockets are watched, while paused and after `close`.
        self._timer: asyncio.TimerHandle | None = None
        # When it was last said that none are taken, and whether that still holds.
        self._said_exhausted = -SAY_AGAIN_SECONDS
        self._complained = False

    def resume(self) -> None:
        """Begin, or go on after `pause`."""
        self._board.accepting = True
        if not self._watching and self._timer is None:
            self._look()

    def pause(self) -> None:
        """Take no connections; the other workers do not wait for this one."""
        self._board.accepting = False
        self._unwatch()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Take no connections ever again. The sockets stay open in the other processes."""
        self.pause()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def _room(self) -> int:
        """How many connections this worker may take before it is too far above the others."""
        lowest = self._board.lowest(besides=self._board.index)
        if lowest is None:
            return BATCH
        slack = max(SLACK, int(lowest * SLACK_PART))
        return lowest + slack + 1 - self._board.own_connections

    def _look(self) -> None:
        self._timer = None
        if self._room() > 0:
            self._watch()
        else:
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            for sock in self._sockets:
                self._loop.add_reader(sock.fileno(), self._accept, sock)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            for sock in self._sockets:
                self._loop.remove_reader(sock.fileno())

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(min(BATCH, self._room())):
            if not self._watching:
                return  # Paused by what a connection brought about.
            if self._board.own_connections >= self._most:
                self._back_off(
                    "this worker has as many connections as it has descriptors for", exhausted=True
                )
                return
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _BROKEN:
                    continue
                self._back_off(error.strerror or str(error), exhausted=error.errno in _EXHAUSTED)
                return
            if self._complained:
                self._complained = False
                logger.info("connections are taken again", extra={"event": "accept_resumed"})
            try:
                self._on_connection(connection, address)
            except Exception:
                connection.close()
                logger.exception("a new connection could not be served", extra={"event": "connection_failed"})
        if self._watching and self._room() <= 0:
            self._unwatch()
            self._look()

    def _back_off(self, reason: str, *, exhausted: bool) -> None:
        """Leave the queue to the others for a moment; closed connections may free what is missing."""
        self.pause()
        self._timer = self._loop.call_later(RETRY_SECONDS, self._retry)
        now = self._loop.time()
        if self._complained or now - self._said_exhausted < SAY_AGAIN_SECONDS:
            return
        self._complained, self._said_exhausted = True, now
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        hint = f"; this process may have {limit} descriptors (ulimit -n, LimitNOFILE=)" if exhausted else ""
        logger.error(
            "no connections are taken for a moment: %s%s", reason, hint, extra={"event": "accept_paused"}
        )

    def _retry(self) -> None:
        self._timer = None
        self.resume()
