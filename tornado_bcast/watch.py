"""What the parent sees of its workers on the board, and what it tells systemd of them.

Owns no process: it looks, when the parent's clock (daemon.py) has it look, and reports. What systemd is told:

    READY=1       when all workers serve, or the first one has for READY_SECONDS
    STATUS=       connections, rates and Redis, in `systemctl status`; sent when it has changed
    WATCHDOG=1    at half of its time, while the loop of each worker that serves turns. One that starts or
                  leaves has the parent's own deadlines; a Redis that is away restarts nothing
    RELOADING=1   from SIGHUP to the moment in which everybody has the new configuration
    STOPPING=1    from the first signal on
"""

import json
import logging
import time
from collections.abc import Callable

from .board import Board, State
from .metrics import status_line
from .systemd import Notifier

logger = logging.getLogger(__name__)

# A worker that is not heard for so long (seconds) is reported.
HUNG_SECONDS = 5.0
# How long (seconds) the first worker that serves waits for the others before it is said.
READY_SECONDS = 10.0
STATUS_SECONDS = 5.0


class Watch:
    """See the module. `on_serving` is called once, when the first worker serves."""

    def __init__(self, board: Board, notifier: Notifier, on_serving: Callable[[], None]) -> None:
        self._board = board
        self._notifier = notifier
        self._on_serving = on_serving
        # When the first worker was seen to serve.
        self._served_at: float | None = None
        # READY=1 has been said.
        self.is_ready = False
        # What is said in place of the numbers while something else goes on.
        self._doing = ""
        self._hung: set[int] = set()
        self._status = ""
        self._status_due = 0.0
        # How long (seconds) a worker may be silent, and when systemd is to hear of us again.
        watchdog = notifier.watchdog or 0.0
        self._interval = watchdog / 2
        self._patience = min(HUNG_SECONDS, self._interval)
        self._watchdog_due = 0.0

    def tick(self, now: float) -> None:
        """Look at everybody; to be called each second or more often. `now`: seconds of the board's clock."""
        if not self._board.stopping:
            self._look(now)
        if self.is_ready:
            self._tell(now)

    def reloading(self) -> None:
        """SIGHUP has come."""
        # CLOCK_MONOTONIC, by which systemd tells this reload from an earlier one.
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._doing = "reloading"
        self._notifier.send(RELOADING=1, MONOTONIC_USEC=microseconds, STATUS=self._doing)

    def reloaded(self) -> None:
        """The new configuration holds for everybody, or the old one does again."""
        self._doing = self._status = ""
        self._status_due = 0.0
        if self.is_ready:
            self._notifier.send(READY=1)

    def stopping(self, seconds: float) -> None:
        """Everything stops, and that may take so long."""
        self._doing = "stopping"
        self._notifier.send(STOPPING=1, STATUS=self._doing, EXTEND_TIMEOUT_USEC=round(seconds * 1e6))

    def _look(self, now: float) -> None:
        slots = self._board.slots()
        serving = [slot for slot in slots if slot.state is State.SERVING]
        if serving and self._served_at is None:
            self._served_at = now
            self._on_serving()
        if not self.is_ready and self._served_at is not None:
            if len(serving) == len(slots) or now - self._served_at > READY_SECONDS:
                self.is_ready = True
                self._notifier.send(READY=1)
        alive = [slot for slot in slots if slot.state in (State.SERVING, State.DRAINING)]
        hung = {slot.pid for slot in alive if now - slot.heartbeat > HUNG_SECONDS}
        for pid in hung - self._hung:
            logger.error(
                "the worker with pid %d has not been heard for %.0f s",
                pid,
                HUNG_SECONDS,
                extra={"event": "worker_hung"},
            )
        for pid in (self._hung - hung) & {slot.pid for slot in alive}:
            logger.info("the worker with pid %d is heard again", pid, extra={"event": "worker_heard"})
        self._hung = hung

    def _tell(self, now: float) -> None:
        fields: dict[str, object] = {}
        if self._interval and now >= self._watchdog_due and (self._board.stopping or self._all_turn(now)):
            self._watchdog_due = now + self._interval
            fields["WATCHDOG"] = 1
        if not self._doing and now >= self._status_due:
            self._status_due = now + STATUS_SECONDS
            status = status_line([json.loads(data) for _, _, data in self._board.snapshots()])
            if status != self._status:
                self._status = fields["STATUS"] = status
        if fields:
            self._notifier.send(**fields)

    def _all_turn(self, now: float) -> bool:
        """Whether the loop of each worker that serves turns."""
        return all(
            now - slot.heartbeat <= self._patience
            for slot in self._board.slots()
            if slot.state is State.SERVING
        )
