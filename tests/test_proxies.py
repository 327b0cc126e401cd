"""conf/nginx.conf and conf/haproxy.cfg, in front of two real daemons on one Redis; and docker-compose.yml."""

import asyncio
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from broker_kit import asynchronous, until
from client import Client, eventually, http
from daemon import ROOT, Daemon
from proxies import run_haproxy, run_nginx
from redis_server import RedisServer, binaries, free_port
from websockets.exceptions import InvalidStatus

from tornado_bcast.config import default_config, load
from tornado_bcast.daemon import STOP_SECONDS
from tornado_bcast.errors import ConfigError
from tornado_bcast.values import duration

NGINX = (ROOT / "conf/nginx.conf").read_text()
HAPROXY = (ROOT / "conf/haproxy.cfg").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

INI = """
[server]
trusted_proxies = 127.0.0.1
drain_seconds = 1s
[redis]
publish_timeout = 200ms
[channels]
persistent = yes
"""


def replaced(text: str, changes: dict[str, str]) -> str:
    """The text with each of these in place of what stands there; each must."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


# The timeouts of a minute and a half, cut so that a test can outlast them.
SHORT = 2.5


class Site:
    """A proxy with the shipped configuration, but for addresses and paths, and the daemons behind it."""

    def __init__(self, stack: ExitStack, kind: str, place: Path) -> None:
        self.redis = stack.enter_context(RedisServer(next(iter(binaries().values()))))
        variables = {"BCAST_REDIS_PREFIX": "proxies", "BCAST_HEARTBEAT_INTERVAL": "500ms"}
        self.daemons = [stack.enter_context(Daemon(INI, redis=self.redis.url, **variables)) for _ in range(2)]
        self.has_checks = kind == "haproxy"
        names = {
            f"bcast-{number}:8080": f"127.0.0.1:{daemon.port}"
            for number, daemon in enumerate(self.daemons, 1)
        }
        port = free_port()
        self.log = place / "proxy.log"
        short = f"{1000 * SHORT:.0f}ms"
        if kind == "nginx":
            ours = {"listen 80;": f"listen 127.0.0.1:{port};", "/var/log/nginx/access.log": str(self.log)}
            ours |= {
                f"{name}_timeout 90s": f"{name}_timeout {short}" for name in ("proxy_read", "proxy_send")
            }
            self.url = stack.enter_context(run_nginx(replaced(NGINX, names | ours), place, port))
        else:
            ours = {"bind :80\n": f"bind 127.0.0.1:{port}\n"}
            ours |= {
                f"timeout {name} 90s": f"timeout {name} {short}" for name in ("client", "server", "tunnel")
            }
            self.url = stack.enter_context(run_haproxy(replaced(HAPROXY, names | ours), place, port))
        self.ws_url = self.url.replace("http", "ws")

    def refusals(self) -> list[dict[str, Any]]:
        return [line for daemon in self.daemons for line in daemon.events("refused")]

    def connections(self) -> list[int]:
        """Of each daemon."""
        rows = [
            {row["pid"]: row["connections"] for row in daemon.stats()["workers"]} for daemon in self.daemons
        ]
        children = [daemon.children() for daemon in self.daemons]
        return [sum(row[pid] for pid in own & row.keys()) for row, own in zip(rows, children, strict=True)]


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, request.param, tmp_path_factory.mktemp("site"))


@asynchronous
async def test_over_two_daemons(site: Site) -> None:
    """Two clients, each on a daemon of its own; both get what one of them and a request publish."""
    async with Client(site.ws_url) as one, Client(site.ws_url, "/ws") as two:
        await until(lambda: site.connections() == [1, 1])
        for client in (one, two):
            assert (await client.ask("subscribe", channel="news"))["op"] == "subscribe"
        assert (await one.ask("broadcast", channel="news", data="ws"))["op"] == "broadcast"
        answer = await http(site.daemons[0].url, "POST", "/broadcast", {"channel": "news", "data": "http"})
        assert answer.status == 200
        for client in (one, two):
            assert await client.messages(2) == ["ws", "http"]
    # Through the proxy nothing is plainly local.
    answer = await http(site.url, "POST", "/broadcast", {"channel": "news", "data": 1})
    assert answer.status == 401


@asynchronous
async def test_the_address_is_the_real_one(site: Site) -> None:
    """What the client writes into the headers itself counts for nothing."""
    request = (
        "GET /stats HTTP/1.1\r\nHost: site\r\nConnection: close\r\n"
        "X-Forwarded-For: 192.0.2.1\r\nX-Real-IP: 192.0.2.2\r\n\r\n"
    )
    with socket.create_connection(
        ("127.0.0.1", int(site.url.rpartition(":")[2])), 10, ("127.0.0.2", 0)
    ) as sock:
        sock.sendall(request.encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 401")
    await until(lambda: "127.0.0.2" in {line["remote"] for line in site.refusals()})
    assert {line["remote"] for line in site.refusals()} <= {"127.0.0.1", "127.0.0.2"}


@asynchronous
async def test_a_session_goes_on_at_the_other_daemon(site: Site) -> None:
    """Why no sticky sessions are needed. The proxy finds the one that is left at the first try."""
    async with Client(site.ws_url) as client:
        await client.ask("subscribe", channel="orders", ack=True)
        session = client.hello["session"]
        await until(lambda: sorted(site.connections()) == [0, 1])
        mine, other = site.daemons[:: 1 if site.connections()[0] else -1]
        await asyncio.to_thread(mine.stop)
        assert (await client.closed())[0] == 1012
    await http(other.url, "POST", "/broadcast", {"channel": "orders", "data": "meanwhile"})
    async with Client(site.ws_url, f"/ws?session={session}") as client:
        assert client.hello["resumed"] is True
        message = await client.message()
        assert message["data"] == "meanwhile"
    # It is secret, and the log has the path alone.
    await until(lambda: " /ws" in site.log.read_text())
    assert session not in site.log.read_text()
    await asyncio.to_thread(mine.start)


@asynchronous
async def test_heartbeats_keep_a_silent_connection(site: Site) -> None:
    async with Client(site.ws_url) as client:
        await asyncio.sleep(SHORT + 1)
        assert await client.is_alive()


@asynchronous
async def test_while_redis_is_away_nobody_is_disconnected(site: Site) -> None:
    """Not by 503s either. New clients are let in as well, unless the proxy asks who is ready."""
    for daemon in site.daemons:
        daemon.expect("redis_down", "redis_away")

    async def connects() -> bool:
        try:
            async with Client(site.ws_url):
                return True
        except InvalidStatus as refusal:
            assert refusal.response.status_code == 503
            return False

    async with Client(site.ws_url) as one, Client(site.ws_url) as two:
        await asyncio.to_thread(site.redis.stop)
        try:
            for daemon in site.daemons:
                await until(lambda daemon=daemon: daemon.get("/health/ready")[0] == 503)
                # Both daemons have refused something through the proxy, so that it may hold it against them.
                assert (await http(site.url, "GET", "/health")).status == 503
            await eventually(connects, lambda connected: connected != site.has_checks)
            assert await one.is_alive() and await two.is_alive()
        finally:
            await asyncio.to_thread(site.redis.start)
        await eventually(connects, bool)
        assert await one.is_alive() and await two.is_alive()


def test_timeouts_are_above_the_heartbeat() -> None:
    heartbeat = default_config().heartbeat
    for text, pattern in (
        (NGINX, r"^\s*proxy_(?:read|send)_timeout (\w+);"),
        (HAPROXY, r"^\s*timeout (?:client|server|tunnel) (\w+)$"),
    ):
        found = re.findall(pattern, text, re.MULTILINE)
        assert len(found) >= 2
        for given in found:
            assert duration().read(given) > heartbeat.interval + heartbeat.timeout


# docker-compose.yml: the same programs with the same environment and arguments, without containers


def variables_of_image() -> dict[str, str]:
    """What the Dockerfile's ENV sets."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return dict(
        pair.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE) for pair in line.split()
    )


class Service(Daemon):
    """A daemon of docker-compose.yml: its environment over that of the image, and the image's arguments."""

    def __init__(self, name: str, redis: str) -> None:
        super().__init__()
        service = COMPOSE["services"][name]
        assert "command" not in service and "entrypoint" not in service
        given = variables_of_image() | service["environment"]
        given["REDIS_URL"] = replaced(given["REDIS_URL"], {"redis://redis:6379": redis})
        # Two share a machine here, and the log is read by a program.
        self._variables = given | {"PORT": str(free_port()), "BCAST_LOG_FORMAT": "json"}
        del self._variables["PATH"]

    def _command(self) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "tornado_bcast.cli", "serve"]


@pytest.fixture(scope="module")
def services() -> Iterator[list[Service]]:
    """Redis with the arguments that stand there, and the daemons."""
    program, *options = COMPOSE["services"]["redis"]["command"]
    assert program == "redis-server"
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer(next(iter(binaries().values())), *options))
        url = redis.url.removesuffix("/0")
        yield [
            stack.enter_context(Service(name, url))
            for name in COMPOSE["services"]
            if name.startswith("bcast")
        ]


@asynchronous
async def test_from_one_daemon_of_compose_to_a_client_of_the_other(services: list[Service]) -> None:
    one, two = services
    async with Client(one.ws_url) as client:
        assert (await client.ask("subscribe", channel="news"))["op"] == "subscribe"
        body = {"channel": "news", "data": "hello"}
        assert (await http(two.url, "POST", "/broadcast", body)).status == 401
        assert (await http(two.url, "POST", "/broadcast", body, {"X-API-Key": "dev-key"})).status == 200
        assert (await client.message())["data"] == "hello"


@asynchronous
async def test_the_curl_line_of_the_readme(services: list[Service], tmp_path: Path) -> None:
    """By nginx, as compose has it, to a client that came by nginx."""
    if shutil.which("curl") is None:
        pytest.skip("no curl on PATH")
    (curl,) = re.findall(r"^    (curl .*dev-key.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert curl in (ROOT / "docker-compose.yml").read_text()
    port = free_port()
    ours = {f"bcast-{number}:8080": f"127.0.0.1:{daemon.port}" for number, daemon in enumerate(services, 1)}
    ours |= {"listen 80;": f"listen 127.0.0.1:{port};", "/var/log/nginx/": f"{tmp_path}/"}
    with run_nginx(replaced(NGINX, ours), tmp_path, port) as url:
        async with Client(url.replace("http", "ws")) as client:
            assert (await client.ask("subscribe", channel="news"))["op"] == "subscribe"
            command = curl.replace("http://127.0.0.1:8080", url)
            done = await asyncio.to_thread(
                subprocess.run, ["bash", "-c", command], capture_output=True, text=True, timeout=30
            )
            assert '"results"' in done.stdout, done
            assert (await client.message())["data"] == "hello"


def test_what_compose_publishes_and_how_long_it_waits() -> None:
    services = COMPOSE["services"]
    published = [port for service in services.values() for port in service.get("ports", ())]
    assert published == ["127.0.0.1:8080:80"]
    volumes = services["nginx"]["volumes"]
    assert volumes == ["./conf/nginx.conf:/etc/nginx/nginx.conf:ro"] and "listen 80;" in NGINX
    (volume,) = services["redis"]["volumes"]
    assert volume.partition(":")[0] in COMPOSE["volumes"] and volume.endswith(":/data")
    for name in ("bcast-1", "bcast-2"):
        service = services[name]
        config = load(environ=variables_of_image() | service["environment"])
        # The workers first, then, where there is one, the private server.
        assert duration().read(service["stop_grace_period"]) > config.server.drain_delay + 2 * STOP_SECONDS
        assert f"{name}:{variables_of_image()['PORT']};" in NGINX
        assert (
            service["read_only"] is True and service["depends_on"]["redis"]["condition"] == "service_healthy"
        )


def test_production_refuses_the_key_of_compose() -> None:
    variables = variables_of_image() | COMPOSE["services"]["bcast-1"]["environment"]
    assert load(environ=variables).auth.api_keys
    with pytest.raises(
        ConfigError, match="`dev-key` is known to everybody, and production takes no such key"
    ):
        load(environ=variables | {"BCAST_ENV": "production"})
