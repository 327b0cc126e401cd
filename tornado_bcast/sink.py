"""One connection's way out: the kernel's buffer while it takes everything, a bounded queue when it does not.

A sink knows bytes, lengths and policies; never JSON, and channels only as keys of its queue. While nothing
is queued a frame goes straight to the socket, without a future or a copy; what the kernel did not take goes
through the stream, in order, and so does everything on a TLS connection.
"""

import errno
from collections import deque
from collections.abc import Sequence
from typing import Literal, Protocol

from tornado.iostream import StreamClosedError

from .direct import DESCRIPTORS, give_back_slot, take_slot
from .stream import ClientStream

# What happens to a message that does not fit into the queue of a slow connection. `wait`: it is refused, and
# stays in the stream of its persistent channel.
SlowConsumer = Literal["disconnect", "drop_oldest", "latest", "wait"]

# Bytes handed to the stream at a time, so that drop_oldest and latest have a say about the rest.
_CHUNK = 65536


class SinkOwner(Protocol):
    """Who holds the other end: told by plain calls, which may close the sink."""

    def on_slow(self) -> None:
        """The queue is full of what must not be dropped: the connection is too slow to go on."""

    def on_drained(self) -> None:
        """Everything that had to wait has left. Told by the loop, never within a call of the sink."""

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        """So many messages were dropped by policy."""


class _Entry:
    """Frames in the queue. `channel` is set where the policy may drop them."""

    __slots__ = ("channel", "count", "data")

    def __init__(self, channel: str | None, data: bytes, count: int) -> None:
        self.channel = channel
        self.data = data
        self.count = count


class Sink:
    """Sends frames to one connection. All methods are plain calls on the loop; none blocks or raises.

    `direct`: frames may go to the descriptor of `stream`, past the stream. Not with TLS.
    """

    __slots__ = (
        "_descriptor",
        "_ended",
        "_entries",
        "_gathered",
        "_latest",
        "_limit",
        "_owner",
        "_queued",
        "_stream",
        "compressed",
        "slot",
    )

    def __init__(
        self, stream: ClientStream, owner: SinkOwner, limit: int, *, direct: bool, compressed: bool = False
    ) -> None:
        # Its place in DESCRIPTORS. No other sink has it as long as anybody holds this one.
        self.slot = take_slot()
        # -1 for TLS: every byte has to pass the stream.
        self._descriptor: int = stream.socket.fileno() if direct else -1
        self.clear = True
        stream.sink = self
        self._stream = stream
        self._owner = owner
        # Bytes; the bound of `queued`.
        self._limit = limit
        # Its peer takes compressed frames; they are made by who sends here.
        self.compressed = compressed
        # The last frame has been given: nothing may follow it (RFC 6455, section 5.5.1).
        self._ended = False
        # Bytes accepted and not yet known to have left, those in the stream's hands included.
        self._queued = 0
        # Both exist only while something is queued: an idle connection pays nothing for them.
        self._entries: deque[_Entry] | None = None
        self._latest: dict[str, _Entry] | None = None
        # Answers of this turn of the loop that leave together; None: none.
        self._gathered: list[bytes] | None = None

    def __del__(self) -> None:
        give_back_slot(self.slot)

    @property
    def clear(self) -> bool:
        """Whether the next frame may go straight to the socket: nothing is queued or being written."""
        return DESCRIPTORS[self.slot] >= 0

    @clear.setter
    def clear(self, clear: bool) -> None:
        DESCRIPTORS[self.slot] = self._descriptor if clear else -1

    @property
    def queued(self) -> int:
        """Bytes that wait to leave."""
        return self._queued

    def send(self, channel: str, data: bytes, frames: Sequence[bytes], policy: SlowConsumer) -> bool:
        """Send a channel's messages: `data` is `frames` joined. False: not taken, by policy `wait` alone."""
        if self._gathered is not None:
            self.release()
        if not self.clear:
            return self._enqueue(channel, data, frames, policy)
        try:
            sent = self._stream.socket.send(data)
        except OSError as error:
            sent = -(error.errno or errno.EIO)
        if sent != len(data):
            self.finish(data, sent)
        return True

    def finish(self, data: bytes, sent: int) -> None:
        """The socket has taken `sent` bytes of `data`, or nothing (minus errno): see to the rest.

        What has begun is finished whatever the policy says.
        """
        self.clear = False
        if sent < 0 and sent not in (-errno.EAGAIN, -errno.EWOULDBLOCK):
            # The peer is gone; the read side of the stream finds that out and ends the connection.
            return
        if not self._write(memoryview(data)[max(sent, 0) :]):
            self._drain()

    def shut(self) -> None:
        """The descriptor is about to be closed."""
        self._descriptor = -1
        self.clear = False

    def gather(self, data: bytes) -> bool:
        """Like `answer`, but what comes in one turn of the loop leaves together, in front of all else.

        True: it is the first, and the caller has `release` called at the end of the turn.
        """
        if self._gathered is not None:
            self._gathered.append(data)
            return False
        if not self.clear:
            self.answer(data)
            return False
        self._gathered = [data]
        # So that whatever comes first passes by here and releases them.
        self.clear = False
        return True

    def release(self) -> None:
        """Send what has gathered and has not left yet."""
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self.clear = True
            self.answer(gathered[0] if len(gathered) == 1 else b"".join(gathered))

    def answer(self, data: bytes) -> None:
        """Send frames that are not a channel's messages, after all that is queued. Never dropped."""
        if self._gathered is not None:
            data = b"".join((*self._gathered, data))
            self._gathered = None
            self.clear = True
        if self.clear:
            self.send("", data, (data,), "disconnect")
        elif self._ended:
            return
        elif self._queued + len(data) > self._limit and self._queued:
            self._owner.on_slow()
        else:
            self._append(_Entry(None, data, 0))

    def end(self, data: bytes) -> None:
        """Send a last frame after all that is queued, whatever the bound. What comes later is dropped."""
        self.release()
        if self.clear:
            self.send("", data, (data,), "disconnect")
        elif not self._ended:
            self._append(_Entry(None, data, 0))
        self._ended = True
        self.clear = False

    def forget(self) -> None:
        """Drop what is queued but for the last frame. One that is half written is finished all the same."""
        if self._entries:
            last = self._entries.pop() if self._ended else None
            self._queued -= sum(len(entry.data) for entry in self._entries)
            self._entries.clear()
            self._latest = None
            if last is not None:
                self._entries.append(last)

    def _enqueue(self, channel: str, data: bytes, frames: Sequence[bytes], policy: SlowConsumer) -> bool:
        if self._ended:
            return True
        count = len(frames)
        if policy == "latest":
            self._owner_dropped(count - 1, policy)
            return self._replace(channel, frames[-1])
        if self._queued + len(data) > self._limit and self._queued:
            if policy == "wait":
                return False
            if policy == "disconnect":
                self._owner.on_slow()
                return True
            if not self._make_room(len(data)):
                self._owner_dropped(count, policy)
                return True
        self._append(_Entry(channel if policy == "drop_oldest" else None, data, count))
        return True

    def _replace(self, channel: str, frame: bytes) -> bool:
        old = self._latest.get(channel) if self._latest else None
        if old is not None:
            self._owner_dropped(1, "latest")
            grown = self._queued + len(frame) - len(old.data)
            if grown <= self._limit:
                self._queued, old.data = grown, frame
                return True
            # Too large for its predecessor's place.
            assert self._entries is not None and self._latest is not None
            self._entries.remove(old)
            del self._latest[channel]
            self._queued -= len(old.data)
        if self._queued + len(frame) > self._limit and self._queued and not self._make_room(len(frame)):
            self._owner_dropped(1, "latest")
            return True
        entry = _Entry(channel, frame, 1)
        if self._latest is None:
            self._latest = {}
        # Known before it is queued: it may leave at once, and is no longer to be replaced then.
        self._latest[channel] = entry
        self._append(entry)
        return True

    def _make_room(self, size: int) -> bool:
        """Drop the oldest messages until `size` bytes fit; False where even all of them would not do."""
        entries = self._entries or deque()
        kept: list[_Entry] = []
        dropped = 0
        while entries and self._queued + size > self._limit:
            entry = entries.popleft()
            if entry.channel is None:
                kept.append(entry)
                continue
            self._queued -= len(entry.data)
            dropped += entry.count
            if self._latest:
                self._latest.pop(entry.channel, None)
        entries.extendleft(reversed(kept))
        self._owner_dropped(dropped, "drop_oldest")
        return self._queued + size <= self._limit

    def _owner_dropped(self, count: int, policy: SlowConsumer) -> None:
        if count:
            self._owner.on_dropped(count, policy)

    def _append(self, entry: _Entry) -> None:
        if self._entries is None:
            self._entries = deque()
        self._entries.append(entry)
        self._queued += len(entry.data)
        if not self._stream.writing():
            self._drain()

    def _drain(self) -> bool:
        """Hand queued frames to the stream until it holds some back. True: nothing is queued any more."""
        while self._entries:
            chunk = bytearray()
            while self._entries and len(chunk) < _CHUNK:
                entry = self._entries.popleft()
                if self._latest and entry.channel is not None and self._latest.get(entry.channel) is entry:
                    del self._latest[entry.channel]
                chunk += entry.data
            self._queued -= len(chunk)
            if self._write(memoryview(chunk)):
                return False
        if self._queued or self._stream.closed() or self._stream.writing():
            return False
        self._entries = self._latest = None
        self.clear = not self._ended
        return True

    def _write(self, data: memoryview) -> bool:
        """Write through the stream; True while it has not taken everything to the kernel."""
        try:
            future = self._stream.write(data)
        except StreamClosedError:
            self._entries = self._latest = None
            self._queued = 0
            return True
        if not self._stream.writing():
            return False
        size = len(data)
        self._queued += size

        def written(_: object) -> None:
            self._queued -= size
            if self._drain():
                self._owner.on_drained()

        future.add_done_callback(written)
        return True
