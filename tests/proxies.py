"""Real proxies for tests: Debian's nginx and HAProxy, on a port of 127.0.0.1.

    with run_nginx(text, place, port) as url:
        ...

`text` is a whole configuration that listens on the port; `place` is a directory for what the program writes.
"""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon import until
from programs import haproxy, nginx

# Where nginx keeps bodies; each of its kinds has a directive, whose default only root may write to.
_TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


@contextmanager
def run_nginx(text: str, place: Path, port: int) -> Iterator[str]:
    paths = " ".join(f"{kind}_temp_path {place}/{kind};" for kind in _TEMPORARY)
    path = place / "nginx.conf"
    path.write_text(text.replace("http {", f"http {{ {paths}", 1))
    # What the configuration says itself must not be said here again.
    ours = f"daemon off; pid {place}/nginx.pid; error_log {place}/nginx.log error;"
    with _run([nginx(), "-p", str(place), "-c", str(path), "-g", ours], place, port) as url:
        yield url


@contextmanager
def run_haproxy(text: str, place: Path, port: int) -> Iterator[str]:
    path = place / "haproxy.cfg"
    path.write_text(text)
    # -db: in the foreground; -dW: a warning is an error.
    with _run([haproxy(), "-db", "-dW", "-f", str(path)], place, port) as url:
        yield url


@contextmanager
def _run(command: list[str], place: Path, port: int) -> Iterator[str]:
    with (place / "proxy.log").open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: _answers(port) or _has_ended(process, place))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def _has_ended(process: "subprocess.Popen[bytes]", place: Path) -> bool:
    assert process.poll() is None, (place / "proxy.log").read_text()
    return False


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0
