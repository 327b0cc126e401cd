"""The worker's event loop: no turn is longer than so many events, and regular turns come together."""

import asyncio
import socket
import time

from tornado_bcast.eventloop import EVENTS_A_TURN, LagMeter, TurnSelector, WorkerLoop, until_tick


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
