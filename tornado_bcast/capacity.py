"""How many connections there is room for: descriptors, the kernel's queue, memory.

Owns the descriptor limit, which the parent raises before it forks, and the sentence for the log. What is
refused when there is no room is the business of the handshake (handlers/websocket.py) and of the acceptor.
"""

import resource
from dataclasses import dataclass
from pathlib import Path

# Descriptors of a worker that are not for clients: Redis, the log, the loop, files.
_OWN_DESCRIPTORS = 40
# And those for HTTP, which comes and goes, and to tell a client that there is no room.
_PASSING_DESCRIPTORS = 60
# More are not asked for: where a container allows a billion, memory ends long before.
_MOST_DESCRIPTORS = 1 << 20
# Bytes of a connection that is open and idle, here and in the kernel (docs/PERFORMANCE.md).
_BYTES_HERE = 6_300
_BYTES_KERNEL = 4_000


def raise_descriptors() -> None:
    """Use all the descriptors that this process may have: each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            # Not as many as that; what there is will be told.
            return


def _descriptors() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def most_clients() -> int:
    """How many WebSocket connections one worker has room for."""
    limit = _descriptors()
    return max(limit - _OWN_DESCRIPTORS - _PASSING_DESCRIPTORS, limit // 2)


def most_connections() -> int:
    """How many connections of any kind one worker takes. The rest stays for Redis, should that come back."""
    limit = _descriptors()
    return max(limit - _OWN_DESCRIPTORS, limit // 2 + limit // 8)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What limits this machine; `configured` is `[server] max_connections`, 0 for as many as there may be."""

    workers: int
    configured: int
    descriptors: int
    # How many connections may wait to be accepted, as the kernel has it; None where it does not say.
    waiting: int | None
    # Bytes of memory that are free, or can be freed; None where the kernel does not say.
    memory: int | None

    @property
    def connections(self) -> int:
        return self.configured or self.workers * most_clients()

    def sentence(self) -> str:
        """For the log: what limits it, and how many connections that makes."""
        limit = "[server] max_connections" if self.configured else "descriptors"
        needed = self.connections * (_BYTES_HERE + _BYTES_KERNEL)
        text = (
            f"room for {self.connections} connections, limited by {limit}: each of {self.workers} workers"
            f" may have {self.descriptors} descriptors (ulimit -n, LimitNOFILE=)"
        )
        if self.waiting is not None:
            text += f"; {self.waiting} may wait to be accepted (somaxconn)"
        text += f"; idle they take {_megabytes(needed)} of memory, the kernel's part included"
        if self.memory is not None:
            enough = "" if needed < self.memory else ", which is TOO LITTLE: set [server] max_connections"
            text += f", and {_megabytes(self.memory)} are available{enough}"
        return text


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def measure(workers: int, configured: int, root: Path = Path("/")) -> Capacity:
    """What holds now, on this machine."""
    somaxconn = _read(root / "proc/sys/net/core/somaxconn")
    return Capacity(
        workers,
        configured,
        _descriptors(),
        int(somaxconn) if somaxconn.isdecimal() else None,
        _available_memory(root),
    )


def _available_memory(root: Path) -> int | None:
    """Of the machine, or less where this is a container with a limit of its own."""
    found: list[int] = []
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    limit, used = (_read(root / "sys/fs/cgroup" / f"memory.{name}") for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()
    except OSError:
        return ""
