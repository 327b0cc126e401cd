"""Sessions against a model: whatever order of changes, saves, take-overs, dead workers and lost data.

Two workers share one store. Each holds connections of a few clients; the model knows what a client was told
(a subscription counts once its save has returned) and what it has acked.
"""

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from tornado_bcast.brokers import BusMessage
from tornado_bcast.brokers.memory import MemorySessions
from tornado_bcast.config import default_config
from tornado_bcast.delivery import Delivery
from tornado_bcast.errors import CloseCode
from tornado_bcast.eventloop import WorkerLoop
from tornado_bcast.keeper import Keeper
from tornado_bcast.rules import Principal
from tornado_bcast.session import Session, Subscription, decode_subscription

TTL = 60.0
CHANNELS = st.sampled_from(["a", "b", "c"])
RULE = default_config().channels.default


class Held:
    """One connection's hold of a session. `closed_with` is the code that its worker ended it with."""

    def __init__(self, worker: "Worker", session: Session) -> None:
        self.worker = worker
        self.session = session
        self.closed_with: CloseCode | None = None
        worker.keeper.add(session, self.end)

    def end(self, code: CloseCode, reason: str = "", *, flush: bool = True) -> None:
        self.closed_with = code
        self.worker.keeper.remove(self.session)

    @property
    def is_open(self) -> bool:
        return self.closed_with is None and self.worker.alive


class Worker:
    def __init__(self, store: MemorySessions) -> None:
        self.keeper = Keeper(store, TTL)
        self.alive = True


class Model:
    """What one client may rely on."""

    def __init__(self) -> None:
        self.principal = ""
        # Channels whose subscribe was acked and whose unsubscribe was not asked for.
        self.subscribed: set[str] = set()
        # The highest seq acked by the client, and the highest of which a save has returned.
        self.acked: dict[str, int] = {}
        self.saved: dict[str, int] = {}


class Sessions(RuleBasedStateMachine):
    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.loop = WorkerLoop()
        asyncio.set_event_loop(self.loop)
        self.now = 1000.0
        self.notices: list[tuple[str, bytes]] = []
        self.store = MemorySessions(
            lambda: self.now, lambda owner, notice: self.notices.append((owner, notice))
        )
        self.workers = [Worker(self.store), Worker(self.store)]
        self.models: dict[str, Model] = {}
        self.newest: dict[str, Held] = {}

    def teardown(self) -> None:
        self.run(self.drain())
        asyncio.set_event_loop(None)
        self.loop.close()

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    async def drain(self) -> None:
        for worker in self.workers:
            await worker.keeper.flush()

    def worker(self, index: int) -> Worker:
        if not self.workers[index].alive:
            self.workers[index] = Worker(self.store)
        return self.workers[index]

    @rule(target=holders, index=st.integers(0, 1), principal=st.sampled_from(["", "ann"]))
    def connect(self, index: int, principal: str) -> Held:
        async def work() -> Held:
            session = Session()
            session.admit(Principal(principal))
            return Held(self.worker(index), session)

        held: Held = self.run(work())
        self.models[held.session.id] = Model()
        self.models[held.session.id].principal = principal
        self.newest[held.session.id] = held
        return held

    def save(self, held: Held) -> None:
        session, model = held.session, self.models[held.session.id]
        taken = self.newest[session.id] is not held
        before = self.store._sessions.get(Session.name(session.id))
        self.run(held.worker.keeper.save(session, held.end))
        if taken and held.worker.alive and before is not None:
            # A write of the past changes nothing, and ends the connection that sent it.
            assert held.closed_with is CloseCode.SESSION_TAKEN
            assert self.store._sessions.get(Session.name(session.id)) is before
        elif not taken:
            model.saved = {name: model.acked[name] for name in model.subscribed if name in model.acked}

    @rule(held=holders, channel=CHANNELS, acks=st.booleans(), seq=st.integers(0, 50))
    def subscribe(self, held: Held, channel: str, acks: bool, seq: int) -> None:
        if not held.is_open:
            return
        session, model = held.session, self.models[held.session.id]
        session.subscriptions[channel] = Subscription(RULE, Delivery(RULE, "e", seq, acks=acks))
        session.changed.add(channel)
        if self.newest[session.id] is held:
            model.subscribed.add(channel)
            model.acked.pop(channel, None)
            if acks:
                model.acked[channel] = seq
        self.save(held)

    @rule(held=holders, channel=CHANNELS)
    def unsubscribe(self, held: Held, channel: str) -> None:
        if not held.is_open or channel not in held.session.subscriptions:
            return
        del held.session.subscriptions[channel]
        held.session.changed.add(channel)
        if self.newest[held.session.id] is held:
            self.models[held.session.id].subscribed.discard(channel)
            self.models[held.session.id].acked.pop(channel, None)
        self.save(held)

    @rule(held=holders, channel=CHANNELS, step=st.integers(1, 9))
    def acknowledge(self, held: Held, channel: str, step: int) -> None:
        subscription = held.session.subscriptions.get(channel)
        if not held.is_open or subscription is None or subscription.delivery is None:
            return
        delivery = subscription.delivery
        moved = delivery.acknowledge("e", delivery.acked + step, self.now)
        assert moved is delivery.acks
        if moved:
            held.session.changed.add(channel)
            if self.newest[held.session.id] is held:
                self.models[held.session.id].acked[channel] = delivery.acked

    @rule(held=holders)
    def save_positions(self, held: Held) -> None:
        if held.is_open:
            self.save(held)

    @rule(held=holders)
    def close(self, held: Held) -> None:
        if not held.is_open:
            return

        async def work() -> None:
            held.closed_with = CloseCode.GOING_AWAY
            held.worker.keeper.remove(held.session)
            await held.worker.keeper.flush()

        was_newest = self.newest[held.session.id] is held
        self.run(work())
        if was_newest:
            model = self.models[held.session.id]
            model.saved = dict(model.acked)

    @rule(index=st.integers(0, 1))
    def kill_worker(self, index: int) -> None:
        """Nothing of it is saved any more."""
        self.workers[index].alive = False

    @rule(target=holders, held=holders, index=st.integers(0, 1))
    def resume(self, held: Held, index: int) -> Held:
        session_id, model = held.session.id, self.models[held.session.id]
        stored = self.store._sessions.get(Session.name(session_id))

        async def work() -> Held | None:
            worker = self.worker(index)
            session = await worker.keeper.resume(session_id, Principal(model.principal))
            if session is None:
                return None
            for name, value in session.restorable.items():
                position = decode_subscription(value)
                seq = position.seq if position is not None else 0
                delivery = Delivery(RULE, "e", seq, acks=position is not None)
                session.subscriptions[name] = Subscription(RULE, delivery)
            session.restorable = {}
            return Held(worker, session)

        newer = self.run(work())
        if newer is None:
            assert stored is None or stored.expires_at <= self.now
            return held
        assert newer.session.client_id == held.session.client_id
        # No acked subscription is lost, and none comes back.
        assert set(newer.session.subscriptions) == model.subscribed
        for name, subscription in newer.session.subscriptions.items():
            assert subscription.delivery is not None
            assert subscription.delivery.acks is (name in model.acked)
            if name in model.acked:
                # Never past what was acked, never before what a save has told of.
                assert model.saved.get(name, 0) <= subscription.delivery.acked <= model.acked[name]
                model.acked[name] = subscription.delivery.acked
        previous = self.newest[session_id]
        if previous.worker is newer.worker and previous.is_open:
            assert previous.closed_with is CloseCode.SESSION_TAKEN
        self.newest[session_id] = newer
        return newer

    @rule(held=holders)
    def resume_as_another(self, held: Held) -> None:
        before = self.store._sessions.get(Session.name(held.session.id))
        generation = before.generation if before is not None else None
        assert self.run(self.workers[0].keeper.resume(held.session.id, Principal("somebody-else"))) is None
        if before is not None:
            assert before.generation == generation

    @rule()
    def lose_all_data(self) -> None:
        """FLUSHALL: those with an open connection are written anew in whole by their next save."""
        self.store._sessions.clear()
        for session_id, held in self.newest.items():
            if held.is_open:
                held.session.changed.add("a")
                self.run(held.worker.keeper.save(held.session, held.end))
                model = self.models[session_id]
                model.saved = dict(model.acked)
            else:
                self.models[session_id].saved = {}

    @rule(seconds=st.sampled_from([1.0, TTL / 2, 3 * TTL]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.forget(self.now)

    @invariant()
    def tell_notices(self) -> None:
        """The channel of a living worker delivers what was said on it."""

        async def work() -> None:
            notices, self.notices[:] = list(self.notices), []
            for owner, notice in notices:
                for worker in self.workers:
                    if worker.alive and worker.keeper.channel == owner:
                        worker.keeper.on_notice(BusMessage(notice, 0))
            await self.drain()

        self.run(work())


TestSessions = pytest.mark.timeout(300)(Sessions.TestCase)
TestSessions.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
