"""A Debian 12 machine for tests: made by debootstrap once, booted by systemd-nspawn with a real systemd.

    prepare()
    with Machine() as machine:
        machine.run("systemctl", "is-active", "tornado-bcast")

What is made stays in var/systemd-test/: the tree, which is never written to (each boot has an overlay in
memory above it), and the wheels that are installed in it without a network. A machine has a network of its
own, with nothing but loopback; the test's process enters it, so its clients come from there. Needs root.
"""

import ctypes
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from daemon import ROOT, until

from tornado_bcast.brokers.embedded import die_with_parent

PLACE = ROOT / "var/systemd-test"
# What the tree has besides Debian's minimum. Its Python is 3.11.
PACKAGES = "systemd,systemd-sysv,dbus,make,python3,python3-venv,gcc,libc6-dev,python3-dev"
PYTHON = "3.11"
TREE = PLACE / f"debian-12-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]}"
WHEELS = PLACE / "wheels"
# Of the wheels that Debian 12 (glibc 2.36) takes.
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34")
BOOT_SECONDS = 60.0
_CLONE_NEWNET = 0x40000000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def say(text: str) -> None:
    print(f"-- {text}", file=sys.__stderr__, flush=True)


def prepare() -> None:
    """Make what stays between runs: the programs of this machine, the tree and the wheels."""
    assert os.geteuid() == 0, "systemd-nspawn needs root"
    if not (shutil.which("debootstrap") and shutil.which("systemd-nspawn")):
        say("installing debootstrap and systemd-container")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in ("update", "install -y --no-install-recommends debootstrap systemd-container"):
            _do("apt-get", "-qq", *command.split(), seconds=300, env=environment)
    _make_tree()
    _fetch_wheels()


def _make_tree() -> None:
    if TREE.exists():
        return
    say(f"making {TREE.relative_to(ROOT)}, once; one or two minutes")
    half = TREE.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    _do("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(half), seconds=900)
    half.rename(TREE)


def _fetch_wheels() -> None:
    """The package's dependencies, and what builds it, for the Python of the tree."""
    lock = (ROOT / "requirements.lock").read_text()
    stamp = WHEELS / hashlib.sha256(lock.encode()).hexdigest()
    if stamp.exists():
        return
    say("fetching wheels")
    shutil.rmtree(WHEELS, ignore_errors=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_{os.uname().machine}")]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
    pip = [sys.executable, "-m", "pip", "-q", "download", "-d", str(WHEELS)]
    # Without their conditions, which pip would judge by the Python that runs it.
    pinned = re.findall(r"^[\w.-]+==[\w.]+", lock, re.MULTILINE)
    _do(*pip, *target, "--no-deps", *pinned, "setuptools>=64", "wheel", seconds=300)
    stamp.touch()


def _do(*command: str, seconds: float, **options: object) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"


class Machine:
    """One boot of the tree. The clone is at /src, the wheels at /wheels, both read-only."""

    def __init__(self) -> None:
        self._nspawn: subprocess.Popen[bytes] | None = None
        # The pid of its first process, as it is known outside.
        self.pid = 0
        # This process's own network, while it is in that of the machine.
        self._home = -1

    def __enter__(self) -> Self:
        say("booting")
        with (PLACE / "console.log").open("wb") as console:
            self._nspawn = subprocess.Popen(
                [
                    *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"),
                    *("--directory", str(TREE), "--volatile=overlay", "--private-network"),
                    *("--machine", f"bcast-{os.getpid()}"),
                    f"--bind-ro={ROOT}:/src",
                    f"--bind-ro={WHEELS}:/wheels",
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                # When this process is killed so is nspawn, and with it the machine.
                preexec_fn=partial(die_with_parent, os.getpid()),
            )
        try:
            until(self._is_up, BOOT_SECONDS)
            self._enter_network()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, (PLACE / "console.log").read_text(errors="replace")
        pid = self._nspawn.pid
        # The first child only prepares; it makes the one that stays.
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            self.pid = int(child)
        return bool(self.pid) and self.status("systemctl", "is-system-running") == 0

    def _enter_network(self) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        inside = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        _set_network(inside)
        os.close(inside)

    def _end(self) -> None:
        """Power it off; where that does not help, nspawn takes all its processes with it."""
        if self._home >= 0:
            _set_network(self._home)
            os.close(self._home)
            self._home = -1
        if self._nspawn is None:
            return
        if self.pid and self._nspawn.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGRTMIN + 4)
        try:
            self._nspawn.wait(60)
        except subprocess.TimeoutExpired:
            say("it does not power off, and is killed")
            self._nspawn.kill()
            self._nspawn.wait(10)
        self._nspawn = None

    # What is done inside, as root.

    def _start(self, *command: str, stdin: str, seconds: float) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*("nsenter", "--all", "--target", str(self.pid), "env", "-i"), f"PATH={_PATH}", *command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )

    def status(self, *command: str, seconds: float = 60) -> int:
        """The exit code of a command."""
        return self._start(*command, stdin="", seconds=seconds).returncode

    def run(self, *command: str, stdin: str = "", seconds: float = 60) -> str:
        """What a command prints, errors as well; it must exit with 0."""
        done = self._start(*command, stdin=stdin, seconds=seconds)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}"
        return done.stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file, with the owner and the mode that it has or that root's umask gives."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, stdin=text)

    def outside(self, path: str) -> str:
        """The path by which a file of the machine is reached from here."""
        return f"/proc/{self.pid}/root{path}"


def _set_network(descriptor: int) -> None:
    """setns(2), which Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
