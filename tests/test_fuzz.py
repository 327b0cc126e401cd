"""What anyone may send: a short run of `make fuzz`, and what its long ones have found."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_kit import asynchronous
from client import Client, handshake, http
from daemon import Daemon
from fuzz import Found, Fuzz, find, play, save
from fuzz_inputs import INI, SMUGGLING, Script, script
from redis_server import RedisServer

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
