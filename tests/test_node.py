"""The node between hub and broker: interest, one send for each turn of the loop, holes and their filling."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from operator import contains
from typing import Any, cast

import pytest
from broker_kit import asynchronous, publication, until

from tornado_bcast.answer import Answer
from tornado_bcast.brokers import BrokerEvents, BusMessage, History, Publication, Receipt
from tornado_bcast.brokers.memory import MemoryBroker
from tornado_bcast.config import ChannelRule, default_config
from tornado_bcast.delivery import Delivery
from tornado_bcast.errors import Unavailable
from tornado_bcast.eventloop import LagMeter
from tornado_bcast.hub import Hub
from tornado_bcast.metrics import Metrics
from tornado_bcast.node import MANY, Node
from tornado_bcast.protocol import Position
from tornado_bcast.sink import Sink, SlowConsumer
from tornado_bcast.topic import Subscriber, Topic
from tornado_bcast.wheel import TICK

PLAIN = default_config().channels.default
KEPT = replace(PLAIN, persistent=True)


class Bus(MemoryBroker):
    """A broker in memory that loses, waits and fails as it is told."""

    def __init__(self) -> None:
        super().__init__()
        # What was asked for, in order.
        self.calls: list[str] = []
        # While set, `subscribe` and `read` wait; and how often `read` and `heads` fail yet.
        self.open = asyncio.Event()
        self.open.set()
        self.failures = 0
        # Which messages are not told.
        self.loses: Callable[[BusMessage], bool] = lambda message: False
        # With `slow` what the node publishes is answered by the test, and told when it says so.
        self.slow = False
        self.unanswered: list[tuple[Answer[Receipt], Callable[[], None]]] = []

    async def start(self, events: BrokerEvents, row: Callable[[], bytes]) -> None:
        await super().start(cast(BrokerEvents, _Ear(self, events)), row)

    def publish(self, publication: Publication) -> Answer[Receipt]:
        if not self.slow:
            return super().publish(publication)
        answer: Answer[Receipt] = Answer()
        self.unanswered.append((answer, lambda: self.tell(publication)))
        return answer

    def tell(self, publication: Publication) -> None:
        super().publish(publication)

    async def subscribe(self, channel: str) -> None:
        self.calls.append(f"+{channel}")
        await self.open.wait()
        await super().subscribe(channel)

    def unsubscribe(self, channel: str) -> None:
        self.calls.append(f"-{channel}")
        super().unsubscribe(channel)

    async def read(self, channel: str, after: int, limit: int) -> History:
        self.calls.append(f"read {channel} {after}")
        await self.open.wait()
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        return await super().read(channel, after, limit)

    def forget(self, channel: str) -> None:
        """Lose the history of a channel, as a Redis does that was emptied."""
        del self._lines[channel]


class _Ear:
    """A node that does not hear everything."""

    def __init__(self, bus: Bus, events: BrokerEvents) -> None:
        self._bus = bus
        self._events = events

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def on_message(self, channel: str | None, message: BusMessage) -> None:
        if not self._bus.loses(message):
            self._events.on_message(channel, message)


class Ears:
    """A sink that records each send. Not `ready`: it has a queue, and takes nothing that may wait."""

    # One that is never clear: it is asked, and no socket is.
    slot = -1
    compressed = False

    def __init__(self) -> None:
        self.sends: list[tuple[str, int, SlowConsumer]] = []
        self.heard: list[Any] = []
        self.seqs: list[int] = []
        self.queued = 0

    def send(self, channel: str, data: bytes, frames: Sequence[bytes], policy: SlowConsumer) -> bool:
        assert data == b"".join(frames)
        if self.queued and policy == "wait":
            return False
        self.sends.append((channel, len(frames), policy))
        for one in frames:
            event = json.loads(one[one.index(b"{") :])
            self.heard.append(event["data"])
            self.seqs.append(event.get("seq", 0))
        return True


class World:
    """A node on a bus."""

    def __init__(self) -> None:
        self.bus = Bus()
        self.hub = Hub()
        self.metrics = Metrics()
        self.node = Node(self.bus, self.hub, self.metrics, everybody=PLAIN, join_timeout=0.2)
        self.lost: list[tuple[Subscriber, str, str, int]] = []

    async def subscribe(self, channel: str, rule: ChannelRule = PLAIN) -> tuple[Ears, Subscriber]:
        """A live subscriber at the channel's head."""
        topic = await self.node.join(channel, rule)
        delivery = Delivery(rule, topic.epoch, topic.seq, acks=False) if rule.persistent else None
        ears = Ears()
        subscriber = Subscriber(
            topic,
            cast(Sink, ears),
            delivery,
            lambda name, epoch, seq: self.lost.append((subscriber, name, epoch, seq)),
            lambda name: pytest.fail("nobody waits for acks here"),
        )
        self.node.dispatch.attach(subscriber)
        return ears, subscriber

    async def crowd(self, channel: str) -> None:
        """So many subscriptions that messages are sent together."""
        for _ in range(MANY):
            await self.node.join(channel, PLAIN)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        self.node.dispatch.detach(subscriber)
        self.node.leave(subscriber.topic)

    def publish(self, channel: str | None, *data: object, persistent: bool = False) -> None:
        for each in data:
            self.bus.tell(publication(channel, each, persistent=persistent))

    @property
    def interest(self) -> list[str]:
        return [call for call in self.bus.calls if call[0] in "+-"]


@asynccontextmanager
async def world(*, slow: bool = False) -> AsyncIterator[World]:
    made = World()
    made.bus.slow = slow
    await made.node.start(lambda: b"{}")
    clock = LagMeter(TICK, lambda lag, now: made.node.turn())
    try:
        yield made
    finally:
        clock.close()
        made.bus.open.set()
        await made.node.close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.node.LINGER", 0.05)


# Interest


@asynchronous
async def test_the_first_one_in_and_the_last_one_out() -> None:
    async with world() as here:
        _, first = await here.subscribe("a")
        _, second = await here.subscribe("a")
        await here.subscribe("b")
        assert here.interest == ["+a", "+b"] and here.node.channel_count == 2
        here.unsubscribe(first)
        await asyncio.sleep(0.1)
        assert here.interest == ["+a", "+b"]
        here.unsubscribe(second)
        assert here.node.channel_count == 1
        await until(lambda: here.interest == ["+a", "+b", "-a"])
        await here.subscribe("a")
        assert here.interest[-1] == "+a"


@asynchronous
async def test_who_comes_back_soon_needs_no_new_subscription() -> None:
    async with world() as here:
        for _ in range(2):
            ears, subscriber = await here.subscribe("a")
            here.publish("a", 1)
            await until(lambda ears=ears: ears.heard)
            here.unsubscribe(subscriber)
        await until(lambda: here.interest == ["+a", "-a"])


@asynchronous
async def test_many_at_once_subscribe_once() -> None:
    async with world() as here:
        here.bus.open.clear()
        joining = [asyncio.create_task(here.node.join("a", PLAIN)) for _ in range(10)]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in joining)
        here.bus.open.set()
        assert len({id(topic) for topic in await asyncio.gather(*joining)}) == 1
        assert here.interest == ["+a"]


@asynchronous
async def test_a_broker_that_does_not_confirm() -> None:
    async with world() as here:
        here.bus.open.clear()
        with pytest.raises(Unavailable) as caught:
            await here.node.join("a", PLAIN)
        assert 0 < caught.value.retry_after < 60_000
        assert here.node.channel_count == 0, "nothing is held"
        # The next one waits for the same subscription, if that is still on its way.
        joining = asyncio.create_task(here.node.join("a", PLAIN))
        await asyncio.sleep(0.05)
        here.bus.open.set()
        topic = await joining
        assert here.interest == ["+a"]
        here.node.leave(topic)
        await until(lambda: here.interest == ["+a", "-a"])


@asynchronous
async def test_who_gives_up_leaves_no_interest() -> None:
    async with world() as here:
        here.bus.open.clear()
        with pytest.raises(Unavailable):
            await here.node.join("a", PLAIN)
        await until(lambda: here.interest == ["+a", "-a"])
        here.bus.open.set()
        await here.subscribe("a")
        assert here.interest == ["+a", "-a", "+a"]


@asynchronous
async def test_a_subscription_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as here:
        good = here.bus.subscribe

        async def bad(channel: str) -> None:
            raise Unavailable("the server is stopping")

        monkeypatch.setattr(here.bus, "subscribe", bad)
        with pytest.raises(Unavailable):
            await here.node.join("a", PLAIN)
        monkeypatch.setattr(here.bus, "subscribe", good)
        ears, _ = await here.subscribe("a")
        here.publish("a", 1)
        await until(lambda: ears.heard == [1])


# One send for each turn


@asynchronous
async def test_what_one_turn_brings_goes_in_one_send() -> None:
    async with world() as here:
        (one, _), (two, _), (other, _) = [await here.subscribe(name) for name in ("a", "a", "b")]
        here.publish("a", *range(20))
        here.publish("b", "x")
        here.publish("a", *range(20, 40))
        await until(lambda: len(one.heard) == 40)
        assert one.sends == two.sends == [("a", 40, "disconnect")]
        assert one.heard == two.heard == list(range(40)) and other.heard == ["x"]
        assert here.metrics.delivered == 81 and here.metrics.lag_count == 81
        assert here.metrics.bytes_out > 81 * 20


def ask(here: World, channel: str, data: object) -> None:
    """Publish by this node; the broker answers when it is told to."""
    payload = json.dumps({"data": data}).encode()
    here.node.publish(channel, PLAIN, f"id {data}", payload, 0, given=False)


@asynchronous
async def test_what_comes_waits_for_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.dispatch.HOLD", 5.0)
    async with world(slow=True) as here:
        await here.crowd("a")
        (ears, _), (other, _) = await here.subscribe("a"), await here.subscribe("b")
        ask(here, "a", 1)
        ask(here, "a", 2)
        (first, tell_first), (second, tell_second) = here.bus.unanswered
        tell_first()
        here.publish("b", "x")
        await until(lambda: other.heard)
        assert not ears.heard, "only those of the same channel wait"
        tell_second()
        first.set_result(Receipt())
        await asyncio.sleep(0)
        second.set_result(Receipt())
        for _ in range(3):
            await asyncio.sleep(0)
        assert ears.sends == [("a", 2, "disconnect")] and ears.heard == [1, 2]


@asynchronous
async def test_and_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.dispatch.HOLD", 0.05)
    async with world(slow=True) as here:
        await here.crowd("a")
        ears, _ = await here.subscribe("a")
        for step in range(3):
            ask(here, "a", step)
            here.bus.unanswered[-1][1]()
            # One is never answered, and that more come all the time prolongs nothing.
            begun = asyncio.get_running_loop().time()
            await until(partial(contains, ears.heard, step))
            assert 0.04 < asyncio.get_running_loop().time() - begun < 1


@asynchronous
async def test_what_fails_on_its_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.dispatch.HOLD", 5.0)
    async with world(slow=True) as here:
        await here.crowd("a")
        ears, _ = await here.subscribe("a")
        ask(here, "a", 1)
        ask(here, "a", 2)
        (first, tell), (second, _) = here.bus.unanswered
        tell()
        first.set_result(Receipt())
        await asyncio.sleep(0)
        second.set_exception(Unavailable("away"))
        for _ in range(3):
            await asyncio.sleep(0)
        assert ears.heard == [1]


@asynchronous
async def test_where_few_listen_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tornado_bcast.dispatch.HOLD", 60.0)
    async with world(slow=True) as here:
        ears, _ = await here.subscribe("a")
        ask(here, "a", 1)
        here.bus.unanswered[0][1]()
        await until(lambda: ears.heard == [1])


@asynchronous
async def test_a_send_has_a_bound() -> None:
    async with world() as here:
        ears, _ = await here.subscribe("a")
        here.publish("a", *(f"{number}".ljust(30_000) for number in range(10)), "y" * 200_000)
        await until(lambda: len(ears.heard) == 11)
        assert [count for _, count, _ in ears.sends] == [2, 2, 2, 2, 2, 1]


@asynchronous
async def test_the_rule_goes_along() -> None:
    async with world() as here:
        ears, _ = await here.subscribe("a", replace(PLAIN, slow_consumer="latest"))
        here.publish("a", 1)
        await until(lambda: ears.sends == [("a", 1, "latest")])


@asynchronous
async def test_what_came_before_is_not_for_the_next_one() -> None:
    async with world() as here:
        one, _ = await here.subscribe("a")
        topic = await here.node.join("a", PLAIN)
        here.node.on_message("a", BusMessage(b'{"data":1}', 0))
        # In the same turn of the loop.
        two = Ears()
        here.node.dispatch.attach(Subscriber(topic, cast(Sink, two), None, lambda *_: None, lambda _: None))
        here.node.on_message("a", BusMessage(b'{"data":2}', 0))
        await until(lambda: two.heard)
        assert one.heard == [1, 2] and two.heard == [2]


@asynchronous
async def test_nothing_comes_after_the_end() -> None:
    async with world() as here:
        ears, subscriber = await here.subscribe("a")
        other, _ = await here.subscribe("a")
        here.node.on_message("a", BusMessage(b'{"data":1}', 0))
        here.unsubscribe(subscriber)
        here.publish("a", 2)
        await until(lambda: len(other.heard) == 2)
        assert ears.heard == [] and here.metrics.subscriptions == 1


@asynchronous
async def test_to_everybody() -> None:
    async with world() as here:
        ears = Ears()
        here.hub.connect(cast(Sink, ears))
        here.publish(None, 1, 2)
        await until(lambda: ears.heard == [1, 2])
        assert ears.sends == [("", 2, "disconnect")] and not here.interest


@asynchronous
async def test_the_servers_own_channels() -> None:
    async with world() as here:
        told: list[bytes] = []
        await here.node.listen("$own", lambda message: told.append(message.payload))
        await here.subscribe("a")
        here.bus._tell("$own", BusMessage(b"x", 0))
        await until(lambda: told == [b"x"])
        assert await here.node.channels() == ["a"], "they are not shown"


@asynchronous
async def test_the_list_of_channels_is_a_second_old_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as here:
        await here.subscribe("a")
        lists = await asyncio.gather(*(here.node.channels() for _ in range(5)))
        await here.subscribe("b")
        assert lists == [["a"]] * 5 and await here.node.channels() == ["a"]
        monkeypatch.setattr("tornado_bcast.node.LIST_AGE", 0.0)
        assert await here.node.channels() == ["a", "b"]


# Persistent channels: holes


@asynchronous
async def test_a_channel_begins_at_its_head() -> None:
    async with world() as here:
        here.publish("p", 1, 2, 3, persistent=True)
        ears, subscriber = await here.subscribe("p", KEPT)
        assert subscriber.topic.seq == 3
        here.publish("p", 4, persistent=True)
        await until(lambda: ears.seqs == [4])
        assert ears.sends == [("p", 1, "wait")]


@asynchronous
async def test_holes_are_filled_before_anything_newer() -> None:
    async with world() as here:
        (one, _), (two, _) = [await here.subscribe("p", KEPT) for _ in range(2)]
        here.bus.loses = lambda message: message.seq in (3, 4, 8)
        for number in range(1, 11):
            here.publish("p", number, persistent=True)
            await asyncio.sleep(0)
        await until(lambda: len(one.seqs) == 10)
        assert one.seqs == two.seqs == list(range(1, 11))
        assert not here.lost and here.metrics.delivered == 20


@asynchronous
async def test_what_comes_while_a_hole_is_filled() -> None:
    async with world() as here:
        ears, _ = await here.subscribe("p", KEPT)
        here.bus.loses = lambda message: message.seq == 2
        here.bus.open.clear()
        for number in range(1, 300):
            here.publish("p", number, persistent=True)
            await asyncio.sleep(0)
        assert ears.seqs == [1], "not one past the hole"
        reads = len([call for call in here.bus.calls if call.startswith("read")])
        here.bus.open.set()
        await until(lambda: len(ears.seqs) == 299)
        assert ears.seqs == list(range(1, 300))
        assert len([call for call in here.bus.calls if call.startswith("read")]) <= reads + 4, "in pieces"


@asynchronous
async def test_a_stream_that_cannot_be_read_is_asked_again() -> None:
    async with world() as here:
        ears, _ = await here.subscribe("p", KEPT)
        here.bus.loses = lambda message: message.seq == 1
        here.bus.failures = 3
        here.publish("p", 1, 2, persistent=True)
        await until(lambda: ears.seqs == [1, 2])
        assert here.bus.failures == 0


@asynchronous
async def test_the_last_message_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing newer shows the hole: the heads are compared from time to time, and after a gap at once."""
    with monkeypatch.context() as patch:
        # It is the gap that is looked at first, so the other way to the same end is shut.
        patch.setattr(Node, "_next_head_checks", lambda node: repeat([]))
        async with world() as here:
            ears, _ = await here.subscribe("p", KEPT)
            here.bus.loses = lambda message: True
            here.publish("p", 1, 2, persistent=True)
            await asyncio.sleep(0.05)
            assert ears.seqs == []
            here.node.on_gap(["p", "unknown"])
            await until(lambda: ears.seqs == [1, 2])
    monkeypatch.setattr("tornado_bcast.node.HEAD_CHECK", 1.0)
    async with world() as here:
        ears, _ = await here.subscribe("p", KEPT)
        here.bus.loses = lambda message: True
        here.publish("p", 1, 2, persistent=True)
        await until(lambda: ears.seqs == [1, 2])


@asynchronous
async def test_what_was_heard_already_is_not_told_again() -> None:
    async with world() as here:
        ears, subscriber = await here.subscribe("p", KEPT)
        here.publish("p", 1, 2, persistent=True)
        await until(lambda: ears.seqs == [1, 2])
        topic = subscriber.topic
        for seq in (1, 2, 1):
            here.node.on_message("p", BusMessage(b'{"data":0}', 0, seq, topic.epoch))
        here.publish("p", 3, persistent=True)
        await until(lambda: ears.seqs == [1, 2, 3])
        assert topic.filling is None


@pytest.mark.logs("history_lost")
@asynchronous
async def test_a_hole_that_cannot_be_filled_is_told_once() -> None:
    async with world() as here:
        rule = replace(KEPT, history_size=3)
        (one, first), (two, second) = [await here.subscribe("p", rule) for _ in range(2)]
        here.publish("p", 1, persistent=True)
        await until(lambda: one.seqs == [1])
        here.bus.loses = lambda message: True
        for number in range(2, 10):
            here.bus.publish(publication("p", number, persistent=True, history_size=3))
        await asyncio.sleep(0.01)
        here.bus.loses = lambda message: False
        here.bus.publish(publication("p", 10, persistent=True, history_size=3))
        await until(lambda: one.seqs[-1:] == two.seqs[-1:] == [10])
        assert one.seqs == two.seqs == [1, 8, 9, 10], "it goes on with the oldest one left"
        epoch = first.topic.epoch
        assert here.lost == [(first, "p", epoch, 7), (second, "p", epoch, 7)]
        here.publish("p", 11, persistent=True)
        await until(lambda: one.seqs[-1] == two.seqs[-1] == 11)
        assert len(here.lost) == 2


@pytest.mark.logs("history_lost")
@asynchronous
async def test_a_history_that_begins_anew_is_told_once() -> None:
    async with world() as here:
        ears, subscriber = await here.subscribe("p", KEPT)
        here.publish("p", 1, 2, persistent=True)
        await until(lambda: ears.seqs == [1, 2])
        old = subscriber.topic.epoch
        here.bus.forget("p")
        here.publish("p", "new 1", "new 2", persistent=True)
        await until(lambda: ears.heard[-1:] == ["new 2"])
        assert ears.seqs == [1, 2, 1, 2]
        ((told, name, epoch, seq),) = here.lost
        assert (told, name, seq) == (subscriber, "p", 0) and epoch != old
        here.publish("p", "new 3", persistent=True)
        await until(lambda: ears.seqs[-1] == 3)
        assert len(here.lost) == 1


@asynchronous
async def test_a_reader_that_is_slow_misses_nothing_and_holds_up_nobody() -> None:
    async with world() as here:
        (slow, subscriber), (good, _) = [await here.subscribe("p", KEPT) for _ in range(2)]
        slow.queued = 1
        for number in range(1, 400):
            here.publish("p", number, persistent=True)
            await asyncio.sleep(0)
        await until(lambda: len(good.seqs) == 399)
        assert slow.seqs == [] and here.metrics.delivered == 399
        slow.queued = 0
        here.node.dispatch.advance(subscriber)
        await until(lambda: len(slow.seqs) == 399)
        assert slow.seqs == good.seqs == list(range(1, 400))
        # It is live again.
        here.publish("p", 400, persistent=True)
        await until(lambda: slow.seqs[-1] == good.seqs[-1] == 400)
        assert subscriber.topic.live.keys() == {cast(Sink, slow), cast(Sink, good)}


@asynchronous
async def test_where_a_position_is() -> None:
    async with world() as here:
        here.publish("p", *range(1, 11), persistent=True)
        _, subscriber = await here.subscribe("p", KEPT)
        topic: Topic = subscriber.topic
        for since, last, place in (
            (None, None, (10, True)),
            (None, 0, (10, True)),
            (None, 3, (7, True)),
            (None, 100, (0, True)),
            (Position(topic.epoch, 0), None, (0, True)),
            (Position(topic.epoch, 4), None, (4, True)),
            (Position(topic.epoch, 10), None, (10, True)),
            (Position(topic.epoch, 11), None, (0, False)),
            (Position("another", 4), None, (0, False)),
        ):
            assert await here.node.locate(topic, since, last) == place, (since, last)


# The end


@asynchronous
async def test_closing_ends_everything() -> None:
    """The decorator fails on any task that is left."""
    here = World()
    await here.node.start(lambda: b"{}")
    await here.subscribe("a")
    here.bus.open.clear()
    joining = asyncio.create_task(here.node.join("b", PLAIN))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await here.node.close()
    with pytest.raises(Unavailable):
        await joining
    with pytest.raises(Unavailable):
        await here.node.publish("a", PLAIN, "i", b"{}", 0, given=True)
