"""The image, run as a container without a Docker engine: namespaces, a read-only root, the daemon as PID 1.

    with Container(root, settings, volume, BCAST_LOG_LEVEL="debug") as container:
        ... container.url, container.exec("sh", "-c", "..."), container.probe() ...

Nothing is writable but the volume; the user is the image's and has no capabilities. The network is the
host's.
"""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from builder import variables_of
from daemon import Daemon
from redis_server import free_port

# What `docker stop` waits before it kills.
STOP_SECONDS = 10

# The root as a runtime makes it, in namespaces of its own; the rest of the arguments is the command.
RUN = """
root=$1 volume=$2 user=$3 group=$4; shift 4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sys "$root/sys"
mount -t tmpfs -o mode=755 dev "$root/dev"
for name in null zero full random urandom; do
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mount --bind "$volume" "$root/var/lib/tornado-bcast"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all env -i "$@"
"""


class Container(Daemon):
    """The image, run on its mounted file system. `variables` are what `docker run -e` would give."""

    def __init__(self, root: Path, settings: dict[str, Any], volume: Path, **variables: str) -> None:
        super().__init__()
        self._root = root
        self._volume = volume
        self._settings = settings
        self._variables = variables_of(settings) | {"PORT": str(free_port()), "WORKERS": "2"} | variables

    def _command(self) -> list[str]:
        namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        place = [str(self._root), str(self._volume), *self._settings["User"].split(":")]
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        return [*namespaces, "sh", "-euc", RUN, "sh", *place, *variables, *self.command()]

    def command(self, *arguments: str) -> list[str]:
        """What runs with these arguments, or those of the image."""
        return [*self._settings["Entrypoint"], *(arguments or self._settings["Cmd"])]

    @property
    def pid(self) -> int:
        """Of its PID 1, as it is called outside."""
        assert self._process is not None
        unshare = self._process.pid
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text())

    def workers(self) -> list[int]:
        """As they are called outside, in no order."""
        return sorted(pid for pid in self.children() if " serve " in command_of(pid))

    def processes(self) -> list[int]:
        """All of its processes, which share its PID namespace."""
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        return [pid for pid in pids() if namespace_of(pid) == ours]

    def exec(self, *command: str, seconds: float = 20) -> int:
        """As `docker exec` does it; the exit code."""
        user, group = self._settings["User"].split(":")
        entering = ["nsenter", "-t", str(self.pid), "-m", "-p", "-r", "-w", "-S", user, "-G", group]
        variables = [f"{name}={value}" for name, value in self._variables.items()]
        return subprocess.run(
            [*entering, "env", "-i", *variables, *command],
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ).returncode

    def probe(self) -> int:
        """The health check of the image."""
        return self.exec(*self._settings["Healthcheck"]["Test"][1:])

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        if self._process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            assert self._process.wait(seconds) == 0, self._log.read_text()
        finally:
            self.kill()

    def kill(self) -> None:
        if self._process is not None:
            # Its PID 1 takes the whole namespace along.
            with suppress(ValueError, OSError):
                self.signal(signal.SIGKILL)
        super().kill()


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def namespace_of(pid: int) -> str | None:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return None


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
