"""Persistent channels and sessions on the real daemon: positions, acks, resuming anywhere, nothing lost."""

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from broker_kit import asynchronous
from client import Client, eventually
from daemon import Daemon, until
from redis_server import RedisServer, binaries

INI = """
[limits]
rate = 0
max_queue_bytes = 128k
[channels]
publish_all = anyone
[channel p.few]
persistent = yes
history_size = 10
[channel p.flood]
persistent = yes
history_size = 100000
[channel p.window]
persistent = yes
max_in_flight = 5
ack_timeout = 30s
[channel p.quick]
persistent = yes
ack_timeout = 300ms
max_redeliveries = 2
[channel p.*]
persistent = yes
[channel closed]
subscribe = nobody
"""


@pytest.fixture(scope="module")
def daemon(redis_server: RedisServer) -> Iterator[Daemon]:
    with Daemon(INI, workers=2, redis=redis_server.url) as running:
        yield running


def resuming(daemon: Daemon, session: str) -> Client:
    return Client(daemon.ws_url, protocols=["bcast.v1", f"session.{session}"])


async def publish(client: Client, channel: str, *data: Any) -> dict[str, Any]:
    """Publish each and return the last one's ack."""
    answer: dict[str, Any] = {}
    for one in data:
        answer = await client.ask("broadcast", channel=channel, data=one)
        assert answer["type"] == "ack", answer
    return answer


def restored(client: Client) -> dict[str, dict[str, Any]]:
    return {entry["channel"]: entry for entry in client.hello["subscriptions"]}


@asynchronous
async def test_a_subscription_begins_at_the_head(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        head = await publish(client, "p.head", 1, 2)
        answer = await client.ask("subscribe", channel="p.head")
        assert answer["persistent"] is True and answer["recovered"] is True and answer["replayed"] == 0
        assert (answer["epoch"], answer["seq"]) == (head["epoch"], 2)
        await publish(client, "p.head", 3)
        event = await client.message()
        assert (event["data"], event["seq"], event["epoch"]) == (3, 3, head["epoch"])
        assert "redelivered" not in event


@asynchronous
async def test_last_and_since_replay_and_go_on_live(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        head = await publish(client, "p.replay", *range(1, 8))
        answer = await client.ask("subscribe", channel="p.replay", last=3)
        assert answer["replayed"] == 3
        assert await client.messages(3) == [5, 6, 7]
        since = {"epoch": head["epoch"], "seq": 5}
        assert (await client.ask("subscribe", channel="p.replay", since=since))["replayed"] == 2
        assert await client.messages(2) == [6, 7]
        # More than there is: everything.
        assert (await client.ask("subscribe", channel="p.replay", last=1000))["replayed"] == 7
        assert await client.messages(7) == [1, 2, 3, 4, 5, 6, 7]
        # Without a place it stays where it is.
        assert (await client.ask("subscribe", channel="p.replay"))["replayed"] == 0
        await publish(client, "p.replay", 8)
        assert await client.messages(1) == [8]


@pytest.mark.parametrize("position", ["trimmed", "epoch", "future"])
@asynchronous
async def test_a_place_that_is_gone_is_told_and_begins_with_the_oldest(daemon: Daemon, position: str) -> None:
    async with Client(daemon.ws_url) as client:
        head = await publish(client, "p.few", *range(25))
        last = head["seq"]
        since = {
            "trimmed": {"epoch": head["epoch"], "seq": last - 20},
            "epoch": {"epoch": "another", "seq": last - 2},
            "future": {"epoch": head["epoch"], "seq": last + 1},
        }[position]
        answer = await client.ask("subscribe", channel="p.few", since=since)
        assert (answer["recovered"], answer["replayed"]) == (False, 10)
        assert [(await client.message())["seq"] for _ in range(10)] == list(range(last - 9, last + 1))


@asynchronous
async def test_places_mean_nothing_on_other_channels(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        answer = await client.ask("subscribe", channel="plain", last=5)
        assert (answer["persistent"], answer["recovered"], answer["replayed"]) == (False, False, 0)
        assert "seq" not in answer


@asynchronous
async def test_no_gap_and_no_overlap_while_thousands_of_messages_arrive(daemon: Daemon) -> None:
    total = 4000
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as reader:

        async def flood() -> None:
            for number in range(total):
                await publisher.send(type="broadcast", channel="p.flood", data=number)
                if number % 50 == 0:
                    await asyncio.sleep(0)

        flooding = asyncio.create_task(flood())
        for round_ in range(12):
            wish = [{}, {"last": 40}, {"last": 5, "ack": True}][round_ % 3]
            await reader.ask("subscribe", channel="p.flood", **wish)
            await reader.ask("unsubscribe", channel="p.flood")
        await reader.ask("subscribe", channel="p.flood", last=total)
        await flooding
        end = await publish(publisher, "p.flood", "end")
        await reader.find(lambda event: event.get("data") == "end")
        # Between one ack of a subscribe and the ack of its unsubscribe: all, in order, once.
        expected: int | None = None
        for event in reader.frames:
            if event["type"] == "ack" and event.get("op") == "subscribe":
                expected = event["seq"] - event["replayed"] + 1
            elif event["type"] == "ack" and event.get("op") == "unsubscribe":
                expected = None
            elif event["type"] == "message":
                assert event["seq"] == expected, (event["seq"], expected)
                expected += 1
        assert expected == end["seq"] + 1


@pytest.mark.parametrize("by", ["subprotocol", "query"])
@asynchronous
async def test_a_session_is_resumed_where_it_had_acked(daemon: Daemon, by: str) -> None:
    channel = f"p.resume.{by}"
    async with Client(daemon.ws_url) as publisher:
        async with Client(daemon.ws_url) as client:
            session = client.hello["session"]
            assert client.hello["resumed"] is False and client.hello["subscriptions"] == []
            await client.ask("subscribe", channel=channel, ack=True)
            await client.ask("subscribe", channel="p.noacks")
            await client.ask("subscribe", channel="plain")
            head = await publish(publisher, channel, 1, 2, 3, 4)
            assert await client.messages(4) == [1, 2, 3, 4]
            await client.send(type="ack", channel=channel, seq=2, epoch=head["epoch"])
            await client.is_alive()
        await publish(publisher, channel, 5)
        path = f"/ws?session={session}" if by == "query" else "/ws"
        protocols = None if by == "query" else ["bcast.v1", f"session.{session}"]
        async with Client(daemon.ws_url, path, protocols=protocols) as again:
            assert again.hello["resumed"] is True
            assert again.hello["clientId"] == client.hello["clientId"]
            assert again.hello["session"] == session
            assert restored(again)[channel] == {
                "channel": channel,
                "recovered": True,
                "epoch": head["epoch"],
                "seq": 2,
            }
            assert restored(again)["p.noacks"]["recovered"] is False
            assert restored(again)["plain"] == {"channel": "plain", "recovered": False}
            assert await again.messages(3) == [3, 4, 5]
            await publish(publisher, "plain", "x")
            assert await again.messages(1) == ["x"]
            if by == "subprotocol":
                assert again.socket.subprotocol == "bcast.v1"


@asynchronous
async def test_a_resumed_client_tells_what_it_has(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher:
        async with Client(daemon.ws_url) as client:
            await client.ask("subscribe", channel="p.tells", ack=True)
            head = await publish(publisher, "p.tells", *range(400))
            await client.messages(400)
        async with resuming(daemon, client.hello["session"]) as again:
            await again.send(type="ack", channel="p.tells", seq=head["seq"])
            await publish(publisher, "p.tells", "new")
            await again.find(lambda event: event.get("data") == "new")
        # It was processed up to the head, so nothing comes again. What a connection acked at its very end may
        # be stored too late for one that resumes at once: then that one acks it, as clients do.
        for _ in range(5):
            async with resuming(daemon, client.hello["session"]) as third:
                if restored(third)["p.tells"]["seq"] >= head["seq"]:
                    break
                await third.send(type="ack", channel="p.tells", seq=head["seq"])
                await third.is_alive()
        else:
            pytest.fail("an acked position was never stored")


@asynchronous
async def test_the_newer_connection_has_the_session(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as older:
        await older.ask("subscribe", channel="p.taken", ack=True)
        async with resuming(daemon, older.hello["session"]) as newer:
            assert newer.hello["resumed"] is True
            assert (await older.closed())[0] == 4009
            await publish(publisher, "p.taken", 1)
            assert await newer.messages(1) == [1]


@asynchronous
async def test_an_unknown_session_is_a_new_one(daemon: Daemon) -> None:
    async with resuming(daemon, "nobody-ever-had-this") as client:
        assert client.hello["resumed"] is False
        assert client.hello["session"] != "nobody-ever-had-this"


@asynchronous
async def test_unsubscribed_channels_are_not_restored(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="p.left", ack=True)
        await client.ask("subscribe", channel="p.kept", ack=True)
        await client.ask("unsubscribe", channel="p.left")
    async with resuming(daemon, client.hello["session"]) as again:
        assert set(restored(again)) == {"p.kept"}


@asynchronous
async def test_commands_on_one_channel_keep_their_order_unawaited(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        for number in range(20):
            kind = "unsubscribe" if number % 2 else "subscribe"
            await client.send(type=kind, channel="p.order", messageId=f"n{number}")
        answers = [await client.next() for _ in range(20)]
        assert [answer["messageId"] for answer in answers] == [f"n{number}" for number in range(20)]
        assert all(answer["type"] == "ack" for answer in answers)
        await publish(client, "p.order", 1)
        assert not [event for event in client.frames if event["type"] == "message"]


@asynchronous
async def test_a_worker_that_is_killed_loses_nobody_anything(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        session = client.hello["session"]
        await client.ask("subscribe", channel="p.killed", ack=True)
        for pid in daemon.workers():
            os.kill(pid, signal.SIGKILL)
        await client.closed()
    daemon.expect("worker_died", "worker_pausing")

    async def retry() -> Client | None:
        try:
            return await resuming(daemon, session).__aenter__()
        except (OSError, ConnectionError, TimeoutError):
            return None

    async with Client(daemon.ws_url) as publisher:
        await publish(publisher, "p.killed", 1, 2)
    again = await eventually(retry, lambda one: one is not None)
    assert again is not None
    assert restored(again)["p.killed"]["recovered"] is True
    assert await again.messages(2) == [1, 2]
    await again.__aexit__()


@asynchronous
async def test_what_is_not_acked_comes_again_and_ends_with_4002(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="p.quick", ack=True)
        await publish(publisher, "p.quick", *range(20))
        assert (await client.closed())[0] == 4002
        events = [event for event in client.frames if event["type"] == "message"]
        assert [event["data"] for event in events[:20]] == list(range(20))
        assert [(event["data"], event["redelivered"]) for event in events[20:]] == [
            (number, times) for times in (1, 2) for number in range(16)
        ]


@asynchronous
async def test_an_ack_stops_redelivery_whatever_it_names_beside(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="p.quick", ack=True)
        head = await publish(publisher, "p.quick", "a", "b")
        assert await client.messages(2) == ["a", "b"]
        for nonsense in (
            {"seq": head["seq"] + 5},
            {"seq": head["seq"], "epoch": "another"},
            {"seq": 0},
        ):
            await client.send(type="ack", channel="p.quick", **nonsense)
        event = await client.message()
        assert (event["data"], event["redelivered"]) == ("a", 1)
        await client.send(type="ack", channel="p.quick", seq=head["seq"], epoch=head["epoch"])
        await client.send(type="ack", channel="p.quick", seq=head["seq"])
        await asyncio.sleep(1.5)
        assert await client.is_alive()
        assert [event["redelivered"] for event in client.frames if event.get("redelivered", 0) > 1] == []


@asynchronous
async def test_no_more_is_on_its_way_than_max_in_flight(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="p.window", ack=True)
        await publish(publisher, "p.window", *range(12))
        assert await client.messages(5) == [0, 1, 2, 3, 4]
        assert await client.is_alive()
        assert len([event for event in client.frames if event["type"] == "message"]) == 5
        first = next(event for event in client.frames if event["type"] == "message")["seq"]
        await client.send(type="ack", channel="p.window", seq=first + 1)
        assert await client.messages(2) == [5, 6]
        await client.send(type="ack", channel="p.window", seq=first + 6)
        assert await client.messages(5) == [7, 8, 9, 10, 11]


@asynchronous
async def test_a_slow_reader_gets_everything_from_the_stream(daemon: Daemon) -> None:
    number, text = 900, "x" * 4000
    async with Client(daemon.ws_url) as publisher, Client(daemon.ws_url) as client:
        await client.ask("subscribe", channel="p.slow", last=1)
        client.socket.transport.pause_reading()
        for start in range(0, number, 100):
            await publish(publisher, "p.slow", *(f"{index} {text}" for index in range(start, start + 100)))
        client.socket.transport.resume_reading()
        got = await client.messages(number)
        assert [one.partition(" ")[0] for one in got] == [str(index) for index in range(number)]


@asynchronous
async def test_two_daemons_share_sessions(redis_server: RedisServer) -> None:
    with Daemon(INI, redis=redis_server.url) as one:
        shared = {"BCAST_REDIS_PREFIX": one.prefix}
        with Daemon(INI, redis=redis_server.url, **shared) as two:
            async with Client(one.ws_url) as publisher, Client(one.ws_url) as client:
                await client.ask("subscribe", channel="p.two", ack=True)
                await publish(publisher, "p.two", 1)
                async with resuming(two, client.hello["session"]) as elsewhere:
                    assert (await client.closed())[0] == 4009
                    assert await elsewhere.messages(1) == [1]


@asynchronous
async def test_rules_of_now_decide_what_is_restored(redis_server: RedisServer) -> None:
    with Daemon(INI, redis=redis_server.url) as before:
        async with Client(before.ws_url) as client:
            await client.ask("subscribe", channel="p.rule", ack=True)
            await client.ask("subscribe", channel="p.other", ack=True)
        prefix = before.prefix
    forbidden = "[channel p.rule]\nsubscribe = nobody\n" + INI
    with Daemon(forbidden, redis=redis_server.url, BCAST_REDIS_PREFIX=prefix) as after:
        async with resuming(after, client.hello["session"]) as again:
            assert again.hello["resumed"] is True and set(restored(again)) == {"p.other"}
            error = await again.next()
            assert (error["type"], error["code"], error["channel"]) == ("error", "forbidden", "p.rule")
        async with resuming(after, client.hello["session"]) as third:
            assert set(restored(third)) == {"p.other"}
            assert await third.is_alive()


@asynchronous
async def test_a_resume_without_redis_is_1013_and_never_a_new_session() -> None:
    with RedisServer(next(iter(binaries().values()))) as server:
        variables = {"BCAST_REDIS_PUBLISH_TIMEOUT": "500ms"}
        with Daemon(INI, redis=server.url, **variables) as daemon:
            async with Client(daemon.ws_url) as client:
                await client.ask("subscribe", channel="p.away", ack=True)
            server.stop()
            daemon.expect("redis_down", "history_lost")
            with pytest.raises(ConnectionError, match="1013"):
                async with resuming(daemon, client.hello["session"]):
                    pass
            server.start()
            await asyncio.to_thread(until, lambda: daemon.get("/health/ready")[0] == 200)
            # The server came back without its data: now it is known to be gone.
            async with resuming(daemon, client.hello["session"]) as again:
                assert again.hello["type"] == "ack"


@asynchronous
async def test_history_and_channels_for_the_operator(daemon: Daemon) -> None:
    async with Client(daemon.ws_url) as client:
        head = await publish(client, "p.history", "a", "b", "c")
        await client.ask("subscribe", channel="p.history")
        status, body = await asyncio.to_thread(daemon.get, "/channels/p.history/history?since=1&limit=1")
        assert status == 200 and body["seq"] == 3 and body["first"] == 1 and body["recovered"] is True
        assert [message["data"] for message in body["messages"]] == ["b"]
        assert body["messages"][0]["epoch"] == head["epoch"]
        status, body = await asyncio.to_thread(daemon.get, "/channels/p.history/history?epoch=x")
        assert body["recovered"] is False and len(body["messages"]) == 3
        status, body = await asyncio.to_thread(daemon.get, "/channels/plain/history")
        assert status == 400 and body["error"]["code"] == "bad_channel"

        async def listed() -> Any:
            return (await asyncio.to_thread(daemon.get, "/channels"))[1]["channels"]

        await eventually(listed, lambda found: {"channel": "p.history", "persistent": True} in found)
        assert not [one for one in await listed() if one["channel"].startswith("$")]
