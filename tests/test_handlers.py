"""Handlers in this process, with pytest-tornado's fixtures: what can be brought about only from within.

All else is tested with the real daemon (test_websocket.py, test_http.py).
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from socket import socket as RawSocket
from typing import Any
from urllib.parse import urlsplit

import pytest
from broker_kit import until
from client import handshake
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, websocket_connect

from tornado_bcast.answer import Answer
from tornado_bcast.application import Inside
from tornado_bcast.board import Board, State
from tornado_bcast.brokers import BrokerHealth, Publication, Receipt
from tornado_bcast.config import default_config
from tornado_bcast.handlers import make_routes
from tornado_bcast.handlers.websocket import SocketHandler
from tornado_bcast.stream import ClientStream

Event = dict[str, Any]


@pytest.fixture
def inside(io_loop: IOLoop) -> Iterator[Inside]:
    """The inside of the one worker, on a broker in memory."""
    board = Board(1)
    board.claim(0)
    board.state = State.SERVING

    async def make() -> Inside:
        made = Inside(default_config(redis={"url": "memory:"}, channels={"publish_all": "anyone"}), board, 0)
        await made.start()
        return made

    made = io_loop.run_sync(make)
    yield made
    io_loop.run_sync(made.close)


@pytest.fixture
def app(inside: Inside) -> Application:
    return make_routes(inside)


class Server(HTTPServer):
    """Makes streams as the worker does."""

    def _handle_connection(self, connection: RawSocket, address: object) -> None:
        self.handle_stream(ClientStream(connection), address)


@pytest.fixture
def http_server(app: Application, io_loop: IOLoop, _unused_port: tuple[RawSocket, int]) -> Iterator[Server]:
    """In the place of pytest-tornado's."""
    server = Server(app)

    async def start() -> None:
        server.add_socket(_unused_port[0])

    async def stop() -> None:
        server.stop()
        await server.close_all_connections()

    io_loop.run_sync(start)
    yield server
    io_loop.run_sync(stop)


async def fetch(client: AsyncHTTPClient, url: str, body: Any = None, **headers: str) -> HTTPResponse:
    """GET, or POST with a body; the answer whatever its status."""
    options: dict[str, Any] = {"headers": headers, "raise_error": False}
    if body is not None:
        options |= {"method": "POST", "body": json.dumps(body)}
    return await client.fetch(url, **options)


class Socket:
    """A client of Tornado's."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection

    async def read(self) -> Event:
        text = await self.connection.read_message()
        assert text is not None, (self.connection.close_code, self.connection.close_reason)
        event: Event = json.loads(text)
        return event

    async def ask(self, **frame: Any) -> Event:
        await self.connection.write_message(json.dumps(frame))
        return await self.read()

    async def closed(self) -> tuple[int | None, str | None]:
        assert await self.connection.read_message() is None
        return self.connection.close_code, self.connection.close_reason


Connect = Callable[[], Awaitable[Socket]]


@pytest.fixture
def connect(io_loop: IOLoop, inside: Inside, base_url: str) -> Iterator[Connect]:
    """Opens connections, which are closed at the end."""
    made: list[Socket] = []

    async def new() -> Socket:
        socket = Socket(await websocket_connect(base_url.replace("http", "ws") + "/ws"))
        made.append(socket)
        assert (await socket.read())["op"] == "connect"
        return socket

    async def close() -> None:
        for socket in made:
            socket.connection.close()
        await until(lambda: inside.metrics.connections == 0)

    yield new
    io_loop.run_sync(close)


@pytest.mark.gen_test
async def test_a_message_from_http_to_a_socket(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str
) -> None:
    socket = await connect()
    assert (await socket.ask(type="subscribe", channel="a"))["op"] == "subscribe"
    answer = await fetch(http_client, base_url + "/broadcast", {"channel": "a", "data": 1})
    assert answer.code == 200
    assert (await socket.read())["data"] == 1


@pytest.mark.logs("internal_error")
@pytest.mark.gen_test
async def test_an_error_of_ours_in_a_request(
    http_client: AsyncHTTPClient, base_url: str, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the inside, and the log nothing of the request."""

    def fail(*args: object, **more: object) -> None:
        raise RuntimeError("secret of the inside")

    monkeypatch.setattr(inside.node, "publish", fail)
    answer = await fetch(http_client, base_url + "/broadcast?token=secret", {"data": 1})
    assert answer.code == 500
    body = json.loads(answer.body)
    assert body["error"]["code"] == "internal" and "secret" not in answer.body.decode()
    assert answer.headers["Content-Type"].startswith("application/json")


@pytest.mark.gen_test
async def test_the_log_of_an_error_has_no_query(
    http_client: AsyncHTTPClient,
    base_url: str,
    inside: Inside,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(inside.node.broker, "health", lambda: 1 / 0)
    assert (await fetch(http_client, base_url + "/health?token=secret")).code == 500
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.event == "internal_error" and record.exc_info  # type: ignore[attr-defined]
    assert "secret" not in caplog.text and "/health" not in record.getMessage()


@pytest.mark.logs("internal_error")
@pytest.mark.parametrize("command", ["broadcast", "subscribe"])
@pytest.mark.gen_test
async def test_an_error_of_ours_in_a_command(
    connect: Connect,
    http_client: AsyncHTTPClient,
    base_url: str,
    inside: Inside,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """The client is told, and its connection lives on."""

    def fail(*args: object, **more: object) -> None:
        raise RuntimeError("secret of the inside")

    socket = await connect()
    with monkeypatch.context() as patch:
        patch.setattr(inside.node, "publish", fail)
        patch.setattr(inside.node, "join", fail)
        error = await socket.ask(type=command, channel="a", data=1, messageId="m")
        assert (error["code"], error["messageId"], error["channel"]) == ("internal", "m", "a")
        assert "secret" not in error["message"]
    answer = await socket.ask(type=command, channel="a", data=1, messageId="m2")
    assert (answer["type"], answer["messageId"]) == ("ack", "m2")


@pytest.mark.gen_test
async def test_a_worker_that_drains(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str, inside: Inside
) -> None:
    """A load balancer sees it, and who comes all the same is served until the clients are sent away."""
    inside.board.state = State.DRAINING
    for path, status in (("/health", 503), ("/health/ready", 503), ("/health/live", 200)):
        answer = await fetch(http_client, base_url + path)
        assert answer.code == status, path
    body = json.loads((await fetch(http_client, base_url + "/health")).body)
    assert body["status"] == "draining"
    answer = await fetch(http_client, base_url + "/broadcast", {"channel": "a", "data": 1})
    assert (answer.code, answer.headers["Connection"]) == (200, "close")
    socket = await connect()
    assert (await socket.ask(type="subscribe", channel="a"))["type"] == "ack"
    await inside.send_away(0.0, 1.0)
    assert (await socket.closed())[0] == 1012
    # One whose request was on its way.
    socket = await connect()
    assert (await socket.closed())[0] == 1012


@pytest.mark.logs("internal_error")
@pytest.mark.gen_test
async def test_a_regular_work_that_fails_takes_no_other_with_it(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fail() -> None:
        done.append("keeper")
        raise OSError

    monkeypatch.setattr(inside.keeper, "turn", fail)
    monkeypatch.setattr(inside.node, "turn", lambda: done.append("node"))
    # The loop's own ticks, which come on after a failure as well.
    while len(done) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert done == ["keeper", "node"] * 2


@pytest.mark.logs("overloaded")
@pytest.mark.gen_test
async def test_an_overloaded_worker(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str, inside: Inside
) -> None:
    """It takes nothing more, goes on delivering, and recovers by itself. The lag is told here."""
    inside._lag_meter.close()
    socket, publisher = await connect(), await connect()
    await socket.ask(type="subscribe", channel="a")
    inside._on_lag(10.0, 100.0)

    with pytest.raises(HTTPClientError) as caught:
        await connect()
    assert caught.value.code == 503
    assert caught.value.response is not None and int(caught.value.response.headers["Retry-After"]) >= 1
    body = {"channel": "a", "data": 1}
    answer = await fetch(http_client, base_url + "/broadcast", body)
    assert (answer.code, json.loads(answer.body)["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    error = await publisher.ask(type="broadcast", messageId="m", **body)
    assert (error["code"], error["messageId"], error["channel"]) == ("unavailable", "m", "a")
    assert error["retryAfter"] > 0
    for path, status in (("/health", 503), ("/health/ready", 200), ("/health/live", 200), ("/stats", 200)):
        assert (await fetch(http_client, base_url + path)).code == status, path
    health = json.loads((await fetch(http_client, base_url + "/health")).body)
    assert (health["status"], health["redis"], health["overloaded"]) == ("degraded", "up", True)

    # What has been taken is delivered, and other requests are answered.
    rule = inside.rules.find("a")
    await inside.node.publish("a", rule, "n", b'{"type":"message","data":0}', 0, given=True)
    assert (await socket.read())["data"] == 0
    assert (await socket.ask(type="subscribe", channel="b"))["op"] == "subscribe"

    # Whoever was refused is heard again at the next tick: refused once more, or taken.
    for number in range(3):
        await publisher.connection.write_message(json.dumps({"type": "broadcast", "messageId": "o", **body}))
        inside._on_lag(0.4 if number < 2 else 0.1, 101.0 + number)
        answer = await publisher.read()
        assert (answer["type"], answer["messageId"]) == ("ack" if number == 2 else "error", "o")
    assert (await socket.read())["data"] == 1
    assert inside.overload.active
    inside._on_lag(0.1, 110.0)
    assert not inside.overload.active
    health = json.loads((await fetch(http_client, base_url + "/health")).body)
    assert health["status"] == "ok" and "overloaded" not in health
    assert (await fetch(http_client, base_url + "/broadcast", body)).code == 200


@pytest.mark.gen_test
async def test_what_a_broker_complains_of_is_told(
    http_client: AsyncHTTPClient, base_url: str, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem that an operator should mend is no reason to send traffic elsewhere."""
    problem = "maxmemory-policy is allkeys-lru"
    monkeypatch.setattr(inside.node.broker, "health", lambda: BrokerHealth(True, 0.001, problem))
    answer = await fetch(http_client, base_url + "/health")
    body = json.loads(answer.body)
    assert (answer.code, body["status"], body["redis"]) == (503, "degraded", "up")
    assert body["problem"] == problem
    assert (await fetch(http_client, base_url + "/health/ready")).code == 200


@pytest.mark.gen_test
async def test_new_rules_and_limits_hold_for_open_connections(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str, inside: Inside
) -> None:
    socket = await connect()
    assert (await socket.ask(type="subscribe", channel="a"))["type"] == "ack"
    changes: Mapping[str, Mapping[str, str]] = {
        "redis": {"url": "memory:"},
        "channels": {"publish": "server", "subscribe": "nobody"},
        "cors": {"origins": "https://only.example"},
        "limits": {"max_subscriptions": "1"},
    }
    inside.configure(default_config(**changes))
    assert (await socket.ask(type="broadcast", channel="a", data=1))["code"] == "forbidden"
    assert (await socket.ask(type="broadcast", data=1))["code"] == "forbidden"
    assert (await socket.ask(type="subscribe", channel="b"))["code"] == "forbidden"
    answer = await fetch(http_client, base_url + "/health", Origin="https://other.example")
    assert answer.code == 403
    # What it has it keeps.
    await fetch(http_client, base_url + "/broadcast", {"channel": "a", "data": 2})
    assert (await socket.read())["data"] == 2


@pytest.mark.gen_test
async def test_closing_says_goodbye(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str, inside: Inside
) -> None:
    sockets = [await connect() for _ in range(4)]
    IOLoop.current().spawn_callback(inside.send_away, 0.0, 2.0)
    reasons = []
    for socket in sockets:
        code, reason = await socket.closed()
        assert code == 1012 and reason is not None
        reasons.append(json.loads(reason)["retryAfter"])
    assert len(set(reasons)) > 1
    await until(lambda: inside.metrics.connections == inside.board.own_sockets == 0)


@pytest.mark.gen_test
async def test_who_is_sent_away_has_its_answers_first(
    connect: Connect,
    http_client: AsyncHTTPClient,
    base_url: str,
    inside: Inside,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was published is answered before the goodbye; what comes after is for the next connection."""
    socket, idle = await connect(), await connect()
    answers: list[Answer[Receipt]] = []

    def publish(publication: Publication) -> Answer[Receipt]:
        answers.append(Answer())
        return answers[-1]

    monkeypatch.setattr(inside.node.broker, "publish", publish)
    send = socket.connection.write_message
    await send(json.dumps({"type": "broadcast", "channel": "a", "data": 1, "messageId": "first"}))
    await until(lambda: len(answers) == 1)
    going = asyncio.ensure_future(inside.send_away(0.0, 1.0))
    assert (await idle.closed())[0] == 1012
    await send(json.dumps({"type": "broadcast", "channel": "a", "data": 2, "messageId": "second"}))
    await asyncio.sleep(0.1)
    assert len(answers) == 1 and not going.done()
    answers[0].set_result(Receipt())
    answer = await socket.read()
    assert (answer["op"], answer["messageId"]) == ("broadcast", "first")
    assert (await socket.closed())[0] == 1012
    await going


@pytest.mark.gen_test
async def test_who_is_never_answered_is_sent_away_all_the_same(
    connect: Connect, http_client: AsyncHTTPClient, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = await connect()
    monkeypatch.setattr(inside.node.broker, "publish", lambda _: Answer())
    frame = {"type": "broadcast", "channel": "a", "data": 1, "messageId": "first"}
    await socket.connection.write_message(json.dumps(frame))
    await asyncio.sleep(0.05)
    begun = time.monotonic()
    going = asyncio.ensure_future(inside.send_away(0.0, 1.0))
    code, reason = await socket.closed()
    assert code == 1012 and 0 < json.loads(reason or "")["retryAfter"] <= 1000
    await going
    assert time.monotonic() - begun < 2.5


@pytest.mark.gen_test
async def test_what_is_acked_is_saved_before_the_goodbye(
    connect: Connect, http_client: AsyncHTTPClient, inside: Inside
) -> None:
    socket = await connect()
    await socket.ask(type="subscribe", channel="a")
    (connection,) = inside._connections
    saved: list[bool] = []
    save = inside.keeper.save

    async def slowly(*arguments: Any) -> None:
        await asyncio.sleep(0.05)
        await save(*arguments)
        saved.append(True)

    inside.keeper.save = slowly  # type: ignore[method-assign]
    connection.session.changed.add("a")  # type: ignore[attr-defined]
    going = asyncio.ensure_future(inside.send_away(0.0, 1.0))
    assert (await socket.closed())[0] == 1012
    assert saved
    await going


@pytest.mark.gen_test
async def test_what_is_counted_is_given_back(
    connect: Connect, http_client: AsyncHTTPClient, base_url: str, inside: Inside
) -> None:
    for _ in range(3):
        sockets = [await connect() for _ in range(3)]
        for socket in sockets:
            await socket.ask(type="subscribe", channel="a")
        assert (inside.metrics.connections, inside.metrics.subscriptions) == (3, 3)
        assert inside.board.own_sockets == 3 and inside.hub.count("a") == 3
        for socket in sockets:
            socket.connection.close()
        await until(lambda: inside.metrics.connections == 0)
        assert inside.metrics.subscriptions == inside.board.own_sockets == inside.hub.count("a") == 0
    assert not inside._connections


@pytest.mark.gen_test
async def test_who_has_left_during_the_handshake_is_no_error(
    http_server: object, base_url: str, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a connection may be read together with the last bytes of its request (the fuzz found it)."""

    def accept(handler: SocketHandler, value: str) -> IOStream:
        stream = take(handler, value)
        stream.close()
        return stream

    take = SocketHandler.accept
    monkeypatch.setattr(SocketHandler, "accept", accept)
    parts = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(handshake(parts.netloc))
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    assert inside.metrics.connections == 0


@pytest.mark.parametrize("seconds", [0.05, 60.0])
@pytest.mark.gen_test
async def test_who_resumes_while_the_worker_leaves_is_told_so(
    http_server: object, base_url: str, inside: Inside, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Whether Redis answers in time or not."""

    async def resume(*_: object) -> None:
        asked.set()
        await asyncio.sleep(seconds)

    asked = asyncio.Event()
    monkeypatch.setattr(inside.keeper, "resume", resume)
    monkeypatch.setattr(inside.keeper, "flush", lambda: asyncio.sleep(0.4))
    socket = Socket(await websocket_connect(base_url.replace("http", "ws") + "/ws?session=unknown"))
    await asked.wait()
    await inside.send_away(0.0, 1.0)
    closing = asyncio.ensure_future(inside.close())
    if seconds < 1:
        assert (await socket.read())["op"] == "connect"
    code, reason = await socket.closed()
    assert code == 1012 and json.loads(reason or "")["retryAfter"] <= 1000
    socket.connection.close()
    await closing
