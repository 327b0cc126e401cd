"""A crowd of plain WebSocket clients in one thread, for loads that objects like client.py's are too slow for.

    with Crowd(daemon.port) as crowd:
        crowd.join(200, "news")
        publishers = crowd.join(10)
        crowd.publish(publishers, "news", rate=5000, seconds=3)

It knows the wire and nothing of the package. What comes is counted by marks in the bytes that are read, and a
message carries the time at which it was due, so that one that had to wait in its publisher counts as late.
"""

import json
import re
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from struct import unpack
from typing import Self

from client import client_frame, handshake

_MESSAGE = b'"type":"message"'
_TAKEN = b'"op":"broadcast"'
_REFUSED = b'"code":"unavailable"'
_PONG = client_frame(b'{"type":"pong"}')
# Seconds after which each member says that it is there, pinged or not.
_PONG_SECONDS = 5.0
# One byte shorter than the shortest mark, so that none is counted twice.
_CARRY = len(_MESSAGE) - 1
# Bytes in which a whole close frame of the server's has room.
_TAIL = 127
_STAMP = re.compile(rb"@T([0-9a-f]{16})")
_READ = 1 << 18
# Bytes that a publisher holds back for a server that does not take them; what is due then is left out.
_BACKLOG = 1 << 20
# Seconds from one look at what is due to the next.
_TICK = 0.005


class Member:
    """One connection. All counts are of what came since it was opened."""

    def __init__(self, address: tuple[str, int], window: int | None) -> None:
        self.socket = socket.socket()
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        self.socket.settimeout(30)
        self.socket.connect(address)
        self.reads = True
        # What is not counted costs the least: its bytes are known.
        self.counts = False
        # The latency of each message that was counted, in seconds.
        self.late: list[float] = []
        self.messages = self.bytes = self.sent = self.taken = self.refused = 0
        # The close code once it has ended, 1006 where none came.
        self.closed: int | None = None
        self.out = bytearray()
        self._tail = b""

    def receive(self, buffer: bytearray) -> None:
        """Count what is there."""
        try:
            size = self.socket.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self.closed = _close_code(self._tail)
            return
        self.bytes += size
        if self.counts:
            self._count(self._tail[-_CARRY:] + buffer[:size])
        self._tail = (self._tail + buffer[max(0, size - _TAIL) : size])[-_TAIL:]
        if 0x88 in self._tail and (code := _close_code(self._tail)) != 1006:
            # The server waits for our goodbye, or for that we hang up.
            self.closed = code

    def _count(self, data: bytes) -> None:
        self.messages += data.count(_MESSAGE)
        self.taken += data.count(_TAKEN)
        self.refused += data.count(_REFUSED)
        now = time.monotonic_ns()
        self.late += [(now - int(stamp, 16)) / 1e9 for stamp in _STAMP.findall(data)]

    def publish(self, channel: str, number: int, size: int) -> int:
        """Send the same message so many times, due now; their number."""
        data = f"@T{time.monotonic_ns():016x}".ljust(size, "x")
        frame = {"type": "broadcast", "channel": channel, "data": data}
        self.out += client_frame(json.dumps(frame).encode()) * number
        self.sent += number
        return number

    def push(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        try:
            sent = self.socket.send(self.out)
        except BlockingIOError:
            return
        except OSError:
            self.out.clear()
            return
        del self.out[:sent]


def _close_code(tail: bytes) -> int:
    """The code of the close frame with which these bytes end; 1006: there is none (RFC 6455, 7.4.1)."""
    for start in range(len(tail) - 3):
        if tail[start] == 0x88 and start + 2 + tail[start + 1] == len(tail):
            code: int = unpack("!H", tail[start + 2 : start + 4])[0]
            return code
    return 1006


class Crowd:
    """All members, on one selector. Use it in a `with` block; everything is closed at its end."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self.members: list[Member] = []
        self._selector = selectors.DefaultSelector()
        self._buffer = bytearray(_READ)
        self._pong_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for member in self.members:
            member.socket.close()
        self._selector.close()

    def join(
        self, number: int, channel: str | None = None, *, window: int | None = None, **fields: object
    ) -> list[Member]:
        """Open so many connections, subscribed where a channel is named; `fields` are the subscribe's.

        `window`: bytes that the kernel may hold for one that does not read.
        """
        joined = []
        for _ in range(number):
            member = Member(self._address, window)
            member.socket.sendall(handshake(f"127.0.0.1:{self._address[1]}"))
            _expect(member.socket, b'"op":"connect"')
            if channel is not None:
                frame = {"type": "subscribe", "channel": channel, **fields}
                member.socket.sendall(client_frame(json.dumps(frame).encode()))
                _expect(member.socket, b'"op":"subscribe"')
            member.socket.setblocking(False)
            self._selector.register(member.socket, selectors.EVENT_READ, member)
            joined.append(member)
        self.members += joined
        return joined

    def stranger(self) -> socket.socket:
        """A connection that says nothing by itself and is no member."""
        return socket.create_connection(self._address, 30)

    def stop_reading(self, members: Sequence[Member]) -> None:
        for member in members:
            self._selector.unregister(member.socket)
            member.reads = False

    def read_again(self, members: Sequence[Member]) -> None:
        for member in members:
            self._selector.register(member.socket, selectors.EVENT_READ, member)
            member.reads = True

    def publish(
        self, publishers: Sequence[Member], channel: str, *, rate: float, seconds: float, size: int = 64
    ) -> int:
        """Publish so many messages a second for a while, whatever the answers say; how many.

        All members read meanwhile. What a publisher's connection does not take is left out.
        """
        begun = time.monotonic()
        due = made = 0
        while (now := time.monotonic()) < begun + seconds:
            missing = int((now - begun) * rate) - due
            share = -(-missing // len(publishers))
            for member in publishers[: -(-missing // share) if share else 0]:
                due += share
                if member.closed is None and len(member.out) < _BACKLOG:
                    made += member.publish(channel, share, size)
            self.turn(_TICK)
        return made

    def saturate(
        self, publishers: Sequence[Member], channel: str, *, window: int, seconds: float, size: int = 64
    ) -> int:
        """Publish as fast as it is answered, each with so many messages without an answer; how many."""
        end = time.monotonic() + seconds
        made = 0
        while time.monotonic() < end:
            for member in publishers:
                room = window - (member.sent - member.taken - member.refused)
                # Half a window at once, as a client that awaits several would.
                if member.closed is None and room >= window // 2:
                    made += member.publish(channel, room, size)
            self.turn(_TICK)
        return made

    def turn(self, timeout: float) -> bool:
        """Read what is there, once; whether anything was."""
        self._push()
        if (now := time.monotonic()) >= self._pong_at:
            self._pong_at = now + _PONG_SECONDS
            for member in self.members:
                if member.closed is None:
                    member.out += _PONG
        ready = self._selector.select(timeout)
        for key, _ in ready:
            member: Member = key.data
            member.receive(self._buffer)
            if member.closed is not None:
                self._selector.unregister(member.socket)
                member.reads = False
                member.socket.close()
        return bool(ready)

    def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        """Read until something is so."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "not in time"
            self.turn(0.02)

    def quiet(self, seconds: float = 20) -> None:
        """Read until nothing has come for a moment, and what was to be published has left."""
        silent, deadline = 0, time.monotonic() + seconds
        while silent < 10 and time.monotonic() < deadline:
            silent = 0 if self.turn(0.1) or self._waiting() else silent + 1

    def _waiting(self) -> list[Member]:
        return [member for member in self.members if member.out and member.closed is None]

    def _push(self) -> None:
        for member in self._waiting():
            member.push()


def _expect(connection: socket.socket, mark: bytes) -> None:
    data = b""
    while mark not in data:
        piece = connection.recv(65536)
        assert piece, f"closed instead of {mark!r}: {data!r}"
        data += piece


def percentile(values: Sequence[float], part: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
