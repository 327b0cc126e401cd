"""What anyone may send: a short run of `make fuzz`, and what its long ones have found."""

import asyncio
import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from broker_kit import asynchronous
from client import Answer, Client, handshake, http
from daemon import Daemon
from fuzz import Found, Fuzz, find, play, save
from fuzz_inputs import INI, SMUGGLING, Script, script
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer
from test_contract import check_answer

SEED = 5


@pytest.fixture(scope="module")
def fuzzed(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(INI, workers=2, redis=redis_server.url) as daemon:
        yield daemon


@pytest.fixture
def daemon(fuzzed: Daemon) -> Iterator[Daemon]:
    yield fuzzed
    fuzzed.check_log()


@asynchronous
async def test_a_short_run(daemon: Daemon, tmp_path: Path) -> None:
    run = Fuzz(daemon, SEED, inputs=4000, seconds=30)
    try:
        await run.run()
    except Found as found:
        save(await find(daemon, found), SEED, tmp_path)
        raise
    assert run.done >= 4000


def test_a_script_can_be_had_again() -> None:
    for number in range(50):
        one = script(SEED, number)
        assert script(SEED, number) == one
        assert one.chunks and one.inputs
    assert script(SEED + 1, 1) != script(SEED, 1)


@pytest.mark.parametrize(
    ("one", "what"),
    [
        # None of these is what the server does: each stands for a fault that the fuzz must see.
        (Script("talk", 0, [handshake("localhost")], 1, asked=("never",)), "not answered"),
        (
            Script("browse", 0, [b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"], 2, methods=("GET",)),
            "not answered",
        ),
        (Script("talk", 0, [b"GET / HTTP/1.1\r\n\r\n"], 1, asked=("a",)), "AssertionError"),
    ],
)
@asynchronous
async def test_what_is_not_answered_is_found(
    daemon: Daemon, one: Script, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz._PATIENCE", 0.5)
    with pytest.raises(Found, match=what):
        await play(daemon.url, one)


@pytest.mark.parametrize("name", SMUGGLING)
@asynchronous
async def test_a_request_with_two_ends_is_refused(daemon: Daemon, name: str) -> None:
    """And the connection with it: what follows is nobody's request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
    writer.write(SMUGGLING[name])
    async with asyncio.timeout(5):
        data = await reader.read()
    writer.close()
    assert data.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ")), data
    assert data.count(b"HTTP/1.1 ") == 1, data


@pytest.mark.parametrize(
    "body",
    [
        r'{"channel": "\ud800", "data": 1}',
        r'{"channels": ["a", "\ud800"], "data": 1}',
        r'{"messages": [{"channel": "\udc00", "data": 1}]}',
        r'{"messages": [{"channel": "a", "data": "\udc00"}, {"channel": "\ud83d", "messageId": "\ud800"}]}',
    ],
)
@asynchronous
async def test_half_a_surrogate_pair_in_a_body(daemon: Daemon, body: str) -> None:
    answer = await http(daemon.url, "POST", "/broadcast", body)
    assert answer.status == (200 if '"a", "\\' in body else 400), answer
    assert "internal" not in answer.body.decode()


@asynchronous
async def test_a_neighbour_of_nonsense_is_served(daemon: Daemon) -> None:
    """One connection's deepest, longest and oddest frame costs the others nothing that they would see."""
    heavy = ('{"type":"broadcast","channel":"kept.1","data":' + "[" * 8000, "[" * 16_000, "9" * 16_000)
    async with Client(daemon.ws_url) as rude, Client(daemon.ws_url) as polite:
        for text in heavy:
            for _ in range(50):
                await rude.send_text(text)
            begun = time.monotonic()
            assert await polite.is_alive()
            assert time.monotonic() - begun < 2


# HTTP bodies by hypothesis: also what json.dumps makes of halves of surrogate pairs, and NaN.

_texts = st.text(st.characters(codec="utf-8") | st.characters(categories=["Cs"]), max_size=4)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_channels = st.sampled_from(["fuzz.1", "kept.1", "closed.1", "$all", "a b"]) | _values
_items = st.fixed_dictionaries(
    {"channel": _channels, "data": _values},
    optional={"messageId": st.sampled_from(["m-1", "m-2"]) | _values, "odd": _values},
)
_bodies = (
    _items
    | st.fixed_dictionaries({"messages": st.lists(_items | _values, max_size=4)})
    | st.fixed_dictionaries({"channels": st.lists(_channels, max_size=4) | _values, "data": _values})
    | st.dictionaries(st.sampled_from(["channel", "channels", "messages", "data"]), _values)
    | _values
)


@given(body=_bodies.map(json.dumps).map(str.encode) | st.binary(max_size=50))
def test_any_body_gets_a_described_answer(fuzzed: Daemon, body: bytes) -> None:
    connection = HTTPConnection("127.0.0.1", fuzzed.port, timeout=10)
    try:
        connection.request("POST", "/broadcast", body)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
    finally:
        connection.close()
    assert answer.status in (200, 400, 413), answer
    check_answer("POST", "/broadcast", answer)
    if answer.status == 200:
        sent = json.loads(body)
        assert len(answer.json["results"]) == len(sent.get("messages") or sent.get("channels") or [sent])
