"""What becomes of workers that have died: how that is told, and how long their successors wait.

Owns no process: the parent (daemon.py) has the first, a worker that is about to begin calls the second.
"""

import logging
import random
import time

from .board import Board

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 5.0


class ForkLog(logging.Filter):
    """Says in our words what `fork_processes` logs of each dead child; who left as told is no warning."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def filter(self, record: logging.LogRecord) -> bool:
        if not (str(record.msg).startswith("child %d") and isinstance(record.args, tuple)):
            return True
        index, pid, code = (*record.args, 0)[:3]
        assert isinstance(index, int)
        if self._board.stopping:
            return False
        if self._board.slot(index).pid != pid:
            logger.info(
                "worker %d (pid %d) has left and is replaced", index, pid, extra={"event": "worker_left"}
            )
            return False
        how = "was killed by signal" if "signal" in record.msg else "ended with status"
        logger.warning(
            "worker %d (pid %d) %s %d and is replaced", index, pid, how, code, extra={"event": "worker_died"}
        )
        return False


def pause(index: int, early_deaths: int) -> None:
    """Hold a worker up whose predecessors died at once. SIGTERM, which kills it here, ends the pause."""
    longest = min(LAST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(early_deaths - 1, 20))
    seconds = longest * random.uniform(0.5, 1.0)
    logger.warning(
        "worker %d: %d in a row died young; pausing %.2f s",
        index,
        early_deaths,
        seconds,
        extra={"event": "worker_pausing"},
    )
    time.sleep(seconds)
