"""The worker's event loop: no turn is longer than so many events, and regular turns come together."""

import asyncio
import socket
import time
from itertools import pairwise

import pytest

from tornado_bcast.eventloop import (
    EVENTS_A_TURN,
    PULSE_SECONDS,
    LagMeter,
    TurnSelector,
    WorkerLoop,
    at_turn_end,
    until_tick,
)


def test_a_turn_serves_so_many_and_the_next_ones_the_rest() -> None:
    count = 3 * EVENTS_A_TURN + 5
    pairs = [socket.socketpair() for _ in range(count)]
    selector = TurnSelector()
    try:
        for number, (near, far) in enumerate(pairs):
            selector.register(near, 1, number)
            far.send(b"x")
        seen: set[int] = set()
        for _ in range(4):
            ready = selector.select(0)
            assert len(ready) <= EVENTS_A_TURN
            seen |= {key.data for key, mask in ready if mask == 1}
        # Nobody was read, all are ready still: and yet each has had its turn.
        assert seen == set(range(count))
    finally:
        selector.close()
        for near, far in pairs:
            near.close()
            far.close()


def test_both_directions_and_no_file_at_all() -> None:
    near, far = socket.socketpair()
    selector = TurnSelector()
    with near, far:
        assert selector.select(0.01) == []
        selector.register(near, 3)
        assert [mask for _, mask in selector.select(0)] == [2]
        far.send(b"x")
        assert [mask for _, mask in selector.select(0)] == [3]
        selector.modify(near, 1)
        assert [mask for _, mask in selector.select(None)] == [1]
        far.close()
        assert [mask for _, mask in selector.select(0)] == [1]
    selector.close()


def test_regular_turns_come_together() -> None:
    async def run() -> set[int]:
        loop = asyncio.get_running_loop()

        async def turn(offset: float) -> int:
            await asyncio.sleep(offset)
            await asyncio.sleep(until_tick(0.5))
            return round(loop.time() / 0.5)

        await asyncio.sleep(until_tick(0.5))
        return set(await asyncio.gather(turn(0), turn(0.01), turn(0.02)))

    with asyncio.Runner(loop_factory=WorkerLoop) as runner:
        assert len(runner.run(run())) == 1


def test_lag_is_how_long_a_socket_waits_for_its_turn() -> None:
    """Many short turns of a busy loop come before it, which a timer would not notice."""
    pairs = [socket.socketpair() for _ in range(5 * EVENTS_A_TURN)]
    turn = EVENTS_A_TURN * 0.001
    lags: list[float] = []

    async def run(busy: int) -> float:
        loop = asyncio.get_running_loop()
        lags.clear()
        meter = LagMeter(0.05, lambda lag, now: lags.append(lag))
        for near, far in pairs[:busy]:
            far.send(b"x")
            # Nobody reads it away, so it is ready in each turn.
            loop.add_reader(near, time.sleep, 0.001)
        while len(lags) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for near, _ in pairs[:busy]:
            loop.remove_reader(near)
        meter.close()
        meter.close()
        told = len(lags)
        await asyncio.sleep(0.15)
        assert len(lags) == told
        return max(lags)

    try:
        with asyncio.Runner(loop_factory=WorkerLoop) as runner:
            assert runner.run(run(len(pairs))) > 3 * turn
            assert runner.run(run(0)) >= 0
    finally:
        for near, far in pairs:
            near.close()
            far.close()


class Silent:
    """A watcher that nothing happens to."""

    def on_readable(self) -> None:
        raise AssertionError

    def on_writable(self) -> None:
        raise AssertionError


@pytest.mark.parametrize(("reading", "writing"), [(True, False), (False, True), (True, True), (False, False)])
def test_what_is_watched_is_served_past_the_loop(reading: bool, writing: bool) -> None:
    near, far = socket.socketpair()
    seen: list[str] = []

    class Watcher:
        def on_readable(self) -> None:
            seen.append("readable")

        def on_writable(self) -> None:
            seen.append("writable")

    selector = TurnSelector()
    watcher = Watcher()
    with near, far:
        # Whatever it was before.
        selector.watch(near.fileno(), watcher, reading=True, writing=True)
        selector.watch(near.fileno(), watcher, reading=reading, writing=writing)
        far.send(b"x")
        for _ in range(2):
            assert selector.select(0) == []
            assert seen == ["readable"] * reading + ["writable"] * writing
            seen.clear()
        far.close()
        selector.select(0)
        # Who looks for anything hears of the end.
        assert ("readable" in seen) == (reading or writing)
        seen.clear()
        selector.watch(near.fileno(), watcher, reading=False, writing=False)
        selector.select(0)
        assert not seen
    selector.close()


def test_one_that_stops_in_its_turn_is_left_alone() -> None:
    near, far = socket.socketpair()
    seen: list[str] = []
    selector = TurnSelector()

    class Watcher(Silent):
        def on_readable(self) -> None:
            seen.append("readable")
            selector.watch(near.fileno(), self, reading=False, writing=False)

    with near, far:
        selector.watch(near.fileno(), Watcher(), reading=True, writing=True)
        far.send(b"x")
        assert selector.select(0) == [] and seen == ["readable"]
    selector.close()


def test_a_turn_ends_when_all_else_in_it_is_done() -> None:
    near, far = socket.socketpair()
    order: list[str] = []

    class Reader(Silent):
        def on_readable(self) -> None:
            near.recv(1)
            order.append("read")
            at_turn_end(lambda: order.append("end"))
            asyncio.get_running_loop().call_soon(order.append, "the next turn")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WorkerLoop)
        loop.turns.watch(near.fileno(), Reader(), reading=True, writing=False)
        far.send(b"x")
        while len(order) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert order == ["read", "end", "the next turn"]
        # In a turn that has other sockets as well its end waits for them.
        order.clear()
        loop.add_reader(quiet, lambda: order.append("another") or quiet.recv(1))
        far.send(b"x")
        loud.send(b"x")
        while len(order) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert order[0] == "read" and "another" in order and order[-1] == "end"
        loop.turns.watch(near.fileno(), Reader(), reading=False, writing=False)
        loop.remove_reader(quiet)

    quiet, loud = socket.socketpair()
    with near, far, quiet, loud, asyncio.Runner(loop_factory=WorkerLoop) as runner:
        runner.run(run())


def test_an_end_may_ask_for_another_and_leave_work() -> None:
    order: list[str] = []

    def first() -> None:
        order.append("first")
        at_turn_end(lambda: order.append("third"))
        asyncio.get_running_loop().call_soon(done.set)

    async def run() -> None:
        nonlocal done
        done = asyncio.Event()
        at_turn_end(first)
        at_turn_end(lambda: order.append("second"))
        assert not order
        begun = time.monotonic()
        async with asyncio.timeout(5):
            await done.wait()
        # The loop did not sleep over it, though there was no event.
        assert time.monotonic() - begun < PULSE_SECONDS
        assert order == ["first", "second", "third"]

    done = asyncio.Event()
    with asyncio.Runner(loop_factory=WorkerLoop) as runner:
        runner.run(run())


def test_what_readers_and_ends_raise_is_reported_and_the_others_go_on() -> None:
    near, far = socket.socketpair()
    reported: list[str] = []
    ended: list[int] = []

    class Reader(Silent):
        def on_readable(self) -> None:
            near.recv(1)
            at_turn_end(lambda: 1 // 0)
            at_turn_end(lambda: ended.append(1))
            raise OSError("of the reader")

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WorkerLoop)
        loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
        loop.turns.watch(near.fileno(), Reader(), reading=True, writing=False)
        far.send(b"x")
        while not ended:  # noqa: ASYNC110
            await asyncio.sleep(0)
        loop.turns.watch(near.fileno(), Reader(), reading=False, writing=False)

    with near, far, asyncio.Runner(loop_factory=WorkerLoop) as runner:
        runner.run(run())
    assert reported == ["of the reader", "integer division or modulo by zero"]


def test_another_loop_has_no_turns() -> None:
    async def run() -> None:
        at_turn_end(print)

    with pytest.raises(AssertionError, match="WorkerLoop"):
        asyncio.run(run())


def test_the_pulse_beats_while_the_loop_waits_and_while_it_turns_and_not_while_it_is_stuck() -> None:
    beats: list[float] = []

    async def run() -> None:
        await asyncio.sleep(2.5 * PULSE_SECONDS)
        assert 3 <= len(beats) <= 6
        beats.clear()
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(beats) >= 10
        beats.clear()
        asyncio.get_running_loop().call_soon(time.sleep, 1.5 * PULSE_SECONDS)
        await asyncio.sleep(0.1)
        assert max(later - beat for beat, later in pairwise(beats)) >= 1.5 * PULSE_SECONDS

    with asyncio.Runner(loop_factory=lambda: WorkerLoop(lambda: beats.append(time.monotonic()))) as runner:
        runner.run(run())
