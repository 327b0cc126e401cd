"""RFC 6455 on the wire of the real daemon, first where Tornado's own reader departs from it.

tests/test_websocket.py has what ends a connection, tests/test_frames.py the parser by itself,
tests/test_compression.py what compression adds, and tests/test_conformance.py a whole suite by others.
"""

import asyncio
import json
from collections.abc import Iterator

import pytest
from broker_kit import asynchronous
from client import Raw, client_frame
from daemon import Daemon

CLOSE, PING, PONG = 8, 9, 10
SUBSCRIBE = client_frame(b'{"type": "subscribe", "channel": "a"}')


@pytest.fixture(scope="module")
def one_daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def daemon(one_daemon: Daemon) -> Iterator[Daemon]:
    yield one_daemon
    one_daemon.check_log()


def close(code: int, reason: bytes = b"") -> bytes:
    return client_frame(code.to_bytes(2, "big") + reason, CLOSE)


async def answer(daemon: Daemon, sent: bytes) -> tuple[int, bytes]:
    """The first frame that comes back for these bytes, which must be the last one as well."""
    async with Raw(daemon.ws_url) as raw:
        await raw.send(sent)
        frame = await raw.frame()
        with pytest.raises(ConnectionError):
            await raw.frame()
        return frame


# What Tornado does otherwise


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
@asynchronous
async def test_a_close_code_that_nobody_may_send(daemon: Daemon, code: int) -> None:
    """Sections 7.4.1 and 7.4.2. Tornado sends it back."""
    opcode, payload = await answer(daemon, close(code, b"why"))
    assert (opcode, payload[:2]) == (CLOSE, (1002).to_bytes(2, "big"))


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 1014, 3000, 3999, 4000, 4999])
@asynchronous
async def test_a_close_code_comes_back(daemon: Daemon, code: int) -> None:
    """Section 5.5.1: the answer has the code, and needs no reason."""
    assert await answer(daemon, close(code, "wärum".encode())) == (CLOSE, code.to_bytes(2, "big"))


@pytest.mark.parametrize(
    "sent",
    [
        client_frame(b'{"type": "pong"}', mask=None),
        client_frame(b"", 2, mask=None),
        client_frame(b"", PING, mask=None),
        client_frame(b"\x03\xe8", CLOSE, mask=None),
        client_frame(b"{", fin=False) + client_frame(b"}", 0, mask=None),
    ],
    ids=["text", "binary", "ping", "close", "continuation"],
)
@asynchronous
async def test_a_frame_without_a_mask(daemon: Daemon, sent: bytes) -> None:
    """Section 5.1: the server closes the connection, and does not do what it says. Tornado reads it."""
    opcode, payload = await answer(daemon, sent)
    assert (opcode, payload[:2]) == (CLOSE, (1002).to_bytes(2, "big"))


@asynchronous
async def test_a_close_frame_of_one_byte(daemon: Daemon) -> None:
    """Section 5.5.1: a code has two."""
    assert (await answer(daemon, client_frame(b"\x03", CLOSE)))[1][:2] == (1002).to_bytes(2, "big")


@asynchronous
async def test_a_close_reason_that_is_no_text(daemon: Daemon) -> None:
    """Section 5.5.1: it is UTF-8."""
    assert (await answer(daemon, close(1000, b"\xff")))[1][:2] == (1007).to_bytes(2, "big")


# What must stay so


@asynchronous
async def test_nothing_counts_after_a_close(daemon: Daemon) -> None:
    """Section 1.4: what comes after it is passed over, in the same write or in a later one."""
    assert await answer(daemon, close(1000) + SUBSCRIBE + client_frame(b"\xff")) == (CLOSE, b"\x03\xe8")


@asynchronous
async def test_what_comes_before_a_close_is_answered(daemon: Daemon) -> None:
    async with Raw(daemon.ws_url) as raw:
        await raw.send(client_frame(b'{"type": "?"}') + client_frame(b"last", PING) + close(1000))
        frames = [await raw.frame() for _ in range(3)]
    assert [opcode for opcode, _ in frames] == [1, PONG, CLOSE]
    assert json.loads(frames[0][1])["code"] == "unknown_type"


@pytest.mark.parametrize("payload", [b"", b"x", bytes(range(125))], ids=len)
@asynchronous
async def test_a_pong_has_what_the_ping_had(daemon: Daemon, payload: bytes) -> None:
    """Section 5.5.3."""
    async with Raw(daemon.ws_url) as raw:
        await raw.send(client_frame(payload, PING))
        assert await raw.frame() == (PONG, payload)


@asynchronous
async def test_a_pong_without_a_ping(daemon: Daemon) -> None:
    """Section 5.5.3: a heartbeat of one side alone; nothing is said to it."""
    async with Raw(daemon.ws_url) as raw:
        await raw.send(client_frame(b"unasked", PONG) + client_frame(b"", PONG) + SUBSCRIBE)
        opcode, payload = await raw.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe"


@asynchronous
async def test_a_ping_between_fragments(daemon: Daemon) -> None:
    """Section 5.4: it is answered before the message is whole."""
    async with Raw(daemon.ws_url) as raw:
        await raw.send(client_frame(b'{"type": "subscribe",', fin=False) + client_frame(b"now", PING))
        assert await raw.frame() == (PONG, b"now")
        await raw.send(client_frame(b'"channel":', 0, fin=False) + client_frame(b'"a"}', 0))
        opcode, payload = await raw.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe"


@asynchronous
async def test_text_that_is_cut_inside_a_character(daemon: Daemon) -> None:
    """Section 8.1: the whole message has to be UTF-8, its fragments need not."""
    async with Raw(daemon.ws_url) as raw:
        text = '{"type": "subscribe", "channel": "a", "x": "😀"}'.encode()
        cut = text.index(b"\x9f")
        await raw.send(client_frame(text[:cut], fin=False) + client_frame(text[cut:], 0))
        opcode, payload = await raw.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe"
    opcode, payload = await answer(
        daemon, client_frame(text[:cut], fin=False) + client_frame(text[cut + 1 :], 0)
    )
    assert (opcode, payload[:2]) == (CLOSE, (1007).to_bytes(2, "big"))


@asynchronous
async def test_who_has_said_goodbye_is_hung_up_on(daemon: Daemon) -> None:
    """Section 7.1.1: the server ends the connection first, and does not wait for the client to do so."""
    async with Raw(daemon.ws_url) as raw, asyncio.timeout(3):
        await raw.send(close(1000))
        assert await raw.frame() == (CLOSE, b"\x03\xe8")
        with pytest.raises(ConnectionError):
            await raw.frame()
