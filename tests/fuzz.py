"""`make fuzz`: what anyone may send (fuzz_inputs.py), to the real daemon with well-behaved clients beside it.

    python tests/fuzz.py --inputs 1000000 --seconds 900 --seed 7
    python tests/fuzz.py --seed 7 --only 4711                # one script, as often as wanted

It fails on anything at WARNING or above in the log, a worker that dies, an answer that is none of ours, a
request without an answer, a connection that the server leaves open, memory that grows, and a message of the
well-behaved publisher that does not arrive in its order. The script that did it is saved, and its number
printed.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from client import Client, client_frame, eventually
from daemon import Daemon
from fuzz_inputs import INI, Script, script
from redis_server import RedisServer, binaries

# Connections at once.
_TOGETHER = 24
# Seconds in which the server must have answered, and closed what has ended.
_PATIENCE = 20.0
# Seconds between two looks at the log.
_LOOK = 3.0
# Seconds until a worker has let go of the channels that nobody has any more.
_LINGER = 1.5
# Bytes by which the PSS of one worker may grow between the warm-up and the end.
GROWTH = 16 << 20
# Inputs of the warm-up: caches are filled, and every kind of thing has been seen.
_WARM = 60_000
_GOODBYE = client_frame(b"\x03\xe8", 8)
_TYPES = {"message", "ack", "error", "ping"}
_STATUSES = {200, 204, 304, 400, 401, 403, 404, 405, 413, 426, 429, 503}
# What no answer may have in it.
_INSIDE = re.compile(rb"Traceback|tornado/|tornado_bcast/|\.py\b|redis-py|hiredis|PyJWT|TornadoServer", re.I)


class Found(Exception):
    """Something that must not be. `scripts` has brought it about, or one of them has."""

    def __init__(self, what: str, scripts: list[Script]) -> None:
        super().__init__(what)
        self.scripts = scripts


class Exchange(asyncio.Protocol):
    """One connection: sends a script, takes what comes, and knows when it is over."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._transport: asyncio.Transport
        self.data = bytearray()
        self.ended = asyncio.get_running_loop().create_future()
        # Bytes of `data` that have been read as frames of the server.
        self._read = 0
        self._waiting = set(script.asked)
        self._answered = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self._script.asked:
            try:
                self._read_frames()
            except Exception as error:
                self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self._answered.set()

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)
        self.abort()

    def abort(self) -> None:
        self._transport.abort()

    async def run(self) -> None:
        for chunk in self._script.chunks:
            if self._transport.is_closing():
                break
            self._transport.write(chunk)
            await asyncio.sleep(0)
        if self._script.asked:
            await self._answered.wait()
            self._transport.write(_GOODBYE)
        elif not self._script.methods and not self._script.silent and self._transport.can_write_eof():
            with suppress(OSError):  # It has been cut already.
                self._transport.write_eof()
        await self.ended
        if self._waiting:
            raise AssertionError(
                f"closed before it had answered {self._waiting}: {bytes(self.data[-300:])!r}"
            )

    def _read_frames(self) -> None:
        if not self._read:
            end = self.data.find(b"\r\n\r\n")
            if end < 0:
                return
            assert self.data.startswith(b"HTTP/1.1 101 "), bytes(self.data[:300])
            self._read = end + 4
        for opcode, payload, end in frames(self.data, self._read):
            self._read = end
            event = check_frame(opcode, payload)
            if event.get("type") in ("ack", "error") and event.get("messageId") in self._script.asked:
                # Twice is as wrong as never.
                self._waiting.remove(event["messageId"])
                if not self._waiting:
                    self._answered.set()

    def check(self) -> None:
        """Hold what came against what may come."""
        data = bytes(self.data)
        found = _INSIDE.search(without_pongs(data))
        assert not found, (found, data[:2000])
        if self._script.asked or not data:
            return
        statuses = []
        position = 0
        methods = iter(self._script.methods)
        while position < len(data):
            status, position, upgraded = read_answer(data, position, next(methods, ""))
            statuses.append(status)
            if upgraded:
                for opcode, payload, _ in frames(data, position):
                    check_frame(opcode, payload)
                break
        if self._script.methods:
            ended = re.search(rb"(?i)\r\nconnection: close\r\n", data) or statuses[-1] == 400
            assert len(statuses) == len(self._script.methods) or ended, (statuses, data[-500:])


def frames(data: bytes | bytearray, position: int) -> Iterator[tuple[int, bytes, int]]:
    """The whole frames from there on, each with the place where it ends."""
    while len(data) >= position + 2:
        first, size, start = data[position], data[position + 1], position + 2
        assert first & 0xF0 == 0x80 and size < 128, "a server's frames are whole and bare"
        if size > 125:
            width = 2 if size == 126 else 8
            if len(data) < start + width:
                return
            size = int.from_bytes(data[start : start + width], "big")
            start += width
        position = start + size
        if len(data) < position:
            return
        yield first & 0x0F, bytes(data[start:position]), position


def without_pongs(data: bytes) -> bytes:
    """What the server has said of its own: a pong has the bytes of its ping, whatever they are."""
    position = data.find(b"\r\n\r\n") + 4
    if not data.startswith(b"HTTP/1.1 101 ") or position < 4:
        return data
    said = [data[:position]]
    end = position
    for opcode, payload, end in frames(data, position):  # noqa: B007
        if opcode != 10:
            said.append(payload)
    return b"\n".join((*said, data[end:]))


def check_frame(opcode: int, payload: bytes) -> dict[str, object]:
    """What a frame says, where it is an event."""
    if opcode == 1:
        event = json.loads(payload, parse_constant=_no_constant)
        assert isinstance(event, dict) and event["type"] in _TYPES and event["timestamp"] > 1e12, event
        assert event.get("code") != "internal", event
        return event
    assert opcode in (8, 9, 10), opcode
    if opcode == 8 and payload:
        code = int.from_bytes(payload[:2], "big")
        # A peer's own code comes back to it; ours have reasons.
        assert 1000 <= code <= 1014 or 3000 <= code <= 4999, payload
        assert payload[2:].decode() != "internal error"
    return {}


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def read_answer(data: bytes, start: int, method: str) -> tuple[int, int, bool]:
    """The status of the answer that begins there, the place where it ends, and whether frames follow."""
    end = data.find(b"\r\n\r\n", start)
    assert end > 0, data[start : start + 300]
    head = data[start:end].decode("latin-1").split("\r\n")
    version, status_text, *_ = head[0].split(" ")
    status, end = int(status_text), end + 4
    assert version == "HTTP/1.1", head
    if status == 100:
        return read_answer(data, end, method)
    if status == 101:
        return status, end, True
    assert status in _STATUSES, head
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if method == "HEAD" or status in (204, 304):
        return status, end, False
    size = int(headers.get("content-length", "0"))
    body = data[end : end + size]
    if headers.get("content-type", "").startswith("application/json") and len(body) == size:
        answer = json.loads(body, parse_constant=_no_constant)
        assert answer.get("error", {}).get("code") != "internal", answer
    return status, end + size, False


async def play(url: str, script: Script) -> None:
    """Let one script have its connection. Raises Found."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_PATIENCE):
            _, exchange = await asyncio.get_running_loop().create_connection(
                lambda: Exchange(script), parts.hostname, parts.port
            )
            try:
                await exchange.run()
            finally:
                exchange.abort()
        exchange.check()
    except TimeoutError:
        raise Found("not answered, or not closed, in time", [script]) from None
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise Found(f"{type(error).__name__}: {str(error)[:3000]}", [script]) from error


class Neighbours:
    """A publisher and a subscriber that do everything right, on a persistent and on another channel."""

    CHANNELS = ("latest.neighbour", "kept.neighbour")

    def __init__(self, url: str) -> None:
        self._publisher, self._subscriber = Client(url), Client(url)
        self._stack = AsyncExitStack()
        self._publishing: asyncio.Task[None]
        self.sent = 0

    async def __aenter__(self) -> "Neighbours":
        for client in (self._publisher, self._subscriber):
            await self._stack.enter_async_context(client)
        for channel in self.CHANNELS:
            answer = await self._subscriber.ask("subscribe", channel=channel)
            assert answer["type"] == "ack", answer
        self._publishing = asyncio.create_task(self._publish())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._publishing.cancel()
        await asyncio.gather(self._publishing, return_exceptions=True)
        await self._stack.aclose()

    async def _publish(self) -> None:
        while True:
            for channel in self.CHANNELS:
                answer = await self._publisher.ask("broadcast", channel=channel, data=self.sent)
                assert answer["type"] == "ack", answer
            self.sent += 1
            await asyncio.sleep(0.02)

    def look(self) -> None:
        """Raises Found where the publisher was refused, or cut."""
        if self._publishing.done():
            raise Found(f"a well-behaved publisher: {self._publishing.exception()!r}", [])

    async def check(self) -> None:
        """All that was published has arrived, once and in order."""
        self.look()
        self._publishing.cancel()
        await asyncio.gather(self._publishing, return_exceptions=True)
        for channel in self.CHANNELS:
            await self._publisher.ask("broadcast", channel=channel, data="end")

        async def heard(channel: str) -> list[object]:
            events = (one for one in self._subscriber.frames if one["type"] == "message")
            return [one["data"] for one in events if one.get("channel") == channel]

        for channel in self.CHANNELS:
            # The last one may have been on its way when the publisher was stopped.
            got = await eventually(lambda channel=channel: heard(channel), lambda data: data[-1:] == ["end"])
            numbers = got[:-1]
            if numbers != list(range(len(numbers))) or len(numbers) < self.sent:
                raise Found(f"{channel}: of {self.sent} messages came {len(numbers)}, or out of order", [])


def pss(pid: int) -> int:
    """Bytes of memory of a process, with its share of what it shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * int(re.findall(r"^Pss: +(\d+) kB$", text, re.MULTILINE)[0])


class Fuzz:
    """A run: scripts one after the other, some at a time, until there have been enough inputs."""

    def __init__(self, daemon: Daemon, seed: int, inputs: int, seconds: float, warm: int = _WARM) -> None:
        self._daemon = daemon
        self._seed = seed
        self._wanted = inputs
        self._deadline = time.monotonic() + seconds
        self._warm = min(warm, inputs // 4)
        self._numbers = count()
        self._begun = time.monotonic()
        # Since the last look at the log.
        self._recent: list[Script] = []
        self.done = 0
        self.connections = 0

    async def run(self) -> None:
        """Raises Found."""
        pids = self._daemon.workers()
        async with Neighbours(self._daemon.ws_url) as neighbours:
            await self._play_until(self._warm, neighbours)
            before = await self._memory(pids)
            await self._play_until(self._wanted, neighbours)
            after = await self._memory(pids)
            await neighbours.check()
        if self._daemon.workers() != pids:
            raise Found("a worker has died", self._recent)
        self._check_log()
        grown = [new - old for old, new in zip(before, after, strict=True)]
        say(f"PSS of the workers: {_mib(before)} MiB after the warm-up, {_mib(after)} MiB at the end")
        say(f"{neighbours.sent} messages of a well-behaved publisher arrived twice over, all in order")
        if max(grown) > GROWTH:
            raise Found(f"a worker has grown by {max(grown) >> 20} MiB", [])

    async def _play_until(self, wanted: int, neighbours: Neighbours) -> None:
        players = [asyncio.create_task(self._player(wanted)) for _ in range(_TOGETHER)]
        try:
            pending = set(players)
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=_LOOK, return_when=asyncio.FIRST_EXCEPTION
                )
                for player in done:
                    player.result()
                neighbours.look()
                self._check_log()
                self._tell()
        finally:
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)

    async def _player(self, wanted: int) -> None:
        while self.done < wanted and time.monotonic() < self._deadline:
            one = script(self._seed, next(self._numbers))
            self._recent.append(one)
            await play(self._daemon.url, one)
            self.done += one.inputs
            self.connections += 1

    async def _memory(self, pids: list[int]) -> list[int]:
        """Once nobody but the neighbours is left, and what lingers for them has gone."""

        async def connections() -> int:
            return int(self._daemon.stats()["totals"]["connections"])

        await eventually(connections, lambda number: number == 2, 15)
        await asyncio.sleep(_LINGER)
        return [pss(pid) for pid in pids]

    def _check_log(self) -> None:
        try:
            self._daemon.check_log()
        except AssertionError as error:
            raise Found(f"the log says: {loud(error)}", self._recent) from None
        self._recent = self._recent[-_TOGETHER:]

    def _tell(self) -> None:
        seconds = time.monotonic() - self._begun
        say(
            f"{seconds:4.0f} s  {self.done:>9,} inputs ({self.done / self._wanted:.0%}), "
            f"{self.connections:,} connections, {self.done / seconds:,.0f} inputs/s"
        )


def _mib(sizes: list[int]) -> str:
    return " ".join(f"{size / (1 << 20):.1f}" for size in sizes)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def loud(error: AssertionError) -> str:
    """What `Daemon.check_log` has found, to be read."""
    return str(error).partition("\nassert not [")[0].replace("\\n", "\n")[:4000]


async def find(daemon: Daemon, found: Found) -> Found:
    """Which of several scripts it was: each alone, the log looked at after it."""
    if len(found.scripts) < 2:
        return found
    for one in found.scripts:
        try:
            await play(daemon.url, one)
            await asyncio.sleep(0.05)
            daemon.check_log()
        except Found as again:
            return again
        except AssertionError:
            return Found(str(found), [one])
    return found


def save(found: Found, seed: int, place: Path) -> None:
    """Write the scripts down, and say how they are had again."""
    scripts = [
        {"number": one.number, "kind": one.kind, "chunks": [chunk.decode("latin-1") for chunk in one.chunks]}
        for one in found.scripts
    ]
    path = place / f"fuzz-{seed}.json"
    path.write_text(json.dumps({"seed": seed, "found": str(found), "scripts": scripts}, indent=1))
    say(f"FOUND: {found}")
    which = " ".join(str(one.number) for one in found.scripts)
    say(f"by one of {which} (in {path}). Again: python tests/fuzz.py --seed {seed} --only NUMBER")


async def fuzz(arguments: argparse.Namespace) -> int:
    """Exit status: 0 all well, 1 something was found, 3 the time was over before."""
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    say(f"seed {seed}")
    with (
        RedisServer(next(iter(binaries().values()))) as redis,
        Daemon(INI, workers=2, redis=redis.url) as daemon,
    ):
        try:
            if arguments.only is not None:
                await play(daemon.url, script(seed, arguments.only))
                daemon.check_log()
                return 0
            run = Fuzz(daemon, seed, arguments.inputs, arguments.seconds)
            await run.run()
        except Found as found:
            save(await find(daemon, found), seed, Path.cwd())
            # It has been told.
            daemon.expect(*{line["event"] for line in daemon.log()})
            return 1
    if run.done < arguments.inputs:
        say(f"the time was over after {run.done:,} of {arguments.inputs:,} inputs")
        return 3
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=900, help="end after this time at the latest")
    parser.add_argument("--seed", type=int, help="of a run that is to be repeated")
    parser.add_argument("--only", type=int, help="the one script of this number")
    return asyncio.run(fuzz(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
