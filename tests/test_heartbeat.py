"""Who is pinged when, and who is dead."""

from tornado_bcast.heartbeat import Heartbeat
from tornado_bcast.wheel import TICK


class Peer:
    seen = pinged = next_ping = 0.0
    slot = 0


class World:
    """Peers by name under one heartbeat of 10 s and 4 s, and what became of them."""

    def __init__(self, *names: str, interval: float = 10.0, timeout: float = 4.0) -> None:
        self.heartbeat: Heartbeat[Peer] = Heartbeat(interval, timeout)
        self.now = 1000.0
        self.peers = {name: Peer() for name in names}
        for peer in self.peers.values():
            self.heartbeat.add(peer, self.now)
        self.pinged: list[tuple[float, str]] = []
        self.dead: list[tuple[float, str]] = []

    def run(self, seconds: float, alive: tuple[str, ...] = ()) -> None:
        """Turn for so long; those that are `alive` answer each ping at once."""
        end = self.now + seconds
        names = {peer: name for name, peer in self.peers.items()}
        while self.now < end:
            self.now += TICK
            ping, dead = self.heartbeat.turn(self.now)
            for peer in ping:
                self.pinged.append((self.now - 1000, names[peer]))
                if names[peer] in alive:
                    peer.seen = self.now
            self.dead += [(self.now - 1000, names[peer]) for peer in dead]


def test_who_answers_is_pinged_at_the_interval() -> None:
    world = World("a")
    world.run(61, alive=("a",))
    times = [when for when, _ in world.pinged]
    assert not world.dead
    assert 5 <= len(times) <= 6
    for last, this in zip([0.0, *times], times, strict=False):
        assert 10 <= this - last <= 10 + 3 * TICK


def test_who_is_silent_is_dead_after_interval_and_timeout() -> None:
    world = World("a", "b")
    world.run(30, alive=("b",))
    assert [name for _, name in world.pinged] == ["a", "b", "b"]
    ((when, name),) = world.dead
    assert name == "a" and 14 <= when <= 14 + 3 * TICK


def test_any_sign_of_life_after_the_ping_counts() -> None:
    world = World("a")
    world.run(12)
    assert world.pinged
    world.peers["a"].seen = world.now
    world.run(6)
    assert not world.dead
    # But one from before it does not.
    world.run(8)
    assert [name for _, name in world.dead] == ["a"]


def test_a_sign_of_life_before_the_ping_is_none() -> None:
    world = World("a")
    world.run(9.5)
    world.peers["a"].seen = world.now
    world.run(6)
    assert [name for _, name in world.dead] == ["a"]


def test_who_has_gone_is_neither_pinged_nor_dead() -> None:
    world = World("a", "b")
    world.heartbeat.remove(world.peers["a"])
    world.run(12)
    world.heartbeat.remove(world.peers["b"])
    world.heartbeat.remove(world.peers["b"])
    world.run(30)
    assert [name for _, name in world.pinged] == ["b"] and not world.dead


def test_a_loop_that_was_late_gives_the_time_back() -> None:
    """After a stall every peer is pinged first, none is found dead at once."""
    world = World("a")
    world.now += 100
    ping, dead = world.heartbeat.turn(world.now)
    assert (ping, dead) == ([world.peers["a"]], [])


def test_a_timeout_longer_than_the_interval() -> None:
    heartbeat: Heartbeat[Peer] = Heartbeat(1.0, 5.0)
    peer = Peer()
    heartbeat.add(peer, 0.0)
    now, pings = 0.0, 0
    while now < 60:
        now += TICK
        ping, dead = heartbeat.turn(now)
        assert not dead
        pings += len(ping)
        if ping:
            peer.seen = now
    assert pings >= 10


def test_a_long_timeout_does_not_stretch_the_interval() -> None:
    world = World("a", interval=2.0, timeout=7.0)
    world.run(8.9)
    assert 3 <= len(world.pinged) <= 4 and not world.dead
    world.run(1)
    assert len(world.dead) == 1
