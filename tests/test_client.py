"""Publishing from Python, by both ways: servers that answer by a script, and a daemon that restarts."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from broker_kit import asynchronous
from daemon import Daemon
from redis_server import RedisServer
from scripted import BUSY, TAKEN, Scripted, answer, error

from tornado_bcast import client
from tornado_bcast.client import GaveUp, Rejected, Unavailable, async_publish, publish
from tornado_bcast.publishing import Publishing

Publish = Callable[..., Any]


def publish_on_a_loop(*arguments: Any, **options: Any) -> Any:
    return asyncio.run(async_publish(*arguments, **options))


both = pytest.mark.parametrize("publish", [publish, publish_on_a_loop])


def results(*fates: tuple[str, str | None]) -> bytes:
    """An answer with the fate of each message: its id, and the code of its error."""
    items = [
        {"channel": "a", "messageId": message_id}
        | ({"error": {"code": code, "message": f"It is {code}."}} if code else {})
        for message_id, code in fates
    ]
    taken = any(code is None for _, code in fates)
    return answer(200, {"results": items}) if taken else answer(503, {"results": items}, "Retry-After: 1")


@both
def test_a_message(publish: Publish) -> None:
    with Scripted(TAKEN) as server:
        assert publish("news", {"a": 1}, url=server.url, key="k", message_id="m1")["messageId"] == "m1"
    ((_, line, headers, body),) = server.requests
    assert line == "POST /broadcast HTTP/1.1" and headers["authorization"] == "Bearer k"
    assert body == {"channel": "news", "data": {"a": 1}, "messageId": "m1"}


@both
def test_it_tries_again_with_the_same_id_as_the_server_asks(publish: Publish) -> None:
    script = (
        error(429, "rate_limited", "Slowly.", "Retry-After: 1"),
        b"",
        BUSY,
        answer(500, b"<html>"),
        TAKEN,
    )
    with Scripted(*script) as server:
        publish("news", 1, url=server.url)
        times = [moment for moment, *_ in server.requests]
        assert len(server.ids) == 1 and len(times) == 5
    assert times[1] - times[0] >= 1


@both
def test_a_batch_is_one_request(publish: Publish) -> None:
    with Scripted(results(("x", None), ("y", None))) as server:
        messages = [{"channel": "a", "data": 1, "messageId": "x"}, {"channel": "b", "data": 2}]
        assert [one["messageId"] for one in publish(messages=messages, url=server.url)] == ["x", "y"]
    ((*_, body),) = server.requests
    first, second = body["messages"]
    assert first == messages[0] and len(second.pop("messageId")) == 36 and second == messages[1]


@both
def test_of_a_batch_only_what_was_not_taken_is_sent_again(publish: Publish) -> None:
    script = results(("a", None), ("b", "unavailable"), ("c", None)), results(("b", "rate_limited")), BUSY
    with Scripted(*script, results(("b", None))) as server:
        messages = [{"channel": "a", "data": n, "messageId": n} for n in "abc"]
        assert [one["messageId"] for one in publish(messages=messages, url=server.url)] == ["a", "b", "c"]
        sent = [[one["messageId"] for one in body["messages"]] for *_, body in server.requests]
    assert sent == [["a", "b", "c"], ["b"], ["b"], ["b"]]


@both
def test_one_that_is_refused_does_not_stop_the_others(publish: Publish) -> None:
    script = results(("a", "forbidden"), ("b", None), ("c", "unavailable")), results(("c", None))
    with Scripted(*script) as server, pytest.raises(Rejected, match="It is forbidden") as refusal:
        messages = [{"channel": "a", "data": n, "messageId": n} for n in "abc"]
        publish(messages=messages, url=server.url)
    assert [one.get("error", {}).get("code") for one in refusal.value.results] == ["forbidden", None, None]
    assert refusal.value.code == "forbidden"


@both
def test_many_go_in_several_requests(publish: Publish) -> None:
    ids = [str(number) for number in range(2500)]
    parts = [ids[:1000], ids[1000:2000], ids[2000:]]
    with Scripted(*(results(*((one, None) for one in part)) for part in parts)) as server:
        messages = ({"channel": "a", "data": 1, "messageId": one} for one in ids)
        assert [one["messageId"] for one in publish(messages=messages, url=server.url)] == ids
        sent = [[one["messageId"] for one in body["messages"]] for *_, body in server.requests]
    assert sent == parts


@both
def test_none_need_no_request(publish: Publish) -> None:
    assert publish(messages=[], url="http://127.0.0.1:9") == []


@both
def test_when_the_time_is_over_it_tells_what_is_known(publish: Publish) -> None:
    script = results(("a", None), ("b", "unavailable")), BUSY
    with Scripted(*script) as server, pytest.raises(Unavailable, match="away") as end:
        messages = [{"channel": "a", "data": n, "messageId": n} for n in "ab"]
        begun = time.monotonic()
        publish(messages=messages, url=server.url, timeout=1.5)
    assert time.monotonic() - begun < 4
    assert isinstance(end.value, GaveUp)
    first, second = end.value.results
    assert "error" not in first and (second["messageId"], second["error"]["code"]) == ("b", "unavailable")


@both
def test_what_makes_no_sense_is_refused_before_it_is_sent(publish: Publish) -> None:
    options = {"url": "http://127.0.0.1:9"}
    for arguments in ({}, {"channel": "a"}, {"messages": [], "channel": "a", "data": 1}):
        with pytest.raises(TypeError):
            publish(**arguments, **options)
    with pytest.raises(ValueError, match="JSON"):
        publish("a", float("nan"), **options)
    with pytest.raises(Rejected, match="is none"):
        publish("a", 1, url="localhost")
    with pytest.raises(Rejected, match="key"):
        publish("a", 1, key="schlüssel", **options)


@both
def test_nobody_there(publish: Publish) -> None:
    with pytest.raises(GaveUp, match=r"No answer from http://127\.0\.0\.1:9 \(Connection refused\)"):
        publish("a", 1, url="http://127.0.0.1:9", timeout=0.3)


@both
def test_who_does_not_speak_our_protocol(publish: Publish) -> None:
    with Scripted(answer(302, b"", "Location: https://example.com/")) as server:
        with pytest.raises(Rejected, match="sends us on to https"):
            publish("a", 1, url=server.url)
    with Scripted(answer(404, b"<html>")) as server:
        with pytest.raises(Rejected, match="Is the URL that of a tornado-bcast server"):
            publish("a", 1, url=server.url)
    # As many results as messages, or it is no answer to them.
    with Scripted(answer(200, {"results": []})) as server, pytest.raises(Rejected):
        publish("a", 1, url=server.url)


def test_the_pauses_grow_and_begin_anew_with_a_success() -> None:
    core = Publishing(
        [{"channel": "a", "data": n, "messageId": n} for n in "ab"],
        timeout=1000,
        now=0.0,
        rng=random.Random(7),
    )
    pauses = []
    for _ in range(12):
        core.request(0.0)
        core.fail("No answer.")
        pauses.append(core.pause(0.0) or 0.0)
    assert max(pauses[:2]) < 0.5 and 2 < max(pauses) <= 10
    core.request(0.0)
    half = {"results": [{"messageId": "a"}, {"messageId": "b", "error": {"code": "internal", "message": ""}}]}
    core.receive(200, {}, json.dumps(half).encode())
    assert (core.pause(0.0) or 0.0) <= 0.25


def test_the_names_of_the_module_are_there() -> None:
    assert all(hasattr(client, name) for name in client.__all__)


# A daemon that is restarted in the middle: nothing is lost, and nothing is there twice.


class Publishers:
    """They publish all the time, by both ways, one at a time and in batches; what they were told is taken."""

    def __init__(self, url: str) -> None:
        self.taken: list[str] = []
        self.orders: list[list[str]] = []
        self._url = url
        self._over = threading.Event()

    def single(self, name: str) -> None:
        """One after the other, in a thread."""
        ids = self._new(name)
        while not self._over.is_set():
            ids.append(f"{name}-{len(ids)}")
            publish("jobs", len(ids), url=self._url, message_id=ids[-1], timeout=60)
            self.taken.append(ids[-1])
            time.sleep(0.005)

    def batches(self, name: str) -> None:
        ids = self._new(name)
        while not self._over.is_set():
            new = [f"{name}-{len(ids) + n}" for n in range(20)]
            ids += new
            publish(
                messages=[{"channel": "jobs", "data": 1, "messageId": one} for one in new],
                url=self._url,
                timeout=60,
            )
            self.taken += new
            time.sleep(0.02)

    async def on_a_loop(self, name: str) -> None:
        ids = self._new(name)
        while not self._over.is_set():
            ids.append(f"{name}-{len(ids)}")
            await async_publish("jobs", 1, url=self._url, message_id=ids[-1], timeout=60)
            self.taken.append(ids[-1])
            await asyncio.sleep(0.005)

    def _new(self, name: str) -> list[str]:
        self.orders.append([])
        return self.orders[-1]

    async def run(self, restart: Callable[[], None]) -> None:
        """Publish before, while and after something happens."""
        work = [
            asyncio.create_task(asyncio.to_thread(self.single, "single")),
            asyncio.create_task(asyncio.to_thread(self.batches, "batch")),
            asyncio.create_task(self.on_a_loop("loop")),
        ]
        await asyncio.sleep(0.7)
        for _ in range(2):
            await asyncio.to_thread(restart)
            await asyncio.sleep(0.5)
        self._over.set()
        await asyncio.gather(*work)


@pytest.mark.parametrize("how", ["stopped", "killed"])
@asynchronous
async def test_a_daemon_that_is_restarted_in_the_middle(redis_server: RedisServer, how: str) -> None:
    ini = "[channel jobs]\npersistent = yes\nhistory_size = 100000\n"
    with Daemon(ini, workers=2, redis=redis_server.url) as daemon:

        def restart() -> None:
            daemon.stop() if how == "stopped" else daemon.kill()
            daemon.start()

        publishers = Publishers(daemon.url)
        await publishers.run(restart)
        kept: list[str] = []
        while True:
            status, body = daemon.get(f"/channels/jobs/history?limit=1000&since={len(kept)}")
            assert status == 200
            if not body["messages"]:
                break
            kept += [message["messageId"] for message in body["messages"]]
        print(f"{how} twice: {len(publishers.taken)} messages")
        assert len(kept) == len(set(kept)), "twice"
        assert set(publishers.taken) <= set(kept), "lost"
        assert len(publishers.taken) > 50
        for ids in publishers.orders:
            places = [kept.index(one) for one in ids if "batch" not in one]
            assert all(one < other for one, other in pairwise(places))
