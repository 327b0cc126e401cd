"""What comes from a client, on real sockets. With TLS: test_workers.py."""

import asyncio
import socket

import pytest
from broker_kit import asynchronous, until

from tornado_bcast.eventloop import WorkerLoop
from tornado_bcast.stream import ClientStream


class Client:
    """A stream whose other end is a plain socket, and what it has told."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.stream = ClientStream(ours)
        self.heard: list[bytes] = []
        # What it says is missing of a message.
        self.missing = 0
        self.ends = 0

    def receive(self) -> None:
        self.stream.receive(self._hear, self._end)

    def _hear(self, data: bytes) -> int:
        self.heard.append(data)
        return self.missing

    def _end(self) -> None:
        self.ends += 1

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()
        self.peer.close()

    async def hears(self, data: bytes) -> None:
        await until(lambda: b"".join(self.heard) == data)


@asynchronous
async def test_what_comes_is_told_in_order() -> None:
    with Client() as client:
        client.receive()
        client.peer.send(b"a")
        await client.hears(b"a")
        data = bytes(range(256)) * 500
        client.peer.sendall(data)
        await client.hears(b"a" + data)


@asynchronous
async def test_what_came_with_the_handshake_is_told_first() -> None:
    with Client() as client:
        client.peer.send(b"GET\r\n\r\nfirst")
        assert await client.stream.read_until(b"\r\n\r\n") == b"GET\r\n\r\n"
        client.receive()
        assert not client.heard, "it would be heard before its receiver is ready"
        client.peer.send(b" second")
        await client.hears(b"first second")


@asynchronous
async def test_it_hears_while_it_cannot_write() -> None:
    with Client() as client:
        client.receive()
        written = client.stream.write(bytes(1 << 22))
        assert client.stream.writing()
        for piece in (b"a", b"b"):
            client.peer.send(piece)
            await client.hears(b"ab"[: b"ab".index(piece) + 1])
        client.peer.setblocking(False)

        def drain() -> bool:
            while client.stream.writing():
                try:
                    client.peer.recv(1 << 20)
                except BlockingIOError:
                    return False
            return True

        await until(drain)
        await written
        client.peer.send(b"c")
        await client.hears(b"abc")


@pytest.mark.parametrize("how", ["the peer", "the peer, with bytes unread", "we"])
@asynchronous
async def test_the_end_is_told_once(how: str) -> None:
    with Client() as client:
        client.receive()
        if how == "we":
            client.stream.close()
            assert not client.ends, "whoever closes is not called back from within"
        else:
            if "unread" in how:
                client.stream.socket.send(b"unread")
            client.peer.close()
        await until(lambda: client.ends)
        client.stream.close()
        await until(client.stream.closed)
        assert client.ends == 1


@asynchronous
async def test_one_that_has_closed_before() -> None:
    with Client() as client:
        client.stream.close()
        client.receive()
        await until(lambda: client.ends)
        assert client.ends == 1 and not client.heard


@asynchronous
async def test_nothing_is_told_after_it_was_closed_from_within() -> None:
    with Client() as client:

        def received(data: bytes) -> None:
            client.heard.append(data)
            client.stream.close()

        client.stream.receive(received, client._end)
        client.peer.send(b"a")
        await until(lambda: client.ends)
        assert client.heard == [b"a"]


@asynchronous
async def test_one_that_is_held_leaves_everything_to_the_kernel() -> None:
    """Whether it writes meanwhile or not, and without the loop turning for it; the end is seen afterwards."""
    with Client() as client:
        client.receive()
        client.peer.send(b"a")
        await client.hears(b"a")
        client.stream.hold()
        client.peer.send(b"b")
        await client.stream.write(b"x" * 100)
        looked = 0
        read = client.stream.on_readable

        def count() -> None:
            nonlocal looked
            looked += 1
            read()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client.stream, "on_readable", count)
            await asyncio.sleep(0.05)
        assert client.heard == [b"a"] and not looked
        client.stream.go_on()
        await client.hears(b"ab")

        # From within, as a refusal does it; then the peer goes.
        def received(data: bytes) -> int:
            client.heard.append(data)
            client.stream.hold()
            return 0

        client.stream._received = received
        client.peer.send(b"c")
        await client.hears(b"abc")
        client.peer.send(b"d")
        client.peer.close()
        await asyncio.sleep(0.05)
        assert client.heard[-1] == b"c" and not client.ends
        client.stream.go_on()
        await client.hears(b"abcd")
        client.stream.go_on()
        await until(lambda: client.ends)


@asynchronous
async def test_the_rest_of_a_long_message_is_read_with_it_and_no_more() -> None:
    look = 16 * 1024
    with Client() as client:
        client.receive()
        client.missing = 7
        client.peer.send(b"a" * look + b"b" * 7 + b"c" * 7 + b"d")
        await client.hears(b"a" * look + b"b" * 7 + b"c" * 7 + b"d")
        # The seven, and seven of the next that has begun; after less than was wanted it waits for its turn.
        assert [len(data) for data in client.heard] == [look, 7, 7, 1]
        client.heard.clear()
        client.missing = 0
        client.peer.send(b"e" * look + b"f")
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            if len(client.heard) < 2:
                asyncio.get_running_loop().call_soon(turn)

        turn()
        await client.hears(b"e" * look + b"f")
        assert turns >= 3, "both came in one turn"


@asynchronous
async def test_nobody_is_watched_after_its_end() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WorkerLoop)
    with Client() as client:
        client.receive()
        assert list(loop.turns._watchers.values()) == [client.stream]
    assert not loop.turns._watchers


@asynchronous
async def test_a_very_long_message_leaves_the_others_their_turn() -> None:
    look = 16 * 1024
    with Client() as client:
        client.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        client.receive()
        client.missing = 1 << 24
        client.peer.send(b"a" * look * 6)
        seen: list[int] = []
        while sum(map(len, client.heard)) < look * 6:
            await asyncio.sleep(0)
            seen.append(len(client.heard))
        assert 4 in seen and set(seen) <= {0, 4, 6}, seen
