"""The image, built without a Docker engine: buildah on a base made by debootstrap.

Both are kept in var/image-test, as are the logs. The base is named as the Dockerfile's `BASE` says. What a
build in a closed network needs (certificates, the settings of apt and pip) is lent by volumes, so that the
image has none of it. It needs root; every command has its deadline, and ends with all its children.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from daemon import ROOT

PLACE = ROOT / "var/image-test"
IMAGE = "tornado-bcast:image-test"
# The longest steps, in seconds.
BASE_SECONDS = 400
BUILD_SECONDS = 600


def run(*command: str | Path, seconds: float = 60, log: Path | None = None) -> str:
    """What a command prints, or what it writes into `log`. At the deadline it ends with all its children."""
    with ExitStack() as stack:
        out = stack.enter_context(log.open("w")) if log else subprocess.PIPE
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if log else None,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            printed = process.communicate(timeout=seconds)[0] or ""
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if process.returncode:
        end = "\n".join(log.read_text().splitlines()[-15:]) if log else ""
        raise AssertionError(f"{command[0]} ended with {process.returncode}\n{end}")
    return printed.strip()


def buildah(*arguments: str | Path, seconds: float = 60, log: Path | None = None) -> str:
    # vfs works everywhere, and needs no module of the kernel.
    place = ("--storage-driver", "vfs", "--root", PLACE / "storage", "--runroot", PLACE / "run")
    return run("buildah", *place, *arguments, seconds=seconds, log=log)


# The image


def base_name() -> str:
    found = re.search(r"^ARG BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def make_base() -> str:
    """The base image, unless an earlier run has made it: Debian by debootstrap, without manuals."""
    name = base_name()
    names = buildah("images", "--format", "{{.Name}}:{{.Tag}}").splitlines()
    if f"docker.io/library/{name}" in names:
        return f"{name}, kept from an earlier run"
    tree = PLACE / "base"
    shutil.rmtree(tree, ignore_errors=True)
    suite = name.partition(":")[2].removesuffix("-slim")
    run("debootstrap", "--variant=minbase", suite, tree, seconds=BASE_SECONDS, log=PLACE / "base.log")
    # The official slim images have none of these either.
    for rest in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / rest, ignore_errors=True)
        (tree / rest).mkdir()
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, tree, "/", seconds=120)
    buildah("commit", "--quiet", "--format", "docker", "--rm", container, name, seconds=120)
    shutil.rmtree(tree)
    return f"{name}, made by debootstrap"


def lent() -> Iterator[str]:
    """The options that lend this machine's certificates and settings to the steps of the build."""
    place = PLACE / "lent"
    place.mkdir(exist_ok=True)
    (place / "apt.conf").write_text(run("apt-config", "dump", "Acquire") + "\n")
    settings = ["[global]", "cert = /etc/lent.crt"]
    index = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True
    )
    settings += [f"index-url = {index.stdout.strip()}"] * (index.returncode == 0)
    (place / "pip.conf").write_text("\n".join(settings) + "\n")
    for path, inside in (
        (place / "apt.conf", "/etc/apt/apt.conf.d/99lent"),
        (place / "pip.conf", "/etc/pip.conf"),
        (Path("/etc/ssl/certs/ca-certificates.crt"), "/etc/lent.crt"),
    ):
        yield from ("--volume", f"{path}:{inside}:ro")


def build() -> str:
    """Build the image anew, on the base that is there; its size."""
    options = ("--isolation", "chroot", "--pull-never", "--format", "docker")
    buildah("bud", *options, *lent(), "--tag", IMAGE, ROOT, seconds=BUILD_SECONDS, log=PLACE / "build.log")
    # What the runs before have left.
    buildah("rmi", "--prune")
    lines = buildah("images", "--format", "{{.Tag}} {{.Size}}").splitlines()
    sizes = {tag: size.strip() for tag, size in (line.split(" ", 1) for line in lines)}
    return f"{sizes['image-test']}, of which the base has {sizes[base_name().partition(':')[2]]}"


def settings_of_image() -> dict[str, Any]:
    """What `docker inspect` would show under `Config`."""
    settings: dict[str, Any] = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    return settings


def variables_of(settings: dict[str, Any]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in settings["Env"])


@contextmanager
def mounted() -> Iterator[Path]:
    """The file system of the image."""
    container = buildah("from", "--pull-never", IMAGE, seconds=120)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("umount", container)
        buildah("rm", container)
