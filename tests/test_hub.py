"""The fan-out as a data structure, with sinks that only record."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from tornado_bcast.hub import Hub
from tornado_bcast.sink import Sink, SlowConsumer


class Recorder:
    """A sink that takes everything, or nothing."""

    # One that is never clear: it is asked, and no socket is.
    slot = -1

    def __init__(self, takes: bool = True) -> None:
        self.takes = takes
        self.got: list[tuple[str, bytes, SlowConsumer]] = []
        self.then: Callable[[], Any] = lambda: None

    def send(self, channel: str, data: bytes, frames: Sequence[bytes], policy: SlowConsumer) -> bool:
        assert b"".join(frames) == data
        self.got.append((channel, data, policy))
        self.then()
        return self.takes


def make(number: int, takes: bool = True) -> tuple[list[Recorder], list[Sink]]:
    recorders = [Recorder(takes) for _ in range(number)]
    return recorders, cast("list[Sink]", recorders)


def test_only_those_that_listen_get_it_in_their_order() -> None:
    hub = Hub()
    (a, b, c), sinks = make(3)
    order: list[str] = []
    for name, recorder in (("a", a), ("b", b)):
        recorder.then = lambda name=name: order.append(name)  # type: ignore[misc]
    hub.add("x", sinks[0])
    hub.add("x", sinks[1])
    hub.add("y", sinks[2])
    assert hub.fan_out("x", b"12", (b"1", b"2"), "latest") == (2, [])
    assert a.got == b.got == [("x", b"12", "latest")] and not c.got
    assert order == ["a", "b"]


def test_nobody_listens() -> None:
    assert Hub().fan_out("x", b"1", (b"1",), "disconnect") == (0, [])
    assert Hub().fan_out(None, b"1", (b"1",), "disconnect") == (0, [])


def test_twice_is_once() -> None:
    hub = Hub()
    (a,), (sink,) = make(1)
    hub.add("x", sink)
    hub.add("x", sink)
    assert hub.count("x") == 1
    hub.fan_out("x", b"1", (b"1",), "disconnect")
    assert len(a.got) == 1
    hub.remove("x", sink)
    assert hub.count("x") == 0
    assert hub.fan_out("x", b"1", (b"1",), "disconnect") == (0, [])


def test_removing_what_is_not_there_changes_nothing() -> None:
    hub = Hub()
    _, (a, b) = make(2)
    hub.remove("x", a)
    hub.add("x", a)
    hub.remove("x", b)
    assert hub.count("x") == 1
    hub.disconnect(a)
    assert hub.count("x") == 1


def test_an_empty_channel_is_forgotten() -> None:
    hub = Hub()
    _, (a, b) = make(2)
    hub.add("x", a)
    hub.add("x", b)
    hub.remove("x", a)
    hub.remove("x", b)
    assert not hub._channels


def test_everybody_is_every_connection_whatever_it_listens_to() -> None:
    hub = Hub()
    (a, b), sinks = make(2)
    for sink in sinks:
        hub.connect(sink)
    hub.add("x", sinks[0])
    assert hub.fan_out(None, b"1", (b"1",), "disconnect") == (2, [])
    assert a.got == b.got == [("", b"1", "disconnect")]
    hub.disconnect(sinks[0])
    assert hub.fan_out(None, b"1", (b"1",), "disconnect") == (1, [])


def test_those_that_did_not_take_it_are_named() -> None:
    hub = Hub()
    _, (good,) = make(1)
    _, (bad,) = make(1, takes=False)
    hub.add("x", bad)
    hub.add("x", good)
    assert hub.fan_out("x", b"1", (b"1",), "wait") == (1, [bad])


def test_who_leaves_while_it_runs_leaves_after_it() -> None:
    hub = Hub()
    (a, b), sinks = make(2)
    hub.add("x", sinks[0])
    hub.add("x", sinks[1])
    a.then = lambda: hub.remove("x", sinks[1])
    assert hub.fan_out("x", b"1", (b"1",), "disconnect") == (2, [])
    assert b.got and hub.count("x") == 1
