"""The WebSocket endpoint of the real daemon: what a client may say, what it is told, what becomes of it."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from broker_kit import asynchronous
from client import Client, Raw, client_frame, eventually, handshake, http, raw_http
from daemon import Daemon
from redis_server import RedisServer

INI = """
[limits]
rate = 0
[channels]
publish_all = anyone
[channel quiet:*]
publish = server
[channel closed:*]
subscribe = nobody
[channel signed:*]
sender = yes
[channel twice]
dedup_ttl = 0
[channel short]
dedup_ttl = 1s
"""

# One of everything that is small.
STRICT = """
[limits]
rate = 20
burst = 10
max_message_bytes = 1k
max_subscriptions = 3
[cors]
origins = https://good.example
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
def strict_daemon() -> Iterator[Daemon]:
    with Daemon(STRICT) as daemon:
        yield daemon


@pytest.fixture
def strict(strict_daemon: Daemon) -> Iterator[Daemon]:
    yield strict_daemon
    strict_daemon.check_log()


@asynccontextmanager
async def clients(daemon: Daemon, *workers: int) -> AsyncIterator[list[Client]]:
    """A client on each of these workers."""
    async with AsyncExitStack() as stack:
        made = []
        for worker in workers:
            with daemon.only(worker):
                made.append(await stack.enter_async_context(Client(daemon.ws_url)))
        yield made


async def refused(daemon: Daemon, act: Callable[[], Awaitable[Any]], **fields: object) -> dict[str, Any]:
    """The log's line of a refusal. It is brought about until there is one: only ten a second are written."""

    async def lines() -> list[dict[str, Any]]:
        await act()
        return [line for line in daemon.events("refused") if fields.items() <= line.items()]

    return (await eventually(lines, bool))[0]


def without_time(event: dict[str, Any]) -> dict[str, Any]:
    """An event without its timestamp, which must be that of now."""
    assert abs(event["timestamp"] - time.time() * 1000) < 10_000
    return {name: value for name, value in event.items() if name != "timestamp"}


# Connecting


@pytest.mark.parametrize("path", ["/", "/ws", "/ws?later=1"])
@asynchronous
async def test_the_first_frame(daemon: Daemon, path: str) -> None:
    async with Client(daemon.ws_url, path) as client:
        hello = without_time(client.hello)
        assert isinstance(hello.pop("clientId"), str)
        assert len(hello.pop("session")) >= 22
        assert hello == {
            "type": "ack",
            "op": "connect",
            "resumed": False,
            "heartbeat": 25_000,
            "subscriptions": [],
            "limits": {
                "rate": 0,
                "burst": 250,
                "maxMessageBytes": 65536,
                "maxSubscriptions": 200,
                "dedupTtl": 300_000,
            },
        }


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (["bcast.v1"], "bcast.v1"),
        (["other", "bcast.v1"], "bcast.v1"),
        (["bcast.v2"], None),
        (["session.x"], None),
        (None, None),
    ],
)
@asynchronous
async def test_subprotocols(daemon: Daemon, offered: list[str] | None, chosen: str | None) -> None:
    async with Client(daemon.ws_url, protocols=offered) as client:
        assert client.socket.subprotocol == chosen
        assert (await client.ask("subscribe", channel="a"))["type"] == "ack"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": None}, 426),
        ({"Sec-WebSocket-Key": None}, 400),
        ({"Connection": "close"}, 400),
        ({"Connection": "keep-alive, Upgrade"}, 101),
        ({"Upgrade": "WebSocket"}, 101),
    ],
)
@asynchronous
async def test_handshakes(daemon: Daemon, headers: dict[str, str | None], status: int) -> None:
    answer = await raw_http(daemon.url, handshake("127.0.0.1", "/ws", headers))
    assert answer.status == status
    if status == 426:
        assert answer.headers["sec-websocket-version"] == "13"


@asynchronous
async def test_a_foreign_origin_is_refused_before_the_upgrade(strict: Daemon) -> None:
    for origin, status in (
        ("https://good.example", 101),
        ("https://evil.example", 403),
        ("http://good.example", 403),
        ("null", 403),
        (None, 101),
    ):
        answer = await raw_http(strict.url, handshake("127.0.0.1", "/ws", {"Origin": origin}))
        assert answer.status == status, origin
        if status == 403:
            assert answer.json["error"]["code"] == "forbidden"
    # The page of the server's own address is as foreign as any, unless it is listed.
    same = await raw_http(strict.url, handshake("127.0.0.1", "/ws", {"Origin": strict.url}))
    assert same.status == 403
    again = handshake("127.0.0.1", "/ws", {"Origin": "https://evil.example"})
    line = await refused(strict, lambda: raw_http(strict.url, again), origin="https://evil.example")
    assert (line["kind"], line["setting"]) == ("origin", "[cors] origins")


# Commands


@asynchronous
async def test_subscribe_publish_and_unsubscribe(daemon: Daemon) -> None:
    async with clients(daemon, 0, 1) as (one, two):
        assert without_time(await one.ask("subscribe", channel="news", messageId="s1")) == {
            "type": "ack",
            "op": "subscribe",
            "messageId": "s1",
            "channel": "news",
            "persistent": False,
        }
        answer = await two.ask("broadcast", channel="news", data={"é": [1, None]}, messageId="b1")
        assert without_time(answer) == {
            "type": "ack",
            "op": "broadcast",
            "messageId": "b1",
            "channel": "news",
        }
        assert without_time(await one.message()) == {
            "type": "message",
            "channel": "news",
            "data": {"é": [1, None]},
            "messageId": "b1",
        }
        assert without_time(await one.ask("unsubscribe", channel="news", messageId="u1")) == {
            "type": "ack",
            "op": "unsubscribe",
            "messageId": "u1",
            "channel": "news",
        }
        await two.ask("broadcast", channel="news", data=2)
        assert await one.is_alive()
        assert not [event for event in one.frames if event.get("data") == 2]
        again = await one.ask("unsubscribe", channel="news")
        assert (again["type"], again["code"], again["channel"]) == ("error", "not_subscribed", "news")
        # A publisher who does not listen hears nothing.
        assert not [event for event in two.frames if event["type"] == "message"]


@asynchronous
async def test_a_publisher_hears_its_own_messages(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="own")
        await client.send(type="broadcast", channel="own", data=1)
        answer = await client.find(lambda event: event.get("op") == "broadcast")
        # The server has given it an id.
        assert len(answer["messageId"]) >= 16
        message = await client.message()
        assert message["messageId"] == answer["messageId"] and "from" not in message


@asynchronous
async def test_the_sender_is_named_by_the_server(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="signed:1")
        await client.send(type="broadcast", channel="signed:1", data=1, **{"from": {"clientId": "forged"}})
        assert (await client.message())["from"] == {"clientId": client.hello["clientId"]}


@asynchronous
async def test_subscribing_twice_is_once(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for _ in range(3):
            assert (await client.ask("subscribe", channel="twofold"))["type"] == "ack"
        await client.ask("broadcast", channel="twofold", data=1)
        assert await client.messages(1) == [1]
        await client.ask("unsubscribe", channel="twofold")
        await client.ask("broadcast", channel="twofold", data=2)
        assert await client.is_alive()
        assert [event["data"] for event in client.frames if event["type"] == "message"] == [1]


@asynchronous
async def test_positions_on_a_channel_that_keeps_none(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for fields in ({"last": 5}, {"since": {"epoch": "e", "seq": 1}}, {"last": 0, "ack": True}):
            answer = await client.ask("subscribe", channel="plain", **fields)
            assert answer["persistent"] is False and answer["recovered"] is False and answer["replayed"] == 0
            assert "seq" not in answer and "epoch" not in answer
        answer = await client.ask("subscribe", channel="plain", ack=True)
        assert answer["persistent"] is False and "recovered" not in answer
        # Acks mean nothing there, and get no answer.
        await client.send(type="ack", channel="plain", seq=1)
        await client.send(type="ack", channel="never", seq=1, epoch="e")
        await client.send(type="pong")
        assert await client.is_alive()
        assert [event["type"] for event in client.frames] == ["ack"] * 5 + ["error"]


@asynchronous
async def test_fields_that_nobody_knows_are_ignored(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        answer = await client.ask("subscribe", channel="later", future={"x": 1}, data=1, seq="no")
        assert answer["type"] == "ack"
        answer = await client.ask("broadcast", channel="later", data=1, chanel="x", ack=5)
        assert answer["type"] == "ack"


@asynchronous
async def test_commands_need_not_wait_for_answers(daemon: Daemon) -> None:
    """All at once: each is answered, those on one channel in their order."""
    script = [
        ("subscribe", "p1"),
        ("subscribe", "p2"),
        ("unsubscribe", "p1"),
        ("subscribe", "p3"),
        ("subscribe", "p1"),
        ("unsubscribe", "p2"),
        ("unsubscribe", "p2"),
        ("subscribe", "p1"),
        ("unsubscribe", "p1"),
        ("subscribe", "p1"),
    ]
    async with Client(daemon.ws_url) as client:
        for number, (kind, channel) in enumerate(script):
            await client.send(type=kind, channel=channel, messageId=f"{channel} {number}")
        answers = [await client.next() for _ in script]
        for channel in ("p1", "p2", "p3"):
            ids = [event["messageId"] for event in answers if event["channel"] == channel]
            assert ids == [f"{channel} {n}" for n, step in enumerate(script) if step[1] == channel]
        codes = {event["messageId"]: event.get("code") or event["op"] for event in answers}
        assert codes["p2 6"] == "not_subscribed"
        assert [codes[f"{step[1]} {n}"] for n, step in enumerate(script) if n != 6] == [
            step[0] for n, step in enumerate(script) if n != 6
        ]
        for channel in ("p1", "p2", "p3"):
            await client.ask("broadcast", channel=channel, data=channel)
        assert await client.messages(2) == ["p1", "p3"]


@asynchronous
async def test_order_is_kept_for_everybody(daemon: Daemon) -> None:
    """Messages of one connection keep their order, and all subscribers see the same one of all."""
    async with clients(daemon, 0, 1, 0, 1) as (one, two, three, four):
        for client in (three, four):
            await client.ask("subscribe", channel="order")
        for number in range(300):
            await one.send(type="broadcast", channel="order", data=["one", number], messageId=f"one {number}")
            await two.send(type="broadcast", channel="order", data=["two", number])
        for client in (one, two):
            acks = [await client.next() for _ in range(300)]
            assert {event["op"] for event in acks} == {"broadcast"}
            if client is one:
                assert [event["messageId"] for event in acks] == [f"one {number}" for number in range(300)]
        first, second = await three.messages(600), await four.messages(600)
        assert first == second
        for name in ("one", "two"):
            assert [number for who, number in first if who == name] == list(range(300))


@asynchronous
async def test_any_json_arrives_as_an_equal_value(daemon: Daemon) -> None:
    values = [
        None,
        True,
        0,
        -1.5e-300,
        2**63,
        "",
        "</script>\u2028\u0000😀",
        [],
        {},
        {"a": {"b": [[[]]]}, "": None},
        "x" * 60_000,
        {"type": "ack", "channel": "other", "seq": 5},
    ]
    async with clients(daemon, 0, 1) as (one, two):
        await two.ask("subscribe", channel="json")
        for value in values:
            assert (await one.ask("broadcast", channel="json", data=value))["type"] == "ack"
        assert await two.messages(len(values)) == values


# A message once


@asynchronous
async def test_a_message_id_is_taken_once_whatever_the_entrance(daemon: Daemon) -> None:
    async with clients(daemon, 0, 1, 1) as (one, two, listener):
        await listener.ask("subscribe", channel="once")
        first = await one.ask("broadcast", channel="once", data=1, messageId="same")
        assert "duplicate" not in first
        for client in (one, two):
            again = await client.ask("broadcast", channel="once", data=2, messageId="same")
            assert (again["type"], again["duplicate"], again["messageId"]) == ("ack", True, "same")
        for body, headers in (
            ({"channel": "once", "data": 3, "messageId": "same"}, {}),
            ({"channel": "once", "data": 3}, {"Idempotency-Key": "same"}),
        ):
            answer = await http(daemon.url, "POST", "/broadcast", body, headers)
            assert answer.json == {"results": [{"channel": "once", "messageId": "same", "duplicate": True}]}
        # On another channel it is another message.
        assert "duplicate" not in await two.ask("broadcast", channel="once2", data=1, messageId="same")
        await two.ask("broadcast", channel="once", data="last")
        assert await listener.messages(2) == [1, "last"]


@asynchronous
async def test_one_of_many_at_the_same_time(daemon: Daemon) -> None:
    async with clients(daemon, 0, 1, 0) as (one, two, listener):
        await listener.ask("subscribe", channel="race")
        for number in range(50):
            answers = await asyncio.gather(
                one.ask("broadcast", channel="race", data=number, messageId=f"race {number}"),
                two.ask("broadcast", channel="race", data=number, messageId=f"race {number}"),
            )
            assert sorted(answer.get("duplicate", False) for answer in answers) == [False, True]
        assert await listener.messages(50) == list(range(50))


@asynchronous
async def test_deduplication_off_and_over(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for channel in ("twice", "short"):
            await client.ask("subscribe", channel=channel)

        async def is_taken(channel: str) -> bool:
            answer = await client.ask("broadcast", channel=channel, data=1, messageId="same")
            assert answer["type"] == "ack"
            return "duplicate" not in answer

        assert [await is_taken("twice") for _ in range(3)] == [True, True, True]
        assert [await is_taken("short") for _ in range(2)] == [True, False]
        begun = time.monotonic()
        while not await is_taken("short"):
            assert time.monotonic() < begun + 5
            await asyncio.sleep(0.05)
        assert time.monotonic() > begun + 0.5
        assert len(await client.messages(5)) == 5


# To everybody


@asynchronous
async def test_a_broadcast_without_channel_reaches_every_connection_once(daemon: Daemon) -> None:
    async with clients(daemon, 0, 1, 0, 1) as everybody:
        await everybody[0].ask("subscribe", channel="some")
        answer = await everybody[3].ask("broadcast", data={"to": "all"}, messageId="to all 1")
        assert without_time(answer) == {"type": "ack", "op": "broadcast", "messageId": "to all 1"}
        again = await everybody[2].ask("broadcast", data=2, messageId="to all 1")
        assert again["duplicate"] is True
        posted = await http(daemon.url, "POST", "/broadcast", {"data": 3, "messageId": "to all 1"})
        assert posted.json == {"results": [{"messageId": "to all 1", "duplicate": True}]}
        await http(daemon.url, "POST", "/broadcast", {"data": 4})
        for client in everybody:
            assert without_time(await client.message()) == {
                "type": "message",
                "data": {"to": "all"},
                "messageId": "to all 1",
            }
            assert await client.messages(1) == [4]
            assert await client.is_alive()


@asynchronous
async def test_to_all_is_for_the_server_unless_the_rule_says_otherwise(strict: Daemon) -> None:
    async with Client(strict.ws_url) as client:
        answer = await client.ask("broadcast", data=1, messageId="m")
        assert (answer["type"], answer["code"], answer["messageId"]) == ("error", "forbidden", "m")
        # A channel that is null is no channel.
        assert (await client.ask("broadcast", channel=None, data=1))["code"] == "forbidden"
        await http(strict.url, "POST", "/broadcast", {"data": 2})
        assert await client.messages(1) == [2]


# Rules


@asynchronous
async def test_rules_by_channel(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for channel in ("quiet:1", "Quiet:1", "closed:1", "quiet"):
            subscribed = await client.ask("subscribe", channel=channel)
            published = await client.ask("broadcast", channel=channel, data=channel)
            assert subscribed["type"] == ("error" if channel == "closed:1" else "ack"), channel
            assert published["type"] == ("error" if channel == "quiet:1" else "ack"), channel
        errors = [event for event in client.frames if event["type"] == "error"]
        assert [(event["code"], event["channel"]) for event in errors] == [
            ("forbidden", "quiet:1"),
            ("forbidden", "closed:1"),
        ]
        await http(daemon.url, "POST", "/broadcast", {"channel": "quiet:1", "data": "by http"})
        assert await client.messages(3) == ["Quiet:1", "quiet", "by http"]
        line = await refused(
            daemon,
            lambda: client.ask("broadcast", channel="quiet:1", data=1),
            clientId=client.hello["clientId"],
            channel="quiet:1",
        )
        assert (line["kind"], line["setting"]) == ("rule", "[channel quiet:*] publish")


# Bad input

SECRET = "wq7-secret-payload"

BAD = [
    (SECRET, "bad_message"),
    ('{"data": "' + SECRET, "bad_message"),
    ("", "bad_message"),
    ("null", "bad_message"),
    ("17", "bad_message"),
    (f'"{SECRET}"', "bad_message"),
    (f'[{{"type": "subscribe", "channel": "{SECRET}"}}]', "bad_message"),
    ("{}", "bad_message"),
    (f'{{"type": 5, "data": "{SECRET}"}}', "bad_message"),
    (f'{{"type": "{SECRET}"}}', "unknown_type"),
    ('{"type": "message", "channel": "a", "data": 1}', "unknown_type"),
    ('{"type": "subscribe"}', "bad_channel"),
    ('{"type": "subscribe", "channel": 5}', "bad_channel"),
    ('{"type": "subscribe", "channel": ""}', "bad_channel"),
    (f'{{"type": "subscribe", "channel": "{SECRET} x"}}', "bad_channel"),
    (json.dumps({"type": "subscribe", "channel": "x" * 256}), "bad_channel"),
    ('{"type": "subscribe", "channel": "$worker:1"}', "bad_channel"),
    ('{"type": "broadcast", "channel": "$x", "data": 1}', "bad_channel"),
    ('{"type": "unsubscribe", "channel": "$x"}', "bad_channel"),
    ('{"type": "subscribe", "channel": "a", "ack": "yes"}', "bad_message"),
    ('{"type": "subscribe", "channel": "a", "last": -1}', "bad_message"),
    ('{"type": "subscribe", "channel": "a", "since": {"seq": 1}}', "bad_message"),
    ('{"type": "broadcast", "channel": "a"}', "bad_message"),
    (f'{{"type": "broadcast", "channel": "a", "data": "{SECRET}", "messageId": 5}}', "bad_message"),
    (f'{{"type": "broadcast", "channel": "a", "data": "{SECRET}", "messageId": ""}}', "bad_message"),
    ('{"type": "broadcast", "channel": "a", "data": NaN}', "bad_message"),
    ('{"type": "broadcast", "channel": "a", "data": [-Infinity]}', "bad_message"),
    ('{"type": "broadcast", "channel": "a", "data": 1e999}', "bad_message"),
    (f'{{"type": "broadcast", "channel": "a", "data": "{SECRET}\\ud800"}}', "bad_message"),
    ('{"type": "broadcast", "channel": "a", "data": {"\\udc00": 1}}', "bad_message"),
    ('{"type": "broadcast", "channel": "a", "data": ' + "[" * 20_000 + "]" * 20_000 + "}", "bad_message"),
    ("[" * 60_000, "bad_message"),
    ('{"a":' * 10_000, "bad_message"),
    ('{"type": "ack", "channel": "a", "seq": "1"}', "bad_message"),
    ('{"type": "ack", "channel": "a", "seq": 9007199254740992}', "bad_message"),
    ('{"type": "ack", "channel": "a", "seq": 1e400}', "bad_message"),
    ('{"type": "auth"}', "bad_message"),
    (f'{{"type": "auth", "token": "{SECRET}"}}', "unauthorized"),
    (b"binary " + SECRET.encode(), "bad_message"),
    (b'{"type": "pong"}', "bad_message"),
    (b"", "bad_message"),
]


@asynchronous
async def test_every_bad_input_has_its_answer_and_the_connection_lives_on(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for sent, code in BAD:
            error = without_time(await client.error(sent))
            assert error["code"] == code, (sent[:80], error)
            assert set(error) <= {"type", "code", "message", "messageId", "channel"}
            assert len(error["message"]) > 10 and SECRET not in json.dumps(error)
        assert await client.is_alive()
        await client.ask("subscribe", channel="alive")
        await client.ask("broadcast", channel="alive", data=1)
        assert await client.messages(1) == [1]
    assert SECRET not in json.dumps(daemon.log())


@asynchronous
async def test_an_error_names_its_request(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        error = await client.ask("subscribe", channel="a", last=-1, messageId="x1")
        assert (error["messageId"], error["channel"]) == ("x1", "a")
        error = await client.ask("nothing", messageId="x2")
        assert (error["code"], error["messageId"]) == ("unknown_type", "x2")
        text = '{"type": "broadcast", "channel": "a", "data": NaN, "messageId": "x3"}'
        assert (await client.error(text))["messageId"] == "x3"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (client_frame(b"\xff\xfe"), 1007),
        (client_frame(b'{"type": "broadcast", "data": "\xed\xa0\x80"}'), 1007),
        (client_frame(b"{}", mask=None), 1002),
        (client_frame(b"{}", rsv=4), 1002),
        (client_frame(b"{}", 3), 1002),
        (client_frame(b"", 0xB), 1002),
        (client_frame(b"x" * 126, 9), 1002),
        (client_frame(b"x", 9, fin=False), 1002),
        (client_frame(b"x", 0), 1002),
        (client_frame(b"x", fin=False) + client_frame(b"y"), 1002),
        (client_frame(b"\x03", 8), 1002),
        (client_frame(b"\x03\xed", 8), 1002),
        (client_frame(b"\x03\xe8\xff", 8), 1007),
        (client_frame(length=b"\x7f" + b"\x00" * 4 + b"\xff" * 4), 1009),
        (client_frame(b"\x03\xe8bye", 8), 1000),
        (client_frame(b"\x0f\xa0", 8), 4000),
    ],
)
@asynchronous
async def test_what_breaks_the_protocol_ends_the_connection(daemon: Daemon, sent: bytes, code: int) -> None:
    async with Raw(daemon.ws_url) as raw:
        await raw.send(sent)
        assert (await raw.close_code())[0] == code


@asynchronous
async def test_a_close_without_a_code(daemon: Daemon) -> None:
    async with Raw(daemon.ws_url) as raw:
        await raw.send(client_frame(b"", 8))
        assert await raw.frame() == (8, b"")


@asynchronous
async def test_frames_in_pieces(daemon: Daemon) -> None:
    async with Raw(daemon.ws_url) as raw:
        text = json.dumps(
            {"type": "subscribe", "channel": "pieces", "x": "é€😀"}, ensure_ascii=False
        ).encode()
        for index in range(len(text)):
            last = index == len(text) - 1
            await raw.send(client_frame(text[index : index + 1], 1 if index == 0 else 0, fin=last))
            if index == 5:
                await raw.send(client_frame(b"between", 9))
        # The ping is answered at once, the message when it is whole.
        assert await raw.frame() == (10, b"between")
        opcode, payload = await raw.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe"
        for byte in client_frame(b'{"type": "unsubscribe", "channel": "pieces"}'):
            await raw.send(bytes([byte]))
        assert json.loads((await raw.frame())[1])["op"] == "unsubscribe"


@pytest.mark.parametrize("sent", ["whole", "in pieces"])
@asynchronous
async def test_what_is_too_big_ends_the_connection(strict: Daemon, sent: str) -> None:
    async with Client(strict.ws_url) as client:
        assert client.hello["limits"]["maxMessageBytes"] == 1024
        fits = {"type": "broadcast", "channel": "a", "data": "", "messageId": "fits"}
        fits["data"] = "x" * (1024 - len(json.dumps(fits)))
        assert (await client.ask(**fits))["type"] == "ack"
        if sent == "whole":
            await client.send_text(json.dumps(fits) + " ")
        else:
            await client.socket.send(iter(["x" * 600, "x" * 600]))
        error = await client.next(lambda event: event["type"] == "error")
        assert error["code"] == "too_large" and "1024" in error["message"]
        assert (await client.closed())[0] == 1009


@asynchronous
async def test_clients_that_vanish(daemon: Daemon) -> None:
    """In the middle of whatever: nothing is left of them, and nobody is disturbed (the fixture looks)."""

    async def vanish(number: int, publisher: Client) -> None:
        raw = Raw(daemon.ws_url, window=4096)
        async with raw:
            if number % 5 == 0:
                await raw.send(client_frame(b"", rsv=1))
                raw.abort()
            elif number % 5 == 1:
                await raw.send(client_frame(b"x" * 1000)[:-7])
            elif number % 5 == 2:
                await raw.send_json(type="subscribe", channel="vanish")
            elif number % 5 == 3:
                await raw.subscribe("vanish")
                for _ in range(20):
                    await raw.send_json(type="broadcast", channel="vanish", data="x" * 5000)
            elif number % 5 == 4:
                await raw.subscribe("vanish")
                await raw.send(client_frame(b"\x03\xe8", 8))
            await publisher.ask("broadcast", channel="vanish", data=number)
            if number % 2:
                # The kernel answers what still comes by a reset.
                raw.abort()

    async def totals() -> dict[str, int]:
        found: dict[str, int] = (await http(daemon.url, "GET", "/stats")).json["totals"]
        return found

    async with Client(daemon.ws_url) as listener, Client(daemon.ws_url) as publisher:
        await listener.ask("subscribe", channel="vanish")
        for start in range(0, 60, 20):
            await asyncio.gather(*(vanish(number, publisher) for number in range(start, start + 20)))
        await publisher.ask("broadcast", channel="vanish", data="end")
        heard: list[Any] = []
        while heard[-1:] != ["end"]:
            heard += await listener.messages(1)
        assert sorted(each for each in heard if isinstance(each, int)) == list(range(60))
        await eventually(totals, lambda found: (found["connections"], found["subscriptions"]) == (2, 1))


# Limits


@asynchronous
async def test_subscriptions_are_limited(strict: Daemon) -> None:
    async with Client(strict.ws_url) as client:
        assert client.hello["limits"]["maxSubscriptions"] == 3
        for channel in ("a", "b", "c"):
            assert (await client.ask("subscribe", channel=channel))["type"] == "ack"
        error = await client.ask("subscribe", channel="d")
        assert (error["code"], error["channel"]) == ("too_many_subscriptions", "d")
        assert (await client.ask("subscribe", channel="c"))["type"] == "ack"
        await client.ask("unsubscribe", channel="a")
        assert (await client.ask("subscribe", channel="d"))["type"] == "ack"


@asynchronous
async def test_subscriptions_under_way_count(strict: Daemon) -> None:
    """A client that does not wait for answers has no more than others."""
    async with Client(strict.ws_url) as client:
        for number in range(8):
            await client.send(type="subscribe", channel=f"way{number}")
        answers = [await client.next() for _ in range(8)]
        assert [event["type"] for event in answers].count("ack") == 3
        assert {event["code"] for event in answers if event["type"] == "error"} == {"too_many_subscriptions"}
        # Nor has it less: one that is given up makes room for the next command.
        mine = next(event["channel"] for event in answers if event["type"] == "ack")
        await client.send(type="unsubscribe", channel=mine)
        assert (await client.ask("subscribe", channel="another"))["type"] == "ack"


@asynchronous
async def test_who_is_too_fast_is_told_when_to_go_on(strict: Daemon) -> None:
    async with Client(strict.ws_url) as client:
        assert client.hello["limits"] | {"rate": 20, "burst": 10} == client.hello["limits"]
        error = None
        for _ in range(15):
            answer = await client.ask("broadcast", channel="a", data=1)
            if answer["type"] == "error":
                error = answer
                break
        assert error is not None and error["code"] == "rate_limited" and 0 < error["retryAfter"] <= 60
        # Pongs and acks are free, also now.
        for _ in range(50):
            await client.send(type="pong")
            await client.send(type="ack", channel="a", seq=1)
        await asyncio.sleep(error["retryAfter"] / 1000)
        assert (await client.ask("broadcast", channel="a", data=1))["type"] == "ack"
        # A bad frame costs as much as a good one.
        errors = [await client.error("x") for _ in range(12)]
        assert "rate_limited" in {event["code"] for event in errors}
        assert {event["code"] for event in errors} <= {"rate_limited", "bad_message"}
        line = await refused(strict, lambda: client.error("x"), clientId=client.hello["clientId"])
        assert (line["kind"], line["setting"]) == ("limit", "[limits] rate")


@asynchronous
async def test_who_does_not_heed_the_limit_is_closed(strict: Daemon) -> None:
    reasons = []
    for _ in range(2):
        async with Client(strict.ws_url) as client:
            try:
                for _ in range(500):
                    await client.send(type="broadcast", channel="a", data=1)
            except ConnectionError:
                pass
            except Exception as error:
                assert type(error).__name__.startswith("ConnectionClosed"), error
            code, reason = await client.closed()
            assert code == 4029
            reasons.append(json.loads(reason))
            assert set(reasons[-1]) == {"retryAfter"} and reasons[-1]["retryAfter"] > 0
            refused = [event for event in client.frames if event.get("code") == "rate_limited"]
            assert len(refused) >= 10, "not at the first"
    assert reasons[0] != reasons[1], "another value for each"


# Heartbeat


@pytest.fixture(scope="module")
def beating() -> Iterator[Daemon]:
    with Daemon("[heartbeat]\ninterval = 600ms\ntimeout = 400ms\n") as daemon:
        yield daemon


@asynchronous
async def test_a_ping_in_both_forms_at_once(beating: Daemon) -> None:
    async with Raw(beating.ws_url) as raw:
        begun = time.monotonic()
        opcode, payload = await raw.frame()
        assert 0.3 < time.monotonic() - begun < 3
        assert opcode == 1 and without_time(json.loads(payload)) == {"type": "ping"}
        # Both came in one piece.
        assert raw._buffer == b"\x89\x00"
        assert await raw.frame() == (9, b"")


@asynchronous
async def test_who_says_nothing_is_closed(beating: Daemon) -> None:
    async with Raw(beating.ws_url) as silent:
        begun = time.monotonic()
        code, reason = await silent.close_code()
        assert (code, reason) == (4001, "heartbeat missed")
        assert 0.8 < time.monotonic() - begun < 4


@asynchronous
async def test_any_frame_is_a_sign_of_life(beating: Daemon) -> None:
    signs = {
        "pong": client_frame(b'{"type": "pong"}'),
        "PONG": client_frame(b"", 10),
        "PING": client_frame(b"anybody?", 9),
        "text": client_frame(b"no json at all"),
        "binary": client_frame(b"binary", 2),
    }

    async def live(name: str) -> int:
        async with Raw(beating.ws_url) as raw:
            end = time.monotonic() + 2.5
            pings = 0
            while time.monotonic() < end:
                opcode, payload = await raw.frame()
                assert opcode != 8, (name, payload)
                if opcode == 9:
                    pings += 1
                    await raw.send(signs[name])
            return pings

    assert all(2 <= pings <= 5 for pings in await asyncio.gather(*map(live, signs)))


@asynchronous
async def test_who_only_listens_is_not_alive(beating: Daemon) -> None:
    """Messages that go out are no sign of life of the one who is to read them."""
    async with Raw(beating.ws_url) as silent, Client(beating.ws_url) as busy:
        await silent.subscribe("busy")

        async def publish() -> None:
            while True:
                await busy.send(type="broadcast", channel="busy", data="x")
                await asyncio.sleep(0.05)

        publishing = asyncio.create_task(publish())
        try:
            assert (await silent.close_code())[0] == 4001
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)


# Slow consumers

SLOW = """
[limits]
rate = 0
max_queue_bytes = 400k
[heartbeat]
interval = 600ms
timeout = 30s
[channel slow:disconnect]
[channel slow:drop_oldest]
slow_consumer = drop_oldest
[channel slow:latest]
slow_consumer = latest
"""


@pytest.fixture(scope="module")
def slow_daemon() -> Iterator[Daemon]:
    with Daemon(SLOW) as daemon:
        yield daemon


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def dropped(daemon: Daemon) -> dict[str, float]:
    answer = await http(daemon.url, "GET", "/metrics")
    found = {}
    for line in answer.body.decode().splitlines():
        if line.startswith("bcast_dropped_total{"):
            found[line.partition('reason="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    return found


@pytest.mark.parametrize("policy", ["disconnect", "drop_oldest", "latest"])
@asynchronous
async def test_slow_consumers(slow_daemon: Daemon, policy: str) -> None:
    channel = f"slow:{policy}"
    (pid,) = slow_daemon.workers()
    before = (await dropped(slow_daemon)).get(policy, 0)
    total = 600
    async with Client(slow_daemon.ws_url) as good, Client(slow_daemon.ws_url) as publisher:
        await good.ask("subscribe", channel=channel)
        async with AsyncExitStack() as stack:
            slow = [await stack.enter_async_context(Raw(slow_daemon.ws_url, window=4096)) for _ in range(5)]
            for raw in slow:
                await raw.subscribe(channel)
            at_first = resident(pid)
            codes: list[tuple[int, str]] = []
            for number in range(total):
                # 36 MB for each of five who do not read.
                data = f"{number} ".ljust(60_000, "x")
                assert (await publisher.ask("broadcast", channel=channel, data=data))["type"] == "ack"
                if policy == "disconnect" and not codes and len(slow_daemon.events("slow_consumer")) == 5:
                    # They are not waited for long.
                    codes = [await raw.close_code() for raw in slow]
            # Others get everything.
            assert [int(data.split()[0]) for data in await good.messages(total)] == list(range(total))
            assert resident(pid) < at_first + (20 << 20)
            stats = (await http(slow_daemon.url, "GET", "/stats")).json
            assert stats["totals"]["dropped"] > 0
            if policy == "disconnect":
                assert [code for code, _ in codes] == [4008] * 5
                assert len({json.loads(reason)["retryAfter"] for _, reason in codes}) > 1
                assert len(slow_daemon.events("slow_consumer")) == 5, "each was told once"
                return
            numbers = [await read_to(raw, total - 1) for raw in slow]
            after = (await dropped(slow_daemon))[policy]
        for came in numbers:
            assert came == sorted(came) and len(came) < total
        missed = sum(total - len(came) for came in numbers)
        assert after - before == missed
        if policy == "latest":
            # What was in the kernel, one half written, and the last.
            assert all(came[-1] - came[-2] > 1 for came in numbers)
        else:
            # Two older ones are half written at most, and beside them the queue has room for these.
            assert all(came[-4:] == list(range(total - 4, total)) for came in numbers)


async def read_to(raw: Raw, last: int) -> list[int]:
    """The numbers of the messages up to this one; heartbeats are passed over."""
    numbers: list[int] = []
    while not numbers or numbers[-1] != last:
        opcode, payload = await raw.frame()
        assert opcode in (1, 9), payload
        event = json.loads(payload) if opcode == 1 else {}
        if event.get("type") == "message":
            numbers.append(int(event["data"].split()[0]))
    return numbers
