"""The real daemon's answers and frames, held against docs/openapi.yaml and docs/asyncapi.yaml.

The schemas allow fields that they do not name, as clients must. Here they do not: what the daemon sends and
the documents do not describe fails.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jwt
import pytest
import websockets
import yaml
from broker_kit import asynchronous
from client import Answer, Client, Event, eventually, http
from daemon import Daemon
from jsonschema import Draft7Validator, Draft202012Validator
from redis_server import RedisServer
from test_vectors import load, text_of

from tornado_bcast.errors import ErrorCode

ROOT = Path(__file__).parents[1]

# Everything is allowed that the documents describe, and acks are due soon.
INI = """
[heartbeat]
interval = 1s
[limits]
max_subscriptions = 5
max_message_bytes = 4k
[channels]
publish_all = anyone
[channel orders*]
persistent = yes
ack_timeout = 100ms
[channel short]
persistent = yes
history_size = 2
[channel chat]
sender = yes
[channel closed]
subscribe = nobody
publish = server
"""

# One connection, one message a minute, one page.
FULL = """
[server]
max_connections = 1
[cors]
origins = https://good.example
[limits]
rate = 1
burst = 2
http_rate = 0.01
http_burst = 1
"""


@cache
def document(name: str) -> Any:
    return yaml.safe_load((ROOT / "docs" / f"{name}.yaml").read_text())


def closed(schema: Any) -> Any:
    """The schema, with each object that names its fields allowing no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    copy = {name: closed(value) for name, value in schema.items()}
    if isinstance(copy.get("properties"), dict) and copy.get("type") == "object":
        copy.setdefault("additionalProperties", False)
    return copy


@cache
def schemas(name: str) -> Any:
    return {"schemas": closed(document(name)["components"]["schemas"])}


def check_http(schema: Any, value: Any) -> None:
    Draft202012Validator({**closed(schema), "components": schemas("openapi")}).validate(value)


def frame_validator(name: str, *, strict: bool = True) -> Draft7Validator:
    """Of one of asyncapi.yaml's schemas; those are JSON Schema draft 7."""
    components = schemas("asyncapi") if strict else document("asyncapi")["components"]
    return Draft7Validator({"$ref": f"#/components/schemas/{name}", "components": components})


_ACKS = {
    "connect": "Connected",
    "subscribe": "Subscribed",
    "unsubscribe": "Unsubscribed",
    "broadcast": "Taken",
    "auth": "Authenticated",
}


def check_frame(frame: Event) -> None:
    kind = frame["type"]
    name = _ACKS[frame["op"]] if kind == "ack" else kind.capitalize()
    frame_validator(name).validate(frame)


def check_answer(method: str, template: str, answer: Answer) -> None:
    """Hold an answer against what openapi.yaml says of its operation and status."""
    operation = document("openapi")["paths"][template][method.lower()]
    described = operation["responses"].get(str(answer.status))
    assert described is not None, f"{method} {template}: {answer.status} is not described"
    for name in described.get("headers", {}):
        if name != "Sec-WebSocket-Protocol":
            assert name.lower() in answer.headers, name
    contents = described.get("content")
    if contents is None:
        assert answer.body == b""
        return
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in contents
    if kind == "application/json":
        check_http(contents[kind]["schema"], answer.json)


# The documents themselves


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
def test_references_lead_somewhere(name: str) -> None:
    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                yield from walk(one)

    references = set(walk(document(name)))
    assert references
    for reference in references:
        place = document(name)
        for step in reference.removeprefix("#/").split("/"):
            assert step in place, reference
            place = place[step]


def test_schemas_are_schemas() -> None:
    for schema in document("openapi")["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for schema in document("asyncapi")["components"]["schemas"].values():
        Draft7Validator.check_schema(schema)


def test_examples_are_right() -> None:
    seen = 0
    for path in document("openapi")["paths"].values():
        for operation in path.values():
            if not isinstance(operation, dict):
                continue
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for content in [one for body in bodies for one in body.get("content", {}).values()]:
                for example in content.get("examples", {}).values():
                    check_http(content["schema"], example["value"])
                    seen += 1
    for message in document("asyncapi")["components"]["messages"].values():
        for example in message.get("examples", []):
            frame_validator(message["payload"]["$ref"].rpartition("/")[2]).validate(example["payload"])
            seen += 1
    assert seen > 15


@pytest.mark.parametrize("entry", load("server-frames", "frames"))
def test_vectors_of_the_server(entry: dict[str, Any]) -> None:
    check_frame(entry["frame"])


# What a schema cannot see: numbers and strings that no JSON may have, and a `$` that Python lets stand before
# a line feed.
_UNSEEN = {"NaN", "half of a surrogate pair", "a messageId with a line feed"}


@pytest.mark.parametrize("entry", load("client-frames", "frames"))
def test_vectors_of_clients(entry: dict[str, Any]) -> None:
    names = ("Subscribe", "Unsubscribe", "Broadcast", "Ack", "Pong", "Auth")
    try:
        frame = json.loads(text_of(entry))
    except ValueError:
        assert entry["error"]["code"] == "bad_message"
        return
    fitting = [name for name in names if frame_validator(name, strict=False).is_valid(frame)]
    if "command" in entry:
        assert fitting == [entry["command"]["type"].capitalize()]
    elif entry["name"] not in _UNSEEN:
        assert fitting == []


def test_bodies_of_vectors() -> None:
    schema = document("openapi")["paths"]["/broadcast"]["post"]["requestBody"]["content"]["application/json"]
    validator = Draft202012Validator({**schema["schema"], "components": schemas("openapi")})
    for parameter in load("http-bodies", "bodies"):
        entry = parameter.values[0]
        good = entry["status"] == 200 and not any("code" in result for result in entry["results"])
        # What is wrong with a header, or with the text itself, is not seen in the value.
        if "body" in entry and "headers" not in entry:
            assert validator.is_valid(entry["body"]) == good, entry["name"]


# HTTP


@pytest.fixture(scope="module")
def redis_daemon(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(INI, workers=2, redis=redis_server.url) as daemon:
        yield daemon


@pytest.fixture
def daemon(redis_daemon: Daemon) -> Iterator[Daemon]:
    yield redis_daemon
    redis_daemon.check_log()


class Case(NamedTuple):
    """A request and the status that it must get."""

    method: str
    template: str
    status: int
    body: Any = None
    headers: dict[str, str | None] | None = None
    path: str | None = None


FOREIGN = {"Origin": "https://bad.example"}
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
HALF = {**UPGRADE, "Sec-WebSocket-Key": None}
PATHS = list(document("openapi")["paths"])
OPERATORS = ["/stats", "/metrics", "/channels", "/channels/{channel}/history"]

# By a daemon with all that it needs.
CASES = [
    Case("GET", "/", 200),
    Case("GET", "/", 101, None, UPGRADE),
    Case("GET", "/ws", 101, None, UPGRADE),
    Case("GET", "/", 400, None, HALF),
    Case("GET", "/ws", 400, None, HALF),
    Case("GET", "/ws", 426),
    Case("GET", "/health", 200),
    Case("GET", "/health", 200, path="/health?deep=1"),
    Case("GET", "/health/live", 200),
    Case("GET", "/health/ready", 200),
    Case("GET", "/stats", 200),
    Case("GET", "/metrics", 200),
    Case("GET", "/channels", 200),
    Case("GET", "/channels/{channel}/history", 200, path="/channels/orders/history"),
    Case("GET", "/channels/{channel}/history", 200, path="/channels/orders/history?since=1&epoch=x&limit=1"),
    Case("GET", "/channels/{channel}/history", 200, path="/channels/orders%2Feu/history"),
    Case("GET", "/channels/{channel}/history", 200, path="/channels/orders/eu/history"),
    Case("GET", "/channels/{channel}/history", 400, path="/channels/news/history"),
    Case("GET", "/channels/{channel}/history", 400, path="/channels/no%20spaces/history"),
    Case("GET", "/channels/{channel}/history", 400, path="/channels/orders/history?limit=many"),
    Case("GET", "/channels/{channel}/history", 400, path="/channels/orders/history?since=-1"),
    Case("POST", "/broadcast", 200, {"channel": "orders", "data": [1, {"a": None}]}),
    Case("POST", "/broadcast", 200, {"channel": "orders", "data": 1, "messageId": "twice"}),
    Case("POST", "/broadcast", 200, {"channel": "orders", "data": 1, "messageId": "twice"}),
    Case("POST", "/broadcast", 400, b"{"),
    Case("POST", "/broadcast", 400, {"messages": [{"channel": "a b", "data": 1}, {"channel": "a"}]}),
    Case("POST", "/broadcast", 401, {"data": 1}, {"Host": "bcast.example"}),
    Case("POST", "/broadcast", 401, {"data": 1}, {"Origin": "https://any.example"}),
    Case("POST", "/broadcast", 413, {"channel": "news", "data": "x" * 5000}),
    Case("POST", "/broadcast", 413, {"channel": "news", "data": "x" * 300_000}),
    Case("POST", "/broadcast", 413, {"messages": [{"channel": "news", "data": "x" * 5000}] * 2}),
    *(Case("GET", path, 401, None, {"X-Forwarded-For": "1.2.3.4"}) for path in OPERATORS),
    *(Case("PUT", path, 405, {}) for path in PATHS),
    *(Case("OPTIONS", path, 204, None, {"Origin": "null"}) for path in PATHS),
]
# By one that is full, whose limits are low and whose list of origins is short.
FULL_CASES = [
    Case("GET", "/", 503, None, UPGRADE),
    Case("GET", "/ws", 503, None, UPGRADE),
    Case("POST", "/broadcast", 200, {"channel": "news", "data": 1}),
    Case("POST", "/broadcast", 429, {"channel": "news", "data": 2}),
    *(Case("GET", path, 403, None, FOREIGN) for path in PATHS if path != "/broadcast"),
    *(Case("OPTIONS", path, 403, None, FOREIGN) for path in PATHS),
    Case("POST", "/broadcast", 403, {"data": 1}, FOREIGN),
]
# By one that is meant for production.
PRODUCTION_CASES = [
    Case("GET", "/", 426),
    Case("GET", "/health", 200),
    Case("POST", "/broadcast", 401, {"data": 1}),
    *(Case("GET", path, 401) for path in OPERATORS),
]
# By one that lets each address have one connection, when it has that.
CROWDED_CASES = [Case("GET", path, 429, None, UPGRADE) for path in ("/", "/ws")]
# By one without Redis.
DEAF_CASES = [
    Case("GET", "/health", 503),
    Case("GET", "/health", 503, path="/health?deep=1"),
    Case("GET", "/health/live", 200),
    Case("GET", "/health/ready", 503),
    Case("GET", "/stats", 200),
    Case("GET", "/channels", 503),
    Case("GET", "/channels/{channel}/history", 503, path="/channels/orders/history"),
    Case("POST", "/broadcast", 503, {"channel": "news", "data": 1}),
    Case("POST", "/broadcast", 503, {"channels": ["news", "orders"], "data": 1}),
]


def test_the_cases_cover_what_is_described() -> None:
    """All but a fault of the server, which no request can bring about on purpose."""
    cases = CASES + FULL_CASES + PRODUCTION_CASES + CROWDED_CASES + DEAF_CASES
    seen = {(case.template, case.method.lower(), str(case.status)) for case in cases}
    # Any method but those described is answered alike.
    seen |= {(path, "post" if path == "/broadcast" else "get", "405") for path in PATHS}
    described = {
        (path, method, status)
        for path, operations in document("openapi")["paths"].items()
        for method, operation in operations.items()
        if method in ("get", "post", "options")
        for status in operation["responses"]
    }
    assert described - seen == {("/broadcast", "post", "500")}
    assert {one for one in seen - described if one[1] != "put"} == set()


async def ask(daemon: Daemon, case: Case) -> Answer:
    path = case.path or case.template.replace("{channel}", "orders")
    return await http(daemon.url, case.method, path, case.body, case.headers)


async def try_cases(daemon: Daemon, cases: list[Case]) -> None:
    for case in cases:
        answer = await ask(daemon, case)
        if case.template.startswith("/health") and answer.status != case.status:
            # On a busy machine the canary may be late, and for that moment this is the right answer.
            answer = await eventually(
                lambda case=case: ask(daemon, case), lambda one, case=case: one.status == case.status
            )
        assert answer.status == case.status, (case, answer)
        method = case.method
        if method == "PUT":
            method = "POST" if case.template == "/broadcast" else "GET"
        try:
            check_answer(method, case.template, answer)
        except Exception as error:
            error.add_note(f"{case}: {answer}")
            raise


@asynchronous
async def test_http(daemon: Daemon) -> None:
    await try_cases(daemon, CASES)
    # What was said there of channels with subscribers and of messages is true of some.
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="orders/eu")
        await client.ask("broadcast", channel="orders/eu", data=1)
        # A list of channels is given out again for a second.
        async with asyncio.timeout(5):
            while {"channel": "orders/eu", "persistent": True} not in (  # noqa: ASYNC110
                answer := await http(daemon.url, "GET", "/channels")
            ).json["channels"]:
                await asyncio.sleep(0.05)
        check_answer("GET", "/channels", answer)
        answer = await http(daemon.url, "GET", "/channels/orders%2Feu/history")
        check_answer("GET", "/channels/{channel}/history", answer)
        assert [message["data"] for message in answer.json["messages"]] == [1]


@asynchronous
async def test_a_full_house() -> None:
    with Daemon(FULL) as daemon:
        async with Client(daemon.ws_url):
            await try_cases(daemon, FULL_CASES)


@asynchronous
async def test_production() -> None:
    with Daemon(BCAST_ENV="production") as daemon:
        # It warns that no key is set, and of channels to which anyone may publish.
        daemon.expect("configuration")
        await try_cases(daemon, PRODUCTION_CASES)


@asynchronous
async def test_too_many_of_one_address() -> None:
    with Daemon("[server]\nmax_connections_per_ip = 1") as daemon:
        async with Client(daemon.ws_url):
            await try_cases(daemon, CROWDED_CASES)


@asynchronous
async def test_without_redis(tmp_path: Path) -> None:
    ini = "[redis]\npublish_timeout = 300ms\n[channel orders]\npersistent = yes"
    with Daemon(ini, redis=f"unix://{tmp_path}/nobody.sock", ready=False) as daemon:
        daemon.expect("redis_away", "redis_down", "sessions_unsaved")
        await try_cases(daemon, DEAF_CASES)
        async with Client(daemon.ws_url) as client:
            for error in (
                await client.ask("broadcast", channel="orders", data=1),
                await client.ask("subscribe", channel="news"),
            ):
                assert error["code"] == "unavailable" and error["retryAfter"] > 0
            for frame in client.frames:
                check_frame(frame)


@asynchronous
async def test_what_is_nowhere(daemon: Daemon) -> None:
    answer = await http(daemon.url, "GET", "/nothing")
    assert answer.status == 404
    check_http({"$ref": "#/components/schemas/ErrorBody"}, answer.json)


@asynchronous
async def test_bodies(daemon: Daemon) -> None:
    """tests/vectors/http-bodies.json, in its order."""
    for parameter in load("http-bodies", "bodies"):
        entry = parameter.values[0]
        answer = await http(daemon.url, "POST", "/broadcast", text_of(entry), entry.get("headers"))
        assert answer.status == entry["status"], (entry, answer)
        check_answer("POST", "/broadcast", answer)
        if "code" in entry:
            assert answer.json["error"]["code"] == entry["code"], entry
        results = answer.json.get("results")
        if "results" not in entry:
            assert results is None
            continue
        assert len(results) == len(entry["results"])
        for result, expected in zip(results, entry["results"], strict=True):
            assert result.get("channel") == expected.get("channel"), entry
            assert result.get("error", {}).get("code") == expected.get("code"), entry
            if "messageId" in expected:
                assert result["messageId"] == expected["messageId"], entry


# WebSocket


@asynccontextmanager
async def watched(
    daemon: Daemon, path: str = "/ws", *, seen: set[str] | None = None, **options: Any
) -> AsyncIterator[Client]:
    """A client each of whose frames is checked at the end; their kinds are noted in `seen`."""
    async with Client(daemon.ws_url, path, **options) as client:
        yield client
    for frame in client.frames:
        check_frame(frame)
        if seen is not None:
            seen.add(" ".join(filter(None, (frame["type"], frame.get("op"), frame.get("code")))))


@asynchronous
async def test_frames(daemon: Daemon) -> None:
    """Everything that a server may say, from the real one; what is left out is named at the end."""
    seen: set[str] = set()
    async with watched(daemon, seen=seen, protocols=["bcast.v1"]) as client:
        assert client.socket.subprotocol == "bcast.v1"
        for channel in ("news", "chat", "orders-1", "short"):
            await client.ask("subscribe", channel=channel, ack=True)
        # The one that is sent again when no ack comes is the last.
        for channel in ("news", "chat", None, "orders-1"):
            fields = {} if channel is None else {"channel": channel}
            ack = await client.ask("broadcast", data={"a": [1]}, messageId=f"m-{channel}", **fields)
            assert "duplicate" not in ack
            again = await client.ask("broadcast", data=2, messageId=f"m-{channel}", **fields)
            assert again["duplicate"] is True and again.get("seq") == ack.get("seq")
        messages = [await client.message() for _ in range(4)]
        assert [message.get("channel") for message in messages] == ["news", "chat", None, "orders-1"]
        again = await client.message()
        assert again["redelivered"] == 1 and again["channel"] == "orders-1"
        await client.send(type="ack", channel="orders-1", seq=again["seq"], epoch=again["epoch"])
        since = {"epoch": again["epoch"], "seq": 0}
        ack = await client.ask("subscribe", channel="orders-1", ack=True, since=since)
        assert (ack["recovered"], ack["replayed"]) == (True, 1)
        await client.send(type="ack", channel="orders-1", seq=again["seq"])
        ack = await client.ask("subscribe", channel="orders-1", since={"epoch": "gone", "seq": 9})
        assert (ack["recovered"], ack["replayed"]) == (False, 1)
        ack = await client.ask("subscribe", channel="news", last=3)
        assert (ack["persistent"], ack["recovered"], ack["replayed"]) == (False, False, 0)
        assert (await client.ask("unsubscribe", channel="chat"))["op"] == "unsubscribe"

        # Refusals.
        assert (await client.ask("auth", token="x"))["code"] == "unauthorized"
        assert (await client.ask("subscribe", channel="closed"))["code"] == "forbidden"
        assert (await client.ask("broadcast", channel="closed", data=1))["code"] == "forbidden"
        assert (await client.ask("unsubscribe", channel="chat"))["code"] == "not_subscribed"
        for index in range(2):
            await client.ask("subscribe", channel=f"more-{index}")
        assert (await client.ask("subscribe", channel="one-more"))["code"] == "too_many_subscriptions"
        for parameter in load("client-frames", "frames"):
            entry = parameter.values[0]
            if "error" in entry:
                error = await client.error(text_of(entry))
                assert {name: error.get(name) for name in ("code", "messageId", "channel")} == {
                    name: entry["error"].get(name) for name in ("code", "messageId", "channel")
                }, entry
        assert (await client.error(b"\x00"))["code"] == "bad_message"
        await client.find(lambda event: event["type"] == "ping")
        hello = client.hello
    async with watched(daemon, f"/?session={hello['session']}", seen=seen) as resumed:
        assert resumed.hello["resumed"] is True and resumed.hello["clientId"] == hello["clientId"]
        positions = {entry["channel"]: entry for entry in resumed.hello["subscriptions"]}
        assert set(positions) == {"news", "orders-1", "short", "more-0", "more-1"}
        assert positions["short"] == {**positions["short"], "recovered": True, "seq": 0}
        error = await resumed.error("x" * 5000)
        assert error["code"] == "too_large"
        assert (await resumed.closed())[0] == 1009

    expected = {"message", "ping"} | {f"ack {op}" for op in _ACKS}
    expected |= {f"error {code}" for code in get_args(ErrorCode)}
    # These are seen in the other tests of this module.
    assert expected - seen == {
        "ack auth",
        "error rate_limited",
        "error unavailable",
        "error history_lost",
        "error internal",
    }


@asynchronous
async def test_frames_with_a_token() -> None:
    secret = "a secret that is long enough for everybody"
    claims = {"sub": "ann", "exp": time.time() + 60, "subscribe": ["a", "b"], "publish": ["a"]}
    first, second = (jwt.encode({**claims, **more}, secret) for more in ({}, {"subscribe": ["b"]}))
    seen: set[str] = set()
    with Daemon(f"[auth]\njwt_secret = {secret}\n[channels]\nsender = yes\n") as daemon:
        async with watched(daemon, seen=seen, protocols=["bcast.v1", f"bearer.{first}"]) as client:
            assert client.hello["expiresAt"] == int(claims["exp"]) * 1000
            await client.ask("subscribe", channel="a")
            await client.ask("broadcast", channel="a", data=1)
            assert (await client.message())["from"]["sub"] == "ann"
            assert (await client.ask("auth", token=second))["expiresAt"] == client.hello["expiresAt"]
            assert (await client.ask("auth", token="x"))["code"] == "unauthorized"
    assert seen >= {"ack auth", "error forbidden", "error unauthorized"}


@asynchronous
async def test_a_lost_history(redis_server: RedisServer) -> None:
    """A reader that is too slow for a short history is told so."""
    with Daemon(INI, redis=redis_server.url) as daemon:
        async with watched(daemon) as client:
            ack = await client.ask("subscribe", channel="short", ack=True)
            session = client.hello["session"]
            for number in range(5):
                await client.ask("broadcast", channel="short", data=number)
        async with watched(daemon, protocols=["bcast.v1", f"session.{session}"]) as client:
            (entry,) = client.hello["subscriptions"]
            assert entry == {"channel": "short", "epoch": ack["epoch"], "seq": 3, "recovered": False}
            assert await client.messages(2) == [3, 4]
            # Now Redis loses everything, while the client listens.
            await asyncio.to_thread(forget_channel, daemon, redis_server, "short")
            await client.ask("broadcast", channel="short", data=5)
            lost = await client.next(lambda event: event["type"] == "error")
            assert (lost["code"], lost["channel"], lost["seq"]) == ("history_lost", "short", 0)
            assert await client.messages(1) == [5]
        daemon.expect("history_lost")


def forget_channel(daemon: Daemon, server: RedisServer, channel: str) -> None:
    """Delete every key of a channel."""
    redis = server.client()
    try:
        keys = list(redis.scan_iter(f"{daemon.prefix}*{{{channel}}}*"))
        assert keys
        redis.delete(*keys)
    finally:
        redis.close()


@asynchronous
async def test_a_client_that_is_too_fast() -> None:
    with Daemon(FULL) as daemon:
        async with watched(daemon) as client:
            errors = []
            with suppress(websockets.ConnectionClosed, ConnectionError):
                while True:
                    answer = await client.ask("broadcast", channel="news", data=1)
                    errors += [answer["code"]] if answer["type"] == "error" else []
            code, reason = await client.closed()
            assert set(errors) == {"rate_limited"} and code == 4029
            assert set(json.loads(reason)) == {"retryAfter"}
