"""The Redis broker when things go wrong, on a server of each test's own: killed, stopped, misled."""

import asyncio
import logging
import signal
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from broker_kit import Node, Proxy, Way, asynchronous, publication, until
from redis_server import RedisServer, binaries

from tornado_bcast.answer import Answer
from tornado_bcast.brokers import Receipt
from tornado_bcast.brokers.redis import RedisBroker, check_server
from tornado_bcast.errors import ConfigError, Unavailable

Make = Callable[..., RedisServer]

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture(params=binaries().values(), ids=binaries().keys())
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes servers of one binary, not yet started; they end with the test."""
    made: list[RedisServer] = []

    def new(*options: str) -> RedisServer:
        made.append(RedisServer(request.param, *options))
        return made[-1]

    yield new
    for server in made:
        server.close()


@pytest.fixture
def server(make: Make) -> RedisServer:
    return make().start()


def node_on(url: str, **options: Any) -> Node:
    return Node(
        RedisBroker(url, **({"prefix": "bcast", "publish_timeout": 10, "wait_replicas": 0} | options))
    )


@asynccontextmanager
async def up(url: str, **options: Any) -> AsyncIterator[Node]:
    """A node, once all is well with it."""
    async with node_on(url, **options) as node:
        await until(lambda: node.broker.health().up)
        yield node


async def fate(answer: Answer[Receipt]) -> Receipt | str:
    """The receipt, or the reason why there is none."""
    try:
        return await answer
    except Unavailable as error:
        assert 500 <= error.retry_after <= 1500
        return str(error)


async def refusal(node: Node, *args: Any, **more: Any) -> str:
    """Why a publication is not taken."""
    answer = await fate(node.broker.publish(publication(*args, **more)))
    assert isinstance(answer, str), answer
    return answer


def events(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    return Counter(getattr(record, "event", "none") for record in caplog.records)


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


class TestOutage:
    @asynchronous
    async def test_crashes_in_mid_publishing(self, make: Make) -> None:
        """What can be told apart is taken exactly once, in order; of the rest each one's fate is told."""
        server = make(*DURABLE).start()
        futures: dict[str, list[Answer[Receipt]]] = {"kept": [], "once": [], "plain": []}
        async with up(server.unix_url) as here, up(server.unix_url) as there:
            for channel in futures:
                await there.broker.subscribe(channel)
            running = True

            async def publish() -> None:
                while running:
                    step = len(futures["kept"])
                    for name, more in (
                        ("kept", {"persistent": True}),
                        ("once", {"dedup_ttl": 60}),
                        ("plain", {}),
                    ):
                        message = publication(name, step, **({"history_size": 100_000} | more))
                        futures[name].append(here.broker.publish(message))
                    if step % 5 == 0:
                        await asyncio.sleep(0.001)

            publishing = asyncio.create_task(publish())
            for _ in range(3):
                told = len(there.messages)
                await until(lambda told=told: len(there.messages) > told + 300)
                server.stop(signal.SIGKILL)
                await asyncio.sleep(0.2)
                server.start()
                await until(lambda: here.broker.health().up and there.broker.health().up)
            running = False
            await publishing
            fates = {name: [await fate(future) for future in futures[name]] for name in futures}

            kept = fates["kept"]
            assert [each.seq for each in kept] == list(range(1, len(kept) + 1))
            assert not any(each.duplicate for each in (*kept, *fates["once"]))
            read = []
            while len(read) < len(kept):
                history = await there.broker.read("kept", len(read), 1000)
                read += history.messages
            assert [message.seq for message in read] == list(range(1, len(kept) + 1))
            assert history.seq == len(kept)
            # Each restart is another master, so each one has begun an epoch.
            assert len(history.ends) == 3
            assert len({each.epoch for each in kept}) == 4
            for step, message in enumerate(read):
                assert b'"data":%d,' % step in message.payload

            plain = fates["plain"]
            refused = {step for step, each in enumerate(plain) if isinstance(each, str)}
            assert {plain[step] for step in refused} <= {"it is not known whether Redis took it"}
            await here.broker.publish(publication("plain", "end"))
            await until(lambda: "end" in there.heard("plain"))
            for channel in futures:
                heard = [data for data in there.heard(channel) if data != "end"]
                assert heard == sorted(set(heard)), f"{channel}: in order, and nothing twice"
            assert Counter(there.gaps) == {"kept": 3, "once": 3, "plain": 3}

    @asynchronous
    async def test_a_start_without_a_server(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        server = make()
        async with node_on(server.url.replace("redis://", "redis://:secret@")) as node:
            assert node.broker.health().up is False
            waiting = asyncio.create_task(node.broker.subscribe("a"))
            early = [node.broker.publish(publication("a", step)) for step in range(3)]
            await until(lambda: node.broker.health().problem)
            await asyncio.sleep(0.3)
            assert not waiting.done() and not any(future.done() for future in early)
            server.options = ("--requirepass", "secret")
            server.start()
            await waiting
            # What was not yet written can wait, of whatever kind it is.
            assert [await future for future in early] == [Receipt()] * 3
            await until(lambda: node.broker.health().up)
            assert node.broker.health().problem is None
            # Nothing had been heard before, so nothing was missed.
            assert node.gaps == []
        assert events(caplog) == {"redis_down": 1, "redis_up": 1}
        assert "secret" not in caplog.text

    @asynchronous
    async def test_a_longer_outage_is_two_lines(
        self, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with up(server.url) as node:
            server.stop()
            await until(lambda: not node.broker.health().up)
            await asyncio.sleep(0.5)
            server.start()
            await until(lambda: node.broker.health().up)
        assert events(caplog) == {"redis_down": 1, "redis_up": 1}

    @asynchronous
    async def test_publications_give_up_in_time(self, server: RedisServer) -> None:
        async with up(server.url, publish_timeout=2) as node:
            loop = asyncio.get_running_loop()
            server.stop()
            start = loop.time()
            first = asyncio.ensure_future(fate(node.broker.publish(publication("a", 1, persistent=True))))
            await asyncio.sleep(1.5)
            # Later ones have their own time.
            second = asyncio.ensure_future(fate(node.broker.publish(publication("a", 2, dedup_ttl=60))))
            assert await first == "Redis cannot be reached"
            assert 1.9 < loop.time() - start < 2.5
            assert not second.done()
            server.start()
            assert await second == Receipt()

    @asynchronous
    async def test_reads_give_up_in_time(self, server: RedisServer) -> None:
        async with up(server.url, publish_timeout=0.3) as node:
            server.stop()
            for work in (node.broker.read("p", 0, 1), node.broker.heads(["a", "b"]), node.broker.channels()):
                with pytest.raises(Unavailable):
                    await work
            with pytest.raises(Unavailable):
                await node.broker.probe()

    @asynchronous
    async def test_a_stuck_server(self, server: RedisServer) -> None:
        """Open connections, and nobody at the other end."""
        async with up(server.url, publish_timeout=0.5) as node:
            await node.broker.subscribe("a")
            server.kill(signal.SIGSTOP)
            unsafe = node.broker.publish(publication("a", 1))
            safe = node.broker.publish(publication("a", 2, dedup_ttl=60))
            assert await fate(unsafe) == await fate(safe) == "Redis did not answer in time"
            assert await refusal(node, "a", 3) == "Redis cannot be reached"
            await until(lambda: not node.broker.health().up)
            with pytest.raises(Unavailable):
                await node.broker.probe()
            server.kill(signal.SIGCONT)
            await until(lambda: node.broker.health().up)
            # The server has found them in its buffers, if it did; a retry is told so.
            receipt = await node.broker.publish(publication("a", 2, dedup_ttl=60))
            await node.broker.publish(publication("a", "end"))
            await until(lambda: "end" in node.heard("a"))
            assert node.heard("a").count(2) == (0 if receipt.duplicate and "a" in node.gaps else 1)

    @asynchronous
    async def test_a_broker_that_never_began(self, make: Make) -> None:
        broker = node_on(make().url).broker
        assert not broker.health().up
        future = broker.publish(publication("a", 1))
        await broker.close()
        assert await fate(future) == "the server is stopping"

    @asynchronous
    async def test_the_queue_is_bounded(self, make: Make) -> None:
        server = make()
        async with node_on(server.url) as node:
            fates = [node.broker.publish(publication("a", step)) for step in range(20_100)]
            assert sum(future.done() for future in fates) == 100
            assert await fate(fates[-1]) == "too much is waiting for Redis"
            big = "x" * (1 << 20)
        for future in fates[:-1]:
            assert isinstance(await fate(future), str)
        async with node_on(server.url) as node:
            fates = [node.broker.publish(publication("a", big, str(step))) for step in range(100)]
            assert sum(not future.done() for future in fates) in (64, 65)
            # Given up by its caller: nothing happens to the others.
            caller = asyncio.ensure_future(fate(fates[0]))
            await asyncio.sleep(0)
            caller.cancel()
            server.start()
            assert await fate(fates[1]) == Receipt()
        for future in fates[1:]:
            await fate(future)

    @asynchronous
    async def test_a_queue_that_is_not_done_in_time_is_full(
        self, server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Redis answers, and more comes than it is asked: what was put behind that would only expire."""
        monkeypatch.setattr("tornado_bcast.brokers.redis_pipeline.BATCH_COMMANDS", 1)
        async with up(server.url, publish_timeout=0.5) as node:
            futures: list[Answer[Receipt]] = []
            while not futures or futures[-1].exception() is None:
                futures += [node.broker.publish(publication("a", len(futures))) for _ in range(100)]
                await asyncio.sleep(0.001)
                assert len(futures) < 20_000, "that many were always too many"
            assert await fate(futures[-1]) == "too much is waiting for Redis"
            # Half a second would have been the time of each, and what waits is done long before.
            assert [await fate(one) for one in futures[:500]] == [Receipt()] * 500
            await until(lambda: all(one.done() for one in futures))
            assert await fate(node.broker.publish(publication("a", "later"))) == Receipt()
            for future in futures:
                await fate(future)

    @asynchronous
    async def test_thousands_of_subscriptions_come_back(self, server: RedisServer) -> None:
        names = [f"c{number}" for number in range(3000)]
        async with up(server.url) as node:
            await asyncio.gather(*(node.broker.subscribe(name) for name in names))
            node.broker.unsubscribe("c7")
            assert server.do("CLIENT", "KILL", "TYPE", "pubsub") == 1
            node.broker.unsubscribe("c8")
            await until(lambda: len(node.gaps) >= 2998)
            assert sorted(node.gaps) == sorted(set(names) - {"c7", "c8"})
            assert set(await node.broker.channels()) == set(names) - {"c7", "c8"}
            await node.broker.publish(publication("c2999", 1))
            await until(lambda: node.heard("c2999") == [1])

    @asynchronous
    async def test_cut_subscriptions_again_and_again(self, server: RedisServer) -> None:
        async with up(server.url) as node:
            await node.broker.subscribe("a")
            for cut in range(1, 11):
                server.do("CLIENT", "KILL", "TYPE", "pubsub")
                await until(lambda cut=cut: len(node.gaps) == cut)
                await node.broker.publish(publication("a", cut))
                await until(lambda cut=cut: node.heard("a")[-1:] == [cut])

    @asynchronous
    async def test_a_deaf_connection_is_found_and_replaced(
        self, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Proxy(server.socket) as proxy, up(proxy.url) as node:
            await node.broker.subscribe("a")
            deaf = [way for way in proxy.connections if b"SUBSCRIBE" in way.said]
            assert len(deaf) == 1
            proxy.filter = lambda way, data: b"" if way in deaf else data
            loop = asyncio.get_running_loop()
            start = loop.time()
            await node.broker.publish(publication("a", 1))
            await until(lambda: not node.broker.health().up)
            await until(lambda: node.gaps == ["a"])
            assert 2 < loop.time() - start < 5
            await until(lambda: node.broker.health().up)
            await node.broker.publish(publication("a", 2))
            await until(lambda: node.heard("a") == [2])
        assert events(caplog) == {"redis_down": 1, "redis_up": 1}
        assert "deaf" in caplog.text

    @asynchronous
    async def test_listening_to_another_server_than_published_to(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As after a failover that left one of two connections with the old master."""
        monkeypatch.setattr("tornado_bcast.brokers.redis.OWN_SILENCE", 4.0)
        old, new = make().start(), make().start()
        async with Proxy(old.socket) as proxy, up(proxy.url) as node, up(old.url) as other:
            await node.broker.subscribe("a")
            proxy.path = new.socket
            for way in proxy.connections:
                if b"SUBSCRIBE" not in way.said:
                    way.abort()
            await until(lambda: not node.broker.health().up)
            # It hears the other one all the while.
            heard = len(other.rows)
            await until(lambda: node.gaps == ["a"])
            assert len(other.rows) > heard
            await until(lambda: node.broker.health().up)
            await node.broker.publish(publication("a", 1))
            await until(lambda: node.heard("a") == [1])

    @asynchronous
    async def test_a_mute_publisher_is_not_taken_for_deafness(self, server: RedisServer) -> None:
        """The ear is not to blame when nothing is said."""
        async with Proxy(server.socket) as proxy, up(proxy.url, publish_timeout=1) as node:
            await node.broker.subscribe("a")
            ear = next(way for way in proxy.connections if b"SUBSCRIBE" in way.said)
            server.do("CLIENT", "PAUSE", 4000)
            await until(lambda: not node.broker.health().up)
            await until(lambda: node.broker.health().up)
            assert ear in proxy.connections
            assert node.gaps == []

    @pytest.mark.parametrize("way", ["url", "unix_url"])
    @asynchronous
    async def test_closing_does_not_wait_for_a_stuck_server(self, server: RedisServer, way: str) -> None:
        loop = asyncio.get_running_loop()
        async with up(getattr(server, way), publish_timeout=0.5) as node:
            server.kill(signal.SIGSTOP)
            # More than sockets take, so that some of it stays in our hands.
            big = "x" * (1 << 20)
            for _ in range(2):
                futures = [node.broker.publish(publication("a", big, str(step))) for step in range(20)]
                for future in futures:
                    assert await fate(future) in ("Redis did not answer in time", "Redis cannot be reached")
            waiting = [node.broker.publish(publication("a", big, str(step))) for step in range(20)]
            subscribing = asyncio.ensure_future(node.broker.subscribe("a"))
            await asyncio.sleep(0.1)
            start = loop.time()
        assert loop.time() - start < 1
        for future in waiting:
            assert await fate(future) in ("the server is stopping", "Redis cannot be reached")
        with pytest.raises(Unavailable):
            await subscribing


class TestLostAnswers:
    """Redis has done it, and its answer is lost on the way."""

    @staticmethod
    @asynccontextmanager
    async def losing(server: RedisServer, **options: Any) -> AsyncIterator[tuple[Node, Callable[[], None]]]:
        async with Proxy(server.socket) as proxy, up(proxy.url, **options) as node:
            await node.broker.subscribe("a")

            def lose() -> None:
                def cut(way: Way, data: bytes) -> bytes:
                    if b"SUBSCRIBE" in way.said:
                        return data
                    proxy.filter = lambda way, data: data
                    way.abort()
                    return b""

                proxy.filter = cut

            yield node, lose

    @asynchronous
    async def test_our_own_second_try_is_no_duplicate(self, server: RedisServer) -> None:
        for more in ({"persistent": True}, {"persistent": True, "dedup_ttl": 0}, {"dedup_ttl": 60}):
            server.do("FLUSHALL")
            async with self.losing(server) as (node, lose):
                lose()
                futures = [node.broker.publish(publication("a", step, **more)) for step in range(20)]
                receipts = [await future for future in futures]
                assert not any(receipt.duplicate for receipt in receipts)
                await node.broker.publish(publication("a", "end"))
                await until(lambda node=node: "end" in node.heard("a"))
                assert node.heard("a") == [*range(20), "end"]
                if more.get("persistent"):
                    assert [receipt.seq for receipt in receipts] == list(range(1, 21))

    @asynchronous
    async def test_what_cannot_be_told_apart_is_not_sent_again(self, server: RedisServer) -> None:
        async with self.losing(server) as (node, lose):
            lose()
            # The last one's key would not outlive the tries.
            answers = [
                node.broker.publish(publication("a", 1)),
                node.broker.publish(publication("a", 2, dedup_ttl=60)),
                node.broker.publish(publication("a", 3, dedup_ttl=1)),
            ]
            unknown = "it is not known whether Redis took it"
            assert [await fate(answer) for answer in answers] == [unknown, Receipt(), unknown]
            await node.broker.publish(publication("a", "end"))
            await until(lambda: "end" in node.heard("a"))
            assert node.heard("a") == [1, 2, 3, "end"]


class TestRefusals:
    @asynchronous
    async def test_out_of_memory(self, server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        async with up(server.url) as node:
            await node.broker.publish(publication("p", 1, persistent=True))
            server.do("CONFIG", "SET", "maxmemory", "1")
            for step in range(2, 5):
                assert await refusal(node, "p", step, persistent=True) == "Redis is out of memory"
            server.do("CONFIG", "SET", "maxmemory", "0")
            assert (await node.broker.publish(publication("p", 5, persistent=True))).seq == 2
        assert events(caplog) == {"redis_refused": 1}

    @asynchronous
    async def test_a_key_of_somebody_else(
        self, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.do("LPUSH", "bcast:{p}:h", "x")
        async with up(server.url) as node:
            reason = await refusal(node, "p", "payload", persistent=True)
            assert reason == "a key that this channel needs in Redis is of another type"
            with pytest.raises(Unavailable):
                await node.broker.read("p", 0, 1)
            assert await node.broker.publish(publication("q", 1, persistent=True))
        assert events(caplog) == {"redis_refused": 2}
        assert "payload" not in caplog.text

    @asynchronous
    async def test_a_user_without_permission(self, server: RedisServer) -> None:
        server.do("ACL", "SETUSER", "joe", "on", ">pw", "~*", "&*", "+@all", "-xadd")
        async with up(server.url.replace("redis://", "redis://joe:pw@")) as node:
            reason = await refusal(node, "p", 1, persistent=True)
            assert reason == "Redis does not allow its user to do this"
            assert await node.broker.publish(publication("a", 1)) == Receipt()

    @asynchronous
    async def test_scripts_are_flushed(self, server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
        async with up(server.url) as node:
            await node.broker.subscribe("p")
            futures = []
            for step in range(100):
                if step % 10 == 0:
                    server.do("SCRIPT", "FLUSH")
                futures.append(node.broker.publish(publication("p", step, persistent=True)))
                await asyncio.sleep(0.001)
            assert [(await future).seq for future in futures] == list(range(1, 101))
            await until(lambda: node.heard("p") == list(range(100)))
            server.do("SCRIPT", "FLUSH")
            assert (await node.broker.read("p", 0, 0)).seq == 100
        assert events(caplog) == {}

    @asynchronous
    async def test_a_replica_is_waited_out(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        master, replica = make("--repl-diskless-sync-delay", "0").start(), make().start()
        async with up(replica.url) as node:
            first = await node.broker.publish(publication("p", 1, persistent=True))
            replica.do("REPLICAOF", "127.0.0.1", master.port)
            # A full copy of an empty master: the channel is gone, and so is its count.
            await until(lambda: not replica.do("EXISTS", "bcast:{p}:h"))
            future = node.broker.publish(publication("p", 2, persistent=True))
            await until(lambda: "replica" in (node.broker.health().problem or ""))
            assert not node.broker.health().up
            await asyncio.sleep(0.3)
            assert not future.done()
            replica.do("REPLICAOF", "NO", "ONE")
            receipt = await future
            assert receipt.seq == 1 and receipt.epoch != first.epoch
            await until(lambda: node.broker.health().up)
            assert node.broker.health().problem is None
        assert events(caplog)["redis_down"] <= 2

    @asynchronous
    async def test_a_password_that_is_mended(
        self, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.do("CONFIG", "SET", "requirepass", "right")
        async with node_on(server.unix_url + "?password=wrong"), up(server.unix_url + "?password=right"):
            pass
        caplog.clear()
        for url in (server.url.replace("redis://", "redis://:hidden@"), server.unix_url + "?password=hidden"):
            async with node_on(url) as node:
                future = node.broker.publish(publication("a", 1))
                await until(lambda node=node: node.broker.health().problem)
                assert (
                    node.broker.health().problem == "Redis refuses the user name or password of [redis] url"
                )
                await asyncio.sleep(0.3)
                with server.client(password="right") as client:
                    client.config_set("requirepass", "hidden")
                assert await future == Receipt()
                await until(lambda node=node: node.broker.health().up)
                with server.client(password="hidden") as client:
                    client.config_set("requirepass", "right")
        assert events(caplog) == {"redis_down": 2, "redis_up": 2}
        assert "hidden" not in caplog.text

    @asynchronous
    async def test_a_server_that_loads(self, make: Make) -> None:
        server = make(*DURABLE, "--key-load-delay", "400").start()
        async with up(server.url) as node:
            futures = [node.broker.publish(publication("p", step, persistent=True)) for step in range(1500)]
            await asyncio.gather(*futures)
            server.stop()
            # It answers once in a thousand commands read.
            server.start(wait=False)
            future = node.broker.publish(publication("p", "new", persistent=True))
            await until(lambda: node.broker.health().problem == "Redis is loading its data")
            assert (await future).seq == 1501

    @asynchronous
    async def test_an_old_server_stays_unused(self, caplog: pytest.LogCaptureFixture) -> None:
        info = b"redis_version:6.0.16\r\nrole:master\r\n"
        with impostor(b"$%d\r\n%s\r\n" % (len(info), info), b"+OK\r\n") as url:
            async with node_on(url, publish_timeout=0.5) as node:
                await until(lambda: "too old" in (node.broker.health().problem or ""))
                assert await refusal(node, "a", 1) == "Redis cannot be reached"
                assert not node.broker.health().up
        assert events(caplog) == {"redis_down": 1}
        assert caplog.records[0].levelname == "ERROR"

    @asynchronous
    async def test_a_policy_that_throws_keys_away(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        server = make("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").start()
        async with up(server.url) as node:
            assert "noeviction" in (node.broker.health().problem or "")
        assert events(caplog) == {"redis_problem": 1}

    @asynchronous
    async def test_what_is_not_ours_is_dropped(
        self, server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with up(server.url) as node:
            await node.broker.subscribe("a")
            for name in ("bcast:{a}", "bcast:$all", "bcast:$workers"):
                for text in ("private", "", "1 2", "x - 3\n{}"):
                    server.do("PUBLISH", name, text)
            await node.broker.publish(publication("a", 1))
            await until(lambda: node.heard("a") == [1])
            assert len(node.messages) == 1
        assert events(caplog) == {"foreign_message": 1}
        assert "private" not in caplog.text


class TestReplicas:
    @asynchronous
    async def test_taken_is_what_a_replica_has(self, make: Make) -> None:
        master, replica = make("--repl-diskless-sync-delay", "0").start(), make().start()
        replica.do("REPLICAOF", "127.0.0.1", master.port)
        await until(lambda: b"master_link_status:up" in raw_info(replica))
        async with up(master.url, wait_replicas=1, publish_timeout=2) as node:
            futures = [node.broker.publish(publication("p", step, persistent=True)) for step in range(50)]
            assert [(await future).seq for future in futures] == list(range(1, 51))
            assert replica.do("XLEN", "bcast:{p}:s") == 50
            replica.kill(signal.SIGSTOP)
            missing = "too few replicas have it: send it again with the same messageId"
            assert await refusal(node, "p", 50, persistent=True) == missing
            # Said to have been taken already: that does not make it safe.
            assert await refusal(node, "p", 50, persistent=True) == missing
            # At most once anyhow, so nobody waits.
            assert await node.broker.publish(publication("a", 1)) == Receipt()
            replica.kill(signal.SIGCONT)
            await until(lambda: b"master_link_status:up" in raw_info(replica))
            receipt = await node.broker.publish(publication("p", 50, persistent=True))
            assert (receipt.duplicate, receipt.seq) == (True, 51)

    @asynchronous
    async def test_two_masters_never_give_one_number_twice(self, make: Make) -> None:
        old, new = make("--repl-diskless-sync-delay", "0").start(), make().start()
        new.do("REPLICAOF", "127.0.0.1", old.port)
        await until(lambda: b"master_link_status:up" in raw_info(new))
        async with up(old.url) as before, node_on(new.url) as after:
            first = await before.broker.publish(publication("p", 1, persistent=True))
            await until(lambda: new.do("XLEN", "bcast:{p}:s") == 1)
            new.do("REPLICAOF", "NO", "ONE")
            await until(lambda: after.broker.health().up)
            here = await before.broker.publish(publication("p", 2, persistent=True))
            there = await after.broker.publish(publication("p", 3, persistent=True))
            assert (here.seq, here.epoch) == (2, first.epoch)
            assert there.seq == 2 and there.epoch != first.epoch
            history = await after.broker.read("p", 0, 10)
            assert history.ends == {first.epoch: 1}
            assert history.continues(first.epoch, 1)
            assert not history.knows(first.epoch, 2)


def raw_info(server: RedisServer) -> bytes:
    with server.client() as client:
        client.set_response_callback("INFO", lambda answer: answer)
        info: bytes = client.execute_command("INFO")
        return info


@contextmanager
def impostor(answer: bytes, otherwise: bytes | None = None) -> Iterator[str]:
    """Something that takes connections and says one thing to INFO, and it or another to whatever else."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    while data := connection.recv(4096):
                        connection.sendall(answer if otherwise is None or b"INFO" in data else otherwise)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


class TestCheck:
    """What the parent learns before it starts anything."""

    def test_all_is_well(self, server: RedisServer) -> None:
        assert check_server(server.url) is check_server(server.unix_url) is None

    def test_nobody_there(self, make: Make) -> None:
        warning = check_server(make().url.replace("redis://", "redis://joe:hidden@"))
        assert warning is not None and "cannot be reached" in warning
        assert "hidden" not in warning

    def test_a_stuck_server(self, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tornado_bcast.brokers.redis_link.CONNECT_TIMEOUT", 0.3)
        server.kill(signal.SIGSTOP)
        assert "does not answer" in (check_server(server.url) or "")

    def test_a_wrong_password(self, server: RedisServer) -> None:
        server.do("CONFIG", "SET", "requirepass", "right")
        for url in (
            server.url,
            server.url.replace("redis://", "redis://:hidden@"),
            server.unix_url + "?password=hidden",
        ):
            with pytest.raises(ConfigError, match="user name or password") as error:
                check_server(url)
            assert "hidden" not in str(error.value)
        assert check_server(server.url.replace("redis://", "redis://:right@")) is None

    def test_settings_that_lose_keys(self, make: Make) -> None:
        server = make("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru").start()
        assert "noeviction" in (check_server(server.url) or "")

    @pytest.mark.parametrize(
        "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"220 mail ready\r\n", b"+OK\r\n"]
    )
    def test_no_redis(self, answer: bytes) -> None:
        with impostor(answer) as url, pytest.raises(ConfigError):
            check_server(url)

    def test_no_tls(self) -> None:
        with impostor(b"-ERR unknown command\r\n") as url, pytest.raises(ConfigError, match="SSL"):
            check_server(url.replace("redis://", "rediss://"))

    def test_an_old_redis(self) -> None:
        info = b"redis_version:6.0.16\r\nrole:master\r\n"
        with (
            impostor(b"$%d\r\n%s\r\n" % (len(info), info), b"+OK\r\n") as url,
            pytest.raises(ConfigError, match=r"6\.0\.16"),
        ):
            check_server(url)

    @pytest.mark.parametrize(
        "url",
        [
            "http://x",
            "redis://h:port",
            "redis://h/?db=x",
            "redis://h/?nonsense=1",
            "redis://u:hidden@h/?socket_timeout=x",
        ],
    )
    def test_urls_that_cannot_be_understood(self, url: str) -> None:
        with pytest.raises(ConfigError, match="url") as error:
            RedisBroker(url, prefix="p", publish_timeout=1, wait_replicas=0)
        assert "hidden" not in str(error.value)
