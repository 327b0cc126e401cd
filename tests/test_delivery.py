"""Delivery on persistent channels: the numbers by themselves, and a whole worker over a store that loses."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from worker_kit import ENDS_KEPT, Clockwork, Peer, Store, Worker, make_rule

from tornado_bcast import compression, dispatch
from tornado_bcast.brokers import BusMessage
from tornado_bcast.config import ChannelsConfig
from tornado_bcast.delivery import RETRY_WINDOW, Delivery
from tornado_bcast.errors import CloseCode, Refusal
from tornado_bcast.node import HEAD_CHECK, LINGER
from tornado_bcast.protocol import Position
from tornado_bcast.reader import PIECE
from tornado_bcast.topic import AHEAD, Topic
from tornado_bcast.wheel import TICK

CHANNEL = "c"
FAULTS = ("missed", "cut", "unavailable", "trimmed", "moved", "rolled back", "flushed")


def run_machine(machine: type[RuleBasedStateMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


class Numbers(RuleBasedStateMachine):
    """One `Delivery`, told of writes, acks and times by a node that does what it should."""

    delivery: Delivery
    # The node's head.
    head: int
    now: float
    # The model: what was written since the position moved, and how often the delivery has gone back since.
    tries: int
    live: bool
    ended: bool
    # The highest that was written, and what is known of the last wait.
    top: int
    begun: float | None

    @initialize(
        seq=st.integers(0, 50),
        acks=st.booleans(),
        in_flight=st.integers(1, 40),
        tries=st.integers(0, 4),
    )
    def begin(self, seq: int, acks: bool, in_flight: int, tries: int) -> None:
        self.rule = make_rule(ack_timeout=5.0, max_in_flight=in_flight, max_redeliveries=tries)
        self.delivery = Delivery(self.rule, "e", seq, acks=acks, uniform=random.random)
        self.head = self.top = self.acked = self.cursor = seq
        self.now = 0.0
        self.tries = 0
        self.live = self.ended = False
        self.begun = None

    @rule(count=st.integers(1, 60))
    def publish(self, count: int) -> None:
        """Live ones are written to at once, as far as their window goes; others fall behind before."""
        for _ in range(count):
            self.head += 1
            if self.live:
                edge = self.delivery.edge
                if edge is not None and edge < self.head:
                    self.fall_behind()
                else:
                    self._note(self.head)
        if self.live:
            self.delivery.epoch, self.delivery.cursor = "e", self.cursor
            self.delivery.watch(self.now)

    @precondition(lambda self: self.live)
    @rule()
    def fall_behind(self) -> None:
        """The queue or the window is full."""
        self.live = False
        self.delivery.fall_behind("e", self.cursor)
        self.delivery.watch(self.now)

    @precondition(lambda self: not self.live)
    @rule(count=st.integers(1, 128))
    def write(self, count: int) -> None:
        room = self.delivery.room(self.head)
        edge = self.head
        if self.delivery.acks:
            limit = self.rule.max_in_flight
            edge = min(edge, self.acked + (min(RETRY_WINDOW, limit) if self.tries else limit))
        assert room == max(0, edge - self.cursor)
        for _ in range(min(count, room)):
            seq = self.cursor + 1
            again = self.delivery.redelivered(seq)
            assert bool(again) == (self.delivery.acks and seq <= self.top)
            self._note(seq)
            self.delivery.wrote("e", seq, self.now)

    def _note(self, seq: int) -> None:
        assert seq == self.cursor + 1
        self.cursor = seq
        self.top = max(self.top, seq)
        if self.begun is None:
            self.begun = self.now

    @precondition(lambda self: not self.live and self.cursor == self.head and not self.tries)
    @rule()
    def go_live(self) -> None:
        self.live, self.delivery.behind = True, False

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        """Any position up to the head: repeated, older, in flight, or not sent yet on this connection."""
        seq = data.draw(st.integers(0, self.head))
        if self.live:
            self.delivery.epoch, self.delivery.cursor = "e", self.cursor
        moved = self.delivery.acknowledge("e", seq, self.now)
        assert moved == (self.delivery.acks and seq > self.acked)
        if moved:
            self.acked = seq
            self.cursor = max(self.cursor, seq)
            self.top = max(self.top, seq)
            self.tries = 0
            self.begun = self.now if self.cursor > seq else None

    @rule(seconds=st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        was_due = self.delivery.due
        outcome = self.delivery.expire(self.now)
        if was_due is None or was_due > self.now:
            assert outcome == "wait"
            return
        assert self.begun is not None
        waited = self.rule.ack_timeout * 2**self.tries
        assert was_due - self.begun >= waited
        self.begun = None
        if self.tries == self.rule.max_redeliveries:
            assert outcome == "give_up"
            # The connection ends, and its client comes back.
            self.restart(self.acked)
            return
        assert outcome == "back"
        self.tries += 1
        self.live = False
        self.cursor = self.acked

    @precondition(lambda self: self.delivery.acks)
    @rule()
    def start_again(self) -> None:
        """The client subscribes a second time."""
        if self.live:
            self.fall_behind()
        self.delivery.start_again()
        self.cursor = self.acked
        self.tries = 0
        self.begun = None

    @precondition(lambda self: self.delivery.due is not None and self.delivery.due <= self.now)
    @rule()
    def postpone(self) -> None:
        """There is a backlog."""
        self.delivery.postpone(self.now)
        self.begun = self.now

    @rule(seq=st.integers(0, 50))
    def restart(self, seq: int) -> None:
        """History is lost, or the client asked for another position."""
        seq = min(seq, self.head)
        self.delivery.restart("e", seq)
        self.live = False
        self.acked = self.cursor = self.top = seq
        self.tries = 0
        self.begun = None

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "delivery"):
            return
        delivery = self.delivery
        assert delivery.behind == (not self.live)
        assert not delivery.acks or delivery.position == ("e", self.acked)
        assert delivery.tries == self.tries
        if not self.live:
            assert delivery.cursor == self.cursor
            assert delivery.sent <= self.top
        # Something is due exactly while something that was written is not acked.
        unacked = delivery.acks and self.acked < self.cursor
        assert (delivery.due is not None) == unacked
        if delivery.due is not None and self.begun is not None:
            longest = self.rule.ack_timeout * 2**self.tries * 1.25
            assert delivery.due <= self.begun + longest + 1e-6
        # A few numbers and nothing else, whatever has happened.
        assert all(
            isinstance(getattr(delivery, name), int | float | str | None)
            for name in Delivery.__slots__
            if name != "_random"
        )


def test_the_numbers_of_one_subscription() -> None:
    run_machine(Numbers, 150, 50)


class World(RuleBasedStateMachine):
    """One worker, a few clients, one channel, and everything that can go wrong between them."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Clockwork()
        self.peers: list[Peer] = []
        # Those whose session may be resumed.
        self.gone: list[Peer] = []
        # Since all was well.
        self.steps = 0

    @initialize(
        in_flight=st.sampled_from([1, 3, 16, 20, 1000]), tries=st.integers(0, 3), size=st.integers(3, 60)
    )
    def begin(self, in_flight: int, tries: int, size: int) -> None:
        self.rule = make_rule(ack_timeout=5.0, max_in_flight=in_flight, max_redeliveries=tries)
        self.store = Store(self.loop, size)
        self.worker = Worker(self.store, ChannelsConfig(self.rule, (), "server")).start()
        self.broker = self.worker.broker
        self.broker.manual = True
        self.connect(True, None, 1 << 20, True, False)
        self.publish(20, True)

    def teardown(self) -> None:
        try:
            if hasattr(self, "worker"):
                try:
                    self.calm()
                finally:
                    self.worker.kill()
        finally:
            self.loop.close()

    # Clients

    @precondition(lambda self: len(self.peers) < 3)
    @rule(
        ack=st.booleans(),
        last=st.none() | st.integers(0, 20),
        queue=st.sampled_from([300, 2000, 1 << 20]),
        wait=st.booleans(),
        compressed=st.booleans(),
    )
    def connect(self, ack: bool, last: int | None, queue: int, wait: bool, compressed: bool) -> None:
        peer = Peer(self.worker, queue=queue, compressed=compressed).open()
        self.peers.append(peer)
        peer.subscribe(CHANNEL, ack=ack, last=last)
        if wait:
            self.exchange()

    @precondition(lambda self: self.gone and len(self.peers) < 3)
    @rule(data=st.data(), queue=st.sampled_from([300, 2000, 1 << 20]), compressed=st.booleans())
    def resume(self, data: st.DataObject, queue: int, compressed: bool) -> None:
        old = data.draw(st.sampled_from(self.gone))
        self.gone.remove(old)
        self.peers.append(Peer(self.worker, queue=queue, heir=old, compressed=compressed).open())

    @property
    def watching(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.alive and CHANNEL in peer.watchers]

    def some_peer(self, data: st.DataObject) -> Peer:
        return data.draw(st.sampled_from(self.watching))

    @precondition(lambda self: self.watching)
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        self.some_peer(data).disconnect()

    @precondition(lambda self: self.watching)
    @rule(
        data=st.data(), ack=st.booleans(), how=st.sampled_from(["stay", "since", "last", "nonsense", "new"])
    )
    def subscribe_again(self, data: st.DataObject, ack: bool, how: str) -> None:
        peer = self.some_peer(data)
        if CHANNEL in peer.asked:
            return
        watcher = peer.watchers[CHANNEL]
        since = last = None
        if how == "since":
            since = Position(watcher.epoch, watcher.seq)
        elif how == "nonsense":
            since = Position(data.draw(st.sampled_from([watcher.epoch, "e0", "?"])), watcher.seq + 1000)
        elif how == "last":
            last = data.draw(st.integers(0, 30))
        elif how == "new":
            peer.unsubscribe(CHANNEL)
        peer.subscribe(CHANNEL, ack=ack, since=since, last=last)

    @precondition(lambda self: self.watching)
    @rule(
        data=st.data(), how=st.sampled_from(["all", "one", "some", "ahead", "nonsense"]), named=st.booleans()
    )
    def ack(self, data: st.DataObject, how: str, named: bool) -> None:
        peer = self.some_peer(data)
        if CHANNEL not in peer.session.subscriptions:
            return
        watcher = peer.watchers[CHANNEL]
        seq, epoch = watcher.seq, watcher.epoch
        if how == "one":
            seq = min(seq, watcher.acked + 1)
        elif how == "some":
            seq = data.draw(st.integers(min(watcher.acked, seq), seq))
        elif how == "ahead":
            topic = self.worker.topic(CHANNEL)
            # What is on its way to the client cannot be taken back.
            if topic.knows(watcher.epoch, watcher.seq) and not peer.sink.queued:
                seq, epoch = data.draw(st.integers(seq, max(seq, topic.seq))), topic.epoch
        elif how == "nonsense":
            seq = data.draw(st.integers(0, 200))
            epoch = data.draw(st.sampled_from(["?", "", *self.store.lines]))
            if self.worker.topic(CHANNEL).knows(epoch, seq) and seq > watcher.acked:
                # A client that says what it cannot know has itself to blame.
                return
        # Without an epoch it is the present one that is meant: only who has seen that says so.
        named = named or self.worker.topic(CHANNEL).epoch != epoch
        peer.ack(CHANNEL, seq, epoch if named else None)

    @precondition(lambda self: self.watching)
    @rule(data=st.data(), room=st.sampled_from([0, 50, 500, 1 << 40]))
    def let_read(self, data: st.DataObject, room: int) -> None:
        """The client reads so much; then its socket is full."""
        peer = self.some_peer(data)
        peer.drain(room)
        if room < 1 << 40:
            peer.block(peer.pipe.room)

    # The store, and the ways to it

    @rule(count=st.integers(1, 40), heard=st.booleans())
    def publish(self, count: int, heard: bool) -> None:
        for _ in range(count):
            self.store.publish(CHANNEL)
        if heard:
            self.hear(-1)

    @rule(count=st.integers(1, 10))
    def hear(self, count: int) -> None:
        self.worker.run(lambda: self.broker.hear(count))

    @rule(count=st.integers(1, 3))
    def execute(self, count: int) -> None:
        self.broker.execute(count)

    @rule(count=st.integers(1, 3))
    def answer(self, count: int) -> None:
        self.worker.run(lambda: self.broker.answer(count))

    @rule()
    def exchange(self) -> None:
        """Everything that is under way is done and answered, and what that leads to."""
        for _ in range(100):
            self.broker.execute()
            self.answer(-1)
            if not self.broker.asked:
                return
        raise AssertionError("a tight loop of reads")

    @rule(kind=st.sampled_from(FAULTS), count=st.integers(0, 12))
    def go_wrong(self, kind: str, count: int) -> None:
        match kind:
            case "missed":
                # Messages get lost on their way, and nobody says so.
                for _ in range(min(count, len(self.broker.bus))):
                    self.broker.bus.popleft()
            case "cut":
                self.worker.run(self.broker.cut)
            case "unavailable":
                self.worker.run(self.broker.fail)
            case "trimmed":
                self.store.trim(CHANNEL, count)
            case "moved":
                self.store.move(CHANNEL)
            case "rolled back":
                self.store.roll_back(CHANNEL, count)
            case "flushed":
                self.store.flush(CHANNEL)

    @rule(seconds=st.sampled_from([0.25, 2.0, 6.5, 13.0, 25.0]))
    def wait(self, seconds: float) -> None:
        self.loop.turn_on(seconds)

    @precondition(lambda self: self.steps > 25)
    @rule()
    def calm(self) -> None:
        """Nothing fails any more, clients ack what they have: all of them get everything that is left."""
        self.steps = 0
        self.broker.manual = False
        self.exchange()
        came, quiet = -1, 0
        while quiet < 8:
            self.hear(-1)
            for peer in self.peers:
                if peer.alive:
                    peer.drain()
                    self.ack_all(peer)
            self.worker.run(lambda: self.worker.node.on_gap([CHANNEL]))
            self.loop.turn_on(0.25)
            before, came = came, sum(len(peer.events) for peer in self.peers)
            quiet = quiet + 1 if came == before else 0
        self.broker.manual = True
        assert not self.broker.bus
        line = self.store.line(CHANNEL)
        assert not any(peer.asked for peer in self.peers if peer.alive)
        for peer in self.watching:
            watcher = peer.watchers[CHANNEL]
            assert watcher.seq == line.seq
            assert watcher.number == watcher.number_of(line.epoch, line.seq)
            assert peer.sink in self.worker.topic(CHANNEL).live

    def ack_all(self, peer: Peer) -> None:
        watcher = peer.watchers.get(CHANNEL)
        if watcher is not None:
            peer.ack(CHANNEL, watcher.seq, watcher.epoch)

    @invariant()
    def holds(self) -> None:
        self.steps += 1
        for peer in [peer for peer in self.peers if peer.closed]:
            self.peers.remove(peer)
            if not peer.turned_away:
                self.gone.append(peer)
        for topic in (getattr(self.worker, "node", None) and self.worker.node._topics.values()) or ():
            # No messages are kept for anybody, and few while the stream is read.
            assert not topic.frames and topic.flushed == topic.seq
            assert not topic.ahead or (topic.filling and len(topic.ahead) <= AHEAD)
            assert not set(topic.live) & set(topic.behind)
            assert topic.users >= len(topic.live) + len(topic.behind)


@pytest.mark.logs("history_lost")
def test_a_worker_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that its small messages are compressed as well.
    monkeypatch.setattr(compression, "THRESHOLD", 0)
    # And what one turn brings leaves in several batches.
    monkeypatch.setattr(dispatch, "_BATCH", 500)
    run_machine(World, 100, 60)


# One thing at a time


class Scene:
    """A worker over a store, on which a test turns the clock."""

    def __init__(self, size: int = 1000, **fields: Any) -> None:
        self.loop = Clockwork()
        self.store = Store(self.loop, size)
        self.rule = make_rule(**({"ack_timeout": 5.0} | fields))
        self.worker = Worker(self.store, ChannelsConfig(self.rule, (), "server")).start()
        self.broker = self.worker.broker

    def peer(self, *, queue: int = 1 << 20, heir: Peer | None = None, **fields: Any) -> Peer:
        """One that is subscribed, unless it has inherited that."""
        peer = Peer(self.worker, queue=queue, heir=heir).open()
        if heir is None:
            peer.subscribe(CHANNEL, **fields)
        return peer

    def publish(self, count: int) -> None:
        for _ in range(count):
            self.store.publish(CHANNEL)

    def hear(self) -> None:
        self.worker.run(self.broker.hear)

    @property
    def topic(self) -> Topic:
        return self.worker.topic(CHANNEL)


@pytest.fixture
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = Scene(**getattr(request, "param", {}))
    yield scene
    scene.worker.kill()
    scene.loop.close()


def test_the_waits_double_and_then_it_ends(scene: Scene) -> None:
    peer = scene.peer(ack=True)
    scene.publish(40)
    scene.hear()
    assert peer.data == list(range(1, 41))
    begun = scene.loop.now
    backs = []
    while peer.alive:
        before = len(peer.data)
        scene.loop.turn_on(0.25)
        if len(peer.data) > before:
            backs.append(scene.loop.now)
            again = peer.events[-RETRY_WINDOW:]
            assert [event["seq"] for event in again] == list(range(1, 17))
            assert {event["redelivered"] for event in again} == {len(backs)}
    assert peer.code == CloseCode.ACKS_OVERDUE
    assert len(backs) == scene.rule.max_redeliveries == 6
    for number, (before, after) in enumerate(pairwise([begun, *backs, scene.loop.now])):
        assert 5 * 2**number <= after - before <= 5 * 2**number * 1.25 + 2 * TICK


def test_progress_resets_the_wait_at_once(scene: Scene) -> None:
    """Also where the wheel was to come by much later."""
    peer = scene.peer(ack=True)
    scene.publish(40)
    scene.hear()
    scene.loop.turn_on(60)
    peer.ack(CHANNEL, 3)
    came = len(peer.data)
    assert peer.data[-24:] == list(range(17, 41))
    scene.loop.turn_on(4.5)
    assert len(peer.data) == came
    scene.loop.turn_on(2.5)
    assert peer.data[came:] == list(range(4, 20))


def test_an_ended_subscription_leaves_the_wheel(scene: Scene) -> None:
    peer = scene.peer(ack=True)
    scene.publish(1)
    scene.hear()
    scene.loop.turn_on(1)
    assert any(scene.worker.node.dispatch._wheel._slots.values())
    peer.disconnect()
    assert not any(scene.worker.node.dispatch._wheel._slots.values())


def go_behind(scene: Scene, **fields: Any) -> Peer:
    """One with a full window of 10, of which the next piece is being read."""
    peer = scene.peer(ack=True, **fields)
    scene.publish(30)
    scene.hear()
    assert peer.data == list(range(1, 11))
    scene.broker.manual = True
    peer.ack(CHANNEL, 5)
    assert len(scene.broker.asked) == 1
    return peer


def finish_reading(scene: Scene) -> None:
    scene.broker.manual = False
    scene.broker.execute()
    scene.worker.run(scene.broker.answer)


@pytest.mark.parametrize("scene", [{"max_in_flight": 10}], indirect=True)
def test_going_back_while_the_stream_is_read(scene: Scene) -> None:
    """The piece that was asked for before is not what comes next."""
    peer = go_behind(scene)
    scene.loop.turn_on(7)
    finish_reading(scene)
    assert peer.data[10:] == list(range(6, 16))


@pytest.mark.parametrize("scene", [{"max_in_flight": 10}], indirect=True)
def test_acks_while_the_stream_is_read(scene: Scene) -> None:
    """Here it was read before the messages came that are acked."""
    peer = go_behind(scene)
    scene.broker.execute()
    scene.publish(20)
    scene.hear()
    peer.ack(CHANNEL, 45)
    finish_reading(scene)
    assert peer.data[10:] == list(range(46, 51))
    assert not peer.errors()


@pytest.mark.parametrize("scene", [{"max_in_flight": 10}], indirect=True)
def test_a_queue_that_fills_while_the_stream_is_read(scene: Scene) -> None:
    """What it does not take is not lost: it is read again."""
    peer = go_behind(scene, queue=600)
    peer.block()
    scene.worker.run(lambda: peer.refuse_command(Refusal("internal", "x" * 400)))
    finish_reading(scene)
    assert len(peer.data) == 10
    peer.drain()
    assert peer.data[10:] == list(range(11, 16))


@pytest.mark.logs("history_lost")
@pytest.mark.parametrize("scene", [{"max_in_flight": 10}], indirect=True)
def test_a_loss_while_the_stream_is_read(scene: Scene) -> None:
    """It goes on with the oldest message left, whatever was asked for."""
    peer = go_behind(scene)
    scene.store.flush(CHANNEL)
    scene.publish(15)
    finish_reading(scene)
    scene.hear()
    assert peer.errors() == ["history_lost"]
    assert peer.data[10:] == list(range(31, 41))


@pytest.mark.logs("history_lost")
def test_a_loss_of_what_only_those_have_seen_who_went_back(scene: Scene) -> None:
    peer, other = scene.peer(ack=True), scene.peer()
    scene.publish(30)
    scene.hear()
    peer.block()
    scene.loop.turn_on(7)
    assert scene.topic.behind
    scene.store.roll_back(CHANNEL, 3)
    scene.publish(5)
    scene.hear()
    peer.drain()
    assert peer.errors() == other.errors() == ["history_lost"]
    peer.ack(CHANNEL, 32)
    assert peer.data[-5:] == other.data[-5:] == list(range(31, 36))


@pytest.mark.logs("history_lost")
@pytest.mark.parametrize("scene", [{"size": 5}], indirect=True)
def test_a_node_that_has_not_heard_what_is_trimmed_already(scene: Scene) -> None:
    """It reads no circles until it has: who needs older ones goes on at the node's head."""
    peer = scene.peer(queue=300)
    peer.block()
    scene.publish(3)
    scene.hear()
    scene.publish(27)
    scene.hear()
    assert scene.topic.behind
    scene.publish(20)
    reads = scene.broker.reads
    peer.drain()
    assert peer.errors() == ["history_lost"]
    assert scene.broker.reads - reads < 4
    scene.hear()
    assert peer.data[-20:] == list(range(31, 51))


@pytest.mark.logs("history_lost")
def test_a_loss_while_a_subscribe_is_saved(scene: Scene) -> None:
    """The position was there when it was asked for."""
    scene.publish(20)
    peer = scene.peer()
    scene.broker.manual = True
    peer.subscribe(CHANNEL, since=Position("e0", 5))
    scene.broker.execute()
    scene.worker.run(scene.broker.answer)
    scene.store.flush(CHANNEL)
    scene.publish(10)
    scene.hear()
    # The save takes longer than what the loss leads to.
    save = scene.broker.asked.popleft()
    finish_reading(scene)
    assert scene.topic.epoch == "e1"
    scene.broker.asked.append(save)
    finish_reading(scene)
    assert peer.errors() == ["history_lost"] * 2
    assert peer.data[-10:] == list(range(21, 31))


def test_queues_that_are_full_one_after_the_other(scene: Scene) -> None:
    """Each goes on after what it was sent."""
    peers = [scene.peer(queue=size) for size in (500, 1500, 3000)]
    for peer in peers:
        peer.block()
    for _ in range(20):
        scene.publish(4)
        scene.hear()
    assert len(scene.topic.behind) == 3
    for peer in peers:
        peer.drain()
        assert peer.data == list(range(1, 81))


def test_a_publisher_that_knows_another_rule(scene: Scene) -> None:
    """What comes without a number passes, and leaves no trace in the numbers."""
    peer = scene.peer(queue=500)
    plain = BusMessage(b'{"type":"message","channel":"c","data":0}', 0)
    peer.is_watched = False
    for _ in range(3):
        scene.broker.bus.append((CHANNEL, plain))
        scene.publish(2)
    peer.block()
    scene.hear()
    assert scene.topic.flushed == scene.topic.seq == 6
    scene.publish(20)
    scene.hear()
    peer.drain()
    assert [number for number in peer.data if number] == list(range(1, 27))
    assert peer.data.count(0) == 3


def test_messages_that_come_all_the_time(scene: Scene) -> None:
    """There is always one between a read and its answer: a hole is filled all the same, and joining ends."""
    scene.broker.manual = True
    peer = scene.peer()
    for _ in range(20):
        scene.broker.execute()
        scene.publish(2)
        scene.worker.run(scene.broker.answer)
        scene.hear()
    assert peer.data
    scene.publish(1)
    scene.broker.bus.clear()
    for _ in range(3):
        scene.publish(2)
        scene.hear()
        scene.broker.execute()
        scene.publish(2)
        scene.hear()
        scene.worker.run(scene.broker.answer)
    assert scene.topic.filling is None
    assert peer.data[-1] == scene.store.line(CHANNEL).seq


def test_a_gap_while_a_hole_is_filled(scene: Scene) -> None:
    """What is read already is of before the gap."""
    peer = scene.peer()
    scene.broker.manual = True
    scene.publish(2)
    scene.broker.bus.popleft()
    scene.hear()
    scene.broker.execute()
    scene.publish(3)
    scene.worker.run(scene.broker.cut)
    finish_reading(scene)
    assert peer.data == [1, 2, 3, 4, 5]


def test_a_hole_while_nobody_listens(scene: Scene) -> None:
    peer = scene.peer()
    peer.unsubscribe(CHANNEL)
    scene.publish(2)
    scene.broker.bus.popleft()
    scene.hear()
    peer.subscribe(CHANNEL)
    assert peer.events[-1]["seq"] == 2


def test_messages_lost_without_a_sign(scene: Scene) -> None:
    """The head check finds them, and says nothing where there is nothing to say."""
    peer = scene.peer()
    scene.publish(3)
    scene.broker.cut(noticed=False)
    scene.loop.turn_on(HEAD_CHECK + 1)
    assert peer.data == [1, 2, 3]


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_end_during_a_second_subscribe(scene: Scene, saving: bool, fails: bool) -> None:
    """What the first one held is given back once: others on the channel still hear."""
    peer, other = scene.peer(), scene.peer()
    scene.publish(3)
    scene.hear()
    scene.broker.manual = True
    peer.subscribe(CHANNEL, last=2)
    if saving:
        scene.broker.execute()
        scene.worker.run(scene.broker.answer)
        assert scene.broker.asked
    peer.disconnect()
    if fails:
        scene.worker.run(scene.broker.fail)
    finish_reading(scene)
    scene.loop.turn_on(2 * LINGER)
    assert scene.topic.users == 1 and scene.worker.metrics.subscriptions == 1
    scene.publish(1)
    scene.hear()
    assert other.data == [1, 2, 3, 4]


# A second subscribe


def answers(peer: Peer) -> list[tuple[bool, int]]:
    """Of each subscribe: `recovered` and `replayed`."""
    return [
        (event["recovered"], event["replayed"]) for event in peer.events if event.get("op") == "subscribe"
    ]


def begin_again(scene: Scene, peer: Peer, **fields: Any) -> None:
    """Subscribe once more, until that is being saved."""
    scene.broker.manual = True
    reads = scene.broker.reads
    peer.subscribe(CHANNEL, **fields)
    if scene.broker.reads > reads:
        scene.broker.execute()
        scene.worker.run(scene.broker.answer)
    assert len(scene.broker.asked) == 1


def place(peer: Peer) -> tuple[str, int, bool]:
    """Where a resumed session goes on."""
    event = peer.events[0]
    return event["epoch"], event["seq"], event["recovered"]


def test_what_is_not_acked_comes_again(scene: Scene) -> None:
    """It was written before, and says so."""
    peer = scene.peer(ack=True)
    scene.publish(5)
    scene.hear()
    peer.ack(CHANNEL, 3)
    for _ in range(2):
        peer.subscribe(CHANNEL, ack=True)
    scene.publish(1)
    scene.hear()
    assert peer.data == [1, 2, 3, 4, 5, 4, 5, 4, 5, 6]
    assert [event.get("redelivered") for event in peer.events if "data" in event][5:] == [1, 1, 2, 2, None]
    assert answers(peer) == [(True, 0), (True, 2), (True, 2)]


def test_a_second_subscribe_is_a_sign_of_life(scene: Scene) -> None:
    """After a going back as well all comes at once, and the wait begins anew."""
    peer = scene.peer(ack=True)
    scene.publish(40)
    scene.hear()
    scene.loop.turn_on(7)
    assert len(peer.data) == 40 + RETRY_WINDOW
    peer.subscribe(CHANNEL, ack=True)
    assert peer.data[-40:] == list(range(1, 41))
    came = len(peer.data)
    scene.loop.turn_on(4.5)
    assert len(peer.data) == came
    scene.loop.turn_on(2.5)
    assert len(peer.data) == came + RETRY_WINDOW


@pytest.mark.parametrize("ends", [False, True])
def test_an_ack_while_a_second_subscribe_is_saved(scene: Scene, ends: bool) -> None:
    peer = scene.peer(ack=True)
    scene.publish(5)
    scene.hear()
    peer.ack(CHANNEL, 2)
    begin_again(scene, peer, ack=True)
    peer.ack(CHANNEL, 4)
    if ends:
        peer.disconnect()
    finish_reading(scene)
    if ends:
        assert place(scene.peer(heir=peer)) == ("e0", 4, True)
    else:
        assert peer.data == [1, 2, 3, 4, 5, 5]
        assert answers(peer)[-1] == (True, 1)


def test_a_second_subscribe_that_fails(scene: Scene) -> None:
    """The first one goes on as if nothing had been asked."""
    peer = scene.peer(ack=True)
    scene.publish(3)
    scene.hear()
    begin_again(scene, peer, ack=True, last=3)
    peer.ack(CHANNEL, 2)
    scene.worker.run(scene.broker.fail)
    scene.broker.manual = False
    assert peer.errors() == ["unavailable"]
    scene.publish(1)
    scene.hear()
    peer.ack(CHANNEL, 3)
    assert peer.data == [1, 2, 3, 4]
    peer.disconnect()
    assert place(scene.peer(heir=peer)) == ("e0", 3, True)


@pytest.mark.parametrize("scene", [{"size": 5}], indirect=True)
def test_a_second_subscribe_when_what_is_not_acked_is_gone(scene: Scene) -> None:
    """It is told by the answer, and, until something is acked, by the next connection as well."""
    peer = scene.peer(ack=True)
    scene.publish(20)
    scene.hear()
    peer.subscribe(CHANNEL, ack=True)
    assert answers(peer)[-1] == (False, 5)
    assert peer.data[20:] == [16, 17, 18, 19, 20] and not peer.errors()
    peer.disconnect()
    assert place(scene.peer(heir=peer)) == ("e0", 15, False)


@pytest.mark.parametrize("scene", [{"size": 5}], indirect=True)
def test_an_ack_that_makes_up_for_what_is_gone(scene: Scene) -> None:
    """While the second subscribe is saved: nothing is lost then, and nothing comes again."""
    peer = scene.peer(ack=True)
    scene.publish(20)
    scene.hear()
    begin_again(scene, peer, ack=True)
    peer.ack(CHANNEL, 18)
    finish_reading(scene)
    assert answers(peer)[-1] == (True, 2)
    assert peer.data[20:] == [19, 20]


@pytest.mark.logs("history_lost")
def test_a_loss_while_a_second_subscribe_is_saved(scene: Scene) -> None:
    """It is told once, by the first one."""
    peer = scene.peer(ack=True)
    scene.publish(20)
    scene.hear()
    begin_again(scene, peer, ack=True)
    scene.store.flush(CHANNEL)
    scene.publish(3)
    scene.hear()
    # The save takes longer than what the loss leads to.
    save = scene.broker.asked.popleft()
    finish_reading(scene)
    scene.broker.asked.append(save)
    finish_reading(scene)
    assert peer.errors() == ["history_lost"]
    assert answers(peer)[-1] == (True, 3)
    assert peer.data[-3:] == [21, 22, 23]


@pytest.mark.logs("history_lost")
def test_a_loss_of_what_was_seen_before_acks_were_given_up(scene: Scene) -> None:
    peer = scene.peer(ack=True)
    scene.publish(30)
    scene.hear()
    peer.block()
    scene.loop.turn_on(7)
    peer.subscribe(CHANNEL)
    scene.store.roll_back(CHANNEL, 3)
    scene.publish(5)
    scene.hear()
    peer.drain()
    assert peer.errors() == ["history_lost"]


@pytest.mark.logs("history_lost")
def test_a_loss_right_before_acks_are_asked_for(scene: Scene) -> None:
    """No ack has shown that the client heard of it: the next connection tells it again."""
    peer = scene.peer()
    scene.publish(3)
    scene.hear()
    scene.store.flush(CHANNEL)
    scene.publish(2)
    scene.hear()
    assert peer.errors() == ["history_lost"]
    peer.subscribe(CHANNEL, ack=True)
    peer.disconnect()
    assert place(scene.peer(heir=peer)) == ("e1", 0, False)


def test_the_last_messages_before_a_subscribe_was_saved(scene: Scene) -> None:
    """Where they begin is stored as well, though more have come meanwhile."""
    scene.publish(10)
    peer = scene.peer()
    begin_again(scene, peer, ack=True, last=2)
    scene.publish(4)
    scene.hear()
    finish_reading(scene)
    assert peer.data == [11, 12, 13, 14, 13, 14]
    peer.disconnect()
    assert place(scene.peer(heir=peer)) == ("e0", 12, True)


@pytest.mark.parametrize("scene", [{"persistent": False}], indirect=True)
def test_a_place_on_another_channel_costs_nothing(scene: Scene) -> None:
    """There is no stream: none is read, and none is begun by reading."""
    peer = scene.peer(since=Position("e0", 4))
    assert answers(peer) == [(False, 0)]
    assert not scene.broker.reads


# Places and their names


def begin_an_epoch(scene: Scene, before: int) -> None:
    """So many messages of e0, and five of the e1 that another master has begun."""
    scene.publish(before)
    scene.hear()
    scene.store.move(CHANNEL)
    scene.publish(5)
    scene.hear()


def lose_an_epoch(scene: Scene) -> None:
    """The other master is gone, and with it what it alone had."""
    scene.store.roll_back(CHANNEL, 5)
    scene.worker.run(scene.broker.cut)
    assert scene.topic.epoch == "e0"


@pytest.mark.logs("history_lost")
@pytest.mark.parametrize("scene", [{"max_in_flight": 1}], indirect=True)
@pytest.mark.parametrize("acks", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_who_has_seen_nothing_of_an_epoch_loses_nothing_with_it(
    scene: Scene, acks: bool, resumed: bool
) -> None:
    """Whatever the present one was when a place was given, written or acked without a name."""
    begin_an_epoch(scene, 10)
    peer = scene.peer(ack=True, last=10)
    if acks:
        peer.ack(CHANNEL, 6)
    if resumed:
        peer.disconnect()
    lose_an_epoch(scene)
    if resumed:
        peer = scene.peer(heir=peer)
        assert place(peer) == ("e0", 5 + acks, True)
    peer.ack(CHANNEL, 7)
    assert peer.data[-1] == 8 and not peer.errors()


@pytest.mark.logs("history_lost")
@pytest.mark.parametrize("scene", [{"max_in_flight": 1, "size": 8}], indirect=True)
@pytest.mark.parametrize("how", ["read", "subscribed", "resumed"])
def test_who_was_told_of_a_loss_is_told_of_no_other(scene: Scene, how: str) -> None:
    """The oldest message left was there before the epoch that is lost then."""
    peer = scene.peer(ack=True)
    if how == "resumed":
        peer.disconnect()
    begin_an_epoch(scene, 10)
    match how:
        case "read":
            peer.ack(CHANNEL, 3)
        case "subscribed":
            peer.subscribe(CHANNEL, ack=True)
            assert answers(peer)[-1] == (False, 8)
        case "resumed":
            peer = scene.peer(heir=peer)
            assert place(peer) == ("e0", 7, False)
    told = peer.errors()
    lose_an_epoch(scene)
    scene.loop.turn_on(7)
    peer.ack(CHANNEL, 8)
    assert peer.data[-3:] == [8, 8, 9] and peer.errors() == told


@pytest.mark.parametrize("scene", [{"max_in_flight": 2}], indirect=True)
def test_messages_of_epochs_whose_names_are_forgotten(scene: Scene) -> None:
    for _ in range(ENDS_KEPT + 5):
        scene.publish(1)
        scene.store.move(CHANNEL)
    peer = scene.peer(ack=True, last=100)
    for seq in range(1, ENDS_KEPT + 6):
        assert peer.data[-1] >= seq
        peer.ack(CHANNEL, seq)
    assert not peer.errors()


@pytest.mark.parametrize("resumed", [False, True])
def test_a_head_that_is_behind_the_present_epoch(scene: Scene, resumed: bool) -> None:
    """A node that has much to catch up with tells of a place that it has heard of."""
    peer = scene.peer()
    if resumed:
        other = scene.peer()
        other.disconnect()
    scene.publish(2 * PIECE)
    scene.broker.cut(noticed=False)
    scene.broker.manual = True
    begin_an_epoch(scene, 0)
    while not scene.topic.seq:
        scene.broker.execute()
        scene.worker.run(scene.broker.answer)
    assert (scene.topic.epoch, scene.topic.seq) == ("e1", PIECE)
    reading = scene.broker.asked.popleft()
    new = scene.peer(heir=other) if resumed else scene.peer()
    finish_reading(scene)
    scene.broker.asked.append(reading)
    finish_reading(scene)
    assert (new.events[0]["epoch"], new.events[0]["seq"]) == ("e0", PIECE)
    assert peer.data[-1] == 2 * PIECE + 5


@pytest.mark.logs("history_lost")
def test_a_full_queue_at_the_end_of_an_epoch(scene: Scene) -> None:
    """What it did not take is of the epoch that is lost; what it has had is not."""
    peer = scene.peer(queue=300)
    peer.block()
    begin_an_epoch(scene, 1)
    assert scene.topic.behind
    lose_an_epoch(scene)
    peer.drain()
    scene.publish(1)
    scene.hear()
    assert peer.data == [1, 7] and not peer.errors()


@pytest.mark.parametrize("scene", [{"max_in_flight": 50}], indirect=True)
def test_acks_of_what_was_not_sent_yet(scene: Scene) -> None:
    """A resumed client tells what it has; what nobody can have yet is ignored."""
    scene.publish(100)
    peer = scene.peer(ack=True)
    scene.publish(1)
    scene.hear()
    peer.disconnect()
    scene.publish(199)
    scene.hear()
    heir = scene.peer(heir=peer)
    assert heir.data == list(range(101, 151))
    heir.ack(CHANNEL, 1000)
    heir.ack(CHANNEL, 280, "another")
    assert len(heir.data) == 50
    heir.ack(CHANNEL, 290)
    assert heir.data[50:] == list(range(291, 301))
