"""The canary: a row of each worker that travels publish -> Redis -> pub/sub every second.

Owns the knowledge whether what is published here is also heard here. A pub/sub connection can be open and
deaf, and says nothing about it; the row that does not come back does.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from tornado_bcast.answer import Answer
from tornado_bcast.errors import Unavailable

logger = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds from row to row
# Seconds without a row of our own after which the pub/sub connection is taken for deaf: when nothing else
# comes out of it either, and when others are heard (a long backlog; or it stands with another server than
# the one that we publish to). A row of ours that Redis has taken must be missing for a while.
SILENCE = 3.0
OWN_SILENCE = 10.0
MISSING = 2.0
PROBE_TIMEOUT = 2.0  # seconds
# Rows of our own that are waited for, at most.
OUT_KEPT = 60


class Canary:
    """One worker's canary.

    `name` is no other broker's. `send` publishes to all workers; its answer comes when Redis has it.
    """

    def __init__(self, name: str, send: Callable[[bytes], Answer[Any]], row: Callable[[], bytes]) -> None:
        self._name = name.encode()
        self._send = send
        self._row = row
        self._loop = asyncio.get_running_loop()
        # Number of the last one sent, and when those were sent that have not come back.
        self._number = 0
        self._out: dict[int, float] = {}
        # When one came back last, and how long it took; on the loop's clock, in seconds.
        self.heard_at: float | None = None
        self.roundtrip: float | None = None
        # Since when one is missing that Redis has taken.
        self._missing_since: float | None = None
        # The last probe, done with the seconds it took or with None, and when it was sent.
        self._probe: asyncio.Future[float | None] | None = None
        self._probe_at = 0.0
        self._probe_number = 0

    def sing(self) -> None:
        """Send a row."""
        try:
            row = self._row()
        except Exception:
            logger.exception("A row of statistics failed", extra={"event": "row_failed"})
            row = b"{}"
        self._number += 1
        number = self._number
        self._out[number] = self._loop.time()
        if len(self._out) > OUT_KEPT:
            del self._out[next(iter(self._out))]
        sent = self._send(b"%s %d\n%s" % (self._name, number, row))
        sent.add_done_callback(lambda answer: self._taken(number, answer))

    def hear(self, data: bytes) -> bytes:
        """Take in what a worker sent; the row in it. ValueError where there is none."""
        header, newline, row = data.partition(b"\n")
        name, _, number = header.partition(b" ")
        if not newline:
            raise ValueError("not a row")
        if name == self._name:
            self._back(int(number))
        return row

    def is_missing(self, since: float, patience: float) -> bool:
        """Whether a connection that stands since then has been silent about us for so many seconds."""
        now = self._loop.time()
        return (
            self._missing_since is not None
            and now - self._missing_since >= MISSING
            and now - max(since, self.heard_at or since) >= patience
        )

    def is_fresh(self, since: float) -> bool:
        """Whether one has come back on a connection that stands since then, and not too long ago."""
        heard_at = self.heard_at
        return heard_at is not None and heard_at >= since and self._loop.time() - heard_at < SILENCE

    def forgive(self) -> None:
        """Begin to wait anew: a connection is new, or this process was not running for a while."""
        self._missing_since = None

    async def probe(self) -> float:
        """Send one, or join the one that somebody sent within the last second: the seconds it took."""
        now = self._loop.time()
        if self._probe is None or (self._probe.done() and now - self._probe_at >= INTERVAL):
            self._probe, self._probe_at = self._loop.create_future(), now
            self._probe_number = self._number + 1
            self.sing()
        probe = self._probe
        try:
            async with asyncio.timeout(PROBE_TIMEOUT):
                seconds = await asyncio.shield(probe)
        except TimeoutError:
            seconds = None
            self._end_probe(None)
        if seconds is None:
            raise Unavailable("the canary did not come back from Redis")
        return seconds

    def close(self) -> None:
        self._end_probe(None)

    def _taken(self, number: int, answer: Answer[Any]) -> None:
        if answer.exception() is not None:
            self._out.pop(number, None)
            if number == self._probe_number:
                self._end_probe(None)
        elif number in self._out and self._missing_since is None:
            self._missing_since = self._loop.time()

    def _back(self, number: int) -> None:
        sent_at = self._out.get(number)
        if sent_at is None:
            return
        # Order is kept: an older one that is still out will never come.
        self._out = {one: at for one, at in self._out.items() if one > number}
        self.heard_at = self._loop.time()
        self.roundtrip = self.heard_at - sent_at
        self._missing_since = None
        if number >= self._probe_number:
            self._end_probe(self.roundtrip)

    def _end_probe(self, seconds: float | None) -> None:
        if self._probe is not None and not self._probe.done():
            self._probe.set_result(seconds)
