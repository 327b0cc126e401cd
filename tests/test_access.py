"""Who gets in, on the real daemon: tokens by every way, keys over HTTP, and what stays shut."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from broker_kit import asynchronous
from browser import Browser
from client import Answer, Client, eventually, handshake, http, raw_http
from daemon import ROOT, Daemon, until
from proxies import run_nginx
from redis_server import RedisServer, free_port
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

SECRET = "the-secret-of-these-tests-0123456789abcdef"
NEW_SECRET = "the-secret-that-comes-after-it-0123456789"
KEYS = {"all": "bk_all", "cron": "bk_cron", "reader": "bk_reader", "slow": "bk_slow"}
HASHES = {name: sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
INI = f"""
[auth]
jwt_secret = {SECRET}
api_keys = {HASHES["all"]}
  {HASHES["cron"]} name=cron publish=news.*,jobs
  {HASHES["reader"]} name=reader read=yes
  {HASHES["slow"]} name=slow rate=2

[channels]
publish_all = token

[channel open.*]
subscribe = anyone
publish = anyone
sender = yes

[channel shut.*]
subscribe = nobody
publish = server

[channel kept.*]
persistent = yes
"""


def token(sub: str = "ann", *, secret: str = SECRET, ttl: float = 60, **more: Any) -> str:
    claims = {"sub": sub, "exp": time.time() + ttl, "subscribe": ["room.*"], "publish": ["room.*"]}
    return jwt.encode({**claims, **more}, secret)


@pytest.fixture(scope="module")
def daemon(redis_server: RedisServer) -> Iterator[Daemon]:
    """Two workers that ask for tokens and keys."""
    with Daemon(INI, workers=2, redis=redis_server.url) as daemon:
        yield daemon


WAYS: dict[str, Any] = {
    "subprotocol": lambda token: {"protocols": ["bcast.v1", f"bearer.{token}"]},
    "subprotocol first": lambda token: {"protocols": [f"bearer.{token}", "bcast.v1"]},
    "header": lambda token: {"headers": {"Authorization": f"Bearer {token}"}},
    "query": lambda token: {"path": f"/ws?token={token}"},
}


async def close_of(daemon: Daemon, *, path: str = "/ws", **how: Any) -> tuple[int | None, str]:
    """How a connection ends to which nothing is said before."""
    protocols, headers = how.get("protocols"), how.get("headers")
    async with connect(
        daemon.ws_url + path, subprotocols=protocols, additional_headers=headers, proxy=None, compression=None
    ) as socket:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(socket.recv(), 10)
        return socket.close_code, socket.close_reason or ""


# Tokens with the connection


@pytest.mark.parametrize("way", WAYS)
@asynchronous
async def test_every_way_to_bring_a_token(way: str, daemon: Daemon) -> None:
    ours = token()
    async with Client(daemon.ws_url, **WAYS[way](ours)) as client:
        end = jwt.decode(ours, options={"verify_signature": False})["exp"]
        assert client.hello["expiresAt"] == int(end) * 1000
        assert client.socket.subprotocol == ("bcast.v1" if way.startswith("subprotocol") else None)
        assert (await client.ask("subscribe", channel="room.1"))["op"] == "subscribe"
        assert (await client.ask("broadcast", channel="room.1", data=1))["op"] == "broadcast"
        assert (await client.message())["data"] == 1


@pytest.mark.parametrize("way", WAYS)
@asynchronous
async def test_a_bad_token_is_told_after_the_upgrade(way: str, daemon: Daemon) -> None:
    for bad, reason in (
        (token(ttl=-60), "The token has expired."),
        (token(secret=NEW_SECRET), "no key of this server has signed it"),
        ("garbage", "cannot be read"),
        (jwt.encode({"sub": "ann", "exp": time.time() + 60}, None, algorithm="none"), "cannot be read"),
        (token(sub=""), "`sub`"),
        ("x" * 9000, "longer than"),
    ):
        if way == "subprotocol first" and len(bad) > 8000:
            continue
        code, told = await close_of(daemon, **WAYS[way](bad))
        assert code == 4500 and reason in told, bad[:20]
        assert bad not in told


@asynchronous
async def test_an_empty_token_is_a_bad_one(daemon: Daemon) -> None:
    assert (await close_of(daemon, path="/ws?token="))[0] == 4500
    # Another scheme is no token.
    async with Client(daemon.ws_url, headers={"Authorization": "Basic YTpi"}) as client:
        assert "expiresAt" not in client.hello


@asynchronous
async def test_the_first_token_counts(daemon: Daemon) -> None:
    bad = {"Authorization": "Bearer bad"}
    async with Client(
        daemon.ws_url, "/?token=bad", protocols=["bcast.v1", f"bearer.{token()}"], headers=bad
    ) as client:
        assert "expiresAt" in client.hello
    assert (await close_of(daemon, path=f"/?token={token()}", headers=bad))[0] == 4500


@asynchronous
async def test_where_nothing_can_be_checked_a_token_is_not_ignored() -> None:
    with Daemon() as daemon:
        for way in WAYS.values():
            code, reason = await close_of(daemon, **way(token()))
            assert code == 4500 and "checks no tokens" in reason
        async with Client(daemon.ws_url) as client:
            assert (await client.ask("auth", token=token()))["code"] == "unauthorized"
            assert (await client.ask("subscribe", channel="room.1"))["op"] == "subscribe"


# What it allows


@asynchronous
async def test_nobody_meets_the_rules_as_nobody(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        assert "expiresAt" not in client.hello
        for type in ("subscribe", "broadcast"):
            for channel, code in (("room.1", "unauthorized"), ("shut.1", "forbidden"), ("open.1", None)):
                answer = await client.ask(type, channel=channel, data=1)
                assert answer.get("code") == code, (type, channel)
        assert (await client.ask("broadcast", data=1))["code"] == "unauthorized"


@asynchronous
async def test_somebody_may_what_the_token_says(daemon: Daemon) -> None:
    ours = token(subscribe=["room.?", "x"], publish=["room.1*", "*.2"])
    async with Client(daemon.ws_url, headers={"Authorization": f"Bearer {ours}"}) as client:
        for type, channel, code in (
            ("subscribe", "room.1", None),
            ("subscribe", "room.12", "forbidden"),
            ("subscribe", "shut.1", "forbidden"),
            ("broadcast", "room.12", None),
            ("broadcast", "a.2", None),
            ("broadcast", "room.2x", "forbidden"),
            ("broadcast", "shut.2", "forbidden"),
            ("broadcast", None, "forbidden"),
        ):
            fields = {} if channel is None else {"channel": channel}
            answer = await client.ask(type, data=1, **fields)
            assert answer.get("code") == code, (type, channel)
            assert answer.get("channel") == channel
    async with Client(daemon.ws_url, headers={"Authorization": f"Bearer {token(publish=['*'])}"}) as client:
        assert (await client.ask("broadcast", data="all"))["op"] == "broadcast"
        assert (await client.message())["data"] == "all"
    claims = {"sub": "ann", "exp": time.time() + 60}
    async with Client(daemon.ws_url, f"/?token={jwt.encode(claims, SECRET)}") as client:
        assert (await client.ask("subscribe", channel="room.1"))["code"] == "forbidden"
        assert (await client.ask("broadcast", channel="room.1", data=1))["code"] == "forbidden"


@asynchronous
async def test_who_it_comes_from(daemon: Daemon) -> None:
    async with (
        Client(daemon.ws_url) as nobody,
        Client(daemon.ws_url, f"/?token={token('bob')}") as bob,
    ):
        await nobody.ask("subscribe", channel="open.from")
        await nobody.ask("broadcast", channel="open.from", data={"from": "me"})
        await bob.ask("broadcast", channel="open.from", data=2)
        await http(
            daemon.url, "POST", "/broadcast", {"channel": "open.from", "data": 3}, {"X-API-Key": KEYS["all"]}
        )
        froms = [(await nobody.message()).get("from") for _ in range(3)]
        assert froms == [
            {"clientId": nobody.hello["clientId"]},
            {"clientId": bob.hello["clientId"], "sub": "bob"},
            None,
        ]


# Renewing and the end


@asynchronous
async def test_after_its_end_the_connection_is_closed(daemon: Daemon) -> None:
    async with Client(daemon.ws_url, f"/?token={token(ttl=2)}") as client:
        code, _ = await client.closed()
        assert code == 4501
        assert 0 <= time.time() - client.hello["expiresAt"] / 1000 < 2
    # The session is still there for whom it belongs to.
    async with Client(daemon.ws_url, f"/?token={token()}&session={client.hello['session']}") as client:
        assert client.hello["resumed"] is True


@asynchronous
async def test_a_token_within_the_leeway_lives_as_long_as_that(daemon: Daemon) -> None:
    async with Client(daemon.ws_url, f"/?token={token(ttl=-3.5)}") as client:
        assert client.hello["expiresAt"] / 1000 < time.time()
        assert (await client.closed())[0] == 4501
        assert 4 < time.time() - client.hello["expiresAt"] / 1000 < 8


@asynchronous
async def test_renewed_in_place(daemon: Daemon) -> None:
    async with Client(daemon.ws_url, f"/?token={token(ttl=2)}") as client:
        await client.ask("subscribe", channel="room.1")
        fresh = token(ttl=60)
        ack = await client.ask("auth", token=fresh)
        end = jwt.decode(fresh, options={"verify_signature": False})["exp"]
        assert (ack["op"], ack["expiresAt"]) == ("auth", int(end) * 1000)
        first_end = client.hello["expiresAt"] / 1000
        # Until well after the first one's end.
        await asyncio.sleep(max(0, first_end + 1 - time.time()))
        await client.ask("broadcast", channel="room.1", data=1)
        assert (await client.message())["data"] == 1
        # And shortened as well.
        await client.ask("auth", token=token(ttl=1))
        assert (await client.closed())[0] == 4501


@asynchronous
async def test_a_bad_renewal_changes_nothing(daemon: Daemon) -> None:
    async with Client(daemon.ws_url, f"/?token={token()}") as client:
        for bad, code in (
            ("garbage", "unauthorized"),
            ("", "unauthorized"),
            (token(ttl=-60), "unauthorized"),
            (token(secret=NEW_SECRET), "unauthorized"),
            (token("eve"), "forbidden"),
            (token("eve", subscribe=["*"]), "forbidden"),
        ):
            answer = await client.ask("auth", token=bad)
            assert (answer["type"], answer["code"]) == ("error", code)
            assert (await client.ask("subscribe", channel="other.1"))["code"] == "forbidden"
        assert (await client.ask("subscribe", channel="room.1"))["op"] == "subscribe"


@asynchronous
async def test_nobody_becomes_somebody_once(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        assert (await client.ask("subscribe", channel="room.1"))["code"] == "unauthorized"
        assert (await client.ask("auth", token=token("ann")))["op"] == "auth"
        assert (await client.ask("subscribe", channel="room.1"))["op"] == "subscribe"
        assert (await client.ask("auth", token=token("bob")))["code"] == "forbidden"
    resume = f"session={client.hello['session']}"
    for query in (resume, f"{resume}&token={token('bob')}"):
        async with Client(daemon.ws_url, f"/?{query}") as other:
            assert other.hello["resumed"] is False and other.hello["session"] != client.hello["session"]
    async with Client(daemon.ws_url, f"/?{resume}&token={token('ann')}") as again:
        assert again.hello["resumed"] is True and again.hello["clientId"] == client.hello["clientId"]
        assert [entry["channel"] for entry in again.hello["subscriptions"]] == ["room.1"]


@asynchronous
async def test_what_the_new_token_does_not_allow_ends(daemon: Daemon) -> None:
    wide = token(subscribe=["room.*", "kept.*"], publish=["*"])
    async with (
        Client(daemon.ws_url, f"/?token={wide}") as client,
        Client(daemon.ws_url, f"/?token={wide}") as publisher,
    ):
        for channel in ("room.1", "room.2", "kept.1", "open.1"):
            await client.ask("subscribe", channel=channel, ack=True)
        await client.ask("auth", token=token(subscribe=["room.2"]))
        ended = [await client.next(lambda event: event["type"] == "error") for _ in range(2)]
        assert [(error["code"], error["channel"]) for error in ended] == [
            ("forbidden", "room.1"),
            ("forbidden", "kept.1"),
        ]
        assert all("messageId" not in error for error in ended)
        for channel in ("room.1", "kept.1", "room.2", "open.1"):
            await publisher.ask("broadcast", channel=channel, data=channel)
        assert await client.messages(2) == ["room.2", "open.1"]
        assert (await client.ask("unsubscribe", channel="room.1"))["op"] == "unsubscribe"
        assert (await client.ask("subscribe", channel="kept.1"))["code"] == "forbidden"
    # What is restored is checked by the token of then.
    resume = f"/?session={client.hello['session']}&token="
    async with Client(daemon.ws_url, resume + token(subscribe=["none"])) as again:
        assert [entry["channel"] for entry in again.hello["subscriptions"]] == ["open.1"]
        error = await again.next(lambda event: event["type"] == "error")
        assert (error["code"], error["channel"]) == ("forbidden", "room.2")


@asynchronous
async def test_a_subscription_under_way_does_not_slip_through(daemon: Daemon) -> None:
    async with Client(daemon.ws_url, f"/?token={token()}") as client:
        for number in range(20):
            channel = f"room.slip{number}"
            await client.ask("auth", token=token())
            # All three are there before the first one is done.
            await client.send(type="subscribe", channel=channel, messageId="s")
            await client.send(type="auth", token=token(subscribe=[]))
            await client.send(type="broadcast", channel=channel, data=1, messageId=f"b{number}")
            await client.find(
                lambda event, name=channel: event.get("code") == "forbidden" and event["channel"] == name  # type: ignore[misc]
            )
            assert (await client.ask("broadcast", channel=channel, data=2))["op"] == "broadcast"
            assert await client.is_alive()
        assert not [event for event in client.frames if event.get("data") == 2]


# API keys


async def post(daemon: Daemon, key: str | None, body: Any, **headers: str) -> Answer:
    given = {} if key is None else {"X-API-Key": KEYS.get(key, key)}
    return await http(daemon.url, "POST", "/broadcast", body, {**given, **headers})


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["code"]


READ = ("/stats", "/metrics", "/channels", "/channels/kept.1/history")


@asynchronous
async def test_a_key_is_needed_as_soon_as_there_is_one(daemon: Daemon) -> None:
    one = {"channel": "news.1", "data": 1}
    for headers in (
        {},
        {"X-API-Key": "wrong"},
        {"X-API-Key": HASHES["all"]},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {token()}"},
        {"Authorization": f"Basic {KEYS['all']}"},
        {"Authorization": KEYS["all"]},
        {"X-API-Key": "wrong", "Authorization": f"Bearer {KEYS['all']}"},
    ):
        answer = await post(daemon, None, one, **headers)
        assert code(answer) == (401, "unauthorized"), headers
        assert answer.headers["www-authenticate"].startswith("Bearer")
        for path in READ:
            assert code(await http(daemon.url, "GET", path, headers=headers)) == (401, "unauthorized")
    for headers in (
        {"X-API-Key": KEYS["all"]},
        {"Authorization": f"Bearer {KEYS['all']}"},
        {"Authorization": f"bearer  {KEYS['all']} "},
    ):
        assert (await post(daemon, None, one, **headers)).status == 200
        for path in READ:
            assert (await http(daemon.url, "GET", path, headers=headers)).status == 200
    assert (await http(daemon.url, "GET", "/health")).status == 200


@asynchronous
async def test_a_key_may_what_its_line_says(daemon: Daemon) -> None:
    for path in READ:
        assert code(await http(daemon.url, "GET", path, headers={"X-API-Key": KEYS["cron"]})) == (
            403,
            "forbidden",
        )
        assert (await http(daemon.url, "GET", path, headers={"X-API-Key": KEYS["reader"]})).status == 200
    assert code(await post(daemon, "reader", {"channel": "news.1", "data": 1})) == (403, "forbidden")
    for channel in ("news.1", "jobs"):
        assert (await post(daemon, "cron", {"channel": channel, "data": 1})).status == 200
    for body in ({"channel": "room.1", "data": 1}, {"data": 1}, {"channels": ["room.1", "job"], "data": 1}):
        assert code(await post(daemon, "cron", body)) == (403, "forbidden")
    answer = await post(daemon, "cron", {"channels": ["room.1", "news.1"], "data": 1})
    assert answer.status == 200
    refused, taken = answer.json["results"]
    assert refused["error"]["code"] == "forbidden" and "error" not in taken
    # A key opens what tokens cannot.
    assert (await post(daemon, "all", {"channel": "shut.1", "data": 1})).status == 200
    assert (await post(daemon, "all", {"data": 1})).status == 200


@asynchronous
async def test_a_key_may_not_be_too_fast(daemon: Daemon) -> None:
    answers = [await post(daemon, "slow", {"channel": "news.1", "data": 1}) for _ in range(8)]
    assert {answer.status for answer in answers} == {200, 429}
    slow = next(answer for answer in answers if answer.status == 429)
    assert code(slow) == (429, "rate_limited") and int(slow.headers["retry-after"]) >= 1
    assert (await post(daemon, "all", {"channel": "news.1", "data": 1})).status == 200


# The local rule


@contextmanager
def site(page: str) -> Iterator[str]:
    """A page on another port of this machine, which is another origin."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_a_page_of_another_origin_may_not_publish() -> None:
    """In Chromium, to a development daemon without keys that lets every page connect."""
    with Daemon() as daemon, site("<p>evil</p>") as url, Browser() as browser:
        before = daemon.stats()["totals"]["published"]
        page = browser.open(url)
        body = json.dumps({"channel": "news", "data": 1})
        for options in (
            f"{{method: 'POST', body: {body!r}}}",
            f"{{method: 'POST', body: {body!r}, headers: {{'Content-Type': 'application/json'}}}}",
            f"{{method: 'POST', body: {body!r}, referrerPolicy: 'no-referrer'}}",
        ):
            script = f"fetch('{daemon.url}/broadcast', {options}).then(answer => answer.status)"
            assert page.evaluate(script) == 401
        blind = f"fetch('{daemon.url}/broadcast', {{method: 'POST', mode: 'no-cors', body: {body!r}}})"
        assert page.evaluate(f"{blind}.then(answer => answer.type)") == "opaque"
        for path in ("/stats", "/metrics", "/channels"):
            assert page.evaluate(f"fetch('{daemon.url}{path}').then(answer => answer.status)") == 401
        # The daemon's own page is another matter only where its origin is listed by name.
        assert page.evaluate(f"fetch('{daemon.url}/health').then(answer => answer.status)") == 200
        assert daemon.stats()["totals"]["published"] == before


@asynchronous
async def test_what_is_not_plainly_local() -> None:
    one = {"channel": "news", "data": 1}
    with Daemon() as daemon:
        assert (await post(daemon, None, one)).status == 200
        # A key that nobody asked for does not shut the door.
        assert (await post(daemon, "any", one)).status == 200
        for headers in (
            {"Host": "bcast.example.com"},
            {"Host": "127.0.0.1.example.com"},
            {"Host": f"192.0.2.1:{daemon.port}"},
            {"Forwarded": "for=127.0.0.1"},
            {"X-Forwarded-For": "127.0.0.1"},
            {"x-forwarded-for": ""},
            {"X-Forwarded-Host": "localhost"},
            {"X-Forwarded-Proto": "https"},
            {"X-Real-IP": "127.0.0.1"},
            {"X-REAL-IP": ""},
            {"Via": "1.1 proxy"},
            {"Origin": "http://127.0.0.1:1"},
            {"Origin": "null"},
            {"Origin": daemon.url},
        ):
            assert code(await post(daemon, None, one, **headers)) == (401, "unauthorized"), headers


# Behind a proxy


@contextmanager
def proxy(daemon: Daemon, place: Path, headers: str = "") -> Iterator[str]:
    """nginx in front of the daemon; `headers` are lines of its `location`. Its URL."""
    port = free_port()
    text = f"""
worker_processes 1;
events {{}}
http {{
  access_log off;
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass {daemon.url}; {headers} }}
  }}
}}
"""
    with run_nginx(text, place, port) as url:
        yield url


@asynchronous
async def test_a_bare_proxy_pass_opens_nothing_in_production(tmp_path: Path) -> None:
    one = {"channel": "news", "data": 1}
    with (
        Daemon("[channels]\npublish = server\n", BCAST_ENV="production") as daemon,
        proxy(daemon, tmp_path) as url,
    ):
        # It warns that no key is set.
        daemon.expect("configuration")
        for path in READ[:3]:
            assert code(await http(url, "GET", path)) == (401, "unauthorized")
        assert code(await http(url, "POST", "/broadcast", one)) == (401, "unauthorized")
        assert (await http(url, "GET", "/health")).status == 200
        assert (await http(url, "GET", "/")).status == 426


@asynchronous
async def test_a_proxy_that_says_so_opens_nothing_in_development(tmp_path: Path) -> None:
    for number, line in enumerate(
        ("X-Forwarded-For $proxy_add_x_forwarded_for", "X-Real-IP $remote_addr", "Host $host.example.com")
    ):
        (place := tmp_path / str(number)).mkdir()
        with Daemon() as daemon, proxy(daemon, place, f"proxy_set_header {line};") as url:
            assert code(await http(url, "GET", "/stats")) == (401, "unauthorized")


UPGRADE = """proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade;
    proxy_set_header Connection upgrade;"""
SETS = {
    "X-Forwarded-For": "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;",
    "X-Real-IP": "proxy_set_header X-Real-IP $remote_addr;",
}
SETS["both"] = SETS["X-Forwarded-For"] + SETS["X-Real-IP"]


@pytest.mark.parametrize("sets", SETS)
@asynchronous
async def test_a_forged_address_behind_a_trusted_proxy_counts_for_nothing(sets: str, tmp_path: Path) -> None:
    """nginx is 127.0.0.1, its clients have other addresses of this machine and claim others again."""
    ini = "[server]\nmax_connections_per_ip = 2\ntrusted_proxies = 127.0.0.1\n"
    with Daemon(ini) as daemon, proxy(daemon, tmp_path, UPGRADE + SETS[sets]) as url:
        opened: list[asyncio.StreamWriter] = []

        async def status(client: str, **headers: str) -> int:
            """Connect and stay so, if that is allowed."""
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", int(url.rpartition(":")[2]), local_addr=(client, 0)
                )
            except OSError:
                pytest.skip(f"{client} is no address of this machine")
            opened.append(writer)
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            writer.write(handshake("127.0.0.1", "/ws", named))
            return int((await asyncio.wait_for(reader.readline(), 10)).split()[1])

        assert [await status("127.0.0.2") for _ in range(3)] == [101, 101, 429]
        if sets == "X-Forwarded-For":
            for forged in ("192.0.2.1", "192.0.2.2, 127.0.0.1", "127.0.0.1", "x", "", "127.0.0.2"):
                assert await status("127.0.0.2", X_Forwarded_For=forged) == 429, forged
        if sets == "X-Real-IP":
            for forged in ("192.0.2.1", "192.0.2.2", "127.0.0.2"):
                assert await status("127.0.0.2", X_Real_IP=forged) == 429, forged
        # Both are there and differ, so neither is believed: all who do this share what the proxy itself has.
        other = "X_Real_IP" if sets == "X-Forwarded-For" else "X_Forwarded_For"
        answers = [await status("127.0.0.2", **{other: f"192.0.2.{number}"}) for number in range(5)]
        assert answers == ([429] * 5 if sets == "both" else [101, 101, 429, 429, 429])
        assert await status("127.0.0.3") == 101
        for writer in opened:
            writer.close()


@asynchronous
async def test_a_forged_address_without_a_trusted_proxy_counts_for_nothing() -> None:
    with Daemon("[server]\nmax_connections_per_ip = 1\ntrusted_proxies = 192.0.2.1\n") as daemon:
        async with Client(daemon.ws_url):
            for name in ("X-Forwarded-For", "X-Real-IP"):
                answer = await raw_http(daemon.url, handshake("127.0.0.1", "/ws", {name: "192.0.2.9"}))
                assert answer.status == 429


# SIGHUP


def write(daemon: Daemon, ini: str, number: int) -> None:
    """Change the file, and wait until all workers have taken it over."""
    (daemon.place / "bcast.ini").write_text(ini)
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("settings_taken", number)


@asynchronous
async def test_keys_are_changed_without_closing_anyone(redis_server: RedisServer, tmp_path: Path) -> None:
    secrets, api_keys = tmp_path / "secrets", tmp_path / "keys"
    secrets.write_text(SECRET)
    api_keys.write_text(HASHES["all"])
    ini = f"[auth]\njwt_secret = file:{secrets}\napi_keys = file:{api_keys}\n"
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:
        pids = [row["pid"] for row in (await stats(daemon, "all"))["workers"]]
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(Client(daemon.ws_url, f"/?token={token()}"))
                for _ in range(20)
            ]
            for client in clients:
                await client.ask("subscribe", channel="room.1")
            old, new = token(), token(secret=NEW_SECRET)
            for number, (contents, outcome) in enumerate(
                (
                    ((f"{SECRET}\n{NEW_SECRET}", f"{HASHES['all']}\n{HASHES['cron']}"), (True, True)),
                    ((NEW_SECRET, HASHES["cron"]), (False, True)),
                ),
                1,
            ):
                secrets.write_text(contents[0])
                api_keys.write_text(contents[1])
                write(daemon, ini, 2 * number)
                for given, taken in zip((old, new), outcome, strict=True):
                    for _ in range(4):  # over both workers
                        if taken:
                            async with Client(daemon.ws_url, f"/?token={given}") as client:
                                assert "expiresAt" in client.hello
                        else:
                            assert (await close_of(daemon, path=f"/?token={given}"))[0] == 4500
                for key, taken in zip(("all", "cron"), outcome, strict=True):
                    answers = [await post(daemon, key, {"channel": "x", "data": 1}) for _ in range(4)]
                    assert {answer.status for answer in answers} == ({200} if taken else {401})
            # Nobody was closed, and everybody hears.
            await post(daemon, "cron", {"channel": "room.1", "data": "still here"})
            for client in clients:
                assert (await client.message())["data"] == "still here"
                assert await client.is_alive()
            assert (await clients[0].ask("auth", token=old))["code"] == "unauthorized"
            assert (await clients[0].ask("auth", token=new))["op"] == "auth"
        assert [row["pid"] for row in (await stats(daemon, "cron"))["workers"]] == pids
        assert not daemon.events("replacing")
        assert SECRET not in daemon_log(daemon) and NEW_SECRET not in daemon_log(daemon)


async def stats(daemon: Daemon, key: str) -> Any:
    async def ask() -> Any:
        return (await http(daemon.url, "GET", "/stats", headers={"X-API-Key": KEYS[key]})).json

    return await eventually(ask, lambda answer: len(answer["workers"]) == 2)


def daemon_log(daemon: Daemon) -> str:
    return (daemon.place / "log").read_text()


@asynchronous
async def test_origins_limits_and_rules_are_taken_over(redis_server: RedisServer) -> None:
    with Daemon("[channel a.*]\npublish = anyone\n", workers=2, redis=redis_server.url) as daemon:
        async with Client(daemon.ws_url) as client:
            for channel in ("a.1", "b.1"):
                await client.ask("subscribe", channel=channel)
            ini = "[cors]\norigins = https://good.example\n[limits]\nmax_subscriptions = 1\n"
            ini += "[channel b.*]\nsubscribe = nobody\n[channel a.*]\npublish = server\n"
            write(daemon, ini, 2)
            error = await client.next(lambda event: event["type"] == "error")
            assert (error["code"], error["channel"]) == ("forbidden", "b.1")
            assert (await client.ask("broadcast", channel="a.1", data=1))["code"] == "forbidden"
            assert (await client.ask("subscribe", channel="c"))["code"] == "too_many_subscriptions"
            for _ in range(4):
                headers = {"Origin": "https://evil.example"}
                assert (await raw_http(daemon.url, handshake("127.0.0.1", "/", headers))).status == 403
            assert (await post(daemon, None, {"channel": "a.1", "data": 2})).status == 200
            assert (await client.message())["data"] == 2
        changes = [line["message"] for line in daemon.events("reload")]
        assert "SIGHUP: [cors] origins: * -> https://good.example" in changes
        assert "SIGHUP: [channel a.*] changed" in changes and "SIGHUP: [channel b.*] is new" in changes


@asynchronous
async def test_a_bad_configuration_is_told_and_the_old_one_stays(redis_server: RedisServer) -> None:
    with Daemon(INI, workers=2, redis=redis_server.url) as daemon:
        daemon.expect("reload_failed")
        async with Client(daemon.ws_url, f"/?token={token()}") as client:
            for number, text in enumerate(
                ("[auth]\njwt_secret = file:/nowhere\n", "[auth]\napi_keys = hunter2\n", "[nonsense]\n"), 1
            ):
                (daemon.place / "bcast.ini").write_text(text)
                daemon.signal(signal.SIGHUP)
                daemon.wait_for_log("reload_failed", 2 * number)
            assert (await client.ask("subscribe", channel="room.1"))["op"] == "subscribe"
        async with Client(daemon.ws_url, f"/?token={token()}"):
            pass
        assert "hunter2" not in daemon_log(daemon)
        assert not daemon.events("settings_taken") + daemon.events("replacing")


@asynchronous
async def test_any_other_change_or_none_replaces_the_workers(redis_server: RedisServer) -> None:
    ini = INI + "[server]\ndrain_seconds = 1s\n"
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:
        daemon.expect("reload_fixed")
        changed = ini.replace("1s", "2s").replace(SECRET, f"{SECRET}\n  {NEW_SECRET}")
        changed += "[heartbeat]\ninterval = 7s\n"
        fixed = changed.replace("[server]", "[server]\nport = 1")
        for number, text in enumerate((changed, changed, fixed), 1):
            (daemon.place / "bcast.ini").write_text(text)
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_log("replaced", number)
            async with Client(daemon.ws_url, f"/?token={token(secret=NEW_SECRET)}") as client:
                assert client.hello["heartbeat"] == 7000
        # The port comes from the environment of these tests, so the file's is hidden: no line tells of it.
        assert len(daemon.events("replacing")) == 3


# The command line


MODULE = (sys.executable, "-W", "error", "-m", "tornado_bcast.cli")


def command(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*MODULE, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


def test_a_key_and_a_token_from_the_command_line(tmp_path: Path) -> None:
    ini, key_file, token_file = tmp_path / "bcast.ini", tmp_path / "key", tmp_path / "token"
    made = command("key", "--name", "cron", "--publish", "room.*", "--publish", "a", "--read", "--rate", "9")
    key, line = made.stdout.splitlines()
    assert line == f"{sha256(key.encode()).hexdigest()} name=cron publish=room.*,a read=yes rate=9"
    assert key not in made.stderr and command("key").stdout != command("key").stdout
    key_file.write_text(key)
    ini.write_text(f"[auth]\njwt_secret = {SECRET}\njwt_audience = me\napi_keys = {line}\n")
    shown = command("check-config", "-c", str(ini)).stdout
    assert SECRET not in shown and line not in shown and "auth.api_keys = ***" in shown
    made = command("token", "-c", str(ini), "--sub", "ann", "--subscribe", "room.*", "--ttl", "5m")
    token_file.write_text(made.stdout)
    claims = jwt.decode(made.stdout.strip(), SECRET, ["HS256"], audience="me")
    assert claims["sub"] == "ann" and claims["subscribe"] == ["room.*"] and claims["publish"] == []
    assert 290 < claims["exp"] - time.time() <= 300
    with Daemon(ini.read_text()) as daemon:
        tail = subprocess.Popen(
            [*MODULE, "tail", "room.1", "--url", daemon.url, "--token-file", str(token_file)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert tail.stdout is not None
        try:
            until(lambda: _channels(daemon, key) == ["room.1"])
            done = command("publish", "room.1", '"hi"', "--url", daemon.url, "--key-file", str(key_file))
            assert done.returncode == 0, done.stderr
            assert json.loads(tail.stdout.readline())["data"] == "hi"
        finally:
            tail.terminate()
            tail.wait(10)
            tail.stdout.close()
        for channel, variables in (("other", {"BCAST_KEY": key}), ("room.1", {"BCAST_KEY": "wrong"})):
            assert command("publish", channel, "1", "--url", daemon.url, **variables).returncode == 1


def _channels(daemon: Daemon, key: str) -> list[str]:
    answer = asyncio.run(http(daemon.url, "GET", "/channels", headers={"X-API-Key": key}))
    return [entry["channel"] for entry in answer.json["channels"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("token", "--sub", "a"), "no [auth] jwt_secret to sign with"),
        (("token", "--sub", "a", "--ttl", "soon"), "no duration"),
        (("token", "--sub", "a", "--key-file", "/nowhere"), "/nowhere cannot be read"),
        (("token",), "--sub"),
        (("token", "--sub", "a", "-c", "/nowhere"), "/nowhere"),
        (("key", "--publish", "$a"), "no glob"),
        (("key", "--name", "a b"), "white space"),
        (("key", "--rate", "fast"), "`rate`"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], sentence: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and done.stdout == ""


# docs/AUTHENTICATION.md


VIEWS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/AUTHENTICATION.md").read_text(), re.DOTALL)


def test_the_flask_view(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [view for view in VIEWS if "flask" in view]
    monkeypatch.setenv("FLASK_SECRET_KEY", "x" * 32)
    monkeypatch.setenv("BCAST_AUTH_JWT_SECRET", SECRET)
    names: dict[str, Any] = {"__name__": "site"}
    exec(compile(code, "AUTHENTICATION.md", "exec"), names)
    client = names["app"].test_client()
    assert client.post("/bcast-token").status_code == 401
    with client.session_transaction() as session:
        session["user_id"] = 7
    assert client.get("/bcast-token").status_code == 405
    answer = client.post("/bcast-token")
    assert answer.headers["Cache-Control"] == "no-store"
    check_token(answer.get_json()["token"])


def test_the_django_view() -> None:
    """In a process of its own: Django's settings are one for each."""
    (code,) = [view for view in VIEWS if "django" in view]
    code += """
import json
from types import SimpleNamespace

import django
from django.conf import settings
from django.test import RequestFactory

settings.configure(SECRET_KEY="x", ALLOWED_HOSTS=["*"], USE_TZ=True)
django.setup()
statuses = []
for method, user in (
    ("post", SimpleNamespace(is_authenticated=False)),
    ("get", SimpleNamespace(is_authenticated=True, pk=7)),
    ("post", SimpleNamespace(is_authenticated=True, pk=7)),
):
    request = getattr(RequestFactory(), method)("/bcast-token")
    request.user = user
    answer = bcast_token(request)
    statuses.append(answer.status_code)
assert "no-store" in answer["Cache-Control"]
print(json.dumps([statuses, json.loads(answer.content)["token"]]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "BCAST_AUTH_JWT_SECRET": SECRET},
    )
    statuses, made = json.loads(done.stdout.splitlines()[-1]) if done.stdout else pytest.fail(done.stderr)
    assert statuses == [401, 405, 200]
    check_token(made)


def check_token(made: str) -> None:
    """The daemon takes it, for `user:7` and nothing else."""

    @asynchronous
    async def look() -> None:
        with Daemon(BCAST_AUTH_JWT_SECRET=SECRET) as daemon:
            async with Client(daemon.ws_url, protocols=["bcast.v1", f"bearer.{made}"]) as client:
                assert (await client.ask("subscribe", channel="user:7"))["op"] == "subscribe"
                for channel in ("user:70", "user:8", "user:*", "news"):
                    assert (await client.ask("subscribe", channel=channel)).get("code") in (
                        "forbidden",
                        "bad_channel",
                    )
                assert (await client.ask("broadcast", channel="user:7", data=1))["code"] == "forbidden"

    look()
