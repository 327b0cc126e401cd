"""Sessions over two workers in every order of events: in memory, and by the Lua scripts on a real server."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import pytest
import redis
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
from redis_server import RedisServer
from worker_kit import SESSION_TTL, Clockwork, Peer, Store, Worker, make_rule

from tornado_bcast.brokers import SavedAs, SessionChange, SessionStore, StoredSession, decode_bus
from tornado_bcast.brokers.memory import MemorySessions
from tornado_bcast.brokers.redis_commands import RESUME, SAVE
from tornado_bcast.config import ChannelsConfig
from tornado_bcast.errors import CloseCode
from tornado_bcast.keeper import SAVE_SECONDS
from tornado_bcast.rules import Principal
from tornado_bcast.session import Session

CHANNELS = ("p0", "p1", "plain")
# Saves are begun within SAVE_SECONDS; the wheel may be a tick late.
SAVED_WITHIN = SAVE_SECONDS + 0.5


class ScriptSessions:
    """The Lua scripts on a real server, each call at once; time there passes when it is told so."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        client.flushall()
        self._ear = client.pubsub()
        self._ear.psubscribe("t:*")
        self._ear.get_message(timeout=5)
        self.tell: Callable[[str, bytes], None] = lambda owner, notice: None

    @staticmethod
    def key(name: str) -> str:
        return f"t:session:{name}"

    async def resume(self, name: str, principal: str, owner: str, ttl: float) -> StoredSession | None:
        arguments = (principal, owner, "t", int(ttl * 1000), name)
        answer = cast(Any, self._client.eval(RESUME.text, 1, self.key(name), *arguments))
        if not answer:
            return None
        heard = self._ear.get_message(timeout=5)
        assert heard is not None
        self.tell(heard["channel"].decode()[3:-1], decode_bus(heard["data"]).payload)
        texts = [item.decode() for item in answer]
        fields = dict(zip(texts[::2], texts[1::2], strict=True))
        channels = {name[2:]: value for name, value in fields.items() if name.startswith("s:")}
        return StoredSession(fields["client"], int(fields["generation"]), channels)

    async def save(self, name: str, change: SessionChange, ttl: float) -> SavedAs:
        fields = [text for channel, value in change.channels.items() for text in ("s:" + channel, value)]
        answer = self._client.eval(
            SAVE.text,
            1,
            self.key(name),
            *(change.generation, int(ttl * 1000), int(change.whole), change.principal, change.client_id),
            *(change.owner, *fields),
        )
        return cast(SavedAs, cast(bytes, answer).decode())

    def pass_time(self, seconds: float) -> None:
        for key in self._client.keys("t:session:*"):
            self._client.pexpire(key, max(0, self._client.pttl(key) - int(seconds * 1000)))

    def flush(self) -> None:
        self._client.flushall()

    def content(self, name: str) -> object:
        return self._client.hgetall(self.key(name))

    def close(self) -> None:
        self._ear.close()
        self._client.close()


class PlainSessions(MemorySessions):
    """Those of `memory:`, with the same handles for the test."""

    def __init__(self, loop: Clockwork) -> None:
        self.tell: Callable[[str, bytes], None] = lambda owner, notice: None
        super().__init__(lambda: loop.now, lambda owner, notice: self.tell(owner, notice))

    def pass_time(self, seconds: float) -> None:
        pass

    def flush(self) -> None:
        self._sessions.clear()

    def content(self, name: str) -> object:
        return deepcopy(self._sessions.get(name))

    def close(self) -> None:
        pass


def pass_time(loop: Clockwork, sessions: PlainSessions | ScriptSessions, seconds: float) -> None:
    """For all of them, in steps that are small beside what is waited for."""
    while seconds > 0:
        step = min(seconds, 20.0)
        sessions.pass_time(step)
        loop.turn_on(step, 0.25 if step < 20 else 4.0)
        seconds -= step


class Client:
    """Somebody who comes back. `peer` is the last connection begun, `known` the last that was answered."""

    def __init__(self, peer: Peer) -> None:
        self.peer = self.known = peer
        # When the server last knew of a connection of this session.
        self.left_at = 0.0
        # When the store lost the session, and it may not have been written again; None when it is there.
        self.gone_at: float | None = None


class Sessions(RuleBasedStateMachine):
    """Two workers, a store, clients that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Clockwork()
        self.sessions = self.make_sessions()
        self.store = Store(self.loop, 1000, cast(SessionStore, self.sessions))
        self.sessions.tell = self.store.tell_worker
        # Delivery is another test's: nobody is too slow with acks here.
        acks = make_rule(ack_timeout=1e6)
        plain = replace(acks, pattern="plain", persistent=False)
        self.channels = ChannelsConfig(acks, (plain,), "server")
        self.workers = [self.make_worker(), self.make_worker()]
        self.clients: list[Client] = []
        # Connections that were taken over, and when.
        self.taken: list[tuple[Peer, float]] = []
        # When something last failed or was late.
        self.trouble_at = self.loop.now

    def make_sessions(self) -> PlainSessions | ScriptSessions:
        return PlainSessions(self.loop)

    def make_worker(self) -> Worker:
        return Worker(self.store, self.channels).start()

    def teardown(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.sessions.close()
        self.loop.close()

    @property
    def quiet_since(self) -> float:
        """Since when everything has been done and answered at once."""
        if any(worker.broker.manual for worker in self.workers):
            return self.loop.now
        return self.trouble_at

    # Clients

    @initialize()
    def begin(self) -> None:
        self.connect(0, True)

    @precondition(lambda self: len(self.clients) < 3)
    @rule(number=st.integers(0, 1), subscribed=st.booleans())
    def connect(self, number: int, subscribed: bool) -> None:
        client = Client(Peer(self.workers[number]).open())
        self.clients.append(client)
        if subscribed:
            for channel in CHANNELS:
                client.peer.subscribe(channel, ack=True)

    def some_client(self, data: st.DataObject) -> Client:
        return data.draw(st.sampled_from([client for client in self.clients if client.peer.alive]))

    some_are_there = precondition(lambda self: any(client.peer.alive for client in self.clients))

    @some_are_there
    @rule(data=st.data(), channel=st.sampled_from(CHANNELS), ack=st.booleans())
    def subscribe(self, data: st.DataObject, channel: str, ack: bool) -> None:
        peer = self.some_client(data).peer
        if channel not in peer.unsure:
            peer.subscribe(channel, ack=ack)

    @some_are_there
    @rule(data=st.data(), channel=st.sampled_from(CHANNELS))
    def unsubscribe(self, data: st.DataObject, channel: str) -> None:
        peer = self.some_client(data).peer
        if channel not in peer.unsure:
            peer.unsubscribe(channel)

    @some_are_there
    @rule(data=st.data(), channel=st.sampled_from(CHANNELS[:2]), part=st.floats(0, 1))
    def ack(self, data: st.DataObject, channel: str, part: float) -> None:
        peer = self.some_client(data).peer
        watcher = peer.watchers.get(channel)
        if watcher is not None and channel not in peer.unsure:
            seq = watcher.acked + round(part * (watcher.seq - watcher.acked))
            peer.ack(channel, seq, watcher.epoch)

    @some_are_there
    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        client = self.some_client(data)
        client.left_at = self.loop.now
        client.peer.disconnect()

    @rule(data=st.data(), number=st.integers(0, 1))
    def resume(self, data: st.DataObject, number: int) -> None:
        """Also while the old connection still stands, for all the server knows."""
        client = data.draw(st.sampled_from(self.clients))
        if client.peer.opened or client.peer.closed:
            client.peer = Peer(self.workers[number], heir=client.known).open()
            self.look(client)

    # The workers and the store

    @rule(channel=st.sampled_from(CHANNELS[:2]), count=st.integers(1, 5))
    def publish(self, channel: str, count: int) -> None:
        for _ in range(count):
            self.store.publish(channel)
        for worker in self.workers:
            worker.run(worker.broker.hear)

    @rule(number=st.integers(0, 1))
    def kill(self, number: int) -> None:
        worker = self.workers[number]
        for client in self.clients:
            if client.known in worker.peers:
                client.left_at = self.loop.now
            if client.peer.worker is worker:
                client.peer.closed = True
        worker.kill()
        self.workers[number] = self.make_worker()

    @rule(seconds=st.sampled_from([0.25, 1.0, 6.0, 200.0, SESSION_TTL]))
    def wait(self, seconds: float) -> None:
        if any(worker.broker.manual for worker in self.workers):
            # Not so long that nothing can be renewed.
            seconds = min(seconds, 6.0)
        pass_time(self.loop, self.sessions, seconds)

    @rule(number=st.integers(0, 1), late=st.booleans())
    def let_wait(self, number: int, late: bool) -> None:
        """From now on answers of the store come when they are let, or at once again."""
        self.workers[number].broker.manual = late
        if not late:
            self.go_on(number)
        self.trouble_at = self.loop.now

    @rule(number=st.integers(0, 1))
    def go_on(self, number: int) -> None:
        worker = self.workers[number]
        for _ in range(10):
            worker.broker.execute()
            worker.run(worker.broker.answer)

    @rule(number=st.integers(0, 1), done=st.booleans())
    def fail(self, number: int, done: bool) -> None:
        """What is under way fails, whether it was done or not."""
        worker = self.workers[number]
        if done:
            worker.broker.execute()
        worker.run(worker.broker.fail)
        self.trouble_at = self.loop.now

    @rule(number=st.integers(0, 1))
    def lose_notices(self, number: int) -> None:
        self.workers[number].broker.bus.clear()

    @rule(number=st.integers(0, 1))
    def hear(self, number: int) -> None:
        worker = self.workers[number]
        worker.run(worker.broker.hear)

    @rule(data=st.data(), number=st.integers(0, 1), known=st.booleans())
    def try_to_steal(self, data: st.DataObject, number: int, known: bool) -> None:
        """Another principal with the id, or a guess: nothing is told, nothing changed."""
        session_id = data.draw(st.sampled_from(self.clients)).known.session.id if known else "guess"
        worker = self.workers[number]
        if worker.broker.manual:
            return
        name = Session.name(session_id)
        before, heard = self.sessions.content(name), len(worker.broker.bus)
        thief = worker.keeper.resume(session_id, Principal("thief"))
        assert self.loop.run_until_complete(thief) is None
        assert self.sessions.content(name) == before
        assert len(worker.broker.bus) == heard

    @rule()
    def flush(self) -> None:
        """FLUSHALL, as far as sessions are concerned."""
        self.sessions.flush()
        for client in self.clients:
            client.gone_at = self.loop.now
        # An older connection that has not noticed yet may be the first to write its session again: of those
        # nothing is said here.
        torn = {peer.session.id for peer, _ in self.taken if not peer.closed}
        self.clients = [client for client in self.clients if client.known.session.id not in torn]
        if not self.clients:
            self.connect(0, True)

    # What holds

    def look(self, client: Client) -> None:
        """A new connection has been told what its session knew."""
        old, new = client.known, client.peer
        if not new.opened or new is old:
            return
        client.known = new
        if old.opened:
            self.taken.append((old, self.loop.now))
        left_at = client.left_at if old.closed else self.loop.now
        if not new.resumed:
            expired = self.loop.now - left_at >= SESSION_TTL
            assert client.gone_at is not None or expired or not old.promised, "the session is lost"
            client.gone_at = None
            return
        for channel in CHANNELS:
            if channel in old.unsure:
                continue
            assert new.promised.get(channel) == old.promised.get(channel), channel
            watcher, before = new.watchers.get(channel), old.watchers.get(channel)
            if watcher and before and watcher.acks:
                assert watcher.acked <= before.acked
                if left_at - max(self.quiet_since, before.acked_at) > SAVED_WITHIN:
                    assert watcher.acked == before.acked

    @invariant()
    def holds(self) -> None:
        for client in self.clients:
            self.look(client)
            # Whatever becomes of the older ones.
            assert client.peer.code is None, client.peer.code
            if client.gone_at is not None and client.peer.alive and client.peer is client.known:
                if self.loop.now - max(client.gone_at, self.quiet_since) > SESSION_TTL / 3 + SAVED_WITHIN:
                    # Its connection has written it again, in whole.
                    client.gone_at = None
        for peer, since in list(self.taken):
            if peer.closed:
                assert peer.code in (None, CloseCode.SESSION_TAKEN)
                self.taken.remove((peer, since))
            elif peer.session.id in {client.known.session.id for client in self.clients}:
                assert self.loop.now - max(since, self.quiet_since) < SESSION_TTL / 3 + SAVED_WITHIN


class ScriptedSessions(Sessions):
    """The same on the scripts."""

    server: RedisServer

    def make_sessions(self) -> ScriptSessions:
        return ScriptSessions(self.server.client())


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


def test_sessions_in_memory() -> None:
    run_machine(Sessions, 100, 50)


def test_sessions_by_the_scripts(redis_server: RedisServer) -> None:
    run_machine(type("OnServer", (ScriptedSessions,), {"server": redis_server}), 40, 40)


# One thing at a time


class Scene:
    """Two workers over one store, on which a test turns the clock."""

    def __init__(self, server: RedisServer | None) -> None:
        self.loop = Clockwork()
        self.sessions = ScriptSessions(server.client()) if server else PlainSessions(self.loop)
        self.store = Store(self.loop, 1000, cast(SessionStore, self.sessions))
        self.sessions.tell = self.store.tell_worker
        plain = make_rule(pattern="plain", persistent=False)
        self.channels = ChannelsConfig(make_rule(ack_timeout=1e6), (plain,), "server")
        self.workers = [Worker(self.store, self.channels).start() for _ in range(2)]

    def peer(self, *, acked: int = 0) -> Peer:
        """On the first worker, subscribed to a channel, of which it has acked the first messages."""
        peer = Peer(self.workers[0]).open()
        peer.subscribe("p0", ack=True)
        for _ in range(10):
            self.store.publish("p0")
        self.workers[0].run(self.workers[0].broker.hear)
        if acked:
            peer.ack("p0", acked)
        return peer

    def resume(self, peer: Peer) -> Peer:
        """On the second worker."""
        return Peer(self.workers[1], heir=peer).open()

    def kill(self, number: int) -> None:
        """A worker dies, and is replaced."""
        self.workers[number].kill()
        self.workers[number] = Worker(self.store, self.channels).start()

    def turn_on(self, seconds: float) -> None:
        pass_time(self.loop, self.sessions, seconds)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.sessions.close()
        self.loop.close()


@pytest.fixture(params=["memory", "scripts"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    server = request.getfixturevalue("redis_server") if request.param == "scripts" else None
    scene = Scene(server)
    yield scene
    scene.close()


def test_the_end_of_a_connection_saves_at_once(scene: Scene) -> None:
    peer = scene.peer(acked=7)
    peer.disconnect()
    scene.kill(0)
    assert scene.resume(peer).watchers["p0"].acked == 7


def test_acked_positions_are_saved_within_five_seconds(scene: Scene) -> None:
    peer = scene.peer(acked=7)
    scene.turn_on(SAVED_WITHIN)
    scene.kill(0)
    assert scene.resume(peer).watchers["p0"].acked == 7


@pytest.mark.parametrize("done", [False, True])
def test_what_could_not_be_saved_is_saved_soon(scene: Scene, done: bool) -> None:
    """By a command of the client or by the clock, done all the same or not."""
    peer = scene.peer(acked=7)
    broker = scene.workers[0].broker
    broker.manual = True
    peer.subscribe("plain")
    peer.ack("p0", 9)
    for _ in range(2):
        scene.turn_on(SAVED_WITHIN)
        if done:
            broker.execute()
        scene.workers[0].run(broker.fail)
    broker.manual = False
    scene.turn_on(SAVED_WITHIN)
    scene.kill(0)
    heir = scene.resume(peer)
    assert heir.watchers["p0"].acked == 9
    assert "plain" not in heir.promised


def test_a_first_save_that_failed_is_done_in_whole(scene: Scene) -> None:
    scene.workers[0].broker.manual = True
    peer = Peer(scene.workers[0]).open()
    scene.turn_on(SAVED_WITHIN)
    scene.workers[0].run(scene.workers[0].broker.fail)
    scene.workers[0].broker.manual = False
    scene.turn_on(SAVED_WITHIN)
    scene.kill(0)
    heir = scene.resume(peer)
    assert heir.resumed and heir.session.client_id == peer.session.client_id


@pytest.mark.parametrize("idle", [0.0, 3 * SESSION_TTL])
def test_a_session_stays_for_its_time_after_its_worker(scene: Scene, idle: float) -> None:
    """Also where it was about to be renewed."""
    peer = scene.peer(acked=7)
    scene.turn_on(idle + SESSION_TTL / 3 - 40)
    scene.kill(0)
    scene.turn_on(SESSION_TTL - 1)
    heir = scene.resume(peer)
    assert heir.resumed
    scene.kill(1)
    scene.turn_on(SESSION_TTL - 1)
    heir = scene.resume(heir)
    assert heir.resumed and heir.watchers["p0"].acked == 7


def test_a_session_ends_after_its_time(scene: Scene) -> None:
    peer = scene.peer()
    peer.disconnect()
    scene.turn_on(SESSION_TTL + 1)
    assert not scene.resume(peer).resumed


def test_the_older_one_is_told(scene: Scene) -> None:
    peer = scene.peer()
    heir = scene.resume(peer)
    scene.workers[0].run(scene.workers[0].broker.hear)
    assert peer.code == CloseCode.SESSION_TAKEN and heir.alive


def test_the_older_one_finds_out(scene: Scene) -> None:
    """Its next write is refused, and nothing of it is written."""
    peer = scene.peer(acked=3)
    heir = scene.resume(peer)
    scene.workers[0].broker.bus.clear()
    peer.ack("p0", 9)
    peer.subscribe("plain")
    assert peer.code == CloseCode.SESSION_TAKEN
    scene.kill(1)
    last = scene.resume(heir)
    assert last.watchers["p0"].acked == 0 and "plain" not in last.promised


def test_one_that_is_overtaken_while_it_is_restored(scene: Scene) -> None:
    """What told of the newer one came before it had begun."""
    peer = scene.peer()
    peer.disconnect()
    first, second = scene.workers
    second.broker.manual = True
    older = scene.resume(peer)
    second.broker.execute()
    newer = Peer(first, heir=peer).open()
    second.run(second.broker.hear)
    second.broker.manual = False
    second.run(second.broker.answer)
    scene.turn_on(SAVED_WITHIN)
    assert older.code == CloseCode.SESSION_TAKEN
    assert newer.alive


def test_the_newer_one_stays_whichever_begins_first(scene: Scene) -> None:
    """Both on one worker."""
    keeper, ended = scene.workers[0].keeper, []

    def session(generation: int) -> Session:
        return Session(StoredSession("client", generation, {}), "id")

    def add() -> None:
        for generation in (2, 4, 3):
            keeper.add(session(generation), lambda *_, number=generation, **__: ended.append(number))

    scene.workers[0].run(add)
    assert ended == [2, 3]


def test_a_session_that_the_store_has_lost_is_written_in_whole(scene: Scene) -> None:
    peer = scene.peer(acked=7)
    peer.subscribe("p1", ack=True)
    peer.subscribe("plain")
    scene.sessions.flush()
    peer.unsubscribe("p1")
    scene.kill(0)
    heir = scene.resume(peer)
    assert heir.resumed and heir.watchers["p0"].acked == 7
    assert heir.promised == {"p0": True, "plain": False}
