"""systemd's protocol: what a service tells its manager, and the sockets that it is handed.

Owns the environment variables of both, which are read once and taken away, for they are not for children.
Without systemd there are none, and nothing is sent.

    notifier = Notifier()
    notifier.send(READY=1, STATUS="2 workers serve")

Sources: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).
"""

import logging
import os
import socket
from collections.abc import MutableMapping

from .errors import ConfigError

logger = logging.getLogger(__name__)

# The first descriptor that systemd hands over (SD_LISTEN_FDS_START).
_LISTEN_FDS_START = 3
# Seconds that a datagram may wait for room in systemd's queue.
_SEND_SECONDS = 1.0


class Notifier:
    """One process's way to `NOTIFY_SOCKET`. To be used by the process that systemd has started, no other."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        # An `@` stands for the NUL of an abstract address (unix(7)).
        self._address = "\0" + path[1:] if path.startswith("@") else path
        # Seconds after which systemd takes a service that is silent for stuck; None: it does not look.
        self.watchdog = _watchdog(environ)

    def send(self, **fields: object) -> None:
        """Send the fields as one datagram of `NAME=value` lines. What cannot be sent is logged."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_SECONDS)
                sock.sendto(text.encode(), self._address)
        except OSError as error:
            logger.warning(
                "systemd cannot be told %s: %s", ", ".join(fields), error, extra={"event": "notify_failed"}
            )


def _watchdog(environ: MutableMapping[str, str]) -> float | None:
    microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or not int(microseconds) or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6


def inherited_sockets(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening sockets that systemd hands over, of whatever family; none where it does not."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    sockets = []
    for fd in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)):
        os.set_inheritable(fd, False)
        try:
            sock = socket.socket(fileno=fd)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ConfigError([f"descriptor {fd} from systemd is no socket: {error.strerror}"]) from error
        if not listens:
            raise ConfigError([f"descriptor {fd} from systemd does not listen: the unit needs Accept=no"])
        sockets.append(sock)
    return sockets
