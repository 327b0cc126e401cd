"""Sending many clients away: who is next, and after what time each may come back.

Knows no sockets and no clock. They are told evenly over a time, and the times after which they come back are
spread as evenly, so that wherever they go nobody gets more than its share in any second.

    farewell = Farewell(connections, over=20.0, back=0.4, now=now)
    for peer, retry_after in farewell.due(now):     # now and then
        peer.leave(retry_after)
"""

import random
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

P = TypeVar("P")

# The steps of the golden ratio fill a circle evenly, however many are taken
# (https://en.wikipedia.org/wiki/Low-discrepancy_sequence#Additive_recurrence).
_STEP = (5**0.5 - 1) / 2
# Nobody is asked to be back earlier than this part of the time.
_EARLIEST = 0.05


def pace(clients: int, seconds: float) -> float:
    """How many seconds so many clients take: `seconds`, but a few are not made to wait for all of them."""
    return min(seconds, float(clients))


class Farewell(Generic[P]):
    """`peers` are told over the seconds `over`, and come back within the seconds `back` after that."""

    def __init__(self, peers: Iterable[P], over: float, back: float, now: float) -> None:
        self._waiting = dict.fromkeys(peers)
        self._back = back
        self._then = now
        self._end = now + over
        # The part of a peer whose time has come.
        self._owed = 0.0
        self._place = random.random()

    def add(self, peer: P) -> None:
        """One that has come meanwhile; it has its turn before the end as well."""
        self._waiting[peer] = None

    def discard(self, peer: P) -> None:
        """One that has gone by itself."""
        self._waiting.pop(peer, None)

    def due(self, now: float) -> Iterator[tuple[P, int]]:
        """Those whose turn it is now, each with its `retryAfter` in ms."""
        if now >= self._end:
            self._owed = float(len(self._waiting))
        else:
            self._owed += len(self._waiting) * (now - self._then) / (self._end - self._then)
        self._then = now
        while self._owed >= 1 and self._waiting:
            self._owed -= 1
            peer, _ = self._waiting.popitem()
            self._place = (self._place + _STEP) % 1
            yield peer, max(1, round(1000 * self._back * (_EARLIEST + (1 - _EARLIEST) * self._place)))
