"""The installed service under a real systemd: `make systemd-test`. Not a part of `make test`.

A Debian 12 machine (machine.py) gets the package by `make install`, without a network, and is looked at from
outside, by clients. Each test finds the service running with the INI below and leaves it as it likes.
"""

import asyncio
import json
import os
import re
import ssl
import textwrap
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from broker_kit import asynchronous
from client import Client, eventually, http
from crowd import Crowd
from daemon import ROOT
from machine import Machine, prepare, say
from test_processes import make_certificate

URL = "http://127.0.0.1:8080"
WS_URL = "ws://127.0.0.1:8080"
UNIT = "tornado-bcast.service"
ETC = "/etc/tornado-bcast"
INI_PATH = f"{ETC}/tornado-bcast.ini"
MANUAL = (ROOT / "docs/OPERATIONS.md").read_text()
DATA = "/var/lib/tornado-bcast"
DRAIN_SECONDS = 5.0
INI = f"""
[server]
env = production
workers = 2
drain_seconds = {DRAIN_SECONDS:.0f}s
[auth]
api_keys = file:{ETC}/api-keys
[limits]
rate = 0
[channel room.*]
persistent = yes
[channel crowd.*]
persistent = yes
"""
# How long a stop may take (5 s for the workers), and a start on this machine.
STOP_SECONDS = 5.0
START_SECONDS = 20.0
# Seconds, of the unit.
WATCHDOG = 15.0

pytestmark = pytest.mark.timeout(600)
patient = partial(asynchronous, seconds=200.0)


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    prepare()
    with Machine() as machine:
        say("make install")
        install(machine)
        yield machine
        say("powering off")


@pytest.fixture
def service(machine: Machine) -> Iterator[Machine]:
    """The machine with the service running, as it is shipped but for its INI, and without data."""
    machine.write(INI_PATH, INI)
    machine.run("sh", "-c", "rm -rf /run/systemd/system/tornado-bcast.*.d")
    machine.run("systemctl", "daemon-reload")
    both = ("tornado-bcast.socket", UNIT)
    machine.run("systemctl", "stop", *both)
    machine.run("rm", "-rf", f"{DATA}/appendonlydir")
    machine.run("systemctl", "start", *both)
    yield machine


@pytest.fixture
def key(machine: Machine) -> dict[str, str | None]:
    """The header that opens everything."""
    return {"X-API-Key": machine.run("cat", f"{ETC}/first-key")}


def install(machine: Machine) -> str:
    offline = ("PIP_NO_INDEX=1", "PIP_FIND_LINKS=/wheels")
    return machine.run("env", *offline, "make", "-C", "/src", "install", seconds=300)


def drop_in(machine: Machine, unit: str, text: str) -> None:
    """Change a unit, as `systemctl edit --runtime` does."""
    machine.write(f"/run/systemd/system/{unit}.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


def recipe(first: str) -> str:
    """The indented block of docs/OPERATIONS.md that begins with these words."""
    (block,) = re.findall(rf"\n\n((?:    .*\n)*?    {re.escape(first)}.*\n(?:    .*\n)*)", MANUAL)
    return textwrap.dedent(block)


def show(machine: Machine, name: str) -> str:
    """One property of the service."""
    return machine.run("systemctl", "show", UNIT, "--value", "-p", name)


async def state(machine: Machine) -> str:
    return await asyncio.to_thread(show, machine, "ActiveState")


def restarts(machine: Machine) -> int:
    """How often systemd itself has restarted it."""
    return int(show(machine, "NRestarts"))


def processes(machine: Machine) -> dict[int, str]:
    """Pid inside -> command, of all that belongs to the service."""
    lines = machine.run("systemd-cgls", "--no-pager", "--full", "-u", UNIT).splitlines()
    found = (re.search(r"[├└]─\s*(\d+) (.*)", line) for line in lines)
    return {int(match[1]): match[2] for match in found if match}


def workers(machine: Machine) -> list[int]:
    parent = int(show(machine, "MainPID"))
    return [pid for pid, name in processes(machine).items() if pid != parent and "valkey" not in name]


def server(machine: Machine) -> int:
    (pid,) = [pid for pid, name in processes(machine).items() if "valkey" in name]
    return pid


def journal(machine: Machine, *arguments: str) -> list[dict[str, Any]]:
    """What the processes of the service have written, each line as JSON."""
    machine.run("journalctl", "--sync")
    text = machine.run("journalctl", "-o", "cat", f"_SYSTEMD_UNIT={UNIT}", *arguments)
    return [json.loads(line) for line in text.splitlines()]


async def do(machine: Machine, *command: str) -> str:
    """The same as `machine.run`, while the clients go on."""
    return await asyncio.to_thread(machine.run, *command, seconds=120)


async def send_signal(machine: Machine, name: str, pid: int) -> None:
    # The machine has no other `kill` than that of the shell.
    await do(machine, "sh", "-c", f"kill -{name} {pid}")


@asynccontextmanager
async def attached(number: int) -> AsyncIterator[list[Client]]:
    """So many clients, subscribed to a channel."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(WS_URL)) for _ in range(number)]
        for client in clients:
            await client.ask("subscribe", channel="room.0")
        yield clients


async def says(path: str, status: int) -> bool:
    return (await http(URL, "GET", path)).status == status


@asynccontextmanager
async def busy(key: dict[str, str | None]) -> AsyncIterator[Crowd]:
    """300 clients and a new one each 20 ms, while 100 messages a second are published on persistent channels.

    At the end each client must have everything that was acknowledged, once and in order.
    """
    async with Crowd(URL, 300, channels=20, headers=key) as crowd:
        async with crowd.publishing(100), crowd.probing():
            await asyncio.sleep(1)
            yield crowd
        await crowd.catch_up()
    say(
        f"{len(crowd.acked)} acknowledged, {len(crowd.goodbyes)} sent away, {dict(crowd.counts)}, "
        f"the longest wait of {len(crowd.waits)} new clients {max(crowd.waits):.2f} s"
    )
    assert not crowd.wrong, "\n".join(crowd.wrong[:20])
    assert len(crowd.acked) > 100


# What `counts` has when nobody is refused or cut off.
CLEAN = {"received", "received again"}


# The installation


def test_who_may_read_what(machine: Machine) -> None:
    """Root, the group, and nobody else; and the daemon does not see the key itself."""
    for name in ("first-key", "api-keys", "tornado-bcast.ini"):
        assert machine.run("stat", "-c", "%U %G %a", f"{ETC}/{name}") == "root tornado-bcast 640"
        assert machine.status("runuser", "-u", "nobody", "--", "cat", f"{ETC}/{name}") != 0
        machine.run("runuser", "-u", "nobody", "-g", "tornado-bcast", "--", "cat", f"{ETC}/{name}")
    assert machine.run("cat", f"{ETC}/first-key").startswith("bk_")


def test_a_second_install_keeps_everything(machine: Machine) -> None:
    names = [f"{ETC}/{name}" for name in ("first-key", "api-keys", "tornado-bcast.ini")]
    machine.run("sh", "-c", f"echo '# mine' >>{INI_PATH}")
    before = machine.run("sha256sum", *names)
    printed = install(machine)
    assert machine.run("sha256sum", *names) == before
    assert "bk_" not in printed and f"{ETC}/first-key" in printed
    test_who_may_read_what(machine)


def test_the_units_are_sound(machine: Machine) -> None:
    """systemd has nothing to say against them, and finds little that they could do."""
    printed = machine.run("systemd-analyze", "verify", "--man=no", UNIT, "tornado-bcast.socket")
    assert printed == ""
    machine.run("systemd-analyze", "security", "--offline=true", "--threshold=20", UNIT)
    verdict = machine.run("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    say(verdict)
    assert float(re.findall(r"[\d.]+ (?=OK)", verdict)[0]) <= 2.0


# The service


@patient
async def test_start_as_shipped(machine: Machine) -> None:
    """With the INI as it is shipped: `systemctl start` returns when it is ready, embedded server included."""
    # With its part in C, which this machine has a compiler for.
    machine.run("/usr/local/lib/tornado-bcast/bin/python", "-c", "import tornado_bcast._speedups")
    began = time.monotonic()
    machine.run("systemctl", "enable", "--now", "tornado-bcast")
    say(f"started in {time.monotonic() - began:.1f} s")
    assert await says("/health/live", 200)
    await eventually(lambda: says("/health/ready", 200), bool)
    assert machine.run("systemctl", "is-active", UNIT, "tornado-bcast.socket") == "active\nactive"
    assert machine.run("systemctl", "is-enabled", UNIT, "tornado-bcast.socket") == "enabled\nenabled"
    key = machine.run("cat", f"{ETC}/first-key")
    message = {"channel": "news", "data": 1}
    assert (await http(URL, "POST", "/broadcast", message)).status == 401
    for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
        answer = await http(URL, "POST", "/broadcast", message, headers)
        assert answer.status == 200, answer
    command = f"tornado-bcast publish --key-file {ETC}/first-key news 1"
    assert json.loads(machine.run(*command.split()))["channel"] == "news"
    # Who breaks into the daemon finds no key.
    parent = show(machine, "MainPID")
    assert machine.run("cat", f"/proc/{parent}/root{ETC}/first-key") == ""


@patient
async def test_status(service: Machine) -> None:
    async def status() -> str:
        return await do(service, "systemctl", "status", "--no-pager", UNIT)

    async with attached(2):
        text = await eventually(status, lambda text: "connections: 2," in text, 15)
    say(re.findall(r"Status: .*", text)[0])
    assert re.search(r'Status: "workers: 2, connections: 2, published: .*/s, .*, Redis: up"', text), text


@patient
async def test_a_connection_starts_it(service: Machine) -> None:
    """With the socket unit alone the first connection waits, and is served."""
    service.run("systemctl", "stop", UNIT)
    assert service.status("systemctl", "is-active", UNIT) != 0
    began = time.monotonic()
    assert await says("/health/live", 200)
    say(f"answered after {time.monotonic() - began:.1f} s")
    await eventually(lambda: state(service), "active".__eq__, START_SECONDS)


@patient
async def test_restart(service: Machine, key: dict[str, str | None]) -> None:
    """Who obeys `retryAfter` is back in time and has lost nothing; no connection attempt is refused."""
    async with busy(key) as crowd:
        await do(service, "systemctl", "restart", UNIT)
        await crowd.all_here(DRAIN_SECONDS + START_SECONDS)
        assert len(crowd.goodbyes) == len(crowd.away) == 300
    load = os.getloadavg()[0]
    say(f"away for {min(crowd.away):.1f} to {max(crowd.away):.1f} s; {load:.0f} want to run here")
    assert max(crowd.away) <= DRAIN_SECONDS + 3
    assert set(crowd.counts) <= CLEAN
    assert restarts(service) == 0


@patient
async def test_reload_takes_over_settings(service: Machine, key: dict[str, str | None]) -> None:
    """What running workers can take over disturbs nobody; a bad configuration is refused."""

    async def rate() -> int:
        async with Client(WS_URL) as client:
            return int(client.hello["limits"]["rate"])

    before = set(workers(service))
    async with busy(key) as crowd:
        service.write(INI_PATH, INI.replace("rate = 0", "rate = 1000"))
        await do(service, "systemctl", "reload", UNIT)
        await eventually(rate, (1000).__eq__)
        service.write(INI_PATH, INI.replace("rate = 0", "rate = many"))
        assert service.status("systemctl", "reload", UNIT) != 0
        assert await state(service) == "active"
        assert [line for line in journal(service, "-n", "20") if line["event"] == "reload_failed"]
        assert await rate() == 1000
        await asyncio.sleep(1)
    assert not crowd.goodbyes and set(crowd.counts) <= CLEAN
    assert set(workers(service)) == before


@patient
async def test_reload_replaces_workers(service: Machine, key: dict[str, str | None]) -> None:
    """Without a change the workers are replaced one by one; clients move over and lose nothing."""
    before = set(workers(service))
    parent = show(service, "MainPID")
    async with busy(key) as crowd:
        began = time.monotonic()
        await do(service, "systemctl", "reload", UNIT)
        say(f"systemctl reload took {time.monotonic() - began:.1f} s")
        after = workers(service)
        assert len(after) == 2 and not before & set(after), "it returned too early"
        await crowd.all_here(DRAIN_SECONDS + 5)
        assert len(crowd.goodbyes) >= 300
    assert set(crowd.counts) <= CLEAN
    assert await state(service) == "active"
    assert show(service, "MainPID") == parent


@patient
async def test_a_stuck_worker(service: Machine, key: dict[str, str | None]) -> None:
    """The watchdog finds it, systemd restarts the service, and nobody loses a message."""
    stuck = workers(service)[0]

    async def restarted() -> int:
        return await asyncio.to_thread(restarts, service)

    async with busy(key) as crowd:
        began = time.monotonic()
        await send_signal(service, "STOP", stuck)
        await eventually(restarted, (1).__eq__, WATCHDOG + 15)
        say(f"restarted {time.monotonic() - began:.1f} s after a worker got stuck")
        await eventually(lambda: state(service), "active".__eq__, START_SECONDS)
        await crowd.all_here(20)
    assert crowd.counts["cut without a goodbye"] >= 300
    assert stuck not in processes(service)
    assert "Watchdog timeout" in service.run("journalctl", "-o", "cat", "-u", UNIT)


@patient
async def test_redis_away(service: Machine, key: dict[str, str | None]) -> None:
    """For three watchdog periods: `/health` and the status say so, nobody is disconnected or restarted."""
    stopped = server(service)
    async with attached(50) as clients:
        await send_signal(service, "STOP", stopped)
        began = time.monotonic()
        try:
            await eventually(lambda: says("/health", 503), bool, 15)
            while time.monotonic() < began + 3 * WATCHDOG:
                assert await says("/health/live", 200)
                await asyncio.sleep(1)
            status = await do(service, "systemctl", "status", "--no-pager", UNIT)
        finally:
            await send_signal(service, "CONT", stopped)
        assert [client.socket.close_code for client in clients] == [None] * 50
        assert "Redis: down" in status
        await eventually(lambda: says("/health/ready", 200), bool, 15)
        message = {"channel": "room.0", "data": "back"}
        assert (await http(URL, "POST", "/broadcast", message, key)).status == 200
        assert [(await client.message())["data"] for client in clients] == ["back"] * 50
    assert restarts(service) == 0
    assert server(service) == stopped


@patient
async def test_stop(service: Machine) -> None:
    """In time, with clients attached; nothing is killed and nothing stays behind."""
    since = service.run("date", "+%F %T.%6N")
    async with attached(200) as clients:
        began = time.monotonic()
        # The socket too, or clients that come again would start it.
        await do(service, "systemctl", "stop", "tornado-bcast.socket", UNIT)
        seconds = time.monotonic() - began
        assert {(await client.closed())[0] for client in clients} == {1012}
    say(f"stopped in {seconds:.1f} s")
    assert seconds < STOP_SECONDS
    assert show(service, "Result") == "success"
    assert show(service, "ControlGroup") == ""
    events = {line["event"] for line in journal(service, "--since", since)}
    assert "stopped" in events and not events & {"worker_killed", "embedded_killed"}


def test_drain_delay_may_be_longer_than_the_unit_allows(service: Machine) -> None:
    """The daemon asks systemd for the time that it needs."""
    service.write(INI_PATH, INI.replace("[server]", "[server]\ndrain_delay = 6s"))
    drop_in(service, UNIT, "[Service]\nTimeoutStopSec=3s\n")
    service.run("systemctl", "restart", UNIT)
    began = time.monotonic()
    service.run("systemctl", "stop", UNIT)
    assert 6 <= time.monotonic() - began < 6 + STOP_SECONDS
    assert show(service, "Result") == "success"


# What docs/OPERATIONS.md tells to do


@patient
async def test_another_address(service: Machine) -> None:
    drop_in(service, "tornado-bcast.socket", recipe("[Socket]"))
    service.run("sh", "-ec", recipe("systemctl restart tornado-bcast.socket"))
    # Of the whole 127.0.0.0/8 only 127.0.0.1 was listened on before.
    answer = await http("http://127.0.0.2:8080", "GET", "/health/live")
    assert answer.status == 200


@patient
async def test_keys_are_changed_without_a_gap(service: Machine, key: dict[str, str | None]) -> None:
    async def status(headers: dict[str, str | None]) -> int:
        return (await http(URL, "POST", "/broadcast", {"channel": "news.a", "data": 1}, headers)).status

    async with attached(20) as clients:
        printed = service.run("sh", "-ec", recipe("tornado-bcast key --name cron"))
        (new,) = re.findall(r"^bk_\S+$", printed, re.MULTILINE)
        await eventually(lambda: status({"X-API-Key": new}), (200).__eq__)
        assert await status(key) == 200
        service.run("sed", "-i", "1d", f"{ETC}/api-keys")
        service.run("systemctl", "reload", UNIT)
        await eventually(lambda: status(key), (401).__eq__)
        assert await status({"X-API-Key": new}) == 200
        assert [client.socket.close_code for client in clients] == [None] * 20
    # As it was, for the tests that follow.
    service.run("sh", "-ec", f'printf %s "$(cat {ETC}/first-key)" | sha256sum | cut -c -64 >{ETC}/api-keys')


@patient
async def test_backup(service: Machine, key: dict[str, str | None]) -> None:
    """The archive brings back a history that was lost."""
    channel = f"room.{uuid4().hex[:8]}"
    message = {"channel": channel, "data": "kept", "messageId": "m1"}

    async def history() -> list[str]:
        answer = await http(URL, "GET", f"/channels/{channel}/history", headers=key)
        return [one["data"] for one in answer.json["messages"]]

    assert (await http(URL, "POST", "/broadcast", message, key)).status == 200
    commands = recipe("systemctl stop tornado-bcast.socket").splitlines()
    service.run("sh", "-ec", "\n".join(commands))
    assert await history() == ["kept"]
    stop, archive, start = commands
    service.run("sh", "-ec", f"{stop}\nrm -r {DATA}/appendonlydir\n{start}")
    assert await history() == []
    put_back = archive.replace("-cf", "-xf")
    service.run("sh", "-ec", f"{stop}\nrm -r {DATA}/appendonlydir\n{put_back}\n{start}")
    assert await history() == ["kept"]


@patient
async def test_tls_by_credentials(service: Machine, tmp_path: Path) -> None:
    """The daemon serves TLS with a key that only root may read; a reload checks it too."""
    make_certificate(tmp_path)
    place = "/etc/letsencrypt/live/bcast.example.com"
    for name, ours in (("fullchain", "cert"), ("privkey", "key")):
        service.write(f"{place}/{name}.pem", (tmp_path / f"{ours}.pem").read_text())
    service.run("chmod", "600", f"{place}/privkey.pem")
    drop_in(service, UNIT, recipe("[Service]\n    LoadCredential"))
    service.write(INI_PATH, INI.replace("[server]", "[server]\n" + recipe("certfile")))
    service.run("systemctl", "restart", UNIT)
    assert service.run("stat", "-c", "%a", f"{place}/privkey.pem") == "600"
    service.run("systemctl", "reload", UNIT)
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    context.check_hostname = False
    answer = await http(URL.replace("http", "https"), "GET", "/health/live", tls=context)
    assert answer.status == 200


@patient
async def test_a_redis_of_its_own(service: Machine, key: dict[str, str | None]) -> None:
    """By its Unix socket, which belongs to a group."""
    binary = service.run("find", "/usr/local/lib/tornado-bcast", "-name", "valkey-server")
    service.run("sh", "-c", "id -u redis >/dev/null 2>&1 || useradd --system redis")
    options = "--port 0 --unixsocket /run/redis/redis-server.sock --unixsocketperm 770"
    unit = ["systemd-run", "--unit=redis-test", "-p", "User=redis", "-p", "RuntimeDirectory=redis"]
    service.run(*unit, binary, *options.split(), "--save", "")
    drop_in(service, UNIT, recipe("[Service]\n    SupplementaryGroups"))
    service.write(INI_PATH, f"{INI}[redis]\nurl = unix:///run/redis/redis-server.sock\n")
    service.run("systemctl", "restart", UNIT)
    assert (await http(URL, "POST", "/broadcast", {"channel": "room.own", "data": 1}, key)).status == 200
    assert "redis.sock" not in str(processes(service))
    service.run("systemctl", "stop", "redis-test")


# The end


def test_the_journal_is_json(service: Machine) -> None:
    """All that the daemon has written on this machine so far."""
    lines = journal(service)
    assert len(lines) > 50
    for line in lines:
        assert {"time", "level", "event", "message"} <= line.keys()
    events = {line["event"] for line in lines}
    assert {"socket_activation", "serving", "reload", "replaced", "worker_hung", "stopped"} <= events
    assert "bk_" not in json.dumps(lines)


def test_uninstall(service: Machine) -> None:
    """The service goes; what belongs to the operator stays."""
    service.run("make", "-C", "/src", "uninstall")
    assert service.status("systemctl", "cat", UNIT) != 0
    assert service.run("find", "/usr/local", "-name", "*tornado*") == ""
    service.run("test", "-s", INI_PATH, "-a", "-s", f"{ETC}/first-key", "-a", "-d", f"{DATA}/appendonlydir")
