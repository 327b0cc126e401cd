"""Several real processes: workers that die, daemons that share a Redis, a Redis that goes away, and limits.

What one process alone can show is in test_websocket.py and test_http.py.
"""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from broker_kit import asynchronous, until
from client import Answer, Client, eventually, handshake, http, raw_http
from daemon import Daemon
from prometheus_client.parser import text_string_to_metric_families
from redis_server import RedisServer, binaries

# A client that is closed for good meets the next worker or daemon within so many seconds.
SOON = 5.0


@asynccontextmanager
async def clients(*daemons: Daemon, workers: tuple[int, ...] = (0, 1)) -> AsyncIterator[list[Client]]:
    """A client on each of these workers of each daemon."""
    async with AsyncExitStack() as stack:
        made = []
        for daemon in daemons:
            for worker in workers:
                with daemon.only(worker):
                    made.append(await stack.enter_async_context(Client(daemon.ws_url)))
        yield made


async def post(daemon: Daemon, **body: Any) -> Answer:
    return await http(daemon.url, "POST", "/broadcast", body)


async def health(daemon: Daemon, kind: str = "") -> int:
    return (await http(daemon.url, "GET", f"/health{kind}")).status


async def are_healthy(daemon: Daemon) -> bool:
    """Whether each worker says so."""
    for worker in range(len(daemon.workers())):
        with daemon.only(worker):
            if await health(daemon) != 200:
                return False
    return True


# Workers


@asynchronous
async def test_the_death_of_a_worker(redis_server: RedisServer) -> None:
    with Daemon(workers=2, redis=redis_server.url) as daemon:
        daemon.expect("worker_died", "worker_pausing")
        first, second = daemon.workers()
        async with clients(daemon, workers=(0, 1, 1)) as (dying, living, publisher):
            for client in (dying, living):
                await client.ask("subscribe", channel="news")
            await publisher.ask("broadcast", channel="news", data=1)
            assert await dying.messages(1) == await living.messages(1) == [1]

            os.kill(first, signal.SIGKILL)
            assert (await dying.closed())[0] == 1006
            for number in range(2, 50):
                assert (await publisher.ask("broadcast", channel="news", data=number))["type"] == "ack"
            assert await living.messages(48) == list(range(2, 50))

            daemon.wait_for_log("worker_died")
            await until(lambda: len(daemon.workers()) == 2 and first not in daemon.workers(), SOON)
            assert daemon.workers()[1] == second
            async with clients(daemon, workers=(0,)) as (new,):
                await new.ask("subscribe", channel="news")
                await new.ask("broadcast", channel="news", data="from the new one")
                for client in (new, living):
                    assert await client.messages(1) == ["from the new one"]

            async def stats() -> Any:
                return (await http(daemon.url, "GET", "/stats")).json

            # The dead one's row goes, with all it counted.
            body = await eventually(stats, lambda body: body["totals"]["connections"] == 2, SOON)
            assert first not in [row["pid"] for row in body["workers"]] and len(body["workers"]) == 2
            metrics = (await http(daemon.url, "GET", "/metrics")).body.decode()
            assert "bcast_worker_restarts_total 1.0" in metrics


@asynchronous
async def test_who_comes_while_a_worker_is_replaced_is_served(redis_server: RedisServer) -> None:
    with Daemon(workers=2, redis=redis_server.url) as daemon:
        daemon.expect("worker_died", "worker_pausing")
        os.kill(daemon.workers()[1], signal.SIGKILL)
        for _ in range(30):
            begun = time.monotonic()
            async with Client(daemon.ws_url) as client:
                assert await client.is_alive()
            assert time.monotonic() - begun < 1


@asynchronous
async def test_the_metrics_of_all_workers(redis_server: RedisServer) -> None:
    """Every name, a series for each living worker, and none for one that is dead or does not answer."""
    with Daemon(workers=2, redis=redis_server.url) as daemon:
        daemon.expect("worker_died", "worker_pausing")

        async def series() -> dict[str, dict[str, float]]:
            """Worker -> sample -> value, as one of them tells it."""
            text = (await http(daemon.url, "GET", "/metrics")).body.decode()
            found: dict[str, dict[str, float]] = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    labels = {**sample.labels}
                    own = found.setdefault(labels.pop("worker", "all"), {})
                    own[sample.name + str(labels or "")] = sample.value
            return found

        async with clients(daemon) as (one, two):
            for client in (one, two):
                await client.ask("subscribe", channel="news")
            await one.ask("broadcast", channel="news", data=1)
            await post(daemon, channel="news", data=2)
            for client in (one, two):
                assert await client.messages(2) == [1, 2]

            def is_complete(found: dict[str, dict[str, float]]) -> bool:
                delivered = [found.get(worker, {}).get("bcast_delivered_total") for worker in "01"]
                return delivered == [2, 2]

            found = await eventually(series, is_complete)
            for worker in "01":
                own = found[worker]
                assert (own["bcast_connections"], own["bcast_subscriptions"]) == (1, 1)
                assert own["bcast_redis_up"] == 1 and own["bcast_redis_roundtrip_seconds"] > 0
                assert own["bcast_delivery_lag_seconds_count"] == 2 and "bcast_redelivered_total" in own
                assert 0 <= own["bcast_event_loop_lag_seconds"] < 10
            for via in ("ws", "http"):
                name = f"bcast_published_total{ {'via': via} }"
                assert sum(found[worker][name] for worker in "01") == 1
            assert found["all"]["bcast_worker_restarts_total"] == 0

            first, _ = daemon.workers()
            os.kill(first, signal.SIGSTOP)
            assert set(await eventually(series, lambda found: "0" not in found)) == {"1", "all"}
            os.kill(first, signal.SIGCONT)
            await eventually(series, is_complete)

            os.kill(first, signal.SIGKILL)
            # Its successor has counted nothing yet.
            found = await eventually(series, lambda found: found.get("0", {}).get("bcast_connections") == 0)
            assert found["0"]["bcast_delivered_total"] == 0 and found["1"]["bcast_delivered_total"] == 2
            assert found["all"]["bcast_worker_restarts_total"] == 1


@asynchronous
async def test_a_leaving_worker_accepts_while_nobody_else_does(redis_server: RedisServer) -> None:
    with Daemon("[server]\ndrain_seconds = 6s\n", workers=2, redis=redis_server.url) as daemon:
        # Who is alone sends all away at once.
        daemon.wait_for_log("worker_serving", 2)
        leaving, staying = daemon.workers()
        async with clients(daemon, workers=(0,) * 12) as several:
            daemon.signal(signal.SIGHUP)
            await until(lambda: any(client.socket.close_code == 1012 for client in several))
            os.kill(staying, signal.SIGSTOP)
            stopped = time.monotonic()
            try:
                while time.monotonic() - stopped < 1.5:
                    begun = time.monotonic()
                    assert await health(daemon, "/live") == 200
                    assert time.monotonic() - begun < 1
            finally:
                os.kill(staying, signal.SIGCONT)
            assert daemon.workers()[0] == leaving, "it was that one"
            codes = [(await client.closed())[0] for client in several]
            assert codes == [1012] * 12
        await asyncio.to_thread(daemon.wait_for_log, "replaced", 1, 30)
        assert not {leaving, staying} & set(daemon.workers())


@asynchronous
async def test_when_it_stops_clients_are_told_when_to_come_back() -> None:
    with Daemon() as daemon:
        async with AsyncExitStack() as stack:
            several = [await stack.enter_async_context(Client(daemon.ws_url)) for _ in range(5)]
            daemon.signal(signal.SIGTERM)
            reasons = []
            for client in several:
                code, reason = await client.closed()
                assert code == 1012
                reasons.append(json.loads(reason)["retryAfter"])
            assert len(set(reasons)) > 1 and all(0 < each <= 10_000 for each in reasons)


@asynchronous
async def test_a_second_signal_does_not_wait_for_anything() -> None:
    with Daemon("[server]\ndrain_delay = 60s\n") as daemon:
        async with Client(daemon.ws_url) as client:
            daemon.signal(signal.SIGTERM)
            await eventually(lambda: health(daemon, "/ready"), lambda status: status == 503)
            assert await client.is_alive(), "for so long all goes on"
            begun = time.monotonic()
            daemon.signal(signal.SIGTERM)
            assert await asyncio.to_thread(daemon.wait) == 0
            assert time.monotonic() - begun < 2
            assert (await client.closed())[0] == 1006


# Two daemons on one Redis


@asynchronous
async def test_two_daemons_on_one_redis(redis_server: RedisServer) -> None:
    prefix = f"pair{os.getpid()}"
    ini = "[channels]\npublish_all = anyone\n"
    options = {"workers": 2, "redis": redis_server.url, "BCAST_REDIS_PREFIX": prefix}
    with (
        Daemon(ini, **options) as north,  # type: ignore[arg-type]
        Daemon(ini, **options) as south,  # type: ignore[arg-type]
        Daemon(ini, redis=redis_server.url) as stranger,
    ):
        async with clients(north, south) as everybody, Client(stranger.ws_url) as foreigner:
            for client in everybody:
                await client.ask("subscribe", channel="news")
            await foreigner.ask("subscribe", channel="news")
            for number, client in enumerate(everybody):
                await client.ask("broadcast", channel="news", data=number)
            for client in everybody:
                assert await client.messages(4) == [0, 1, 2, 3]
            # To all, from one end and from the other, and by HTTP.
            await everybody[0].ask("broadcast", data="from the north")
            await everybody[3].ask("broadcast", data="from the south")
            await post(south, data="by HTTP")
            for client in everybody:
                assert await client.messages(3) == ["from the north", "from the south", "by HTTP"]

            # A message once, wherever it is said.
            await everybody[0].ask("broadcast", channel="news", data=1, messageId="same")
            for client in everybody:
                again = await client.ask("broadcast", channel="news", data=2, messageId="same")
                assert again["duplicate"] is True
            for daemon in (north, south):
                answer = await post(daemon, channel="news", data=3, messageId="same")
                assert answer.json["results"][0]["duplicate"] is True
            await everybody[3].ask("broadcast", channel="news", data="end")
            for client in everybody:
                assert await client.messages(2) == [1, "end"]

            # Either speaks for both; another prefix is another world.
            for daemon in (north, south):

                async def stats(daemon: Daemon = daemon) -> Any:
                    return (await http(daemon.url, "GET", "/stats")).json

                def is_complete(body: Any) -> bool:
                    return body["totals"]["connections"] == 4 and body["totals"]["channels"] == 1

                body = await eventually(stats, is_complete, 3)
                assert len(body["workers"]) == 4 and len({row["node"] for row in body["workers"]}) == 2
            assert await foreigner.is_alive()
            assert [event["type"] for event in foreigner.frames] == ["ack", "ack", "error"]


# Redis goes away


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    with RedisServer(next(iter(binaries().values()))) as server:
        yield server


@asynchronous
async def test_redis_stops_and_starts(own_redis: RedisServer) -> None:
    with Daemon(workers=2, redis=own_redis.url, BCAST_REDIS_PUBLISH_TIMEOUT="20s") as daemon:
        daemon.expect("redis_down")
        async with clients(daemon) as (one, two):
            for client in (one, two):
                await client.ask("subscribe", channel="news")
            await one.ask("broadcast", channel="news", data="before")
            assert await two.messages(1) == ["before"]

            own_redis.stop()
            for path, status in (("", 503), ("/ready", 503), ("/live", 200)):
                await eventually(lambda path=path: health(daemon, path), lambda got, s=status: got == s)  # type: ignore[misc]
            body = (await http(daemon.url, "GET", "/health")).json
            assert (body["status"], body["redis"]) == ("degraded", "down")
            # Publishes wait, in their order; what needs no Redis is answered.
            for number in range(20):
                await one.send(type="broadcast", channel="news", data=number, messageId=f"w{number}")
            await one.send(type="subscribe", channel="later", messageId="later")
            assert (await one.ask("nothing"))["code"] == "unknown_type"
            assert not [event for event in one.frames if event.get("messageId", "")[:1] in ("w", "l")]

            own_redis.start()
            for number in range(20):
                answer = await one.find(lambda event, n=number: event.get("messageId") == f"w{n}")  # type: ignore[misc]
                assert (answer["type"], answer["op"]) == ("ack", "broadcast"), answer
            assert (await one.find(lambda event: event.get("messageId") == "later"))["type"] == "ack"
            await eventually(lambda: are_healthy(daemon), bool)
            assert await health(daemon, "/ready") == 200
            # Both workers listen again, and nobody was closed.
            await two.ask("broadcast", channel="news", data="after")
            await two.ask("broadcast", channel="later", data="later")
            for client in (one, two):
                heard = []
                while not heard or heard[-1] != "after":
                    heard += await client.messages(1)
                numbers = [data for data in heard if isinstance(data, int)]
                # The bridge may have come back later than the first publishes: they are lost, not reordered.
                assert numbers == sorted(numbers) and numbers == list(range(20))[20 - len(numbers) :]
            assert await one.messages(1) == ["later"]
        assert len(daemon.events("redis_down")) >= 1 and len(daemon.events("redis_up")) >= 1


@asynchronous
async def test_redis_stays_away(own_redis: RedisServer) -> None:
    with Daemon(redis=own_redis.url, BCAST_REDIS_PUBLISH_TIMEOUT="1s") as daemon:
        daemon.expect("redis_down")
        async with Client(daemon.ws_url) as client:
            await client.ask("subscribe", channel="news")
            own_redis.stop()
            for fields in ({"messageId": "given"}, {}):
                begun = time.monotonic()
                seen = len(client.frames)
                await client.send(type="broadcast", channel="news", data=1, **fields)
                error = await client.find(lambda event: event["type"] == "error", seen)
                assert time.monotonic() - begun < 3
                assert (error["code"], error["channel"]) == ("unavailable", "news")
                # With this id it may be sent again.
                assert error["messageId"] == fields.get("messageId", error["messageId"])
                assert 0 < error["retryAfter"] < 60_000
            error = await client.ask("subscribe", channel="other")
            assert error["code"] == "unavailable" and error["retryAfter"] > 0
            answer = await post(daemon, channel="news", data=1, messageId="given")
            assert answer.status == 503 and answer.json["error"]["code"] == "unavailable"
            assert 1 <= int(answer.headers["retry-after"]) < 60
            deep = await http(daemon.url, "GET", "/health?deep=1")
            assert deep.status == 503 and deep.json["redis"] == "down"
            # One that comes now is let in.
            async with Client(daemon.ws_url) as late:
                assert (await late.ask("nothing"))["code"] == "unknown_type"

            own_redis.start()
            await eventually(lambda: health(daemon), lambda status: status == 200)
            again = await client.ask("broadcast", channel="news", data=2, messageId="given")
            assert (again["type"], again.get("duplicate")) == ("ack", None)
            assert await client.messages(1) == [2]


@asynchronous
async def test_a_stop_does_not_wait_for_redis(own_redis: RedisServer) -> None:
    """Publishes that cannot be answered, and sessions that cannot be saved, hold it up for 2 s at most."""
    with Daemon("[channel kept]\npersistent = yes\n", workers=2, redis=own_redis.url) as daemon:
        daemon.expect("redis_down", "sessions_unsaved")
        async with clients(daemon) as several:
            for client in several:
                await client.ask("subscribe", channel="kept", ack=True)
            head = await several[0].ask("broadcast", channel="kept", data=1)
            for client in several:
                await client.messages(1)
            own_redis.stop()
            for client in several:
                await client.send(type="ack", channel="kept", epoch=head["epoch"], seq=head["seq"])
                await client.send(type="broadcast", channel="kept", data=2, messageId="waits")
            await eventually(lambda: health(daemon), lambda status: status == 503)
            begun = time.monotonic()
            daemon.signal(signal.SIGTERM)
            for client in several:
                assert (await client.closed())[0] == 1012
            told = time.monotonic() - begun
            assert await asyncio.to_thread(daemon.wait) == 0
            took = time.monotonic() - begun
        print(f"told within {told:.1f} s, ended within {took:.1f} s")
        assert told < 2 and took < 5


@asynchronous
async def test_who_goes_while_redis_is_away(own_redis: RedisServer) -> None:
    """Before the answer: nothing is left of them, and the log says nothing of it."""
    with Daemon(redis=own_redis.url, BCAST_REDIS_PUBLISH_TIMEOUT="1s") as daemon:
        daemon.expect("redis_down")
        own_redis.stop()
        await eventually(lambda: health(daemon), lambda status: status == 503)
        body = b'{"channel": "gone", "data": 1}'
        head = b"POST /broadcast HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(head + body)
            await writer.drain()
            writer.close()
            async with Client(daemon.ws_url) as client:
                await client.send(type="subscribe", channel="gone")
                await client.send(type="broadcast", channel="gone", data=1)
                await client.send(type="unsubscribe", channel="gone")
        # When all of them have been given up.
        async with Client(daemon.ws_url) as client:
            assert (await client.ask("broadcast", channel="gone", data=1))["code"] == "unavailable"
        own_redis.start()
        await eventually(lambda: health(daemon), lambda status: status == 200)

        async def totals() -> Any:
            return (await http(daemon.url, "GET", "/stats")).json["totals"]

        def is_empty(found: Any) -> bool:
            return not (found["connections"] or found["subscriptions"] or found["channels"])

        await eventually(totals, is_empty)


@asynchronous
async def test_the_embedded_server_comes_back() -> None:
    with Daemon(workers=2, redis="embedded:") as daemon:
        daemon.expect("redis_down", "embedded_dead")
        (server,) = daemon.children() - set(daemon.workers())
        async with clients(daemon) as (one, two):
            for client in (one, two):
                await client.ask("subscribe", channel="news")
            await one.ask("broadcast", channel="news", data=1, messageId="kept")
            os.kill(server, signal.SIGKILL)
            # It is retried until it is taken.
            assert (await one.ask("broadcast", channel="news", data=2))["type"] == "ack"
            await eventually(lambda: are_healthy(daemon), bool)
            # What was acknowledged before the crash is still known.
            again = await two.ask("broadcast", channel="news", data=3, messageId="kept")
            assert again["duplicate"] is True
            await two.ask("broadcast", channel="news", data="heard")
            await one.find(lambda event: event.get("data") == "heard")


# Limits over all workers


@asynchronous
async def test_connections_are_limited_over_all_workers() -> None:
    with (
        RedisServer(next(iter(binaries().values()))) as server,
        Daemon("[server]\nmax_connections = 4\n", workers=2, redis=server.url) as daemon,
    ):
        async with clients(daemon, workers=(0, 0, 1, 1)) as made:
            for worker in (0, 1):
                with daemon.only(worker):
                    answer = await raw_http(daemon.url, handshake("127.0.0.1"))
                    assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
                    assert answer.json["error"]["code"] == "unavailable"
            # The operator's entrances have room.
            assert (await http(daemon.url, "GET", "/health")).status == 200
            line = daemon.events("refused")[0]
            assert (line["kind"], line["setting"]) == ("limit", "[server] max_connections")
            await made[3].socket.close()
            await eventually(
                lambda: raw_http(daemon.url, handshake("127.0.0.1")), lambda answer: answer.status == 101
            )


async def open_sockets(daemon: Daemon) -> int:
    """How many TCP connections its workers have open."""
    port = f":{daemon.port:04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]  # noqa: ASYNC240
    # Where a process still has it, it has an inode.
    return sum(line[1].endswith(port) and line[3] != "0A" and line[9] != "0" for line in lines)


@asynchronous
async def test_connections_of_an_address_are_limited_over_all_workers(redis_server: RedisServer) -> None:
    ini = "[server]\nmax_connections_per_ip = 4\n"
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:
        # The connections by which it was asked whether it is ready may count for another moment.
        await eventually(lambda: open_sockets(daemon), lambda number: not number)
        async with clients(daemon, workers=(0, 0, 1, 1)) as made:
            for worker in (0, 1):
                with daemon.only(worker):
                    answer = await raw_http(daemon.url, handshake("127.0.0.1"))
                    assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
                    assert answer.json["error"]["code"] == "rate_limited"
            assert daemon.events("refused")[0]["setting"] == "[server] max_connections_per_ip"
            await made[0].socket.close()
            await eventually(
                lambda: raw_http(daemon.url, handshake("127.0.0.1")), lambda answer: answer.status == 101
            )


@asynchronous
async def test_behind_a_proxy_it_is_the_clients_address_that_counts() -> None:
    ini = "[server]\nmax_connections_per_ip = 2\ntrusted_proxies = 127.0.0.1, 10.0.0.0/8\n"
    with Daemon(ini) as daemon:
        async with AsyncExitStack() as stack:

            async def connect(*hops: str) -> int:
                headers = {"X-Forwarded-For": ", ".join(hops)}
                answer = await raw_http(daemon.url, handshake("127.0.0.1", "/ws", headers))
                if answer.status == 101:
                    await stack.enter_async_context(Client(daemon.ws_url, headers=headers))
                return answer.status

            # Each of these connects twice, of which the first is closed again.
            assert [await connect("192.0.2.1") for _ in range(2)] == [101, 101]
            await eventually(lambda: connect("192.0.2.1", "10.1.2.3"), lambda status: status == 429)
            assert await connect("192.0.2.2") == 101
            # What the client itself writes in front counts for nothing.
            assert await connect("192.0.2.9", "192.0.2.1") == 429


# Time for the handshake


@contextmanager
def tls_files(place: Path) -> Iterator[tuple[Path, Path]]:
    """A certificate for 127.0.0.1, which is its own authority, and its key."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key.pem -out cert.pem"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=place,
        check=True,
        capture_output=True,
    )
    yield place / "cert.pem", place / "key.pem"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, ssl.SSLContext]]:
    """A daemon that speaks TLS, and who trusts it."""
    with tls_files(tmp_path_factory.mktemp("tls")) as (certificate, key):
        ini = f"""
[server]
certfile = {certificate}
keyfile = {key}
[limits]
rate = 0
max_queue_bytes = 256k
handshake_timeout = 1s
[heartbeat]
interval = 1s
timeout = 3s
[channel latest]
slow_consumer = latest
"""
        with Daemon(ini) as daemon:
            yield daemon, ssl.create_default_context(cafile=certificate)


@asynchronous
async def test_plain_text_on_a_tls_port_is_told_once(tls: tuple[Daemon, ssl.SSLContext]) -> None:
    daemon, trust = tls
    seen = len(daemon.log())
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP" not in await reader.read()
        writer.close()
    daemon.expect("general")
    assert (await http(daemon.url, "GET", "/health/live", tls=trust)).status == 200
    assert len([line for line in daemon.log()[seen:] if line["level"] == "WARNING"]) <= 1


async def cut_after(url: str, *pieces: bytes, pause: float = 0.1) -> float:
    """Send pieces with pauses between; the seconds until the server closes."""
    parts = urlsplit(url)
    begun = time.monotonic()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)

    async def drip() -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(10):
            while await reader.read(1000):
                pass
    except ConnectionError:
        pass
    finally:
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.close()
    return time.monotonic() - begun


@asynchronous
async def test_who_is_slow_with_the_request_is_cut() -> None:
    with Daemon("[limits]\nhandshake_timeout = 1s\n") as daemon:
        request = handshake("127.0.0.1")
        slow = [bytes([byte]) for byte in request]
        body = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000\r\n\r\n"
        async with Client(daemon.ws_url) as idle:
            seconds = await asyncio.gather(
                cut_after(daemon.url),
                cut_after(daemon.url, request[:8]),
                cut_after(daemon.url, request[:-2]),
                cut_after(daemon.url, *slow),
                cut_after(daemon.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                cut_after(daemon.url, body % b"/broadcast", *[b" "] * 50),
                cut_after(daemon.url, body % b"/health", *[b" "] * 50),
            )
            assert all(0.8 < each < 3 for each in seconds), seconds
            # It is not for connections that have had their handshake.
            assert await idle.is_alive()
        assert daemon.stats()["totals"]["connections"] == 0


# TLS


@asynchronous
async def test_tls(tls: tuple[Daemon, ssl.SSLContext]) -> None:
    daemon, trust = tls
    assert daemon.url.startswith("https://")
    answer = await http(daemon.url, "GET", "/health", tls=trust)
    assert answer.status == 200
    async with Client(daemon.ws_url, tls=trust) as one, Client(daemon.ws_url, tls=trust) as two:
        await one.ask("subscribe", channel="news")
        texts = []
        for start in range(0, 500, 25):
            # As many as fit into what may wait for one client there.
            for number in range(start, start + 25):
                await two.send(type="broadcast", channel="news", data=f"{number} ".ljust(number * 13 % 5000))
            texts += await one.messages(25)
        assert [int(text) for text in texts] == list(range(500))
        answer = await http(
            daemon.url, "POST", "/broadcast", {"channel": "news", "data": "by HTTP"}, tls=trust
        )
        assert answer.status == 200
        assert await one.messages(1) == ["by HTTP"]
        # Plain text on this port is no request.
        with pytest.raises((ConnectionError, AssertionError)):
            await http(daemon.url.replace("https", "http"), "GET", "/health")
        # Tornado has a line of its own for that.
        daemon.expect("general")
        assert await one.is_alive()
    daemon.check_log()


@asynchronous
async def test_slow_readers_over_tls(tls: tuple[Daemon, ssl.SSLContext]) -> None:
    """Everything passes the stream there: the queue is as bounded, and the order as good."""
    daemon, trust = tls
    async with Client(daemon.ws_url, tls=trust) as good, Client(daemon.ws_url, tls=trust) as publisher:
        slow = [Client(daemon.ws_url, tls=trust) for _ in range(2)]
        async with slow[0] as disconnected, slow[1] as late:
            await disconnected.ask("subscribe", channel="all")
            await late.ask("subscribe", channel="latest")
            for channel in ("all", "latest"):
                await good.ask("subscribe", channel=channel)
            for client in (disconnected, late):
                client.socket.transport.pause_reading()
            total = 200
            for number in range(total):
                for channel in ("all", "latest"):
                    data = f"{number} ".ljust(50_000, "x")
                    assert (await publisher.ask("broadcast", channel=channel, data=data))["type"] == "ack"
            numbers = [int(text.split()[0]) for text in await good.messages(2 * total)]
            assert numbers[::2] == numbers[1::2] == list(range(total))
            for client in (disconnected, late):
                client.socket.transport.resume_reading()
            assert (await disconnected.closed())[0] == 4008
            came: list[int] = []
            while not came or came[-1] != total - 1:
                came.append(int((await late.messages(1))[0].split()[0]))
            assert came == sorted(came) and len(came) < total
            assert await late.is_alive()
    daemon.check_log()


@asynchronous
async def test_who_is_slow_with_tls_is_cut(tls: tuple[Daemon, ssl.SSLContext]) -> None:
    daemon, _ = tls
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    seconds = await asyncio.gather(
        cut_after(daemon.url),
        cut_after(daemon.url, hello),
        cut_after(daemon.url, *(bytes([b]) for b in hello)),
    )
    assert all(0.8 < each < 4 for each in seconds), seconds
    daemon.check_log()


@asynchronous
async def test_who_is_silent_over_tls_is_closed(tls: tuple[Daemon, ssl.SSLContext]) -> None:
    """Also while messages go out all the time: that the kernel takes them is no sign of life."""
    daemon, trust = tls
    parts = urlsplit(daemon.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=trust)
    async with Client(daemon.ws_url, tls=trust) as publisher:
        writer.write(handshake("127.0.0.1"))
        subscribe = json.dumps({"type": "subscribe", "channel": "busy"}).encode()
        writer.write(bytes([0x81, 0x80 | len(subscribe)]) + bytes(4) + subscribe)
        await reader.readuntil(b'"op":"subscribe"')

        async def publish() -> None:
            while True:
                await publisher.send(type="broadcast", channel="busy", data="x")
                await asyncio.sleep(0.05)

        publishing = asyncio.create_task(publish())
        begun = time.monotonic()
        try:
            async with asyncio.timeout(8):
                await reader.readuntil((4001).to_bytes(2, "big") + b"heartbeat missed")
        finally:
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            writer.close()
        assert time.monotonic() - begun > 0.8
    daemon.check_log()
