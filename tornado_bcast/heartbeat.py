"""Who is due for a ping, and who has been silent for too long: one wheel for all connections, no clock.

Any frame of a peer, and any progress in taking what waits for it, is a sign of life.
"""

from typing import Generic, Protocol, TypeVar

from .wheel import Wheel


class Peer(Protocol):
    """What the heartbeat keeps on each connection. Times are seconds of the caller's steady clock."""

    # The last sign of life; the connection writes it.
    seen: float
    # The ping that it has not answered by any sign of life; 0: none. The heartbeat writes it.
    pinged: float
    # When the next ping goes out. The heartbeat writes it.
    next_ping: float
    # Its place on the wheel. The heartbeat writes it.
    slot: int


P = TypeVar("P", bound=Peer)


class Heartbeat(Generic[P]):
    """Pings each peer every `interval` seconds; one that shows no sign of life for `timeout` more is dead."""

    def __init__(self, interval: float, timeout: float) -> None:
        self.interval = interval
        self.timeout = timeout
        self._wheel: Wheel[P] = Wheel()

    def add(self, peer: P, now: float) -> None:
        peer.seen, peer.pinged = now, 0.0
        peer.next_ping = now + self.interval
        peer.slot = self._wheel.add(peer, peer.next_ping)

    def remove(self, peer: P) -> None:
        self._wheel.discard(peer, peer.slot)

    def turn(self, now: float) -> tuple[list[P], list[P]]:
        """Those to ping now, and those that are dead."""
        ping: list[P] = []
        dead: list[P] = []
        for peer in self._wheel.expired(now):
            if peer.seen >= peer.pinged:
                peer.pinged = 0.0
            elif now >= peer.pinged + self.timeout:
                dead.append(peer)
                continue
            if now >= peer.next_ping:
                ping.append(peer)
                peer.pinged = peer.pinged or now
                peer.next_ping = now + self.interval
            due = peer.next_ping
            if peer.pinged:
                due = min(due, peer.pinged + self.timeout)
            peer.slot = self._wheel.add(peer, due)
        return ping, dead
