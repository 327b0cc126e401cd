"""The event loop of a worker: asyncio's own, but no turn of it is longer than so many events.

asyncio takes all sockets that are ready in one turn, and what they bring is done before anything else gets
its turn again. When thousands of clients leave or come back at once that is seconds, in which no message is
delivered. epoll hands out what is ready in a circle, so that a bound on each turn is fair to all sockets.
"""

import asyncio
import os
import select
import selectors
from collections.abc import Callable

# Sockets that one turn serves: some milliseconds of work where each of them is a new connection.
EVENTS_A_TURN = 64


class BoundedSelector(selectors.EpollSelector):
    """An EpollSelector that reports at most EVENTS_A_TURN of the files that are ready."""

    def __init__(self) -> None:
        super().__init__()
        # The same epoll instance, by a descriptor of our own: the public way to it.
        self._bounded = select.epoll.fromfd(os.dup(self.fileno()))

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        wait = -1.0 if timeout is None else max(timeout, 0.0)
        keys = self.get_map()
        ready: list[tuple[selectors.SelectorKey, int]] = []
        for fd, events in self._bounded.poll(wait, EVENTS_A_TURN):
            if (key := keys.get(fd)) is not None:
                mask = selectors.EVENT_READ if events & ~select.EPOLLOUT else 0
                if events & ~select.EPOLLIN:
                    mask |= selectors.EVENT_WRITE
                ready.append((key, mask & key.events))
        return ready

    def close(self) -> None:
        self._bounded.close()
        super().close()


class LagMeter:
    """Measures, each `interval` seconds, how late the running loop serves a socket.

    An event is made ready at a regular moment and waits for its turn among those of the clients. A timer
    alone would not tell: with thousands of busy sockets every turn of the loop is short, and yet each of them
    waits for many turns. `tell(lag, now)` is called with seconds, `now` on the loop's clock.
    """

    def __init__(self, interval: float, tell: Callable[[float, float], None]) -> None:
        self._interval = interval
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # When the event was to be made ready; on the loop's clock.
        self._due = 0.0
        self._timer: asyncio.TimerHandle
        self._loop.add_reader(self._event, self._served)
        self._wait()

    def close(self) -> None:
        """May be called again."""
        if self._event >= 0:
            self._timer.cancel()
            self._loop.remove_reader(self._event)
            os.close(self._event)
            self._event = -1

    def _wait(self) -> None:
        wait = until_tick(self._interval)
        self._due = self._loop.time() + wait
        self._timer = self._loop.call_at(self._due, os.eventfd_write, self._event, 1)

    def _served(self) -> None:
        os.eventfd_read(self._event)
        now = self._loop.time()
        lag = now - self._due
        self._wait()
        self._tell(lag, now)


def until_tick(seconds: float) -> float:
    """The wait until the loop's clock shows a whole multiple of `seconds`.

    Whoever has a regular turn waits for that, so that all come at once and an idle worker sleeps more.
    """
    return seconds - asyncio.get_running_loop().time() % seconds


def new_event_loop() -> asyncio.AbstractEventLoop:
    """For `asyncio.Runner`."""
    return asyncio.SelectorEventLoop(BoundedSelector())
