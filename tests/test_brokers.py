"""What every broker guarantees: one class, run over each kind and each real server of this machine."""

import asyncio
import json
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
from broker_kit import Node, Proxy, asynchronous, publication, until
from redis_server import RedisServer, binaries, free_port, has_tls

from tornado_bcast.brokers import BusMessage, History, Receipt, decode_bus, encode_bus
from tornado_bcast.brokers.memory import MemoryBroker
from tornado_bcast.brokers.redis import RedisBroker, check_server
from tornado_bcast.errors import ConfigError, Unavailable

prefixes = count()


class Place:
    """Where the brokers of one test meet: a process's memory, or a Redis reached in one of three ways."""

    def __init__(self, kind: str, server: RedisServer | None = None, certificate: Path | None = None) -> None:
        self.kind = kind
        self._server = server
        self._certificate = certificate

    @asynccontextmanager
    async def nodes(self, number: int) -> AsyncIterator[list[Node]]:
        """So many nodes on one bus. On `memory:` it is the same one each time."""
        async with AsyncExitStack() as stack:
            if self.kind == "memory":
                yield [await stack.enter_async_context(Node(MemoryBroker()))] * number
                return
            url = await stack.enter_async_context(self._url())
            options = {"prefix": f"test{next(prefixes)}", "publish_timeout": 10, "wait_replicas": 0}
            yield [
                await stack.enter_async_context(Node(RedisBroker(url, **options), f"node {index}"))
                for index in range(number)
            ]

    @asynccontextmanager
    async def _url(self) -> AsyncIterator[str]:
        server = self._server
        assert server is not None
        if self.kind == "redis":
            yield server.url
        elif self.kind == "unix":
            yield server.unix_url
        else:
            assert self._certificate is not None
            trust = f"?ssl_ca_certs={self._certificate / 'cert.pem'}"
            if has_tls(server.binary):
                yield f"rediss://127.0.0.1:{server.tls_port}/0{trust}"
                return
            # This server was built without TLS: something in front of it speaks it, as is usual then.
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._certificate / "cert.pem", self._certificate / "key.pem")
            async with Proxy(server.socket, context) as proxy:
                yield proxy.url + trust


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The directory of a certificate for 127.0.0.1, its own authority, and of its key."""
    if shutil.which("openssl") is None:
        return None
    place = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key.pem -out cert.pem"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=place,
        check=True,
        capture_output=True,
    )
    return place


@pytest.fixture(scope="module")
def servers(certificate: Path | None) -> Iterator[Callable[[str], RedisServer]]:
    """A running server for each binary, by its name."""
    running: dict[str, RedisServer] = {}
    with ExitStack() as stack:

        def get(name: str) -> RedisServer:
            if name not in running:
                binary, options, port = binaries()[name], [], free_port()
                if has_tls(binary) and certificate is not None:
                    options = f"--tls-port {port} --tls-auth-clients no".split()
                    for option, file in (("cert", "cert"), ("key", "key"), ("ca-cert", "cert")):
                        options += [f"--tls-{option}-file", str(certificate / f"{file}.pem")]
                running[name] = stack.enter_context(RedisServer(binary, *options, tls_port=port))
            return running[name]

        yield get


KINDS = [("memory", ""), *((kind, name) for name in binaries() for kind in ("redis", "unix", "rediss"))]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(filter(None, kind)))
def place(
    request: pytest.FixtureRequest,
    servers: Callable[[str], RedisServer],
    certificate: Path | None,
) -> Place:
    kind, name = request.param
    if kind == "memory":
        return Place(kind)
    if kind == "rediss" and certificate is None:
        pytest.skip("rediss:// is NOT tested here: no openssl command to make a certificate with")
    return Place(kind, servers(name), certificate)


def test_there_is_a_real_server() -> None:
    assert binaries(), "no Redis-compatible server on this machine: none of the guarantees were tested"


class TestBroker:
    """The guarantees of `Broker`."""

    @asynchronous
    async def test_subscribers_hear_what_is_published_in_one_order(self, place: Place) -> None:
        async with place.nodes(3) as (one, two, three):
            for node in (one, two):
                await node.broker.subscribe("news")
            receipts = [
                node.broker.publish(publication("news", f"{index} {step}"))
                for step in range(200)
                for index, node in enumerate((one, two, three))
            ]
            assert set(await asyncio.gather(*receipts)) == {Receipt()}
            if one is two:
                await until(lambda: len(one.messages) == 600)
            else:
                await until(lambda: len(one.messages) == len(two.messages) == 600)
            assert one.messages == two.messages
            for index in range(3):
                own = [data for data in one.heard("news") if data.startswith(f"{index} ")]
                assert own == [f"{index} {step}" for step in range(200)]
            assert not one.gaps

    @asynchronous
    async def test_what_is_published_after_subscribe_returned_is_heard(self, place: Place) -> None:
        async with place.nodes(2) as (here, there):
            for step in range(50):
                await here.broker.subscribe(f"c{step}")
                await there.broker.publish(publication(f"c{step}", step))
            await until(lambda: len(here.messages) == 50)

    @asynchronous
    async def test_many_subscribe_in_one_turn(self, place: Place) -> None:
        async with place.nodes(2) as (here, there):
            names = [f"c{number}" for number in range(1200)]
            await asyncio.gather(*(here.broker.subscribe(name) for name in names))
            await asyncio.gather(*(there.broker.publish(publication(name, name)) for name in names))
            await until(lambda: len(here.messages) == len(names))
            assert [name for name, _ in here.messages] == names

    @asynchronous
    async def test_nothing_is_heard_after_unsubscribe(self, place: Place) -> None:
        async with place.nodes(2) as (here, there):
            await asyncio.gather(here.broker.subscribe("a"), here.broker.subscribe("b"))
            await there.broker.publish(publication("a", 1))
            await until(lambda: here.heard("a") == [1])
            here.broker.unsubscribe("a")
            here.broker.unsubscribe("never")
            await there.broker.publish(publication("a", 2))
            await there.broker.publish(publication("b", 3))
            await until(lambda: here.heard("b") == [3])
            assert here.heard("a") == [1]

    @asynchronous
    async def test_interest_that_comes_and_goes_ends_as_the_last_call_said(self, place: Place) -> None:
        async with place.nodes(2) as (here, there):
            for _ in range(20):
                waiting = asyncio.ensure_future(here.broker.subscribe("a"))
                await asyncio.sleep(0)
                here.broker.unsubscribe("a")
                await asyncio.gather(waiting, return_exceptions=True)
                await here.broker.subscribe("a")
                here.broker.unsubscribe("a")
                await here.broker.subscribe("a")
                here.messages.clear()
                await there.broker.publish(publication("a", "yes"))
                await until(lambda: here.heard("a") == ["yes"])
                here.broker.unsubscribe("a")
            await until_async(there.broker.channels, [])

    @asynchronous
    async def test_a_message_to_all_is_heard_without_subscribing(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            await ready(one, two)
            await one.broker.publish(publication(None, "all"))
            await one.broker.publish(publication(None, "all", dedup_ttl=60))
            receipt = await two.broker.publish(publication(None, "all", dedup_ttl=60))
            assert receipt.duplicate
            await until(lambda: len(two.heard(None)) >= 2)
            assert one.heard(None) == two.heard(None) == ["all", "all"]

    @asynchronous
    async def test_an_id_is_taken_once_whoever_sends_it(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            await one.broker.subscribe("a")
            await one.broker.subscribe("b")
            receipts = [
                await node.broker.publish(publication(channel, "x", dedup_ttl=60))
                for channel in ("a", "b")
                for node in (one, two, one)
            ]
            assert [receipt.duplicate for receipt in receipts] == [False, True, True] * 2
            await one.broker.publish(publication("b", "end"))
            await until(lambda: "end" in one.heard("b"))
            assert one.heard("a") == ["x"]

    @asynchronous
    async def test_an_id_is_free_again_after_its_time(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            assert not (await node.broker.publish(publication("a", 1, dedup_ttl=0.05))).duplicate
            await asyncio.sleep(0.1)
            assert not (await node.broker.publish(publication("a", 1, dedup_ttl=0.05))).duplicate
            assert not (await node.broker.publish(publication("a", 1))).duplicate
            assert not (await node.broker.publish(publication("a", 1))).duplicate

    @asynchronous
    async def test_a_persistent_channel_counts_without_holes(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            await one.broker.subscribe("p")
            await one.broker.subscribe("q")
            receipts = await asyncio.gather(
                *(
                    node.broker.publish(publication("p", f"{index} {step}", persistent=True))
                    for step in range(100)
                    for index, node in enumerate((one, two))
                )
            )
            assert sorted(receipt.seq for receipt in receipts) == list(range(1, 201))
            assert len({receipt.epoch for receipt in receipts}) == 1
            await until(lambda: len(one.messages) == 200)
            assert one.seqs("p") == list(range(1, 201))
            by_seq = {message.seq: json.loads(message.payload) for _, message in one.messages}
            for step in range(100):
                for index in range(2):
                    receipt = receipts[2 * step + index]
                    told = by_seq[receipt.seq]
                    assert told["data"] == f"{index} {step}"
                    assert (told["seq"], told["epoch"]) == (receipt.seq, receipt.epoch)
            # Another channel counts for itself.
            assert (await two.broker.publish(publication("q", 1, persistent=True))).seq == 1

    @asynchronous
    async def test_a_duplicate_is_answered_with_the_first_ones_number(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            first = await one.broker.publish(publication("p", "x", persistent=True))
            await one.broker.publish(publication("p", "y", persistent=True))
            again = await two.broker.publish(publication("p", "x", persistent=True))
            assert again == Receipt(True, first.seq, first.epoch)
            assert (await one.broker.read("p", 0, 10)).seq == 2

    @asynchronous
    async def test_persistent_without_deduplication(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            for seq in (1, 2):
                receipt = await node.broker.publish(publication("p", "x", persistent=True, dedup_ttl=0))
                assert (receipt.seq, receipt.duplicate) == (seq, False)

    @asynchronous
    async def test_reading_from_a_position(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            await one.broker.subscribe("p")
            for step in range(1, 101):
                one.broker.publish(publication("p", step, persistent=True))
            last = await one.broker.publish(publication("p", 101, persistent=True))
            await until(lambda: len(one.messages) == 101)
            told = [message for _, message in one.messages]
            history = await two.broker.read("p", 0, 1000)
            assert history == History(last.epoch, 101, 1, {}, told)
            assert (await two.broker.read("p", 40, 10)).messages == told[40:50]
            assert (await two.broker.read("p", 100, 10)).messages == told[100:]
            assert (await two.broker.read("p", 101, 10)).messages == []
            assert (await two.broker.read("p", 500, 10)).messages == []
            assert (await two.broker.read("p", 0, 0)).messages == []
            # The last ones.
            assert (await two.broker.read("p", -3, 10)).messages == told[-3:]
            assert (await two.broker.read("p", -300, 1000)).messages == told
            assert history.continues(last.epoch, 0)
            assert not history.continues(last.epoch, 102)
            assert not history.continues("another", 1)

    @asynchronous
    async def test_a_channel_begins_where_it_is_first_read(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            empty = await one.broker.read("p", 0, 10)
            assert (empty.seq, empty.first, empty.messages) == (0, 1, [])
            assert empty.continues(empty.epoch, 0)
            assert await two.broker.read("p", 0, 10) == empty
            receipt = await two.broker.publish(publication("p", 1, persistent=True))
            assert (receipt.seq, receipt.epoch) == (1, empty.epoch)

    @asynchronous
    async def test_heads_of_many_channels(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            names = [f"p{number}" for number in range(700)]
            for name in names[::7]:
                await node.broker.publish(publication(name, 1, persistent=True))
            heads = await node.broker.heads(names)
            assert list(heads) == names
            assert [heads[name].seq for name in names[:8]] == [1, 0, 0, 0, 0, 0, 0, 1]
            assert len({heads[name].epoch for name in names}) > 1 or place.kind == "memory"
            assert await node.broker.heads([]) == {}

    @asynchronous
    async def test_history_keeps_its_size(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            for step in range(1, 301):
                node.broker.publish(publication("p", step, persistent=True, history_size=100))
            await node.broker.publish(publication("p", 301, persistent=True, history_size=100))
            history = await node.broker.read("p", 0, 1000)
            assert (history.seq, history.first, len(history.messages)) == (301, 202, 100)
            assert history.continues(history.epoch, 201)
            assert not history.continues(history.epoch, 200)

    @asynchronous
    async def test_history_keeps_its_time(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            first = await node.broker.publish(publication("p", 1, persistent=True, history_ttl=0.1))
            await asyncio.sleep(0.2)
            history = await node.broker.read("p", 0, 10)
            # The messages are gone, the count is not.
            assert history == History(first.epoch, 1, 2, {}, [])
            second = await node.broker.publish(publication("p", 2, persistent=True, history_ttl=60))
            assert (second.seq, second.epoch) == (2, first.epoch)
            history = await node.broker.read("p", 0, 10)
            assert (history.first, [message.seq for message in history.messages]) == (2, [2])

    @asynchronous
    async def test_any_payload_goes_through(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            await node.broker.subscribe("p")
            for data in ("}", "\n", "é€😀", "\u0000", "x" * 300_000, {"seq": 1}, [], None, '"'):
                for more in ({}, {"persistent": True}):
                    await node.broker.publish(publication("p", data, "id" + repr(data)[:20], **more))
                    count = len(node.messages)
                    await until(lambda count=count: len(node.messages) >= count)
            await until(lambda: len(node.messages) == 18)
            assert node.heard("p")[::2] == node.heard("p")[1::2]
            # Pieces stay below a size: who reads goes on where one ended.
            read: list[BusMessage] = []
            while piece := (await node.broker.read("p", read[-1].seq if read else 0, 100)).messages:
                read += piece
            assert [message.seq for message in read] == list(range(1, 10))

    @asynchronous
    async def test_rows_reach_every_worker(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            rows = {b'{"name":"%s"}' % node.name.encode() for node in (one, two)}
            await until(lambda: set(one.rows) == set(two.rows) == rows)

    @asynchronous
    async def test_channels_that_somebody_listens_to(self, place: Place) -> None:
        async with place.nodes(2) as (one, two):
            await one.broker.subscribe("b")
            await two.broker.subscribe("a/~@:=+.-_")
            await two.broker.subscribe("b")
            assert await one.broker.channels() == ["a/~@:=+.-_", "b"]
            two.broker.unsubscribe("a/~@:=+.-_")
            await until_async(one.broker.channels, ["b"])

    @asynchronous
    async def test_a_probe_comes_back(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            await ready(node)
            seconds = await asyncio.gather(*(node.broker.probe() for _ in range(5)))
            assert len(set(seconds)) == 1 or place.kind == "memory"
            assert all(0 < each < 2 for each in seconds)
            health = node.broker.health()
            assert health.up and health.problem is None
            assert health.roundtrip is not None and health.roundtrip < 2

    @asynchronous
    async def test_nothing_is_taken_after_close(self, place: Place) -> None:
        async with place.nodes(1) as (node,):
            await ready(node)
            waiting = node.broker.publish(publication("a", 1))
        assert waiting.done()
        waiting.exception()
        with pytest.raises(Unavailable):
            await node.broker.publish(publication("a", 2))
        assert not node.broker.health().up


async def ready(*nodes: Node) -> None:
    await until(lambda: all(node.broker.health().up for node in nodes))


async def until_async(ask: Callable[[], Awaitable[object]], wanted: object) -> None:
    """Wait until something that has to be asked for is so."""
    async with asyncio.timeout(10):
        while await ask() != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_bus_form() -> None:
    for message in (BusMessage(b'{"a":1}', 17), BusMessage(b"{\n}", 17, 2**53 - 1, "e1")):
        assert decode_bus(encode_bus(message)) == message
    for bad in (b"", b"1 - 2", b"1 -\n{}", b"x - 2\n{}", b"1 - 2 3\n{}"):
        with pytest.raises(ValueError):
            decode_bus(bad)


@asynchronous
async def test_memory_forgets_in_time() -> None:
    now = 0.0
    broker = MemoryBroker(clock=lambda: now)
    async with Node(broker) as node:
        first = await broker.publish(publication("p", 1, persistent=True))
        now += 61
        assert (await broker.read("p", 0, 10)).messages == []
        assert not (await broker.publish(publication("p", 1, persistent=True))).duplicate
        now += 31 * 86400
        rows = len(node.rows)
        await until(lambda: len(node.rows) > rows)
        history = await broker.read("p", 0, 10)
        assert history.seq == 0 and history.epoch != first.epoch
        # What has only been subscribed to goes sooner.
        now += 3700
        rows = len(node.rows)
        await until(lambda: len(node.rows) > rows)
        assert (await broker.read("p", 0, 10)).epoch != history.epoch


def test_a_server_is_checked_over_tls(
    servers: Callable[[str], RedisServer], certificate: Path | None
) -> None:
    """A certificate that nobody vouches for stops the start."""
    name = next((name for name, binary in binaries().items() if has_tls(binary)), None)
    if name is None or certificate is None:
        pytest.skip("no server that was built with TLS: the refusal of its certificate is NOT tested here")
    url = f"rediss://127.0.0.1:{servers(name).tls_port}"
    assert check_server(f"{url}?ssl_ca_certs={certificate / 'cert.pem'}") is None
    with pytest.raises(ConfigError, match="certificate"):
        check_server(url)
