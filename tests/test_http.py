"""The HTTP entrances of the real daemon: publishing, who may, CORS, and what operators ask."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from broker_kit import asynchronous
from client import Answer, Client, eventually, http, raw_http
from daemon import Daemon
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer

INI = """
[limits]
max_message_bytes = 4k
[cors]
origins = *, https://listed.example
[channel closed]
subscribe = nobody
"""

PRODUCTION = """
[server]
env = production
[cors]
origins = https://good.example, https://*.sub.example
[channels]
publish = server
"""


@pytest.fixture(scope="module")
def two_workers(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(INI, workers=2, redis=redis_server.url) as daemon:
        yield daemon


@pytest.fixture
def daemon(two_workers: Daemon) -> Iterator[Daemon]:
    yield two_workers
    two_workers.check_log()


@pytest.fixture(scope="module")
def production_daemon() -> Iterator[Daemon]:
    with Daemon(PRODUCTION) as daemon:
        # It warns that no key is set.
        daemon.expect("configuration")
        yield daemon


@pytest.fixture
def production(production_daemon: Daemon) -> Iterator[Daemon]:
    yield production_daemon
    production_daemon.check_log()


async def post(daemon: Daemon, body: Any, **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return await http(daemon.url, "POST", "/broadcast", body, fields)


def error(answer: Answer) -> tuple[int, str]:
    """Status and code of an error, whose body must have the contract's form."""
    body = answer.json
    assert set(body["error"]) == {"code", "message"} and len(body["error"]["message"]) > 10, body
    assert answer.headers["content-type"].startswith("application/json")
    return answer.status, body["error"]["code"]


# Publishing


@asynchronous
async def test_one_message(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="one")
        answer = await post(daemon, {"channel": "one", "data": {"a": None}, "messageId": "m1"})
        assert answer.status == 200
        assert answer.json == {"results": [{"channel": "one", "messageId": "m1"}]}
        again = await post(daemon, {"channel": "one", "data": 2, "messageId": "m1"})
        assert again.status == 200 and again.json["results"][0]["duplicate"] is True
        generated = (await post(daemon, {"channel": "one", "data": 3})).json["results"][0]["messageId"]
        first, second = await client.message(), await client.message()
        assert (first["data"], first["messageId"], first["channel"]) == ({"a": None}, "m1", "one")
        assert (second["data"], second["messageId"]) == (3, generated)


@asynchronous
async def test_to_everybody(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        answer = await post(daemon, {"data": "all", "messageId": "all 1"})
        assert answer.json == {"results": [{"messageId": "all 1"}]}
        message = await client.message()
        assert message["data"] == "all" and "channel" not in message


@asynchronous
async def test_several_channels(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for channel in ("s1", "s2"):
            await client.ask("subscribe", channel=channel)
        answer = await post(daemon, {"channels": ["s1", "s2", "s1"], "data": 1})
        results = answer.json["results"]
        assert [result["channel"] for result in results] == ["s1", "s2", "s1"]
        assert len({result["messageId"] for result in results}) == 3
        assert await client.messages(3) == [1, 1, 1]
        answer = await post(daemon, {"channels": ["s1", "s2"], "data": 2, "messageId": "same"})
        assert [result["messageId"] for result in answer.json["results"]] == ["same", "same"]
        assert await client.messages(2) == [2, 2]


@asynchronous
async def test_a_batch_keeps_its_order(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="batch")
        messages = [{"channel": "batch", "data": number} for number in range(1000)]
        answer = await post(daemon, {"messages": messages})
        assert answer.status == 200 and len(answer.json["results"]) == 1000
        assert len({result["messageId"] for result in answer.json["results"]}) == 1000
        assert await client.messages(1000) == list(range(1000))


@asynchronous
async def test_idempotency_keys(daemon: Daemon) -> None:
    bodies: list[tuple[dict[str, Any], list[str]]] = [
        ({"channel": "i1", "data": 1}, ["key 1"]),
        ({"data": 1}, ["key 1"]),
        ({"channel": "i2", "data": 1, "messageId": "own"}, ["own"]),
        ({"channels": ["i3", "i4"], "data": 1}, ["key 1", "key 1"]),
        ({"channels": ["i5"], "data": 1, "messageId": "own"}, ["own"]),
        (
            {
                "messages": [
                    {"channel": "i6", "data": 1},
                    {"channel": "i6", "data": 2, "messageId": "own"},
                    {"data": 3},
                ]
            },
            ["key 1:0", "own", "key 1:2"],
        ),
    ]
    for body, ids in bodies:
        first = await post(daemon, body, Idempotency_Key="key 1")
        assert [result["messageId"] for result in first.json["results"]] == ids
        assert not any("duplicate" in result for result in first.json["results"])
        again = await post(daemon, body, Idempotency_Key="key 1")
        assert again.status == 200
        assert all(result["duplicate"] is True for result in again.json["results"])


@pytest.mark.parametrize(
    ("key", "items", "status"),
    [("x" * 128, 0, 200), ("x" * 129, 0, 400), ("", 0, 400), ("é", 0, 400), ("x" * 126, 1, 200)],
)
@asynchronous
async def test_what_an_idempotency_key_may_be(daemon: Daemon, key: str, items: int, status: int) -> None:
    body = {"messages": [{"data": 1, "channel": "k"}] * items} if items else {"data": 1, "channel": "k"}
    assert (await post(daemon, body, Idempotency_Key=key)).status == status


@asynchronous
async def test_a_key_that_is_too_long_with_its_number(daemon: Daemon) -> None:
    messages = [{"channel": "k", "data": 1}] * 11
    answer = await post(daemon, {"messages": messages}, Idempotency_Key="y" * 126)
    assert answer.status == 200
    codes = [result.get("error", {}).get("code") for result in answer.json["results"]]
    assert codes == [None] * 10 + ["bad_message"]


@asynchronous
async def test_each_item_of_a_batch_has_its_fate(daemon: Daemon) -> None:
    messages = [
        {"channel": "fate", "data": 1, "messageId": "f0"},
        {"channel": "fate", "data": 1, "messageId": "f0"},
        {"chanel": "fate", "data": 1},
        {"channel": "$fate", "data": 1},
        {"channel": "fate"},
        5,
        {"channel": "fate", "data": "x" * 5000, "messageId": "f6"},
        {"channel": "fate", "data": 2, "messageId": "f7"},
    ]
    answer = await post(daemon, {"messages": messages})
    assert answer.status == 200
    results = answer.json["results"]
    assert [result.get("error", {}).get("code") for result in results] == [
        None,
        None,
        "bad_message",
        "bad_channel",
        "bad_message",
        "bad_message",
        "too_large",
        None,
    ]
    assert results[1]["duplicate"] is True
    assert (results[6]["channel"], results[6]["messageId"]) == ("fate", "f6")
    assert all(len(result["error"]["message"]) > 10 for result in results if "error" in result)


@asynchronous
async def test_when_nothing_was_taken_the_first_error_decides(daemon: Daemon) -> None:
    answer = await post(
        daemon, {"messages": [{"channel": "a", "data": "x" * 5000}, {"channel": "$", "data": 1}]}
    )
    assert error(answer) == (413, "too_large")
    codes = [result["error"]["code"] for result in answer.json["results"]]
    assert codes == ["too_large", "bad_channel"]
    answer = await post(
        daemon, {"messages": [{"channel": "$", "data": 1}, {"channel": "a", "data": "x" * 5000}]}
    )
    assert error(answer) == (400, "bad_channel")
    answer = await post(daemon, {"channels": ["$", "a b"], "data": 1})
    assert error(answer) == (400, "bad_channel")
    results = answer.json["results"]
    assert [(result["channel"], result["error"]["code"]) for result in results] == [
        ("$", "bad_channel"),
        ("a b", "bad_channel"),
    ]


# Bad bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"{}",
        b'{"channel": "a"}',
        b'{"channel": "a", "data": 1} x',
        b'{"channel": "a", "data": NaN}',
        b'{"channel": "a", "data": 1e999}',
        b'{"channel": "a", "data": "\\ud800"}',
        b'{"channel": "a", "data": "\xff"}',
        b'\xff\xfe{"data": 1}',
        b'{"data": ' + b"[" * 100_000,
        b'{"channel": "a", "data": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"chanel": "a", "data": 1}',
        b'{"channel": "a", "data": 1, "x": 1}',
        b'{"type": "broadcast", "channel": "a", "data": 1}',
        b'{"channel": null, "data": 1}',
        b'{"channel": "a", "channels": ["b"], "data": 1}',
        b'{"channels": [], "data": 1}',
        b'{"channels": "a", "data": 1}',
        b'{"channels": ["a"]}',
        b'{"channels": ["a"], "data": 1, "x": 1}',
        b'{"channels": [null], "data": 1}',
        b'{"channels": [5], "data": 1}',
        b'{"messages": []}',
        b'{"messages": {"data": 1}}',
        b'{"messages": [{"data": 1}], "data": 2}',
        b'{"messages": [{"data": 1, "x": 2}]}',
        b'{"messages": [[]]}',
        b'{"channel": "a", "data": 1, "messageId": ""}',
        b'{"channel": "a", "data": 1, "messageId": 5}',
        json.dumps({"channels": ["a"] * 1001, "data": 1}).encode(),
        json.dumps({"messages": [{"channel": "a", "data": 1}] * 1001}).encode(),
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
@asynchronous
async def test_bad_bodies(daemon: Daemon, body: bytes) -> None:
    async with Client(daemon.ws_url) as client:
        status, code = error(await post(daemon, body))
        assert status == 400 and code in ("bad_message", "bad_channel")
        assert await client.is_alive()
        assert not [event for event in client.frames if event["type"] == "message"], "to nobody"


@asynchronous
async def test_a_body_is_json_whatever_its_content_type(daemon: Daemon) -> None:
    body = json.dumps({"channel": "a", "data": 1})
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        None,
    ):
        answer = await http(daemon.url, "POST", "/broadcast", body, {"Content-Type": kind})
        assert answer.status == 200, kind


def chunked(daemon: Daemon, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = f"POST /broadcast HTTP/1.1\r\nHost: 127.0.0.1:{daemon.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


@asynchronous
async def test_a_body_in_chunks(daemon: Daemon) -> None:
    body = json.dumps({"channel": "chunks", "data": "é" * 100, "messageId": "c1"}).encode()
    answer = await raw_http(daemon.url, chunked(daemon, *(bytes([byte]) for byte in body)))
    assert answer.json == {"results": [{"channel": "chunks", "messageId": "c1"}]}


@asynchronous
async def test_bodies_that_are_too_large(daemon: Daemon) -> None:
    limit = 64 * 4096
    huge = json.dumps({"channel": "a", "data": "x" * limit}).encode()
    answer = await post(daemon, huge)
    assert error(answer) == (413, "too_large")
    # One that is much too large is refused by its head, without the body.
    head = f"POST /broadcast HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {10**12}\r\n\r\n"
    assert error(await raw_http(daemon.url, head.encode())) == (413, "too_large")
    answer = await raw_http(daemon.url, chunked(daemon, *[b" " * 40_000] * 10))
    assert error(answer) == (413, "too_large")
    # One message.
    assert error(await post(daemon, {"channel": "a", "data": "x" * 5000})) == (413, "too_large")
    assert (await post(daemon, {"channel": "a", "data": "x" * 4000})).status == 200
    # Many messages together may be larger than one.
    messages = [{"channel": "a", "data": "x" * 4000}] * 60
    assert (await post(daemon, {"messages": messages})).status == 200


@pytest.mark.parametrize("path", ["/health", "/stats", "/ws", "/nothing"])
@asynchronous
async def test_a_body_that_nobody_wants_is_not_kept(daemon: Daemon, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50000000\r\n\r\n"
    answer = await raw_http(daemon.url, head.encode())
    assert answer.status in (400, 404, 405, 413)


@asynchronous
async def test_curls_hesitation(daemon: Daemon) -> None:
    body = json.dumps({"channel": "a", "data": 1})
    answer = await http(daemon.url, "POST", "/broadcast", body, {"Expect": "100-continue"})
    assert answer.status in (100, 200)


@asynchronous
async def test_several_requests_on_one_connection(daemon: Daemon) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    body = b'{"channel": "keep", "data": 1}'
    head = b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write((head + body) * 3)
    for _ in range(3):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        length = 0
        while (line := await reader.readline()) != b"\r\n":
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        assert b"results" in await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()


# Who may

LOCAL = [
    {},
    {"Host": "localhost"},
    {"Host": "127.0.0.1"},
    {"Host": "127.0.0.9:1"},
    {"Host": "[::1]:8080"},
    {"Host": "app.localhost:8080"},
    {"Origin": "https://listed.example"},
    {"Origin": "HTTPS://listed.example"},
]
FOREIGN = [
    {"Host": "example.com"},
    {"Host": "localhost.example.com"},
    {"Host": "127.0.0.1.example.com"},
    {"Host": "10.0.0.1"},
    {"Host": "[::2]"},
    {"Host": ""},
    {"Forwarded": "for=127.0.0.1"},
    {"X-Forwarded-For": "127.0.0.1"},
    {"X-Forwarded-For": ""},
    {"X-Real-IP": "127.0.0.1"},
    {"Origin": "https://other.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3000"},
]
OPERATORS = [("POST", "/broadcast"), ("GET", "/stats"), ("GET", "/metrics")]


async def ask(daemon: Daemon, method: str, path: str, headers: dict[str, str]) -> Answer:
    body = {"channel": "who", "data": 1} if method == "POST" else None
    return await http(daemon.url, method, path, body, headers)


@pytest.mark.parametrize(("method", "path"), OPERATORS)
@asynchronous
async def test_what_is_plainly_local_may(daemon: Daemon, method: str, path: str) -> None:
    for headers in LOCAL:
        assert (await ask(daemon, method, path, headers)).status == 200, headers


@pytest.mark.parametrize(("method", "path"), OPERATORS)
@asynchronous
async def test_anyone_else_is_told_which_key_to_set(daemon: Daemon, method: str, path: str) -> None:
    for headers in FOREIGN:
        answer = await ask(daemon, method, path, headers)
        if headers == {"Host": ""}:
            # No valid request at all (RFC 9112, section 3.2).
            assert answer.status in (400, 401)
            continue
        assert error(answer) == (401, "unauthorized"), headers
        assert "api_keys" in answer.json["error"]["message"]
        assert answer.headers["www-authenticate"].startswith("Bearer")


@asynchronous
async def test_in_production_nobody_may_without_a_key(production: Daemon) -> None:
    for method, path in OPERATORS:
        for headers in (
            {},
            {"Authorization": "Bearer x"},
            {"X-API-Key": "x"},
            {"Origin": "https://good.example"},
        ):
            answer = await ask(production, method, path, headers)
            assert error(answer) == (401, "unauthorized")
    for path in ("/health", "/health/live", "/health/ready", "/health?deep=1"):
        assert (await http(production.url, "GET", path)).status == 200


@asynchronous
async def test_who_may_not_need_not_send_the_body(daemon: Daemon) -> None:
    head = "POST /broadcast HTTP/1.1\r\nHost: example.com\r\nContent-Length: 1000\r\n\r\n"
    answer = await raw_http(daemon.url, head.encode())
    assert answer.status == 401
    assert answer.headers["connection"] == "close"


# Origins


@pytest.mark.parametrize("path", ["/broadcast", "/stats", "/metrics", "/health", "/health/ready", "/", "/ws"])
@asynchronous
async def test_preflight(daemon: Daemon, production: Daemon, path: str) -> None:
    headers = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,x-api-key",
    }
    for server, origin in (
        (daemon, "https://anyone.example"),
        (daemon, "null"),
        (production, "https://good.example"),
        (production, "https://a.sub.example"),
    ):
        answer = await http(server.url, "OPTIONS", path, headers={**headers, "Origin": origin})
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] in (origin, "*")
        assert "POST" in answer.headers["access-control-allow-methods"]
        allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].lower().split(",")}
        assert allowed >= set(headers["Access-Control-Request-Headers"].split(","))
        assert answer.headers.get("vary") == "Origin"
    for origin in ("https://evil.example", "null", "http://good.example", "https://sub.example"):
        answer = await http(production.url, "OPTIONS", path, headers={**headers, "Origin": origin})
        assert error(answer) == (403, "forbidden")
        assert "access-control-allow-origin" not in answer.headers
    assert (await http(daemon.url, "OPTIONS", path)).status == 204


@asynchronous
async def test_answers_to_origins(daemon: Daemon, production: Daemon) -> None:
    answer = await http(daemon.url, "GET", "/health", headers={"Origin": "https://anyone.example"})
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] in ("https://anyone.example", "*")
    assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
    # An error can be read by the page as well.
    answer = await ask(daemon, "POST", "/broadcast", {"Origin": "https://anyone.example"})
    assert answer.status == 401 and "access-control-allow-origin" in answer.headers
    answer = await http(production.url, "GET", "/health", headers={"Origin": "https://evil.example"})
    assert error(answer) == (403, "forbidden")
    answer = await http(production.url, "GET", "/health")
    assert "access-control-allow-origin" not in answer.headers


# Methods and paths


@asynchronous
async def test_paths_and_methods_that_are_none(daemon: Daemon) -> None:
    for path in ("/nothing", "/broadcast/", "/ws/", "/health/x", "/stats/1", "//", "/%00", "/../etc/passwd"):
        for method in ("GET", "POST"):
            answer = await http(daemon.url, method, path, b"{}" if method == "POST" else None)
            assert error(answer)[0] == 404, (method, path)
    for method, path, allowed in (
        ("GET", "/broadcast", {"POST", "OPTIONS"}),
        ("PUT", "/broadcast", {"POST", "OPTIONS"}),
        ("DELETE", "/broadcast", {"POST", "OPTIONS"}),
        ("POST", "/stats", {"GET", "OPTIONS"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/ws", {"GET", "OPTIONS"}),
        ("PATCH", "/metrics", {"GET", "OPTIONS"}),
    ):
        answer = await http(daemon.url, method, path, b"{}" if method != "GET" else None)
        assert error(answer)[0] == 405, (method, path)
        # RFC 9110, section 15.5.6: a 405 says what is allowed.
        listed = {name.strip() for name in answer.headers["allow"].split(",")}
        assert listed - {"HEAD"} == allowed - {"HEAD"}, (method, path)
    # A method that Tornado does not know is answered before the request is read: nothing may follow it.
    answer = await http(daemon.url, "BREW", "/broadcast", None, {"Connection": "keep-alive"})
    assert error(answer)[0] == 405
    assert answer.headers["connection"] == "close"


@asynchronous
async def test_head_for_monitors(daemon: Daemon) -> None:
    for path in ("/health", "/health/live", "/health/ready"):
        answer = await http(daemon.url, "HEAD", path)
        assert (answer.status, answer.body) == (200, b"") and int(answer.headers["content-length"]) > 0
    assert (await http(daemon.url, "HEAD", "/nothing")).status == 404


@asynchronous
async def test_the_page_is_for_development(daemon: Daemon, production: Daemon) -> None:
    page = await http(daemon.url, "GET", "/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert b"<html" in page.body.lower()
    for url, path in ((production.url, "/"), (production.url, "/ws"), (daemon.url, "/ws")):
        answer = await http(url, "GET", path)
        assert error(answer)[0] == 426
        assert answer.headers["upgrade"].lower() == "websocket"


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /health?deep=%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health?deep=%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /ws?session=%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        bytes(range(256)),
    ],
    ids=lambda data: data[:40].decode("latin-1").strip(),
)
@asynchronous
async def test_garbage(daemon: Daemon, request_: bytes) -> None:
    """It is refused or cut, and is no reason for more than a line at INFO (the fixture looks)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(request_)
    writer.write_eof()
    async with asyncio.timeout(10):
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
    writer.close()
    assert not answer or answer.split()[1][:1] in (b"4", b"5", b"2"), answer[:100]
    assert b"Traceback" not in answer
    assert (await http(daemon.url, "GET", "/health/live")).status == 200


# The rate by peer


@asynchronous
async def test_the_rate_of_a_peer_is_one_over_all_workers(redis_server: RedisServer) -> None:
    ini = "[limits]\nhttp_rate = 4\nhttp_burst = 10\n"
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:
        for worker in (0, 1):
            with daemon.only(worker):
                for _ in range(4):
                    assert (await post(daemon, {"channel": "a", "data": 1})).status == 200
        # A batch is paid for by its messages, and is taken whole or not at all.
        answer = await post(daemon, {"messages": [{"channel": "a", "data": 1}] * 5})
        assert error(answer) == (429, "rate_limited")
        for worker in (0, 1):
            with daemon.only(worker):
                answer = await post(daemon, {"messages": [{"channel": "a", "data": 1}] * 9})
                assert error(answer) == (429, "rate_limited")
                assert 1 <= int(answer.headers["retry-after"]) <= 5
        assert (await http(daemon.url, "GET", "/health")).status == 200, "other requests are free"
        line = daemon.events("refused")[0]
        assert (line["kind"], line["setting"]) == ("limit", "[limits] http_rate")
        await asyncio.sleep(int(answer.headers["retry-after"]))
        assert (await post(daemon, {"messages": [{"channel": "a", "data": 1}] * 9})).status == 200


# Health, statistics, metrics


@asynchronous
async def test_health(daemon: Daemon) -> None:
    answer = await http(daemon.url, "GET", "/health")
    assert answer.status == 200
    assert answer.json | {"status": "ok", "redis": "up"} == answer.json
    assert (await http(daemon.url, "GET", "/health/ready")).json["status"] == "ok"
    assert (await http(daemon.url, "GET", "/health/live")).json["status"] == "ok"
    assert answer.headers["cache-control"] == "no-store"


@asynchronous
async def test_a_canary_on_request_is_shared(daemon: Daemon) -> None:
    with daemon.only(0):
        answers = await asyncio.gather(*(http(daemon.url, "GET", "/health?deep=1") for _ in range(10)))
    assert {answer.status for answer in answers} == {200}
    times = [answer.json["canaryMs"] for answer in answers]
    assert all(0 < each < 2000 for each in times)
    assert len(set(times)) <= 2, "at most one a second"


@asynchronous
async def test_stats_speak_for_all_workers(redis_server: RedisServer) -> None:
    with Daemon(workers=2, redis=redis_server.url) as daemon:
        pids = daemon.workers()
        clients = []
        for worker, number in ((0, 2), (1, 3)):
            with daemon.only(worker):
                for _ in range(number):
                    clients.append(await Client(daemon.ws_url).__aenter__())
        try:
            for client in clients:
                await client.ask("subscribe", channel="stats")
            await clients[0].ask("subscribe", channel="stats2")
            for _ in range(3):
                await clients[4].ask("broadcast", channel="stats", data=1)
            await post(daemon, {"channel": "stats", "data": 2})
            for client in clients:
                assert await client.messages(4) == [1, 1, 1, 2]

            async def stats() -> Any:
                return (await http(daemon.url, "GET", "/stats")).json

            def is_complete(body: Any) -> bool:
                totals = body["totals"]
                return (totals["delivered"], totals["published"], totals["channels"]) == (20, 4, 2)

            for worker in (0, 1):
                with daemon.only(worker):
                    body = await stats()
                if not is_complete(body):
                    # At most two seconds old, whichever worker is asked.
                    body = await eventually(stats, is_complete, 2.5)
                totals = body["totals"]
                assert totals.pop("bytesOut") > 20 * 50
                assert totals == {
                    "connections": 5,
                    "subscriptions": 6,
                    "channels": 2,
                    "published": 4,
                    "delivered": 20,
                    "dropped": 0,
                    "redelivered": 0,
                }
                rows = body["workers"]
                assert [row["pid"] for row in rows] == pids
                assert [row["worker"] for row in rows] == [0, 1]
                assert [row["connections"] for row in rows] == [2, 3]
                assert len({row["node"] for row in rows}) == 1
                assert set(body) == {"version", "uptimeSeconds", "totals", "rates", "workers"}
                assert set(body["rates"]) == {"publishedPerSecond", "deliveredPerSecond"}
        finally:
            for client in clients:
                await client.__aexit__()
        await eventually(stats, lambda body: not body["totals"]["connections"], 2.5)


@asynchronous
async def test_metrics(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="metrics")
        await client.ask("broadcast", channel="metrics", data=1)
        await post(daemon, {"channel": "metrics", "data": 1})

        async def metrics() -> dict[str, Any]:
            answer = await http(daemon.url, "GET", "/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            return {each.name: each for each in text_string_to_metric_families(answer.body.decode())}

        def total(families: dict[str, Any], name: str) -> float:
            return float(sum(sample.value for sample in families[name].samples))

        families = await eventually(
            metrics,
            lambda found: total(found, "bcast_delivered") >= 2 and total(found, "bcast_connections") == 1,
        )
    assert set(families) == {
        "bcast_connections",
        "bcast_subscriptions",
        "bcast_published",
        "bcast_delivered",
        "bcast_dropped",
        "bcast_redelivered",
        "bcast_delivery_lag_seconds",
        "bcast_redis_up",
        "bcast_redis_roundtrip_seconds",
        "bcast_worker_restarts",
        "bcast_event_loop_lag_seconds",
        "bcast_connections_limit",
    }
    assert total(families, "bcast_connections_limit") > 0
    assert {sample.labels["via"] for sample in families["bcast_published"].samples} == {"ws", "http"}
    assert [sample.value for sample in families["bcast_redis_up"].samples] == [1, 1], "of both workers"
    assert families["bcast_delivery_lag_seconds"].type == "histogram"
    assert total(families, "bcast_worker_restarts") == 0
