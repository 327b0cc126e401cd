"""What nobody learns: secrets and payloads from anything that is written, and the inside from any answer.

Each entrance is used with values of its own, rightly and wrongly, at DEBUG; then everything that the
processes have written is searched. planted.py does the same for all other tests.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import jwt
import pytest
from broker_kit import asynchronous
from client import PATIENCE, Client, client_frame, handshake, http, raw_http
from daemon import ROOT, Daemon, until
from planted import Planted
from redis_server import RedisServer, binaries
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

# In every value that must stay secret.
MARK = "hunter2"
PASSWORD = f"{MARK}-redis-password"
SECRET = f"{MARK}-the-secret-of-all-the-tokens-of-this-daemon"
NEXT_SECRET = f"{MARK}-the-one-that-comes-after-it-and-is-as-long"
KEY = f"{MARK}-api-key"
PAYLOAD = f"{MARK}-payload"
INI = """
[auth]
jwt_secret = file:{place}/secrets
  {secret}
api_keys = file:{place}/keys
[limits]
rate = 50
burst = 100
[channel kept.*]
persistent = yes
[channel signed]
sender = yes
"""

# Of what an answer may not speak: where things are, what they are made of, and what went wrong inside.
INSIDE = re.compile(
    r"Traceback|File \"|line \d+, in|site-packages|\.py\b|\.lua\b|/tmp/|/usr/|/home/|tornado/|TornadoServer"
    r"|ujson|PyJWT|hiredis|redis-py|redis\.exceptions|valkey|python|openssl|WRONGTYPE|NOAUTH|EVALSHA|Errno",
    re.IGNORECASE,
)
OWN_NAMES = re.compile(r"tornado-bcast|docs/PROTOCOL\.md")


def token(secret: str = SECRET, **claims: Any) -> str:
    everything = {"sub": f"{MARK}-sub", "exp": time.time() + 600, "subscribe": ["*"], "publish": ["*"]}
    return jwt.encode({**everything, **claims}, secret, "HS256")


@pytest.fixture(scope="module")
def guarded() -> Iterator[RedisServer]:
    """A Redis that asks for a password."""
    with RedisServer(next(iter(binaries().values())), "--requirepass", PASSWORD) as server:
        yield server


@contextmanager
def observed(tmp_path: Path, redis: str, **variables: str) -> Iterator[Daemon]:
    """A daemon with secrets in its file and in files of their own, whose log is searched at its end."""
    (tmp_path / "secrets").write_text(SECRET)
    (tmp_path / "keys").write_text(sha256(KEY.encode()).hexdigest() + " name=all")
    ini = INI.format(place=tmp_path, secret=f"{MARK}-{'x' * 40}")
    with Daemon(ini, workers=2, redis=redis, **variables) as daemon:
        yield daemon
        daemon.stop()
        written = daemon.written()
    assert MARK not in written, [line for line in written.splitlines() if MARK in line]
    assert "serves" in written


WAYS: dict[str, Any] = {
    "subprotocol": lambda text: {"protocols": ["bcast.v1", f"bearer.{text}"]},
    "header": lambda text: {"headers": {"Authorization": f"Bearer {text}"}},
    "query": lambda text: {"path": f"/ws?token={text}&more={MARK}"},
}


async def refused(daemon: Daemon, *, path: str = "/ws", **how: Any) -> str:
    """The reason for which a connection is closed at once."""
    async with connect(
        daemon.ws_url + path,
        subprotocols=how.get("protocols"),
        additional_headers=how.get("headers"),
        proxy=None,
        open_timeout=PATIENCE,
    ) as socket:
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        return socket.close_reason or ""


async def use_sockets(daemon: Daemon) -> list[str]:
    """Every way in over WebSocket, with what is right and what is wrong. What was said, as text."""
    said = []
    good, bad = token(), token(NEXT_SECRET)
    wrong = (bad, token(exp=time.time() - 60), token(sub=5), f"{MARK}.{MARK}.{MARK}", f"{MARK}" * 1200, "")
    for way in WAYS.values():
        for text in wrong:
            if len(text) < 4000:
                said.append(await refused(daemon, **way(text)))
        async with Client(daemon.ws_url, **way(good)) as client:
            session = client.hello["session"]
            await client.ask("auth", token=good)
            for text in wrong:
                await client.ask("auth", token=text)
            await client.ask("auth", token=token(sub=f"{MARK}-another"))
            for channel in ("kept.1", "signed", "news"):
                await client.ask("subscribe", channel=channel, ack=True)
                await client.ask("broadcast", channel=channel, data={PAYLOAD: PAYLOAD})
            for text in (
                f'{{"type": "{PAYLOAD}"}}',
                f'{{"type": "subscribe", "channel": "{MARK} {MARK}"}}',
                f'{{"type": "broadcast", "channel": "kept.1", "data": "{PAYLOAD}',
                f'{{"type": "broadcast", "channel": "kept.1", "data": ["{PAYLOAD}", NaN]}}',
                f'{{"type": "auth", "token": ["{PAYLOAD}"]}}',
                f'{{"type": "ack", "channel": "kept.1", "seq": "{PAYLOAD}"}}',
            ):
                await client.error(text)
            await client.error(PAYLOAD.encode())
            said += [json.dumps(frame) for frame in client.frames if frame["type"] == "error"]
        offers = ["bcast.v1", f"session.{session}", f"bearer.{good}"]
        async with Client(daemon.ws_url, protocols=offers) as again:
            assert again.hello["resumed"]
        async with Client(daemon.ws_url, f"/?session={session}&token={token(sub='else')}") as other:
            assert not other.hello["resumed"]
        # Frames that break the connection.
        for data in (client_frame(PAYLOAD.encode(), 3), client_frame(PAYLOAD.encode() + b"\xff"), b"x" * 99):
            said.append(await broken(daemon, handshake("localhost", f"/ws?token={good}") + data))
    return said


async def broken(daemon: Daemon, data: bytes) -> str:
    """The first answer to bytes that end a connection, without the key to the handshake."""
    answer = await raw_http(daemon.url, data)
    return json.dumps(answer.headers)


async def use_http(daemon: Daemon) -> list[str]:
    """The same over HTTP."""
    said = []
    for key in (KEY, f"{MARK}-wrong", "", f"Bearer {MARK}"):
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}, {"Cookie": key}):
            for path in ("/broadcast", f"/broadcast?key={key.replace(' ', '')}"):
                for body in (
                    {"channel": "kept.1", "data": PAYLOAD},
                    {"channels": ["kept.1", f"{MARK} bad"], "data": PAYLOAD},
                    {"messages": [{"channel": "kept.1", "data": PAYLOAD, "messageId": f"{MARK}\n"}]},
                    f'{{"channel": "kept.1", "data": "{PAYLOAD}',
                    b"\xff" + PAYLOAD.encode(),
                ):
                    answer = await http(daemon.url, "POST", path, body, headers)
                    said.append(f"{answer.headers} {answer.body.decode()}")
            for path in (
                f"/stats?token={MARK}",
                f"/metrics?{MARK}",
                f"/channels?{MARK}",
                f"/channels/kept.1/history?since={MARK}",
                f"/channels/kept.1/history?limit=%ff{MARK}",
                f"/nothing/at/all?{MARK}",
                f"/health?deep=1&{MARK}",
                f"/ws?token={MARK}",
            ):
                answer = await http(daemon.url, "GET", path, headers=headers)
                # What an operator may read is another matter.
                if answer.status >= 400:
                    said.append(f"{answer.headers} {answer.body.decode()}")
    for raw in (
        f"GET /{MARK} {MARK} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"POST /broadcast HTTP/1.1\r\nHost: a\r\nContent-Length: {MARK}\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: {MARK} {MARK}\r\n\r\n",
        f"GET / HTTP/1.1\r\n{MARK}\r\n\r\n",
        "POST /stats HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        f"Content-Length: 7\r\n\r\n{MARK}",
        f"{MARK} /broadcast?{MARK} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /ws?token={MARK} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        f"GET /ws?token={MARK} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nOrigin: https://{MARK}\r\n\r\n",
    ):
        answer = await raw_http(daemon.url, raw.encode())
        said.append(f"{answer.headers} {answer.body.decode()}")
    return said


def check_said(said: list[str]) -> None:
    assert len(said) > 20
    for text in said:
        found = INSIDE.search(OWN_NAMES.sub("", text))
        assert not found, (found, text[:1000])


@pytest.mark.parametrize("format", ["json", "text"])
@asynchronous
async def test_every_entrance(guarded: RedisServer, tmp_path: Path, format: str) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{guarded.port}/0"
    with observed(tmp_path, url) as daemon:
        # The daemon's start is found in its log as JSON; from here on it may write for people.
        if format == "text":
            write(daemon, daemon._ini.read_text() + "[log]\nformat = text\n")
            # Its workers are replaced for that.
            until(lambda: " replaced " in daemon.written(), 30)
        check_said([*await use_sockets(daemon), *await use_http(daemon)])


@asynchronous
async def test_what_goes_wrong_inside(guarded: RedisServer, tmp_path: Path) -> None:
    """Workers that crash, keys of another type, another password of Redis, bad new configurations."""
    url = f"redis://:{PASSWORD}@127.0.0.1:{guarded.port}/0"
    with observed(tmp_path, url, BCAST_REDIS_PUBLISH_TIMEOUT="500ms") as daemon:
        daemon.expect("worker_died", "worker_pausing", "redis_down", "redis_refused", "reload_failed")
        # Of the short secret, where that is read before the next configuration.
        daemon.expect("configuration")
        good = token()
        async with Client(daemon.ws_url, f"/?token={good}") as client:
            with guarded.client(password=PASSWORD) as redis:
                for kind in ("h", "s", "id:m-1"):
                    redis.delete(f"{daemon.prefix}:{{kept.2}}:{kind}")
                    redis.sadd(f"{daemon.prefix}:{{kept.2}}:{kind}", PAYLOAD)
                said = [
                    await client.ask("broadcast", channel="kept.2", data=PAYLOAD, messageId="m-1"),
                    await client.ask("broadcast", channel="kept.2", data=PAYLOAD, messageId="m-2"),
                    await client.ask("subscribe", channel="kept.2", last=5),
                ]
                redis.config_set("requirepass", f"{MARK}-changed")
                redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                said.append(await client.ask("broadcast", channel="kept.1", data=PAYLOAD))
                redis.config_set("requirepass", PASSWORD)
            answer = await http(daemon.url, "GET", "/health")
            check_said([json.dumps(one) for one in said] * 6 + [answer.body.decode()])
        for number, pid in zip((signal.SIGABRT, signal.SIGKILL), sorted(daemon.children()), strict=True):
            os.kill(pid, number)
        daemon.wait_for_log("worker_died", 2)
        until(lambda: daemon._health("/health/ready") == 200, 20)
        (tmp_path / "secrets").write_text(f"{NEXT_SECRET}\n{MARK}-short")
        daemon.signal(signal.SIGHUP)
        for bad in (f"jwt_public_key = {MARK}", f"api_keys = {MARK} name={MARK}", f"{MARK}", "[x"):
            write(daemon, f"[auth]\n{bad}\n")
        write(daemon, f"[redis]\nurl = redis://{MARK}:{MARK}@nowhere:{MARK}/0\n")


def write(daemon: Daemon, ini: str) -> None:
    """Give it another configuration, and wait until it has an opinion."""
    seen = daemon.written().count("\n")
    daemon._ini.write_text(ini)
    daemon.signal(signal.SIGHUP)
    until(lambda: daemon.written().count("\n") > seen)
    time.sleep(0.3)  # Whatever else it has to say of it.


def test_an_error_of_ours_tells_neither_the_client_nor_the_payload(tmp_path: Path) -> None:
    """With a fault put into the daemon: its log has the place, and nobody has the message."""
    (tmp_path / "sitecustomize.py").write_text(
        "from tornado_bcast.node import Node\n"
        "def publish(self, channel, rule, message_id, payload, *rest, **more):\n"
        "    raise KeyError(payload)\n"
        "Node.publish = publish\n"
    )
    with Daemon(PYTHONPATH=str(tmp_path)) as daemon:
        daemon.expect("internal_error")

        async def ask() -> list[str]:
            answer = await http(daemon.url, "POST", "/broadcast", {"channel": "a", "data": PAYLOAD})
            assert answer.status == 500 and answer.json["error"]["code"] == "internal"
            async with Client(daemon.ws_url) as client:
                error = await client.ask("broadcast", channel="a", data=PAYLOAD)
                assert error["code"] == "internal"
            return [f"{answer.headers} {answer.body.decode()}", json.dumps(error)] * 11

        check_said(asyncio.run(ask()))
        traces = [line["traceback"] for line in daemon.events("internal_error")]
        assert len(traces) == 2 and all("sitecustomize.py" in trace for trace in traces)
        assert MARK not in daemon.written()


@pytest.mark.parametrize(
    "variables",
    [
        {"REDIS_URL": f"redis://{MARK}:{MARK}@127.0.0.1:{MARK}/0"},
        {"REDIS_URL": f"redis://{MARK}:{MARK}@127.0.0.1:1/x"},
        {"REDIS_URL": f"http://{MARK}:{MARK}@127.0.0.1:1/0"},
        {"REDIS_URL": f"rediss://:{MARK}@127.0.0.1:1/0?ssl_ca_certs=/{MARK}"},
        {"BCAST_AUTH_JWT_SECRET": f"-----BEGIN PUBLIC KEY----- {MARK}"},
        {"BCAST_AUTH_JWT_PUBLIC_KEY": MARK},
        {"BCAST_AUTH_API_KEYS": f"{MARK} name={MARK}"},
        {"BCAST_AUTH_JWT_SECRET": MARK, "BCAST_ENV": "production"},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_a_start_that_fails_does_not_show_the_value(command: str, variables: dict[str, str]) -> None:
    # In front of what is wrong here stands something else that is wrong, so that no daemon stays.
    environment = {**os.environ, "PORT": "none", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tornado_bcast.cli", command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert MARK not in done.stdout + done.stderr, done.stderr
    assert "PORT" in done.stderr


def test_what_passes_by_is_planted() -> None:
    planted = Planted()
    planted.add_request(
        "/ws?token=a-token-in-the-query", {"X-API-Key": "a-key-of-16-letters", "Host": "h" * 20}
    )
    planted.add_request(
        "/broadcast", None, {"messages": [{"channel": "c" * 20, "data": {"k": "a-payload-in-a-batch"}}]}
    )
    planted.add_frame({"type": "auth", "token": "head-of-a-token1.payload-of-a-token.sig"})
    log = (
        "a-token-in-the-query a-key-of-16-letters a-payload-in-a-batch head-of-a-token1 payload-of-a-token "
        + "h" * 20
        + " "
        + "c" * 20
    )
    assert planted.found_in(log) == set(log.split()[:5])
