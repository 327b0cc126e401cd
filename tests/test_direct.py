"""The loop over descriptors, in Python and in C, on real sockets."""

import errno
import shutil
import socket
from array import array
from collections.abc import Iterator
from typing import cast

import pytest

from tornado_bcast.direct import SendEach, fastest_send_each, send_each

Pairs = list[tuple[socket.socket, socket.socket]]


@pytest.fixture(params=[send_each, fastest_send_each], ids=["python", "fastest"])
def send(request: pytest.FixtureRequest) -> SendEach:
    return cast(SendEach, request.param)


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    pairs = [socket.socketpair() for _ in range(4)]
    for near, _ in pairs:
        near.setblocking(False)
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


def test_each_slot_once(send: SendEach, pairs: Pairs) -> None:
    descriptors = array("i", [near.fileno() for near, _ in pairs])
    assert send(descriptors, array("i", [2, 0]), b"news") == []
    assert [far.recv(9) for _, far in (pairs[0], pairs[2])] == [b"news", b"news"]
    for _, far in (pairs[1], pairs[3]):
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(1)


def test_who_has_no_descriptor_is_left_to_the_caller(send: SendEach, pairs: Pairs) -> None:
    assert send(array("i", [-1, pairs[0][0].fileno()]), array("i", [1, 0]), b"x") == [(1, None)]


def test_what_the_kernel_does_not_take(send: SendEach, pairs: Pairs) -> None:
    near, far = pairs[0]
    descriptors, data = array("i", [near.fileno()]), bytes(1 << 20)
    ((index, sent),) = send(descriptors, array("i", [0]), data)
    assert index == 0 and sent is not None and 0 < sent < len(data)
    assert send(descriptors, array("i", [0]), data) == [(0, -errno.EAGAIN)]
    far.close()
    assert send(descriptors, array("i", [0]), data) == [(0, -errno.EPIPE)]


def test_everybody_else_gets_it_when_one_fails(send: SendEach, pairs: Pairs) -> None:
    descriptors = array("i", [near.fileno() for near, _ in pairs])
    pairs[1][1].close()
    assert send(descriptors, array("i", range(4)), b"x") == [(1, -errno.EPIPE)]
    assert [pairs[index][1].recv(9) for index in (0, 2, 3)] == [b"x"] * 3


def test_nobody(send: SendEach) -> None:
    assert send(array("i"), array("i"), b"x") == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_loop_in_c_is_there_where_it_can_be_built() -> None:
    assert fastest_send_each is not send_each
