"""One connection's way out: order, bounds and policies, on a stream that only records and on real sockets."""

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest
from broker_kit import asynchronous, until
from hypothesis import given, settings
from hypothesis import strategies as st
from tornado.iostream import StreamClosedError

from tornado_bcast.direct import DESCRIPTORS
from tornado_bcast.frames import frame
from tornado_bcast.sink import Sink, SlowConsumer
from tornado_bcast.stream import ClientStream


class Owner:
    """Records what it is told, in order."""

    def __init__(self) -> None:
        self.slow = 0
        self.drained = 0
        self.dropped: dict[SlowConsumer, int] = {}

    def on_slow(self) -> None:
        self.slow += 1

    def on_drained(self) -> None:
        self.drained += 1

    def on_dropped(self, count: int, policy: SlowConsumer) -> None:
        assert count > 0
        self.dropped[policy] = self.dropped.get(policy, 0) + count


class FakeFuture:
    def __init__(self, end: int) -> None:
        # The byte of the stream with which this write is done.
        self.end = end
        self.callbacks: list[Callable[[object], None]] = []

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        self.callbacks.append(callback)


class FakeStream:
    """A stream over a kernel that takes `room` bytes. Futures are done in the next `turn`, as there."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.out = bytearray()
        self.buffer = bytearray()
        self.futures: list[FakeFuture] = []
        self.broken: OSError | None = None
        self.is_closed = False
        self.socket = self

    def fileno(self) -> int:
        return 1 << 20

    def send(self, data: bytes | memoryview) -> int:
        assert not self.buffer, "bytes would overtake others"
        if self.broken:
            raise self.broken
        if not self.room:
            raise BlockingIOError(errno.EAGAIN, "")
        return self._take(bytes(data))

    def _take(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.out += taken
        return len(taken)

    def write(self, data: memoryview) -> FakeFuture:
        if self.is_closed:
            raise StreamClosedError
        self.buffer += data
        future = FakeFuture(len(self.out) + len(self.buffer))
        self.futures.append(future)
        self._push()
        return future

    def _push(self) -> None:
        del self.buffer[: self._take(bytes(self.buffer))]

    def writing(self) -> bool:
        return bool(self.buffer)

    def closed(self) -> bool:
        return self.is_closed

    def turn(self, room: int = 0) -> None:
        """The peer reads `room` bytes, and the loop turns once."""
        self.room += room
        self._push()
        done = [future for future in self.futures if future.end <= len(self.out)]
        self.futures = self.futures[len(done) :]
        for future in done:
            for callback in future.callbacks:
                callback(future)

    def drain(self) -> None:
        while self.buffer or self.futures:
            self.turn(1 << 30)

    def close(self) -> None:
        self.is_closed = True
        self.buffer.clear()
        futures, self.futures = self.futures, []
        for future in futures:
            for callback in future.callbacks:
                callback(future)


class Way:
    """A sink over a fake stream, and what came out of it."""

    def __init__(self, room: int = 0, limit: int = 100, *, direct: bool = True) -> None:
        self.stream = FakeStream(room)
        self.owner = Owner()
        self.sink = Sink(cast(ClientStream, self.stream), self.owner, limit, direct=direct)

    def send(self, channel: str, text: str, policy: SlowConsumer = "disconnect") -> bool:
        """Send frames: one for each word."""
        frames = [frame(word.encode()) for word in text.split()]
        return self.sink.send(channel, b"".join(frames), frames, policy)

    def answer(self, text: str) -> None:
        self.sink.answer(frame(text.encode()))

    def heard(self) -> list[str]:
        """All that leaves once the peer reads everything."""
        self.stream.drain()
        return decode(bytes(self.stream.out))


def decode(data: bytes) -> list[str]:
    texts, position = [], 0
    while position < len(data):
        assert data[position] == 0x81, "not the beginning of a frame"
        size, start = data[position + 1], position + 2
        if size == 126:
            size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
        elif size == 127:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        assert start + size <= len(data), "half a frame"
        texts.append(data[start : start + size].decode())
        position = start + size
    return texts


# While the kernel takes everything


def test_nothing_is_queued_while_the_kernel_takes_everything() -> None:
    way = Way(room=1000)
    assert way.send("a", "1 2")
    way.answer("3")
    assert decode(bytes(way.stream.out)) == ["1", "2", "3"]
    assert way.sink.clear and not way.sink.queued and not way.stream.futures
    assert (way.owner.slow, way.owner.drained, way.owner.dropped) == (0, 0, {})


def test_what_the_kernel_did_not_take_follows_in_order() -> None:
    way = Way(room=4)
    way.send("a", "one")
    way.send("a", "two")
    way.answer("three")
    assert not way.sink.clear
    assert way.sink.queued == 1 + len(frame(b"two")) + len(frame(b"three"))
    assert way.heard() == ["one", "two", "three"]
    assert way.sink.queued == 0 and way.owner.drained == 1
    assert way.sink.clear
    way.stream.room = 100
    way.send("a", "four")
    assert way.heard()[-1] == "four" and way.owner.drained == 1


def test_that_all_has_left_is_told_by_the_loop_alone() -> None:
    """Whoever sends is in the middle of a fan-out, and is not to be asked for more from within."""
    way = Way(room=4)
    way.send("a", "one two")
    way.stream.room = 1000
    way.stream._push()
    for send in (lambda: way.send("a", "three"), lambda: way.answer("four"), way.sink.release):
        send()
        assert not way.owner.drained
    way.stream.turn()
    assert way.owner.drained == 1
    assert way.heard() == ["one", "two", "three", "four"]


def test_a_kernel_without_any_room() -> None:
    way = Way(room=0)
    way.send("a", "one")
    assert way.sink.queued == len(frame(b"one"))
    assert way.heard() == ["one"]


def test_over_tls_everything_passes_the_stream() -> None:
    way = Way(room=1000, direct=False)
    for word in ("1", "2", "3"):
        way.send("a", word)
        assert not way.sink.clear
    assert decode(bytes(way.stream.out)) == ["1", "2", "3"]
    way.stream.turn()
    # Nothing has waited, so that it has left is no news, and no sign of life of the peer.
    assert way.sink.queued == way.owner.drained == 0
    way.stream.room = 2
    way.send("a", "4 5")
    assert way.sink.queued
    assert way.heard() == ["1", "2", "3", "4", "5"]
    assert not way.sink.clear and way.owner.drained == 1


# Slow consumers


def fill(way: Way, policy: SlowConsumer = "disconnect") -> None:
    """Put a frame of 10 bytes into the stream's hands and 9 into the queue: all there is room for."""
    for number in range(10):
        assert way.send("full", f"fill{number:04}", policy)
    assert way.sink.queued == 100


def test_disconnect() -> None:
    way = Way()
    fill(way)
    assert way.owner.slow == 0
    assert way.send("a", "more")
    assert way.owner.slow == 1 and not way.owner.dropped
    assert way.sink.queued == 100


def test_an_answer_is_never_dropped() -> None:
    way = Way()
    fill(way, "drop_oldest")
    way.answer("an answer")
    assert way.owner.slow == 1 and not way.owner.dropped


def test_drop_oldest() -> None:
    way = Way()
    fill(way, "drop_oldest")
    way.send("full", "new00001", "drop_oldest")
    way.send("full", "new00002 new00003", "drop_oldest")
    assert way.owner.dropped == {"drop_oldest": 3} and way.owner.slow == 0
    assert way.sink.queued <= 100
    # The first is half written, or might be: it is finished.
    assert way.heard() == [
        "fill0000",
        *(f"fill000{n}" for n in range(4, 10)),
        *(f"new0000{n}" for n in (1, 2, 3)),
    ]


def test_drop_oldest_takes_nothing_from_others() -> None:
    way = Way()
    way.send("keep", "keep0000")
    way.send("old", "old00000", "drop_oldest")
    way.answer("answer00")
    for number in range(7):
        way.send("keep", f"keep000{number}")
    assert way.sink.queued == 100
    way.send("old", "new00000", "drop_oldest")
    assert way.owner.dropped == {"drop_oldest": 1}
    heard = way.heard()
    assert "old00000" not in heard and heard[-1] == "new00000" and len(heard) == 10
    assert "answer00" in heard and way.owner.slow == 0


def test_what_does_not_fit_at_all_is_dropped_itself() -> None:
    way = Way()
    fill(way)
    way.send("a", "aaaa bbbb", "drop_oldest")
    way.send("b", "cccc", "latest")
    assert way.owner.dropped == {"drop_oldest": 2, "latest": 1} and way.owner.slow == 0
    assert len(way.heard()) == 10


def test_latest_keeps_one_for_each_channel() -> None:
    way = Way(room=3)
    way.send("x", "begun")
    for number in range(5):
        way.send("a", f"a{number}", "latest")
        way.send("b", f"b{number} b{number}'", "latest")
    way.answer("answer")
    assert way.owner.dropped == {"latest": 4 + 9} and way.owner.slow == 0
    assert way.heard() == ["begun", "a4", "b4'", "answer"]


def test_latest_after_a_drain_begins_anew() -> None:
    way = Way(room=3)
    way.send("x", "begun")
    way.send("a", "a1", "latest")
    assert way.heard() == ["begun", "a1"]
    way.stream.room = 3
    way.send("a", "a2", "latest")
    way.send("a", "a3", "latest")
    # The one that was half written is finished, the next waits.
    assert way.heard()[2:] == ["a2", "a3"]


def test_wait_is_told_and_takes_nothing() -> None:
    way = Way()
    fill(way)
    assert not way.send("p", "more", "wait")
    assert way.owner.slow == 0 and not way.owner.dropped and way.sink.queued == 100
    way.stream.turn(20)
    way.stream.drain()
    assert way.send("p", "more", "wait")
    assert way.heard()[-1] == "more"


def test_one_that_is_larger_than_the_queue_goes_when_nothing_waits() -> None:
    for policy in ("disconnect", "drop_oldest", "latest", "wait"):
        way = Way(room=1, limit=10)
        assert way.send("a", "x" * 500, cast(SlowConsumer, policy))
        assert way.owner.slow == 0 and not way.owner.dropped
        assert way.heard() == ["x" * 500]


def test_a_replacement_that_is_larger_is_held_to_the_bound() -> None:
    way = Way(limit=100)
    way.send("x", "begun")
    way.send("a", "1", "latest")
    way.send("a", "2" * 120, "latest")
    assert way.sink.queued <= 100
    assert way.owner.dropped == {"latest": 2}
    way.send("b", "3", "latest")
    way.send("a", "4" * 80, "latest")
    way.send("a", "5" * 90, "latest")
    # There is room for it when the other goes.
    assert way.owner.dropped == {"latest": 3, "drop_oldest": 1} and way.sink.queued <= 100
    assert way.heard() == ["begun", "5" * 90]


# The end


def test_forget_finishes_what_has_begun_and_drops_the_rest() -> None:
    way = Way(room=4)
    way.send("a", "begun")
    way.send("a", "queued")
    way.send("b", "queued", "latest")
    way.sink.forget()
    assert way.sink.queued == len(frame(b"begun")) - 4
    way.sink.end(frame(b"last"))
    assert way.heard() == ["begun", "last"]


def test_the_last_frame_goes_whatever_the_bound() -> None:
    way = Way()
    fill(way)
    way.sink.end(frame(b"last"))
    assert way.owner.slow == 0
    assert way.heard()[-1] == "last"


@pytest.mark.parametrize("room", [1000, 4, 0])
@pytest.mark.parametrize("direct", [True, False])
def test_nothing_follows_the_last_frame(room: int, direct: bool) -> None:
    way = Way(room, direct=direct)
    way.send("a", "first")
    way.sink.end(frame(b"last"))
    for policy in ("disconnect", "drop_oldest", "latest", "wait"):
        for _ in range(20):
            assert way.send("a", "more" * 10, cast(SlowConsumer, policy))
    way.answer("more")
    way.sink.end(frame(b"another last"))
    way.sink.forget()
    way.send("a", "more")
    heard = way.heard()
    # What had begun, or had left before, and the last.
    assert heard == ["first", "last"]
    way.stream.room = 1000
    way.send("a", "more")
    way.answer("more")
    assert way.heard() == heard
    assert way.owner.slow == 0 and not way.owner.dropped and way.sink.queued == 0


def test_forget_with_nothing_queued() -> None:
    way = Way(room=100)
    way.sink.forget()
    way.send("a", "x")
    assert way.heard() == ["x"] and way.sink.clear


def test_a_peer_that_is_gone() -> None:
    way = Way(room=100)
    way.stream.broken = ConnectionResetError()
    assert way.send("a", "x")
    assert not way.sink.clear and way.owner.slow == 0
    way.stream.is_closed = True
    assert way.send("a", "y")
    way.answer("z")
    way.sink.forget()
    way.sink.end(frame(b"last"))
    assert way.owner.slow == way.owner.drained == 0


def test_a_stream_that_closes_with_a_queue() -> None:
    way = Way(room=4)
    way.send("a", "one")
    way.send("a", "two")
    way.stream.close()
    assert way.send("a", "three") and way.sink.queued <= 0
    assert way.owner.drained == 0, "nothing has left"


# Any order of events

POLICY: dict[str, SlowConsumer] = {
    "d": "disconnect",
    "o": "drop_oldest",
    "p": "drop_oldest",
    "l": "latest",
    "m": "latest",
    "w": "wait",
}
LIMIT = 60
steps = st.one_of(
    st.tuples(st.just("send"), st.sampled_from("dopplmmw"), st.integers(1, 3), st.integers(0, 20)),
    st.tuples(st.just("answer"), st.integers(0, 10)),
    st.tuples(st.just("turn"), st.integers(0, 80)),
    st.tuples(st.just("drain")),
)


@settings(max_examples=300)
@given(st.lists(steps, max_size=60), st.integers(0, 50), st.booleans())
def test_whatever_happens(script: list[tuple[Any, ...]], room: int, direct: bool) -> None:
    way = Way(room, LIMIT, direct=direct)
    owner = way.owner
    counts = dict.fromkeys([*POLICY, "answer"], 0)
    sent: dict[str, list[str]] = {name: [] for name in counts}
    refused = biggest = 0
    for step in script:
        if step[0] == "send":
            _, channel, number, size = step
            words = []
            for _ in range(number):
                counts[channel] += 1
                words.append(f"{channel}{counts[channel]}:".ljust(size, "x"))
            slow = owner.slow
            biggest = max(biggest, sum(len(frame(word.encode())) for word in words))
            taken = way.send(channel, " ".join(words), POLICY[channel])
            assert taken or POLICY[channel] == "wait"
            if taken and owner.slow == slow:
                sent[channel] += words
            else:
                refused += 1
        elif step[0] == "answer":
            counts["answer"] += 1
            word = f"answer{counts['answer']}:".ljust(step[1], "x")
            slow = owner.slow
            biggest = max(biggest, len(frame(word.encode())))
            way.answer(word)
            if owner.slow == slow:
                sent["answer"].append(word)
        elif step[0] == "turn":
            way.stream.turn(step[1])
        else:
            way.stream.drain()
        assert 0 <= way.sink.queued <= max(LIMIT, biggest)
        assert way.sink.clear is (direct and not way.sink.queued)
    heard = way.heard()
    assert way.sink.queued == 0
    dropped = 0
    for name, words in sent.items():
        came = [word for word in heard if word.startswith(name) and word[len(name)].isdigit()]
        # In order, each once, and nothing that was not sent.
        assert came == [word for word in words if word in set(came)], name
        missing = len(words) - len(came)
        if name in ("d", "w", "answer"):
            assert not missing, name
        dropped += missing
        if words and name in "lm":
            # The newest comes, unless it was dropped for want of room.
            assert came[-1:] == words[-1:] or owner.dropped
    assert sum(owner.dropped.values()) == dropped
    if not refused and not dropped:
        assert len(heard) == sum(map(len, sent.values()))


# Real sockets


class Pair:
    """A stream with a small send buffer, and the other end as a plain socket."""

    def __init__(self, limit: int = 1 << 20, *, direct: bool = True) -> None:
        ours, self.peer = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.peer.setblocking(False)
        self.stream = ClientStream(ours)
        self.owner = Owner()
        self.sink = Sink(self.stream, self.owner, limit, direct=direct)

    async def read(self, until: Callable[[bytes], bool]) -> bytes:
        """Read until what has come is enough."""
        data = b""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            while not until(data):
                piece = await loop.sock_recv(self.peer, 3000)
                assert piece
                data += piece
        return data

    def send(self, channel: str, text: str, policy: SlowConsumer = "disconnect") -> bool:
        data = frame(text.encode())
        return self.sink.send(channel, data, (data,), policy)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()
        self.peer.close()


def ends(text: str) -> Callable[[bytes], bool]:
    return lambda data: data.endswith(text.encode())


@pytest.mark.parametrize("direct", [True, False])
@asynchronous
async def test_partial_sends_keep_every_byte(direct: bool) -> None:
    texts = [f"{number}:".ljust(number * 7 % 900, "x") for number in range(1000)]
    with Pair(direct=direct) as pair:
        for text in texts:
            pair.send("a", text)
            pair.sink.answer(frame(b"answer"))
        assert pair.sink.queued and not pair.sink.clear
        pair.sink.answer(frame(b"the end"))
        data = await pair.read(ends("the end"))
        assert decode(data)[:-1:2] == texts
        await until(lambda: pair.owner.drained)
        assert pair.sink.queued == 0 and pair.sink.clear is direct
        assert pair.owner.slow == 0
        pair.send("a", "again")
        assert decode(await pair.read(ends("again"))) == ["again"]


@asynchronous
async def test_messages_that_come_while_the_peer_reads() -> None:
    with Pair() as pair:

        async def write() -> None:
            for number in range(3000):
                pair.send("a", f"{number}".ljust(200, "x"))
                if number % 50 == 0:
                    await asyncio.sleep(0)
            pair.sink.end(frame(b"the end"))

        writing = asyncio.create_task(write())
        data = await pair.read(ends("the end"))
        await writing
        assert [int(text.rstrip("x")) for text in decode(data)[:-1]] == list(range(3000))


@asynchronous
async def test_a_reader_that_stops_gets_the_latest_when_it_goes_on() -> None:
    with Pair(limit=20_000) as pair:
        for number in range(5000):
            pair.send("a", f"{number}".ljust(100, "x"), "latest")
        assert pair.sink.queued < 20_000
        pair.sink.end(frame(b"the end"))
        numbers = [int(text.rstrip("x")) for text in decode(await pair.read(ends("the end")))[:-1]]
        assert numbers == sorted(numbers) and numbers[-1] == 4999
        assert len(numbers) + pair.owner.dropped["latest"] == 5000
        assert pair.owner.slow == 0


@asynchronous
async def test_a_reader_that_stops_misses_the_oldest() -> None:
    with Pair(limit=20_000) as pair:
        for number in range(5000):
            pair.send("a", f"{number}".ljust(100, "x"), "drop_oldest")
            assert pair.sink.queued <= 20_000
        pair.sink.end(frame(b"the end"))
        numbers = [int(text.rstrip("x")) for text in decode(await pair.read(ends("the end")))[:-1]]
        assert numbers == sorted(numbers) and numbers[-100:] == list(range(4900, 5000))
        assert len(numbers) + pair.owner.dropped["drop_oldest"] == 5000


@asynchronous
async def test_a_reader_that_stops_is_slow() -> None:
    with Pair(limit=20_000) as pair:
        number = 0
        while not pair.owner.slow:
            pair.send("a", f"{number}".ljust(100, "x"))
            number += 1
            assert number < 5000
        assert pair.sink.queued <= 20_000
        pair.sink.forget()
        pair.sink.end(frame(b"the end"))
        numbers = [int(text.rstrip("x")) for text in decode(await pair.read(ends("the end")))[:-1]]
        assert numbers == list(range(len(numbers)))


@asynchronous
async def test_a_peer_that_closes() -> None:
    with Pair() as pair:
        for _ in range(100):
            pair.send("a", "x" * 1000)
        pair.peer.close()
        await until(pair.stream.closed)
        pair.send("a", "x")
        pair.sink.answer(frame(b"x"))
        pair.sink.end(frame(b"x"))
        pair.sink.forget()
        assert pair.owner.slow == 0


@asynchronous
async def test_a_peer_that_has_closed_before() -> None:
    with Pair() as pair:
        pair.peer.close()
        for _ in range(5):
            pair.send("a", "x" * 10_000)
            pair.sink.answer(frame(b"x"))
        await asyncio.sleep(0)
        assert pair.owner.slow == 0


# Descriptors


@asynchronous
async def test_a_descriptor_is_out_of_the_row_before_it_is_closed() -> None:
    with Pair() as pair:
        number = pair.stream.socket.fileno()
        assert DESCRIPTORS[pair.sink.slot] == number
        pair.stream.close()
        assert DESCRIPTORS[pair.sink.slot] == -1
        with Pair() as later:
            # The kernel gives out the lowest number that is free.
            assert later.stream.socket.fileno() == number
            assert later.sink.slot != pair.sink.slot
            pair.send("a", "not for the later one")
            later.send("a", "x")
            assert decode(await later.read(ends("x"))) == ["x"]


@asynchronous
async def test_a_slot_is_given_out_again_when_nobody_holds_its_sink() -> None:
    with Pair() as pair:
        slot, holder = pair.sink.slot, (pair.sink,)
        del pair.sink
        pair.stream.sink = None
        with Pair() as other:
            assert other.sink.slot != slot
        assert holder[0].slot == slot
        del holder
        with Pair() as other:
            assert other.sink.slot == slot


class TestGathering:
    """Answers of one turn of the loop that leave together."""

    def test_they_leave_in_one_piece_when_the_turn_ends(self) -> None:
        way = Way(room=1000)
        assert way.sink.gather(frame(b"a"))
        assert not way.sink.gather(frame(b"b"))
        assert not way.stream.out
        way.sink.release()
        assert way.heard() == ["a", "b"] and way.sink.clear
        way.sink.release()
        assert way.heard() == ["a", "b"]

    @pytest.mark.parametrize("next_one", ["message", "answer", "end"])
    def test_nothing_passes_them(self, next_one: str) -> None:
        way = Way(room=1000)
        way.sink.gather(frame(b"a"))
        assert not way.sink.clear
        if next_one == "message":
            assert way.send("x", "b")
        elif next_one == "answer":
            way.answer("b")
        else:
            way.sink.end(frame(b"b"))
        assert way.heard() == ["a", "b"]
        way.sink.release()
        assert way.heard() == ["a", "b"]
        assert way.sink.clear is (next_one != "end")

    def test_where_something_is_queued_they_come_after_it(self) -> None:
        way = Way(room=1)
        way.send("x", "a")
        assert not way.sink.gather(frame(b"b"))
        assert way.heard() == ["a", "b"] and way.sink.clear

    def test_what_the_kernel_does_not_take_is_finished(self) -> None:
        way = Way(room=4)
        way.sink.gather(frame(b"a"))
        way.sink.gather(frame(b"b"))
        way.sink.release()
        assert not way.sink.clear and way.sink.queued == 2
        assert way.send("x", "c")
        assert way.heard() == ["a", "b", "c"] and way.sink.clear

    def test_none_after_the_peer_has_gone(self) -> None:
        way = Way(room=1000)
        way.sink.gather(frame(b"a"))
        way.stream.broken = ConnectionResetError()
        way.sink.release()
        assert not way.sink.clear
