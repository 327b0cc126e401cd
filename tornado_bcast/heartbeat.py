"""Who is due for a ping, and who has been silent for too long: one wheel for all connections, no clock.

Any frame of a peer, and any progress in taking what waits for it, is a sign of life.
"""

from typing import Generic, Protocol, TypeVar

from .wheel import Wheel

# Seconds between the turns of the wheel.
TICK = 0.25


class Peer(Protocol):
    """What the heartbeat keeps on each connection. Times are seconds of the caller's steady clock."""

    # The last sign of life; the connection writes it.
    seen: float
    # When it was last pinged and not yet found alive; 0: it is not waited for. The heartbeat writes it.
    pinged: float
    # Its place on the wheel. The heartbeat writes it.
    slot: int


P = TypeVar("P", bound=Peer)


class Heartbeat(Generic[P]):
    """Pings each peer every `interval` seconds; one that shows no sign of life for `timeout` more is dead."""

    def __init__(self, interval: float, timeout: float) -> None:
        self.interval = interval
        self.timeout = timeout
        self._wheel: Wheel[P] = Wheel(TICK)

    def add(self, peer: P, now: float) -> None:
        peer.seen, peer.pinged = now, 0.0
        peer.slot = self._wheel.add(peer, now + self.interval)

    def remove(self, peer: P) -> None:
        self._wheel.discard(peer, peer.slot)

    def turn(self, now: float) -> tuple[list[P], list[P]]:
        """Those to ping now, and those that are dead."""
        ping: list[P] = []
        dead: list[P] = []
        for peer in self._wheel.expired(now):
            if not peer.pinged:
                peer.pinged = now
                ping.append(peer)
                due = now + self.timeout
            elif peer.seen >= peer.pinged:
                due = max(now, peer.pinged + self.interval)
                peer.pinged = 0.0
            else:
                dead.append(peer)
                continue
            peer.slot = self._wheel.add(peer, due)
        return ping, dead
