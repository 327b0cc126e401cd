"""At-least-once for one subscription of a persistent channel: a few numbers, no messages, no clock.

A subscriber is *live* (it stands at its node's head, and fan-out compares nothing) or *behind* (it reads the
stream from `cursor` on, and is live again when it has reached the head). With acks the server goes back to
`acked` when no ack has moved that position for a while, waiting twice as long each time, and gives the
connection up after `max_redeliveries` tries without progress. Times are seconds of any steady clock.
"""

import random
from collections.abc import Callable
from typing import Literal

from .config import ChannelRule

# After going back at most so many messages are on their way until an ack moves the position: enough to show
# that the reader is alive, too few to drown it.
RETRY_WINDOW = 16
# A wait is stretched by up to this part of itself, so that clients of one outage do not all come at once.
_JITTER = 0.25


class Delivery:
    """Where one subscriber stands. Its owner is the node, which tells it what was written and acked."""

    __slots__ = (
        "_random",
        "acked",
        "acked_epoch",
        "acks",
        "behind",
        "cursor",
        "due",
        "epoch",
        "lost",
        "max_in_flight",
        "max_redeliveries",
        "sent",
        "timeout",
        "times",
        "tries",
    )

    def __init__(
        self,
        rule: ChannelRule,
        epoch: str,
        seq: int,
        *,
        acks: bool,
        sent: int = 0,
        lost: tuple[str, int] | None = None,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._random = uniform
        self.acks = acks
        self.timeout = rule.ack_timeout
        self.max_redeliveries = rule.max_redeliveries
        self.max_in_flight = rule.max_in_flight
        # All up to here has been processed by the client. Of no meaning without acks.
        self.acked = seq
        self.acked_epoch = epoch
        # A position that is gone. The client was told so, but no ack has shown yet that it heard of it.
        self.lost = lost
        # While behind: the last message written in this pass, and the epoch in which that number was given.
        # While live it is the node's head, and the node sets it where it matters.
        self.cursor = seq
        self.epoch = epoch
        # The highest message ever written; what is written again up to here is a redelivery.
        self.sent = max(seq, sent)
        self.behind = True
        # Goings-back since an ack last moved the position.
        self.tries = 0
        # Goings-back since all that was sent was last acked: the `redelivered` of what comes again.
        self.times = 0
        # When to go back unless an ack moves the position; None while nothing is unacked.
        self.due: float | None = None

    @property
    def position(self) -> tuple[str, int]:
        """All up to here is processed."""
        return self.acked_epoch, self.acked

    @property
    def kept(self) -> tuple[str, int]:
        """What a session keeps. Should the connection end before the client has heard of a loss, it is told
        again when it resumes, and never goes on as if nothing had happened."""
        return self.lost or self.position

    @property
    def edge(self) -> int | None:
        """The last message that may be written before another ack; None without acks."""
        if not self.acks:
            return None
        return self.acked + (min(RETRY_WINDOW, self.max_in_flight) if self.tries else self.max_in_flight)

    def room(self, head: int) -> int:
        """How many messages may be written now by one that is behind."""
        edge = self.edge
        return max(0, (head if edge is None else min(head, edge)) - self.cursor)

    def redelivered(self, seq: int) -> int:
        """How many times this message was written before; 0 for its first time."""
        return max(self.times, 1) if self.acks and seq <= self.sent else 0

    def wrote(self, epoch: str, seq: int, now: float) -> None:
        """Everything up to this place has been written."""
        self.epoch, self.cursor = epoch, seq
        self.sent = max(self.sent, seq)
        self.watch(now)

    def watch(self, now: float) -> None:
        """Begin to wait for an ack, where something is unacked and the waiting has not begun."""
        if self.acks and self.due is None and self.acked < self.cursor:
            self.due = now + self._wait()

    def _wait(self) -> float:
        return float(self.timeout * 2**self.tries * (1 + _JITTER * self._random()))

    def fall_behind(self, epoch: str, seq: int) -> None:
        """A live one did not get what came after this place."""
        self.behind = True
        self.epoch, self.cursor = epoch, seq
        self.sent = max(self.sent, seq)

    def acknowledge(self, epoch: str, seq: int, now: float) -> bool:
        """The client has processed all up to `seq`, which was given in `epoch`. True: the position moved.

        The caller has made sure that this place lies on the present line of numbers, and not past its head.
        """
        if not self.acks:
            return False
        if self.lost is None:
            if seq <= self.acked:
                return False
        elif not self.acked <= seq <= max(self.sent, self.cursor):
            # It was on its way when the loss was told: what the client had then is no more.
            return False
        self.lost = None
        self.acked_epoch, self.acked = epoch, seq
        self.tries = 0
        self.due = None
        if seq >= self.sent:
            self.times = 0
        if self.behind and seq > self.cursor:
            # A resumed client tells what it has: that need not be sent again.
            self.epoch, self.cursor = epoch, seq
            self.sent = max(self.sent, seq)
        self.watch(now)
        return True

    def expire(self, now: float) -> Literal["wait", "back", "give_up"]:
        """The due time has come, and the connection has nothing queued: go back, or give it up."""
        if self.due is None or self.due > now:
            return "wait"
        self.due = None
        if self.tries >= self.max_redeliveries:
            return "give_up"
        self._go_back()
        self.tries += 1
        return "back"

    def _go_back(self) -> None:
        self.behind = True
        self.sent = max(self.sent, self.cursor)
        self.epoch, self.cursor = self.position
        self.times += 1

    def start_again(self) -> None:
        """The client asks once more for all that it has not acked."""
        self._go_back()
        self.tries = 0
        self.due = None

    def postpone(self, now: float) -> None:
        """The due time has come, but the connection has a backlog: that is no fault of the reader's acks."""
        self.due = now + self._wait()

    def lose(self, epoch: str, seq: int) -> None:
        """The position is gone, and the client is told to go on after this one."""
        lost = self.kept
        self.restart(epoch, seq)
        self.lost = lost

    def restart(self, epoch: str, seq: int) -> None:
        """Go on after another position."""
        self.lost = None
        self.epoch = self.acked_epoch = epoch
        self.acked = self.cursor = self.sent = seq
        self.behind = True
        self.tries = self.times = 0
        self.due = None
