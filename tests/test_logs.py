"""logs.py: what a line looks like, and what never stands in one."""

import asyncio
import io
import json
import logging
import re
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import tornado.web
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.websocket import WebSocketHandler

from tornado_bcast import logs

SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Everything that `configure` changes in the process, put back."""
    root = logging.getLogger()
    names = ["", logs.PACKAGE, "tornado.access", "push_response"]
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, hook = root.handlers[:], sys.excepthook
    yield
    root.handlers[:] = handlers
    sys.excepthook = hook
    logging.captureWarnings(False)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def configured(level: str = "info", worker: int | None = None) -> io.StringIO:
    stream = io.StringIO()
    handler = logs.configure("json", level, worker=worker, stream=stream)
    # Without pytest's own, which raise at bad formats and cannot report lone surrogates.
    logging.getLogger().handlers[:] = [handler]
    return stream


logger = logging.getLogger("tornado_bcast.test")


def test_a_json_line_has_the_agreed_fields() -> None:
    stream = configured(worker=3)
    logger.info(
        "%s came", "somebody", extra={"event": "connected", "clientId": "c1", "channel": "news", "n": 7}
    )
    (line,) = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(line.pop("time")))
    assert line == {
        "level": "INFO",
        "event": "connected",
        "message": "somebody came",
        "worker": 3,
        "clientId": "c1",
        "channel": "news",
        "n": 7,
    }


def test_without_event_and_client_the_line_still_has_an_event() -> None:
    stream = configured()
    logger.warning("hm")
    (line,) = lines(stream)
    assert (line["event"], line["worker"]) == ("test", None)
    assert "clientId" not in line


def test_one_record_is_one_line_whatever_it_contains() -> None:
    stream = configured()
    logger.info("a\nb\u2028c \ud800 %s", "d\r\n", extra={"event": "x", "odd": object()})
    assert len(stream.getvalue().splitlines()) == 1


def test_configuring_again_replaces_the_handler() -> None:
    first = configured()
    second = configured(worker=1)
    logger.info("once")
    assert first.getvalue() == ""
    assert len(lines(second)) == 1


def test_the_level_is_that_of_the_package_only() -> None:
    stream = configured("DEBUG")
    logger.debug("ours")
    for name in ("redis", "push_response", "asyncio", "websockets", "tornado.general", "tornado.application"):
        other = logging.getLogger(name)
        before = other.level
        other.setLevel(logging.DEBUG)  # even when somebody switched it on
        other.info("Push response: %s", SECRET)
        other.debug("Push response: %s", SECRET)
        other.setLevel(before)
    assert [line["message"] for line in lines(stream)] == ["ours"]
    assert not logging.getLogger("redis").isEnabledFor(logging.INFO)


def test_the_level_holds_back_what_is_below_it() -> None:
    stream = configured("Warning")
    logger.info("no")
    logger.warning("yes")
    assert [line["message"] for line in lines(stream)] == ["yes"]


def test_text_is_aligned_and_has_worker_event_and_fields() -> None:
    stream = io.StringIO()
    logs.configure("text", "info", worker=2, stream=stream)
    logger.info("hello %s", "you", extra={"event": "greeted", "clientId": "c1", "channel": "news"})
    logger.warning("then\x1b[2J this\nand that")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d\.\d{3} INFO     w2   greeted            hello you clientId=c1 channel=news", first
    )
    assert second.endswith(r"WARNING  w2   test               then\x1b[2J this\nand that")


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            stream = Terminal()
            logs.configure("text", "info", stream=stream)
            logger.error("x")
            assert ("\x1b[" in stream.getvalue()) is coloured


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("GET /ws?token=abc&x=1 (127.0.0.1)", "GET /ws (127.0.0.1)"),
        ("Request(uri='/ws?token=abc', version='HTTP/1.1')", "Request(uri='/ws version='HTTP/1.1')"),
        ("really? yes", "really? yes"),
        ("redis://user:pa@example.com:6379/0", "redis://***@example.com:6379/0"),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.e30.abc", "Bearer ***"),
        ("bcast.v1, bearer.eyJhbGciOiJIUzI1NiJ9.e30", "bcast.v1, bearer.***"),
        ("session.0123456789abcdef0123456789abcdef", "session.***"),
        ("the session ended", "the session ended"),
    ],
)  # fmt: skip
def test_scrub(text: str, scrubbed: str) -> None:
    assert logs.scrub(text) == scrubbed


def test_of_an_exception_that_quotes_a_value_only_the_type_is_printed() -> None:
    stream = configured()
    try:
        try:
            {}[SECRET]
        except KeyError as exc:
            raise RuntimeError("the outer sentence") from exc
    except RuntimeError:
        logger.exception("it went wrong", extra={"event": "broken"})
    (line,) = lines(stream)
    assert SECRET not in stream.getvalue()
    trace = str(line["traceback"])
    assert trace.index("KeyError") < trace.index("RuntimeError: the outer sentence")
    assert "test_logs.py" in trace


def test_groups_are_printed_with_their_members() -> None:
    stream = configured()
    logger.error("both", exc_info=ExceptionGroup("two", [OSError("first"), ValueError(SECRET)]))
    trace = str(lines(stream)[0]["traceback"])
    assert "OSError: first" in trace
    assert "ValueError" in trace
    assert SECRET not in trace


def test_a_bad_format_string_neither_raises_nor_prints_its_arguments() -> None:
    stream = configured()
    logger.info("%d", SECRET)
    (line,) = lines(stream)
    assert line["event"] == "log_failed"
    assert "test_logs.py" in str(line["message"])
    assert SECRET not in stream.getvalue()


def test_a_closed_stream_stops_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    logs.configure("json", "info", stream=Gone())
    logger.info("into the void")
    assert capsys.readouterr().err == ""


def test_warnings_and_uncaught_errors_come_in_the_same_form() -> None:
    code = (
        "import warnings\n"
        "from tornado_bcast import logs\n"
        "logs.configure('json', 'info')\n"
        "warnings.warn('careful')\n"
        f"raise KeyError({SECRET!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert "careful" in first["message"]
    assert (second["event"], second["level"]) == ("crash", "CRITICAL")
    assert SECRET not in done.stderr


# --- Tornado's and asyncio's own loggers, in the real thing ------------------------------------------


class Raises(tornado.web.RequestHandler):
    def get(self, what: str) -> None:
        if what == "uncaught":
            raise RuntimeError("boom")
        if what == "missing":
            self.get_argument("needed")
        self.get_argument("x")  # Tornado: HTTPError(400, "Invalid unicode in x: b'...'")

    def post(self, what: str) -> None:
        raise tornado.web.HTTPError(400, f"bad body: {self.request.body!r}")


class Socket(WebSocketHandler):
    def on_message(self, message: str | bytes) -> None:
        raise ValueError(message)


def exchange(port: int, request: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as peer:
        peer.sendall(request)
        peer.settimeout(0.5)
        try:
            while peer.recv(65536):
                pass
        except TimeoutError:
            return  # an answer after which the connection stays open


REQUESTS = {
    "uncaught": f"GET /uncaught?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "missing": f"GET /missing?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "unicode": f"GET /unicode?x=%ff{SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "body": f"POST /body?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    f"Content-Length: {len(SECRET)}\r\n\r\n{SECRET}",
    "not found": f"GET /a/b/c?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "bad method": f"BREW /uncaught?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "bad path": f"GET /%ff?token={SECRET} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "malformed": f"GET {SECRET}\r\n\r\n",
    "bad header": f"GET /uncaught HTTP/1.1\r\nHost: x\r\n{SECRET}\r\n\r\n",
    "bad host": f"GET /uncaught HTTP/1.1\r\nHost: {SECRET} {SECRET}\r\n\r\n",
    "bad length": f"POST /uncaught HTTP/1.1\r\nHost: x\r\nContent-Length: {SECRET}\r\n\r\n",
    "bad form": "POST /uncaught HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    f"Content-Length: {len(SECRET)}\r\nConnection: close\r\n\r\n{SECRET}",
    "bad upgrade": f"GET /ws?token={SECRET} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\n\r\n",
    "websocket": f"GET /ws?token={SECRET} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    # One masked text frame (mask 0) with the secret in it.
    + "\x81" + chr(0x80 | len(SECRET)) + "\0\0\0\0" + SECRET,
}  # fmt: skip


async def serve_and_ask(request: bytes) -> None:
    server = HTTPServer(
        tornado.web.Application([(r"/ws", Socket), (r"/([a-z]+)", Raises)], serve_traceback=True)
    )
    (sock,) = bind_sockets(0, "127.0.0.1")
    server.add_socket(sock)
    try:
        await asyncio.to_thread(exchange, sock.getsockname()[1], request)
    finally:
        server.stop()
        await server.close_all_connections()


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("level", ["info", "debug"])
def test_tornado_prints_nothing_of_a_request_but_its_path(name: str, level: str) -> None:
    stream = configured(level)
    asyncio.run(serve_and_ask(REQUESTS[name].encode("latin-1")))
    text = stream.getvalue()
    assert SECRET not in text
    assert "token=" not in text
    assert all(line["level"] in ("WARNING", "ERROR") for line in lines(stream))
    if name in ("uncaught", "missing", "unicode", "body", "websocket"):
        assert len(lines(stream)) == 1  # it was told, and once: tornado.access is silent
    if name == "uncaught":
        assert "GET /uncaught" in text
        assert "RuntimeError: boom" in text


def test_failed_tls_handshakes_are_told_once_a_minute() -> None:
    stream = configured()
    general = logging.getLogger("tornado.general")
    for second in (0, 1, 59, 60, 100):
        text = "SSL Error on %s %s: %s"
        record = general.makeRecord(general.name, logging.WARNING, "", 0, text, (7, ("::1", 1), "http"), None)
        record.created = 1e9 + second
        general.handle(record)
    general.warning("something else")
    times = [str(line["time"])[17:19] for line in lines(stream)[:-1]]
    assert times == ["40", "40"]
    assert lines(stream)[-1]["message"] == "something else"


def test_callbacks_and_tasks_are_named_without_their_arguments() -> None:
    stream = configured("debug")

    def callback(data: str) -> None:
        raise ValueError(data)

    async def task(data: str) -> None:
        raise ValueError(data)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        IOLoop.current().add_callback(callback, SECRET)
        loop.call_soon(callback, SECRET)
        lost = loop.create_task(task(SECRET))
        await asyncio.sleep(0.01)
        del lost

    asyncio.run(main())
    assert SECRET not in stream.getvalue()
    messages = [str(line["message"]) for line in lines(stream)]
    assert len(messages) == 3
    assert any(message.startswith("Exception in callback") and "callback" in message for message in messages)
    assert any("never retrieved" in message for message in messages)


# --- RefusalLog -----------------------------------------------------------------------------------


def test_a_refusal_has_client_reason_and_key() -> None:
    stream = configured()
    refusals = logs.RefusalLog(logger)
    refusals.add(
        1.0, "limit", "Slow down.", client_id="c1", setting="[limits] rate", channel="news", origin=None
    )
    (line,) = lines(stream)
    line.pop("time")
    assert line == {
        "level": "INFO",
        "event": "refused",
        "message": "refused: Slow down.",
        "worker": None,
        "clientId": "c1",
        "kind": "limit",
        "setting": "[limits] rate",
        "channel": "news",
    }


def test_ten_refusals_a_second_and_then_one_line_for_the_rest() -> None:
    stream = configured()
    refusals = logs.RefusalLog(logger)
    for tick in range(25):
        refusals.add(100 + tick * 0.01, "origin", "no")
    assert len(lines(stream)) == 10
    refusals.sweep(100.9)
    assert len(lines(stream)) == 10
    refusals.sweep(101.0)
    refusals.sweep(102.5)
    (told,) = lines(stream)[10:]
    assert (told["event"], told["leftOut"]) == ("refusals_left_out", 15)
    refusals.add(102.6, "origin", "no")
    assert len(lines(stream)) == 12


def test_the_rest_is_told_by_the_next_refusal_as_well() -> None:
    stream = configured()
    refusals = logs.RefusalLog(logger, per_second=1)
    for now in (5.0, 5.1, 6.2):
        refusals.add(now, "rule", "no")
    assert [line["event"] for line in lines(stream)] == ["refused", "refusals_left_out", "refused"]
