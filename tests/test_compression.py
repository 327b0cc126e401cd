"""permessage-deflate: what is agreed on, each direction by itself, and the real daemon with it."""

import asyncio
import json
import os
import random
import signal
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_kit import asynchronous
from browser import Browser
from client import Client, Raw, client_frame, eventually, handshake, http, raw_http
from daemon import Daemon
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer
from websockets.asyncio.client import connect

from tornado_bcast import compression
from tornado_bcast.compression import THRESHOLD, Compressor, inflate, negotiate
from tornado_bcast.frames import BINARY, COMPRESSED, TEXT, FrameParser, ProtocolViolation, frame, payload_of

NO_TAKEOVER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
# RSV1, as `client_frame` has it.
RSV1 = 4
TAIL = b"\x00\x00\xff\xff"


def deflate(data: bytes, **options: int) -> bytes:
    """A message's payload, as a client compresses it (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(wbits=-15, **options)
    return (deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)


def violation(data: bytes, limit: int = 1000) -> int:
    with pytest.raises(ProtocolViolation) as caught:
        inflate(data, limit)
    assert len(caught.value.reason.encode()) <= 123
    return caught.value.code


# Agreeing


@pytest.mark.parametrize(
    ("offers", "answer"),
    [
        # Chromium, Firefox, gorilla/websocket.
        ("permessage-deflate; client_max_window_bits", NO_TAKEOVER),
        ("permessage-deflate", NO_TAKEOVER),
        (NO_TAKEOVER, NO_TAKEOVER),
        ("permessage-deflate;client_max_window_bits=10", NO_TAKEOVER),
        ('permessage-deflate ; client_max_window_bits = "15"', NO_TAKEOVER),
        # Section 7.1.2.1: who accepts it says so.
        ("permessage-deflate; server_max_window_bits=15", NO_TAKEOVER + "; server_max_window_bits=15"),
        # A smaller window would need frames of its own.
        ("permessage-deflate; server_max_window_bits=9", None),
        ("permessage-deflate; server_max_window_bits=9, permessage-deflate", NO_TAKEOVER),
        ("x-webkit-deflate-frame, permessage-deflate", NO_TAKEOVER),
        # Section 7.1: unknown names, bad values and what stands there twice decline an offer.
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; client_max_window_bits=016", None),
        ("permessage-deflate; client_max_window_bits=", None),
        ("permessage-deflate; server_no_context_takeover=1", None),
        ("permessage-deflate; client_no_context_takeover; client_no_context_takeover", None),
        ("permessage-deflate; later", None),
        ("permessage-deflate; later, permessage-deflate;", None),
        ("permessage-bzip2", None),
        ('permessage-deflate; client_max_window_bits="1', None),
        (", ;=,", None),
        ("", None),
    ],
)
def test_offers(offers: str, answer: str | None) -> None:
    assert negotiate(offers) == answer


@given(st.text(max_size=80))
def test_any_text_is_an_offer_or_none(offers: str) -> None:
    assert negotiate(offers) is None
    assert negotiate(f"{offers.replace(';', ',')}, permessage-deflate") == NO_TAKEOVER


# Sending


def some_json(size: int) -> bytes:
    """Text of this size that can be compressed, but is no single run."""
    words = random.Random(size)
    text = " ".join(words.choice(("alpha", "beta", "gamma", "delta")) for _ in range(size // 4 + 1))
    return text[:size].encode()


@pytest.mark.parametrize("opcode", [TEXT, BINARY])
@pytest.mark.parametrize("size", [300, 65_535, 65_536, 200_000])
def test_a_compressed_frame(size: int, opcode: int) -> None:
    plain = frame(some_json(size), opcode)
    packed = Compressor().compress(plain)
    assert packed[0] == 0x80 | 0x40 | opcode, "in one piece, with RSV1 (RFC 7692, section 6)"
    assert len(packed) < len(plain) / 2
    assert inflate(bytes(payload_of(packed)), size) == payload_of(plain)


def test_what_saves_nothing_stays_as_it_is() -> None:
    compressor = Compressor()
    small = frame(b"x" * (THRESHOLD - 5))
    assert compressor.compress(small) is small
    noise = frame(random.Random(1).randbytes(5000))
    assert compressor.compress(noise) is noise
    assert compressor.compress(frame(b"x" * THRESHOLD)) != frame(b"x" * THRESHOLD)


@given(st.lists(st.binary(min_size=80, max_size=300).map(lambda piece: piece * 4), min_size=1, max_size=9))
def test_no_message_depends_on_another(payloads: list[bytes]) -> None:
    """Each can be read without those before it (`server_no_context_takeover`), whatever they were."""
    compressor = Compressor()
    for payload in [*payloads, *payloads]:
        packed = compressor.compress(frame(payload))
        assert packed[0] & COMPRESSED and inflate(bytes(payload_of(packed)), 2000) == payload


# Receiving


@given(st.binary(max_size=2000), st.integers(0, 9), st.integers(1, 9))
def test_whatever_a_client_compresses(payload: bytes, level: int, memory: int) -> None:
    data = deflate(payload, level=level, memLevel=memory)
    assert inflate(data, 2000) == payload
    assert inflate(data, max(1, len(payload))) == payload


@pytest.mark.parametrize(
    "data",
    [
        # The examples of RFC 7692, sections 7.2.3.1, .3, .4 and .5.
        "f2 48 cd c9 c9 07 00",
        "00 05 00 fa ff 48 65 6c 6c 6f 00",
        "f3 48 cd c9 c9 07 00 00",
        "f2 48 05 00 00 00 ff ff ca c9 c9 07 00",
    ],
)
def test_the_examples_of_the_standard(data: str) -> None:
    assert inflate(bytes.fromhex(data), 5) == b"Hello"
    assert violation(bytes.fromhex(data), 4) == 1009


@pytest.mark.parametrize(
    "data",
    [
        "",
        "ff ff ff",
        # Refers to an earlier message (section 7.2.3.2), which nobody keeps.
        "f2 00 11 00 00",
        # After a last block only an empty one may stand.
        "f3 48 cd c9 c9 07 00",
        "f3 48 cd c9 c9 07 00 f3 48 cd c9 c9 07 00 00",
    ],
)
def test_what_is_no_deflate(data: str) -> None:
    assert violation(bytes.fromhex(data)) == 1007


def test_data_that_ends_early() -> None:
    data = deflate(some_json(1000))
    for cut in range(len(data)):
        assert violation(data[:cut], 1 << 20) == 1007


@given(st.binary(max_size=200))
def test_any_bytes_are_a_payload_or_a_violation(data: bytes) -> None:
    try:
        assert len(inflate(data, 100)) <= 100
    except ProtocolViolation as broken:
        assert broken.code in (1007, 1009)


def test_a_bomb_is_never_unpacked() -> None:
    """64 MB in 64 KB: the limit is what it costs."""
    bomb = deflate(bytes(64 << 20), level=9)
    assert len(bomb) < 66_000
    tracemalloc.start()
    try:
        assert violation(bomb, 65_536) == 1009
        # What came with its end, what is left of it, the payload and its pieces.
        assert tracemalloc.get_traced_memory()[1] < 65_536 * 5
    finally:
        tracemalloc.stop()


def test_last_blocks_without_number_cost_nothing() -> None:
    begun = time.process_time()
    assert violation(b"\x03\x00" * 500_000) == 1007
    assert time.process_time() - begun < 0.5


# Frames


def read(*pieces: bytes, limit: int = 1000) -> list[tuple[int, bytes]]:
    parser = FrameParser(limit, inflate=inflate)
    return [message for piece in pieces for message in parser.feed(piece)]


def broken(*pieces: bytes, limit: int = 1000) -> int:
    with pytest.raises(ProtocolViolation) as caught:
        read(*pieces, limit=limit)
    return caught.value.code


def test_compressed_and_plain_messages_in_turn() -> None:
    """RFC 7692, section 6.2: each message says for itself whether it is compressed."""
    packed, plain = client_frame(deflate(b"one"), rsv=RSV1), client_frame(b"two")
    assert read(packed, plain, packed) == [(TEXT, b"one"), (TEXT, b"two"), (TEXT, b"one")]
    assert read(client_frame(deflate(b"three"), BINARY, rsv=RSV1)) == [(BINARY, b"three")]
    assert read(client_frame(b"\x00", rsv=RSV1)) == [(TEXT, b"")], "section 7.2.3.6"


def test_control_frames_between_compressed_fragments() -> None:
    """RFC 6455, section 5.4, and RFC 7692, section 6.1: the bit is in the first frame alone."""
    data = deflate(b"one message " * 9)
    sent = [client_frame(data[:1], rsv=RSV1, fin=False), client_frame(b"ping", 9)]
    sent += [client_frame(bytes([byte]), 0, fin=False) for byte in data[1:-1]]
    sent += [client_frame(b"pong", 10), client_frame(data[-1:], 0), client_frame(b"plain", fin=False)]
    sent += [client_frame(b"", 9), client_frame(b"!", 0)]
    expected = [(9, b"ping"), (10, b"pong"), (TEXT, b"one message " * 9), (9, b""), (TEXT, b"plain!")]
    assert read(*sent) == expected
    assert read(b"".join(sent)) == expected
    assert read(*(bytes([byte]) for byte in b"".join(sent))) == expected


def test_the_bit_is_for_the_first_frame_of_a_message_alone() -> None:
    first = client_frame(deflate(b"one")[:2], rsv=RSV1, fin=False)
    assert broken(first, client_frame(b"", 0, rsv=RSV1)) == 1002
    assert broken(client_frame(b"a", fin=False), client_frame(b"b", 0, rsv=RSV1)) == 1002
    for opcode in (8, 9, 10):
        assert broken(client_frame(b"", opcode, rsv=RSV1)) == 1002
    for opcode in (3, 7, 11, 15):
        assert broken(client_frame(b"", opcode, rsv=RSV1)) == 1002
    for rsv in (1, 2, 3, 5, 6, 7):
        assert broken(client_frame(deflate(b"one"), rsv=rsv)) == 1002


def test_limits_of_compressed_messages() -> None:
    assert read(client_frame(deflate(b"x" * 1000), rsv=RSV1)) == [(TEXT, b"x" * 1000)]
    assert broken(client_frame(deflate(b"x" * 1001), rsv=RSV1)) == 1009
    # What cannot be compressed has room to grow.
    noise = random.Random(2).randbytes(1000)
    grown = deflate(noise, memLevel=1)
    assert len(grown) > 1000
    assert read(client_frame(grown, rsv=RSV1)) == [(TEXT, noise)]
    pieces = [client_frame(grown[:900], rsv=RSV1, fin=False), client_frame(grown[900:], 0)]
    assert read(*pieces) == [(TEXT, noise)]
    # Other messages have not, and by its head a longer one is refused before it has come.
    assert broken(client_frame(b"x" * 1001)) == 1009
    assert broken(client_frame(b"x" * 900, fin=False), client_frame(b"x" * 101, 0)) == 1009
    assert broken(*pieces, client_frame(b"x" * 1001)) == 1009
    assert broken(client_frame(length=b"\x7e\x05\x00", rsv=RSV1)) == 1009
    assert broken(pieces[0], client_frame(b"x" * 300, 0, fin=False)) == 1009


# The daemon

INI = """
[server]
compression = yes
[limits]
rate = 0
max_queue_bytes = 200k
max_message_bytes = 100k
[channels]
publish_all = anyone
[channel kept:*]
persistent = yes
[channel latest:*]
slow_consumer = latest
"""
DATA = {"rows": [{"id": number, "name": "somebody", "state": "active"} for number in range(40)]}


@pytest.fixture(scope="module")
def one_daemon(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(INI, redis=redis_server.url) as daemon:
        yield daemon


@pytest.fixture
def daemon(one_daemon: Daemon) -> Iterator[Daemon]:
    yield one_daemon
    one_daemon.check_log()


def packed_raw(daemon: Daemon, window: int | None = None) -> Raw:
    return Raw(daemon.ws_url, window=window, extensions="permessage-deflate")


async def message(raw: Raw) -> dict[str, Any]:
    """The next `message`."""
    while True:
        opcode, payload = await raw.frame()
        event: dict[str, Any] = json.loads(payload) if opcode == 1 else {}
        if event.get("type") == "message":
            return event


@asynchronous
async def test_it_is_off_unless_switched_on() -> None:
    with Daemon() as daemon:
        async with packed_raw(daemon) as raw:
            assert raw.agreed is None
            await raw.subscribe("news")
            await http(daemon.url, "POST", "/broadcast", {"channel": "news", "data": DATA})
            assert (await message(raw))["data"] == DATA
            await raw.send(client_frame(deflate(b"{}"), rsv=RSV1))
            assert (await raw.close_code())[0] == 1002


@asynchronous
async def test_each_gets_the_form_that_it_has_agreed_on(daemon: Daemon) -> None:
    async with AsyncExitStack() as stack:
        raws = [await stack.enter_async_context(packed_raw(daemon)) for _ in range(2)]
        plain = await stack.enter_async_context(Raw(daemon.ws_url))
        refused = await stack.enter_async_context(Raw(daemon.ws_url, extensions="permessage-bzip2"))
        assert [raw.agreed for raw in (*raws, plain, refused)] == [NO_TAKEOVER] * 2 + [None] * 2
        for raw in (*raws, plain, refused):
            await raw.subscribe("forms")
        before = daemon.stats()["totals"]["bytesOut"]
        many = [{"channel": "forms", "data": DATA} for _ in range(20)]
        await http(daemon.url, "POST", "/broadcast", {"messages": many})
        await http(daemon.url, "POST", "/broadcast", {"data": DATA})
        for raw in (*raws, plain, refused):
            events = [await message(raw) for _ in range(21)]
            assert [event["data"] for event in events] == [DATA] * 21
            assert len({event["messageId"] for event in events}) == 21
        assert [len(raw.compressed) for raw in raws] == [21, 21]
        size = len(json.dumps(DATA))
        assert sum(raws[0].compressed) < 21 * size / 3
        # Small ones are not worth it, and answers stay as they are.
        await raws[0].send_json(type="broadcast", channel="forms", data=1)
        assert (await message(raws[1]))["data"] == 1 and len(raws[1].compressed) == 21

        async def sent() -> float:
            return float(daemon.stats()["totals"]["bytesOut"] - before)

        # What is counted is what was sent: two in one form and two in the other.
        await eventually(sent, lambda count: 2 * 21 * size < count < 2.7 * 21 * size)


@asynchronous
async def test_a_foreign_client_that_compresses_both_ways(daemon: Daemon) -> None:
    """`websockets` compresses everything that it sends."""
    async with (
        connect(daemon.ws_url + "/ws", compression="deflate", proxy=None) as one,
        Client(daemon.ws_url) as two,
    ):
        await two.ask("subscribe", channel="foreign")
        await one.send(json.dumps({"type": "subscribe", "channel": "foreign"}))
        assert json.loads(await one.recv())["op"] == "connect"
        assert json.loads(await one.recv())["op"] == "subscribe"
        await one.send(json.dumps({"type": "broadcast", "channel": "foreign", "data": "é€😀" * 900}))
        text = json.dumps({"type": "broadcast", "channel": "foreign", "data": DATA})
        await one.send([text[:100], text[100:101], "", text[101:]])
        assert await two.messages(2) == ["é€😀" * 900, DATA]
        got: list[Any] = []
        while len(got) < 2:
            event = json.loads(await one.recv())
            got += [event["data"]] if event["type"] == "message" else []
        assert got == ["é€😀" * 900, DATA]


@asynchronous
async def test_a_ping_between_the_fragments_of_a_compressed_message(daemon: Daemon) -> None:
    """RFC 6455, section 5.4. Tornado inflates the ping with the message, and drops the connection."""
    async with packed_raw(daemon) as raw:
        data = deflate(json.dumps({"type": "subscribe", "channel": "pieces", "x": "y" * 99}).encode())
        await raw.send(client_frame(data[:9], rsv=RSV1, fin=False))
        await raw.send(client_frame(b"between", 9))
        assert await raw.frame() == (10, b"between")
        await raw.send(client_frame(data[9:], 0))
        opcode, payload = await raw.frame()
        assert opcode == 1 and json.loads(payload)["op"] == "subscribe"


def bomb() -> bytes:
    return deflate(bytes(64 << 20), level=9)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        # RFC 7692, sections 6.1 and 6.2: where the bit may stand.
        (client_frame(b"", 9, rsv=RSV1), 1002),
        (client_frame(b"\x03\xe8", 8, rsv=RSV1), 1002),
        (client_frame(deflate(b"{}"), fin=False) + client_frame(b"", 0, rsv=RSV1), 1002),
        (client_frame(deflate(b"{}"), rsv=RSV1 | 2), 1002),
        # RFC 6455, section 7.4.1: data that is not what the message says.
        (client_frame(b"\xff\xff\xff", rsv=RSV1), 1007),
        (client_frame(deflate(b'{"type": "pong"}')[:-3], rsv=RSV1), 1007),
        (client_frame(deflate(b"\xff\xfe"), rsv=RSV1), 1007),
        (client_frame(bomb(), rsv=RSV1), 1009),
        (client_frame(deflate(b" " * 102_401), rsv=RSV1), 1009),
    ],
    ids=["ping", "close", "continuation", "RSV2", "no deflate", "cut", "no UTF-8", "bomb", "too big"],
)
@asynchronous
async def test_what_breaks_the_rules_ends_the_connection(daemon: Daemon, sent: bytes, code: int) -> None:
    async with packed_raw(daemon) as raw:
        await raw.send(sent)
        if code == 1009:
            assert json.loads((await raw.frame())[1])["code"] == "too_large"
        assert (await raw.close_code())[0] == code


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@asynchronous
async def test_bombs_cost_no_memory(daemon: Daemon) -> None:
    (pid,) = daemon.workers()
    sent = client_frame(bomb(), rsv=RSV1)
    at_first = resident(pid)

    async def send() -> None:
        async with packed_raw(daemon) as raw:
            await raw.send(sent)
            assert (await raw.close_code())[0] == 1009

    for _ in range(4):
        await asyncio.gather(*(send() for _ in range(10)))
    assert resident(pid) < at_first + (24 << 20)


@asynchronous
async def test_a_slow_reader_of_a_persistent_channel_misses_nothing(daemon: Daemon) -> None:
    """It falls behind the live ones, reads the stream and is live again: compressed, once, in order."""
    noise = random.Random(3)
    # More than the kernel takes.
    total = 160
    async with packed_raw(daemon, window=4096) as slow, Client(daemon.ws_url) as publisher:
        await slow.subscribe("kept:slow")
        for number in range(total):
            # Half of it is saved.
            data = f"{number} " + noise.randbytes(40_000).hex()
            answer = await publisher.ask("broadcast", channel="kept:slow", data=data)
            assert answer["seq"] == number + 1
        events = [await message(slow) for _ in range(total)]
        assert [int(event["data"].split()[0]) for event in events] == list(range(total))
        assert [event["seq"] for event in events] == list(range(1, total + 1))
        assert len(slow.compressed) == total
        await publisher.ask("broadcast", channel="kept:slow", data="the end")
        assert (await message(slow))["data"] == "the end"


@asynchronous
async def test_replays_are_compressed(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher, packed_raw(daemon) as raw:
        for _ in range(3):
            await publisher.ask("broadcast", channel="kept:again", data=DATA)
        await raw.send_json(type="subscribe", channel="kept:again", last=3, ack=True)
        assert [(await message(raw))["seq"] for _ in range(3)] == [1, 2, 3]
        assert len(raw.compressed) == 3


@asynchronous
async def test_the_latest_for_a_slow_reader(daemon: Daemon) -> None:
    """A compressed message can be dropped, for none depends on it."""
    noise = random.Random(4)
    async with packed_raw(daemon, window=4096) as slow, Client(daemon.ws_url) as publisher:
        await slow.subscribe("latest:1")
        # Until the kernel's buffers and the queue are full, and many more.
        for number in range(200):
            data = f"{number} " + noise.randbytes(30_000).hex()
            await publisher.ask("broadcast", channel="latest:1", data=data)
        numbers: list[int] = []
        while not numbers or numbers[-1] != 199:
            numbers.append(int((await message(slow))["data"].split()[0]))
        assert numbers == sorted(numbers) and len(numbers) < 200
        assert len(slow.compressed) == len(numbers)


@asynchronous
async def test_a_reload_switches_it_for_new_connections(tmp_path: Path) -> None:
    async def answer() -> str | None:
        offer = {"Sec-WebSocket-Extensions": "permessage-deflate"}
        got = await raw_http(daemon.url, handshake("127.0.0.1", headers=offer))
        assert got.status == 101
        return got.headers.get("sec-websocket-extensions")

    with Daemon("[server]\ncompression = no\ndrain_seconds = 0\n", redis="embedded:") as daemon:
        assert await answer() is None
        (daemon.place / "bcast.ini").write_text("[server]\ncompression = yes\ndrain_seconds = 0\n")
        daemon.signal(signal.SIGHUP)
        assert await eventually(answer, bool) == NO_TAKEOVER


def test_chromium_reads_and_writes_it(daemon: Daemon) -> None:
    script = """new Promise(resolve => {
        const socket = new WebSocket("ws:" + location.host + "/ws", ["bcast.v1"]);
        const data = "compress me ".repeat(400);
        socket.onopen = () => {
            socket.send(JSON.stringify({type: "subscribe", channel: "chromium"}));
        };
        socket.onmessage = ({data: text}) => {
            const event = JSON.parse(text);
            if (event.op === "subscribe")
                socket.send(JSON.stringify({type: "broadcast", channel: "chromium", data}));
            if (event.type === "message") resolve([socket.extensions, event.data === data]);
        };
        socket.onclose = ({code}) => resolve(["closed", code]);
    })"""
    with Browser() as browser:
        page = browser.open(daemon.url + "/health")
        page.evaluate(f"{script}.then(found => {{ window.found = found }}), 0")
        page.wait_for("window.found")
        assert page.evaluate("window.found") == [NO_TAKEOVER, True]


def test_the_threshold_stands_in_the_documents() -> None:
    text = (Path(__file__).parents[1] / "docs/CONFIGURATION.md").read_text()
    assert f"fewer than {compression.THRESHOLD} bytes" in text
