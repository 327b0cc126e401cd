"""The bytes of one connection to Redis, without Redis: replies to whom they are for, and every end."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from broker_kit import asynchronous, until
from hiredis import Reader
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.exceptions import InvalidResponse, ResponseError

from tornado_bcast.brokers.redis_wire import RedisWire, pack


class Driver:
    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.ends: list[Exception] = []

    def on_reply(self, reply: Any) -> None:
        self.replies.append(reply)
        if reply == b"bad":
            raise ConnectionError("it said bad")


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[RedisWire, socket.socket]]:
    """A wire over what redis-py would have made, and the other side of it."""
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_unix_connection(sock=ours)
    reader = Reader(protocolError=InvalidResponse, replyError=ResponseError, notEnoughData=NOT_ENOUGH_DATA)
    wire = RedisWire(SimpleNamespace(_parser=SimpleNamespace(_reader=reader), _writer=writer))
    theirs.setblocking(False)
    with theirs:
        yield wire, theirs
        wire.abort()
        await asyncio.sleep(0)


@asynchronous
async def test_answers_go_to_who_asked_and_the_rest_to_who_drives() -> None:
    async with connected() as (wire, redis):
        first, second = (asyncio.ensure_future(wire.ask("ECHO", word)) for word in ("a", "b"))
        await asyncio.sleep(0)
        assert redis.recv(100) == pack(("ECHO", "a")) + pack(("ECHO", "b"))
        redis.send(b"+a\r\n-ERR no ")
        assert await first == b"a" and not second.done()
        redis.send(b"b\r\n")
        with pytest.raises(ResponseError, match="no b"):
            await second
        driver = Driver()
        wire.drive(driver.on_reply, driver.ends.append)
        redis.send(b":1\r\n*2\r\n$1\r\nx\r\n$-1\r\n-ERR this\r\n")
        await until(lambda: len(driver.replies) == 3)
        assert driver.replies[:2] == [1, [b"x", None]] and str(driver.replies[2]) == "ERR this"
        wire.send((b"one", b"two"))
        assert redis.recv(100) == b"onetwo" and not driver.ends


@pytest.mark.parametrize(
    ("sent", "reason"),
    [(b"", "closed by server"), (b"?what\r\n", "Protocol error"), (b"+bad\r\n+never\r\n", "it said bad")],
)
@asynchronous
async def test_every_end_is_told_once_and_the_socket_is_let_go(sent: bytes, reason: str) -> None:
    async with connected() as (wire, redis):
        driver = Driver()
        wire.drive(driver.on_reply, driver.ends.append)
        if sent:
            redis.send(sent)
        else:
            redis.shutdown(socket.SHUT_WR)
        await until(lambda: driver.ends)
        assert reason in str(driver.ends[0])
        await asyncio.sleep(0)
        assert redis.recv(100) == b"", "it is closed from our side too"
        await asyncio.sleep(0.02)
        assert len(driver.ends) == 1 and b"never" not in driver.replies
        # Who comes later hears of it at once.
        late = Driver()
        wire.drive(late.on_reply, late.ends.append)
        assert late.ends == driver.ends
        with pytest.raises(type(driver.ends[0]), match=reason):
            await wire.ask("PING")


@asynchronous
async def test_who_has_asked_hears_of_the_end() -> None:
    async with connected() as (wire, redis):
        asked = [asyncio.ensure_future(wire.ask("PING")) for _ in range(2)]
        await asyncio.sleep(0)
        asked[0].cancel()
        redis.close()
        with pytest.raises(OSError):
            await asked[1]


@asynchronous
async def test_one_that_is_given_up_tells_nobody() -> None:
    async with connected() as (wire, redis):
        driver = Driver()
        wire.drive(driver.on_reply, driver.ends.append)
        wire.abort()
        await asyncio.sleep(0)
        assert redis.recv(100) == b""
        assert not driver.ends and not driver.replies
