"""The event loop of a worker: asyncio's own, with bounded turns, an end of each turn, and its pulse.

asyncio takes all sockets that are ready in one turn, and what they bring is done before anything else gets
its turn again. When thousands of clients leave or come back at once that is seconds, in which no message is
delivered. epoll hands out what is ready in a circle, so that a bound on each turn is fair to all sockets.

A message is through in one turn: the socket that brings it is read straight from here, and what it has made
ready to leave does so before the loop sleeps again. By asyncio alone it takes three or more, all of it code
that is in no cache when messages are few (docs/PERFORMANCE.md).
"""

import asyncio
import os
import select
import selectors
from collections.abc import Callable
from typing import Protocol

# Sockets that one turn serves: some milliseconds of work where each of them is a new connection.
EVENTS_A_TURN = 64
# Seconds between two beats of the pulse at most, while the loop turns or waits: half of what makes a worker
# stale (board.py), and as long as between two turns of its wheels, so that nobody is woken for a beat alone.
PULSE_SECONDS = 0.25


class Watcher(Protocol):
    """Who serves a descriptor past the loop."""

    def on_readable(self) -> None:
        """Something has come, or the end."""

    def on_writable(self) -> None:
        """There is room again."""


def _no_pulse() -> None:
    """Nobody wants to know."""


class TurnSelector(selectors.EpollSelector):
    """An EpollSelector that ends the turns of its loop, and bounds the next one.

    Where the loop asks it to wait, a turn is over, and what `at_end` has is done. Of the descriptors that are
    ready, at most EVENTS_A_TURN at a time, it serves those that are watched past the loop and reports the
    others; where there are none of these, the turn ends at once. `failed` takes what is raised in all that.
    """

    def __init__(self, pulse: Callable[[], None] = _no_pulse) -> None:
        super().__init__()
        # The same epoll instance, by a descriptor of our own: the public way to it.
        self._bounded = select.epoll.fromfd(os.dup(self.fileno()))
        self._pulse = pulse
        # By descriptor; the loop knows nothing of these.
        self._watchers: dict[int, Watcher] = {}
        # Called once, in this order, at the end of the turn.
        self.at_end: list[Callable[[], object]] = []
        self.failed: Callable[[Exception], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        wait = PULSE_SECONDS if timeout is None else min(max(timeout, 0.0), PULSE_SECONDS)
        if self.at_end:
            self._end_turn()
            # What has ended may have left something to do.
            wait = 0.0
        came = self._bounded.poll(wait, EVENTS_A_TURN)
        self._pulse()
        ready: list[tuple[selectors.SelectorKey, int]] = []
        for fd, events in came:
            if (watcher := self._watchers.get(fd)) is not None:
                if events & ~select.EPOLLOUT:
                    self._call(watcher.on_readable)
                if events & select.EPOLLOUT and self._watchers.get(fd) is watcher:
                    self._call(watcher.on_writable)
            elif (key := self.get_map().get(fd)) is not None:
                mask = selectors.EVENT_READ if events & ~select.EPOLLOUT else 0
                if events & ~select.EPOLLIN:
                    mask |= selectors.EVENT_WRITE
                ready.append((key, mask & key.events))
        if self.at_end and not ready:
            self._end_turn()
        return ready

    def watch(self, fd: int, watcher: Watcher, *, reading: bool, writing: bool) -> None:
        """Serve this descriptor past the loop, or do so otherwise than before; with neither, no more.

        That has to be so before the descriptor is closed.
        """
        mask = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if writing else 0)
        if fd not in self._watchers:
            if mask:
                self._bounded.register(fd, mask)
                self._watchers[fd] = watcher
        elif mask:
            self._bounded.modify(fd, mask)
        else:
            # Its end would be reported all the same, again and again.
            self._bounded.unregister(fd)
            del self._watchers[fd]

    def _end_turn(self) -> None:
        # What is done here may ask for another end, which belongs to this turn.
        while self.at_end:
            ending, self.at_end = self.at_end, []
            for callback in ending:
                self._call(callback)

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            callback()
        except Exception as error:
            self.failed(error)

    def close(self) -> None:
        self._bounded.close()
        super().close()


class WorkerLoop(asyncio.SelectorEventLoop):
    """See the module. `pulse` is called in each turn, and every PULSE_SECONDS while the loop waits."""

    def __init__(self, pulse: Callable[[], None] = _no_pulse) -> None:
        self.turns = TurnSelector(pulse)
        super().__init__(self.turns)
        self.turns.failed = self._report

    def _report(self, error: Exception) -> None:
        self.call_exception_handler({"message": "an error in a turn of the loop", "exception": error})


def turns() -> TurnSelector:
    """Those of the running loop, which has to be a WorkerLoop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WorkerLoop), "this needs a WorkerLoop"
    return loop.turns


def at_turn_end(callback: Callable[[], object]) -> None:
    """Call once, when everything else in this turn of the running loop is done."""
    turns().at_end.append(callback)


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
