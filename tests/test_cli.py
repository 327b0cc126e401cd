"""The command line: real processes, and servers on real sockets that answer as a script tells them."""

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemon import ROOT, Daemon, until
from scripted import BUSY, DUPLICATE, TAKEN, Scripted, answer, error
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from tornado_bcast import client
from tornado_bcast.errors import Unavailable
from tornado_bcast.tail import Print, Say, Send, Stop, Tail

COMMAND = [sys.executable, "-W", "error", "-m", "tornado_bcast.cli"]
# What cron gives to a job: no HOME, no terminal.
CRON = {"PATH": "/usr/bin:/bin"}


def run(
    *arguments: str, env: dict[str, str] | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        input=stdin,
        env=CRON | (env or {}),
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    text = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "Traceback" not in text.stderr, text.stderr
    return text


# --- publish ----------------------------------------------------------------------------------------------


def test_publish_sends_the_json_and_prints_the_result() -> None:
    with Scripted(TAKEN) as server:
        done = run("publish", "news", '{"a": [1, 2.5, "ü"]}', "--url", server.url, "--id", "m1")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"channel": "news", "messageId": "m1"}
    ((_, line, headers, body),) = server.requests
    assert line == "POST /broadcast HTTP/1.1"
    assert body == {"channel": "news", "data": {"a": [1, 2.5, "ü"]}, "messageId": "m1"}
    assert "authorization" not in headers


@pytest.mark.parametrize(
    ("arguments", "stdin", "data"),
    [
        (["null"], b"", None),
        (["-5"], b"", -5),
        (["-"], b' {"from": "stdin"}\n', {"from": "stdin"}),
        (["--text", "not { json"], b"", "not { json"),
        (["--text", "-"], "zwei\nZeilen ü\n".encode(), "zwei\nZeilen ü"),
        (["--text", "5"], b"", "5"),
    ],
)
def test_publish_reads_json_or_text(arguments: list[str], stdin: bytes, data: Any) -> None:
    with Scripted(TAKEN) as server:
        done = run("publish", "news", *arguments, env={"BCAST_URL": server.url}, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert server.requests[0][3]["data"] == data


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["hello"], b"", "--text"),
        (['{"a": NaN}'], b"", "NaN"),
        (["1e999"], b"", "number"),
        ([""], b"", "--text"),
        (["-"], b"\xff", "UTF-8"),
        (["[" * 100_000], b"", "deep"),
        (["1", "--timeout", "soon"], b"", "duration"),
        (["1", "--key-file", "/nowhere/key"], b"", "/nowhere/key"),
    ],
)
def test_publish_says_what_is_wrong_with_its_arguments(arguments: list[str], stdin: bytes, said: str) -> None:
    done = run("publish", "news", *arguments, "--url", "http://127.0.0.1:9", stdin=stdin)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_publish_refuses_an_argument_that_is_not_utf8() -> None:
    done = subprocess.run(
        [*COMMAND, "publish", "news", "--text", b"\xff"], capture_output=True, cwd=ROOT, check=False
    )
    assert (done.returncode, b"UTF-8" in done.stderr) == (2, True)


def test_publish_takes_the_key_from_a_file_or_the_environment(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("from-file\n")
    with Scripted(TAKEN) as server:
        run("publish", "news", "1", "--url", server.url, env={"BCAST_KEY": "from-env"})
        run(
            "publish",
            "news",
            "1",
            "--url",
            server.url,
            "--key-file",
            str(key_file),
            env={"BCAST_KEY": "from-env"},
        )
    sent = [headers["authorization"] for _, _, headers, _ in server.requests]
    assert sent == ["Bearer from-env", "Bearer from-file"]


@pytest.mark.parametrize("content", [b"", b" \n", b"uno\ndos\n", "schl\u00fcssel".encode(), b"\xff"])
def test_a_file_without_a_usable_secret_is_told_and_not_shown(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    for arguments in (["publish", "news", "1", "--key-file"], ["tail", "news", "--token-file"]):
        done = run(*arguments, str(path))
        assert (done.returncode, str(path) in done.stderr) == (2, True)
        assert not any(part in done.stderr for part in ("uno", "schl"))


def test_there_is_no_option_for_the_key_itself() -> None:
    done = run("publish", "news", "1", "--key", "secret")
    assert done.returncode == 2


def test_publish_tries_again_with_the_same_id_as_the_server_asks() -> None:
    script = [
        error(503, "unavailable", "Redis is away.", "Retry-After: 1"),
        error(429, "rate_limited", "Slow down."),
        b"",  # taken, but the answer was lost
        b"HTTP/1.1 200",  # cut off
        TAKEN[:-5],  # as well
        DUPLICATE,
    ]
    with Scripted(*script) as server:
        done = run("publish", "news", "1", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["duplicate"] is True
    assert len(server.requests) == 6
    assert len(server.ids) == 1
    times = [at for at, *_ in server.requests]
    assert times[1] - times[0] >= 1


def test_publish_waits_for_a_server_that_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started: list[Scripted] = []
    timer = threading.Timer(0.7, lambda: started.append(Scripted(TAKEN, port=port)))
    timer.start()
    done = run("publish", "news", "1", "--url", f"http://127.0.0.1:{port}", "--timeout", "20s")
    timer.join()
    with started[0]:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("status", "code"), [(400, "bad_channel"), (401, "unauthorized"), (403, "forbidden"), (413, "too_large")]
)
def test_publish_gives_up_at_once_when_it_is_refused(status: int, code: str) -> None:
    with Scripted(error(status, code, "Set [auth] api_keys.")) as server:
        done = run("publish", "news", "1", "--url", server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tornado-bcast publish: Set [auth] api_keys.\n"
    assert len(server.requests) == 1


def test_publish_ends_with_75_when_its_time_is_over() -> None:
    with Scripted(BUSY) as server:
        begun = time.monotonic()
        done = run("publish", "news", "1", "--url", server.url, "--timeout", "1.5s")
    assert done.returncode == 75
    assert "Redis is away." in done.stderr
    assert server.ids == {done.stderr.split("--id ")[1].strip()}
    assert len(server.requests) > 1
    assert time.monotonic() - begun < 4


def test_publish_does_not_wait_for_what_it_will_not_see() -> None:
    with Scripted(error(503, "unavailable", "Later.", "Retry-After: 60")) as server:
        begun = time.monotonic()
        done = run("publish", "news", "1", "--url", server.url, "--timeout", "20s")
    assert (done.returncode, len(server.requests)) == (75, 1)
    assert time.monotonic() - begun < 5


def test_publish_does_not_hang_on_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = run(
            "publish",
            "news",
            "1",
            "--url",
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            "--timeout",
            "500ms",
        )
    assert (done.returncode, "timed out" in done.stderr) == (75, True)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8080", "none"),
        ("ftp://example.com", "none"),
        ("http://", "none"),
        ("http://user:pw@example.com", "user"),
        ("http://example.com:99999", "cannot be read"),
        ("http://exa mple.com", "characters"),
    ],
)
def test_publish_refuses_what_is_no_url(url: str, said: str) -> None:
    done = run("publish", "news", "1", "--url", url)
    assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    assert "pw" not in done.stderr


def test_publish_tells_what_is_not_our_server() -> None:
    with Scripted(answer(404, b"<html>no</html>")) as server:
        done = run("publish", "news", "1", "--url", server.url)
    assert (done.returncode, "404" in done.stderr, "URL" in done.stderr) == (1, True, True)
    with Scripted(answer(301, b"", "Location: https://example.com/broadcast")) as server:
        done = run("publish", "news", "1", "--url", server.url)
    assert (done.returncode, "https://example.com/broadcast" in done.stderr) == (1, True)


def test_the_path_of_the_url_is_kept() -> None:
    with Scripted(TAKEN) as server:
        run("publish", "news", "1", "--url", f"{server.url}/push/")
    assert server.requests[0][1] == "POST /push/broadcast HTTP/1.1"


def test_publish_from_python() -> None:
    with Scripted(BUSY, TAKEN) as server:
        result = client.publish("news", {"a": 1}, url=server.url, key="k", message_id="m1")
    assert result == {"channel": "news", "messageId": "m1"}
    with pytest.raises(ValueError, match="JSON"):
        client.publish("news", float("nan"))
    with Scripted(BUSY) as server, pytest.raises(Unavailable, match="away"):
        client.publish("news", 1, url=server.url, timeout=0.2)
    with Scripted(error(403, "forbidden", "No.")) as server, pytest.raises(client.Rejected) as refusal:
        client.publish("news", 1, url=server.url)
    assert (refusal.value.code, refusal.value.status) == ("forbidden", 403)


def test_an_error_in_a_200_is_no_success() -> None:
    body = json.dumps({"results": [{"channel": "news", "error": {"code": "forbidden", "message": "No."}}]})
    with Scripted(answer(200, body.encode())) as server, pytest.raises(client.Rejected, match="No"):
        client.publish("news", 1, url=server.url)
    body = body.replace("forbidden", "unavailable")
    with Scripted(answer(200, body.encode()), TAKEN) as server:
        client.publish("news", 1, url=server.url)
        assert len(server.requests) == 2
    with pytest.raises(client.Rejected):
        client.decode_answer(200, None, b"<html>")


def test_backoff_grows_with_full_jitter_up_to_its_cap() -> None:
    samples: list[list[float]] = [[] for _ in range(8)]
    for seed in range(300):
        backoff = client.Backoff(base=0.25, cap=10, rng=random.Random(seed))
        for pauses in samples:
            pauses.append(backoff.next())
    for index, pauses in enumerate(samples):
        ceiling = min(10, 0.25 * 2**index)
        assert max(pauses) <= ceiling
        assert min(pauses) < 0.1 * ceiling < 0.9 * ceiling < max(pauses)
    backoff.reset()
    assert backoff.next() <= 0.25
    assert backoff.next(at_least=7) >= 7


def test_retry_after_is_a_number_or_a_date() -> None:
    assert client.parse_retry_after("3") == 3
    assert (
        client.parse_retry_after(None)
        == client.parse_retry_after("soon")
        == client.parse_retry_after("-1")
        == 0
    )
    assert client.parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert client.parse_retry_after("Fri, 21 Oct 2095 07:28:00 GMT") > 1e9


# --- tail: a scripted WebSocket server ---------------------------------------------------------------------

CONNECTED = {
    "type": "ack",
    "op": "connect",
    "clientId": "c",
    "session": "s",
    "resumed": False,
    "heartbeat": 25000,
}
Peer = Callable[["Talk"], None]


class Talk:
    """One connection of the scripted server."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.headers = connection.request.headers if connection.request else Headers()
        self.say(CONNECTED)

    def say(self, *frames: dict[str, Any]) -> None:
        for frame in frames:
            self.connection.send(json.dumps({"timestamp": 1, **frame}))

    def hear(self) -> dict[str, Any]:
        frame: dict[str, Any] = json.loads(self.connection.recv(timeout=10))
        return frame

    def subscribed(self, **fields: Any) -> dict[str, Any]:
        """Hear a subscribe and confirm it."""
        request = self.hear()
        ack = {
            "type": "ack",
            "op": "subscribe",
            "channel": request["channel"],
            "messageId": request["messageId"],
        }
        self.say({**ack, "persistent": False, **fields})
        return request


@contextmanager
def websocket_server(*script: Peer, refuse: list[bytes] | None = None) -> Iterator[str]:
    """Each connection is given to the next function; the last one takes all that follow."""
    parts = list(script)
    failures: list[BaseException] = []

    def handle(connection: ServerConnection) -> None:
        part = parts.pop(0) if len(parts) > 1 else parts[0]
        try:
            part(Talk(connection))
        except ConnectionClosed:
            pass
        except BaseException as exc:
            failures.append(exc)

    def refuse_some(connection: ServerConnection, request: Request) -> Response | None:
        if not refuse:
            return None
        head, _, body = refuse.pop(0).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = Headers([tuple(line.split(": ", 1)) for line in lines])
        return Response(int(first.split()[1]), "X", headers, body)

    server: Server = serve(handle, "127.0.0.1", 0, subprotocols=["bcast.v1"], process_request=refuse_some)  # type: ignore[list-item]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
    finally:
        server.shutdown()
        thread.join(5)
    if failures:
        raise failures[0]


@contextmanager
def tail(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [*COMMAND, "tail", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CRON,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def stop(process: subprocess.Popen[str], how: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
    process.send_signal(how)
    out, err = process.communicate(timeout=10)
    return process.returncode, out, err


def message(channel: str, data: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "channel": channel, "data": data, "messageId": "m", **fields}


def test_tail_prints_each_message_at_once_and_ends_with_ctrl_c() -> None:
    seen: list[Any] = []

    def script(talk: Talk) -> None:
        seen.append(talk.connection.subprotocol)
        seen.append([talk.subscribed()["channel"], talk.subscribed()["channel"]])
        talk.say(message("a", {"text": "ü\u2028\n"}), {"type": "ping"})
        seen.append(talk.hear())
        talk.say(message("b", 2), {"type": "message", "data": "to all", "messageId": "m"})
        talk.hear()

    with websocket_server(script) as url, tail("a", "b", "a", "--url", url) as process:
        assert process.stdout
        lines = [json.loads(process.stdout.readline()) for _ in range(3)]
        code, out, err = stop(process)
    assert seen == ["bcast.v1", ["a", "b"], {"type": "pong"}]
    assert [line["data"] for line in lines] == [{"text": "ü\u2028\n"}, 2, "to all"]
    assert lines[0]["channel"] == "a"
    assert (code, out) == (130, "")
    assert err == "tornado-bcast tail: subscribed to a\ntornado-bcast tail: subscribed to b\n"


def test_tail_ends_in_silence_when_nobody_reads_any_more() -> None:
    def script(talk: Talk) -> None:
        talk.subscribed()
        talk.say(message("a", 1))
        talk.hear()  # never a second message: head has gone after the first one all the same

    with websocket_server(script) as url:
        command = " ".join([*COMMAND, "tail", "a", "--url", url]) + " | head -1; echo ${PIPESTATUS[0]}"
        done = subprocess.run(
            ["bash", "-c", command],
            capture_output=True,
            text=True,
            env=CRON,
            cwd=ROOT,
            timeout=20,
            check=False,
        )
    first, status = done.stdout.splitlines()
    assert json.loads(first)["data"] == 1
    assert status == "0"
    assert done.stderr == "tornado-bcast tail: subscribed to a\n"


def test_tail_ends_in_silence_also_while_it_waits_for_a_server() -> None:
    command = (
        " ".join([*COMMAND, "tail", "a", "--url", "http://127.0.0.1:9"])
        + " | sleep 1.5; echo ${PIPESTATUS[0]}"
    )
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=CRON, cwd=ROOT, timeout=20, check=False
    )
    assert done.stdout == "0\n"
    assert all("Trying again in" in line for line in done.stderr.splitlines())


def test_tail_asks_for_the_last_and_goes_on_after_its_position() -> None:
    asked: list[dict[str, Any]] = []
    head = {"persistent": True, "epoch": "e1", "recovered": True}

    def first(talk: Talk) -> None:
        asked.append(talk.subscribed(**head, seq=7, replayed=2))
        talk.say(message("a", 6, seq=6, epoch="e1"))
        talk.connection.socket.close()

    def second(talk: Talk) -> None:
        asked.append(talk.subscribed(**head, seq=8, replayed=2))
        talk.say(
            message("a", 7, seq=7, epoch="e1"),
            message("a", 7, seq=7, epoch="e1"),
            message("a", 8, seq=8, epoch="e1"),
        )
        talk.connection.close(1012, '{"retryAfter": 20}')

    def third(talk: Talk) -> None:
        asked.append(talk.subscribed(**(head | {"epoch": "e2", "recovered": False}), seq=3, replayed=1))
        talk.say(message("a", 3, seq=3, epoch="e2"))
        talk.hear()

    with websocket_server(first, second, third) as url, tail("a", "--last", "2", "--url", url) as process:
        assert process.stdout
        data = [json.loads(process.stdout.readline())["data"] for _ in range(4)]
        _, out, err = stop(process)
    assert data == [6, 7, 8, 3]
    assert out == ""
    assert asked[0]["last"] == 2
    assert asked[1]["since"] == {"epoch": "e1", "seq": 6}
    assert asked[2]["since"] == {"epoch": "e1", "seq": 8}
    assert ("last" in asked[1], "since" in asked[0]) == (False, False)
    assert "The connection was lost. Trying again in" in err
    assert "(1012, restart). Trying again in 0.0 s." in err
    assert err.count("messages were missed") == 1


def test_tail_waits_as_long_as_the_server_asks() -> None:
    times: list[float] = []

    def first(talk: Talk) -> None:
        talk.subscribed()
        times.append(time.monotonic())
        talk.connection.close(4008, '{"retryAfter": 900}')

    def second(talk: Talk) -> None:
        times.append(time.monotonic())
        talk.subscribed()
        talk.hear()

    with websocket_server(first, second) as url, tail("a", "--url", url) as process:
        assert process.stderr
        lines = [process.stderr.readline() for _ in range(3)]
        stop(process)
    assert 0.85 < times[1] - times[0] < 3
    assert "(4008, slow consumer). Trying again in 0.9 s." in lines[1]
    assert "subscribed to a again; what was sent meanwhile is lost" in lines[2]


def test_tail_survives_refused_handshakes_and_a_server_that_is_not_there_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with tail("a", "--url", url) as process:
        assert process.stderr
        assert "Connection refused" in process.stderr.readline()
        assert "Trying again in" in process.stderr.readline()
        assert stop(process)[0] == 130
    refusals = [error(503, "unavailable", "Full.", "Retry-After: 1"), error(502, "x", "Proxy.")]

    def script(talk: Talk) -> None:
        talk.subscribed()
        talk.hear()

    with websocket_server(script, refuse=refusals) as url, tail("a", "--url", url) as process:
        assert process.stderr
        assert "Full. Trying again in" in process.stderr.readline()
        assert "Proxy. Trying again in" in process.stderr.readline()
        assert "subscribed" in process.stderr.readline()


@pytest.mark.parametrize(
    "refusal", [error(401, "unauthorized", "No key."), answer(404, b"no"), answer(301, b"", "Location: x")]
)
def test_tail_ends_where_there_is_no_socket_for_it(refusal: bytes) -> None:
    with websocket_server(lambda talk: None, refuse=[refusal]) as url:
        done = run("tail", "a", "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", [4500, 4501, 4503, 4999])
def test_tail_ends_when_it_must_not_come_back(code: int) -> None:
    with websocket_server(lambda talk: talk.connection.close(code, "go away")) as url:
        done = run("tail", "a", "--url", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert str(code) in done.stderr
    assert "go away" in done.stderr


def test_tail_comes_back_once_with_a_renewed_token(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("one\n")
    tokens: list[str | None] = []

    def script(talk: Talk) -> None:
        tokens.append(talk.headers.get("Authorization"))
        token_file.write_text("two\n")
        talk.connection.close(4501, "expired")

    with websocket_server(script) as url:
        done = run("tail", "a", "--url", url, "--token-file", str(token_file))
    assert tokens == ["Bearer one", "Bearer two"]
    assert done.returncode == 1
    assert "two" not in done.stderr


def test_tail_ends_when_a_channel_is_refused() -> None:
    def script(talk: Talk) -> None:
        talk.subscribed()
        request = talk.hear()
        refusal = {
            "type": "error",
            "code": "forbidden",
            "message": "Not for you.",
            "channel": request["channel"],
        }
        talk.say({**refusal, "messageId": request["messageId"]})
        talk.hear()

    with websocket_server(script) as url:
        done = run("tail", "a", "b", "--url", url)
    assert done.returncode == 1
    assert done.stderr.endswith("tornado-bcast tail: b: Not for you.\n")


def test_tail_subscribes_again_when_it_was_too_fast() -> None:
    def script(talk: Talk) -> None:
        request = talk.hear()
        talk.say(
            {
                "type": "error",
                "code": "rate_limited",
                "message": "Slow down.",
                "messageId": request["messageId"],
                "retryAfter": 50,
            }
        )
        talk.subscribed()
        talk.say(message("a", 1))
        talk.hear()

    with websocket_server(script) as url, tail("a", "--url", url) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["data"] == 1
        assert "a: Slow down." in stop(process)[2]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--last", "0"],
        ["a", "--last", "x"],
        ["a", "--url", "nonsense"],
        ["a", "--token-file", "/nowhere"],
    ],
)
def test_tail_says_what_is_wrong_with_its_arguments(arguments: list[str]) -> None:
    assert run("tail", *arguments).returncode == 2


# --- Tail, without a socket ---------------------------------------------------------------------------------


def test_a_silent_connection_is_given_up_after_two_heartbeats() -> None:
    state = Tail(["a"], None)
    list(state.connect())
    assert list(state.receive({"type": "ack", "op": "connect", "heartbeat": 10_000})) == []
    assert state.patience == 25
    list(state.connect())
    assert state.patience == 30


def test_what_is_unknown_or_odd_is_left_alone() -> None:
    state = Tail(["a"], None)
    for frame in ({}, {"type": "new"}, {"type": "ack", "op": "new"}, {"type": "ack", "op": "subscribe"}):
        assert list(state.receive(frame)) == []
    assert list(state.receive({"type": "message", "data": 1})) == [Print()]
    assert list(state.receive({"type": "error", "messageId": {}})) == [Say("an error")]


def test_lost_history_moves_the_position() -> None:
    state = Tail(["a"], None)
    ack = {"type": "ack", "op": "subscribe", "channel": "a", "persistent": True, "epoch": "e", "seq": 4}
    list(state.receive({**ack, "recovered": True, "replayed": 0}))
    lost = {
        "type": "error",
        "code": "history_lost",
        "channel": "a",
        "message": "Gone.",
        "epoch": "f",
        "seq": 9,
    }
    assert list(state.receive(lost)) == [Say("a: Gone.")]
    (request,) = state.connect()
    assert request.frame["since"] == {"epoch": "f", "seq": 9}
    assert list(
        state.receive({"type": "error", "code": "forbidden", "message": "No.", "messageId": "tail-0"})
    ) == [Stop("a: No.")]
    assert list(
        state.receive(
            {"type": "error", "code": "internal", "message": "Hm.", "messageId": "tail-0", "retryAfter": 500}
        )
    ) == [Say("a: Hm."), Send(request.frame, 0.5)]


# --- The other commands -------------------------------------------------------------------------------------


def test_version_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, tornado_bcast.cli as cli\n"
        "assert cli.main(['version']) == 0\n"
        "heavy = {'tornado', 'redis', 'asyncio', 'ssl', 'http', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.stdout, done.stderr) == ("tornado-bcast 0.1.0\n", "")
    assert run("--version").stdout == done.stdout


def test_publishing_needs_neither_tornado_nor_redis() -> None:
    code = (
        "import sys, tornado_bcast.cli as cli\n"
        "assert cli.main(['publish', 'news', '1', '--url', 'http://127.0.0.1:9', '--timeout', '1ms']) == 75\n"
        "heavy = {'tornado', 'redis', 'asyncio', 'ujson', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_check_config_shows_values_and_where_they_come_from(tmp_path: Path) -> None:
    path = tmp_path / "bcast.ini"
    path.write_text("[server]\nport = 9001\n")
    done = run("check-config", "-c", str(path), env={"BIND": "0.0.0.0", "BCAST_NONSENSE": "1"})
    assert done.returncode == 0, done.stderr
    assert f"server.port = 9001  (from: file {path}:2)" in done.stdout
    assert "server.bind = 0.0.0.0  (from: env BIND)" in done.stdout
    assert "warning: env BCAST_NONSENSE" in done.stderr


@pytest.mark.parametrize("command", [["check-config"], ["serve"], []])
def test_a_bad_configuration_stops_with_all_its_faults(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bcast.ini"
    path.write_text("[server]\nprot = 9001\nworkers = many\n")
    done = run(*command, "-c", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert f"{path}:2" in first
    assert "port" in first
    assert f"{path}:3" in second


def test_an_unknown_command_or_option_is_told() -> None:
    for arguments in (["nonsense"], ["--nonsense"], ["publish"], ["version", "x"], ["token"], ["key", "x"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: tornado-bcast")
    assert "publish" in run("--help").stdout


def test_a_closed_output_is_no_accident() -> None:
    command = f"{' '.join(COMMAND)} check-config | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=os.environ, cwd=ROOT, check=False
    )
    assert done.stderr == ""


# --- With the real daemon -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=2, redis="embedded:") as daemon:
        yield daemon


def sent(daemon: Daemon, channel: str, data: Any) -> None:
    client.publish(channel, data, url=daemon.url)


def test_what_publish_sends_tail_prints(daemon: Daemon) -> None:
    with tail("cli.a", "cli.b", "--url", daemon.url) as process:
        assert process.stdout and process.stderr
        assert {process.stderr.readline().split()[-1] for _ in range(2)} == {"cli.a", "cli.b"}
        first = run("publish", "cli.a", '{"n": 1}', "--id", "id-1", "--url", daemon.url)
        again = run("publish", "cli.a", '{"n": 1}', "--id", "id-1", "--url", daemon.url)
        other = run("publish", "cli.b", "--text", "-", "--url", daemon.url, stdin=b"from a pipe\n")
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert stop(process)[:2] == (130, "")
    assert json.loads(first.stdout) == {"channel": "cli.a", "messageId": "id-1"}
    assert json.loads(again.stdout) == {"channel": "cli.a", "messageId": "id-1", "duplicate": True}
    assert other.returncode == 0
    assert [(line["channel"], line["data"]) for line in lines] == [
        ("cli.a", {"n": 1}),
        ("cli.b", "from a pipe"),
    ]
    assert lines[0]["messageId"] == "id-1"


def test_refusals_of_the_real_daemon(daemon: Daemon) -> None:
    done = run("publish", "$system", "1", "--url", daemon.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "$" in done.stderr
    done = run("publish", "news", json.dumps("x" * 70_000), "--url", daemon.url)
    assert done.returncode == 1
    assert "65536" in done.stderr
    done = run("tail", "not a channel", "--url", daemon.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tornado-bcast tail: not a channel: ")


def test_tail_outlives_a_rolling_replacement(daemon: Daemon) -> None:
    replaced = len(daemon.events("replaced"))
    with tail("cli.roll", "--url", daemon.url) as process:
        assert process.stdout and process.stderr
        process.stderr.readline()
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("replaced", replaced + 1, 60)
        assert "(1012, restart)" in process.stderr.readline()
        assert "subscribed to cli.roll again" in process.stderr.readline()
        # It may have come to the other old worker first, and then it was sent on once more.
        until(lambda: sent(daemon, "cli.roll", 1) or select.select([process.stdout], [], [], 0.2)[0])
        assert json.loads(process.stdout.readline())["data"] == 1
        assert stop(process)[0] == 130


def test_serve_logs_json_and_nothing_of_what_is_sent() -> None:
    with Daemon(redis="embedded:", BCAST_LOG_LEVEL="debug") as daemon:
        secret = "s3cr3t-payload"
        sent(daemon, "news", secret)
        run("publish", "$no", json.dumps(secret), "--url", f"{daemon.url}")
        with tail("news", "--url", daemon.url) as process:
            assert process.stdout and process.stderr
            process.stderr.readline()
            sent(daemon, "news", secret)
            assert secret in process.stdout.readline()
            stop(process)
        for path in ("/ws", "/", "/broadcast", "/health", "/nowhere"):
            with socket.create_connection(tuple(daemon.url.split("//")[1].split(":"))) as peer:
                peer.sendall(f"GET {path}?token={secret} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
                peer.settimeout(5)
                while peer.recv(65536):
                    pass
        lines = daemon.log()
    assert secret not in json.dumps(lines)
    assert all({"time", "level", "event", "message", "worker"} <= line.keys() for line in lines)
    assert {line["worker"] for line in lines} == {None, 0}


def test_options_of_serve_stand_above_the_environment() -> None:
    done = run("serve", "--workers", "none", env={"WORKERS": "2"})
    assert (done.returncode, "command line" in done.stderr) == (2, True)
    done = run("--redis-url", "gopher://x")
    assert (done.returncode, "[redis] url" in done.stderr) == (2, True)


def test_tail_misses_nothing_of_a_persistent_channel() -> None:
    with Daemon("[channel kept]\npersistent = yes\n", workers=2, redis="embedded:") as daemon:
        for n in range(1, 4):
            sent(daemon, "kept", n)
        with tail("kept", "--last", "2", "--url", daemon.url) as process:
            assert process.stdout and process.stderr
            process.stderr.readline()
            daemon.signal(signal.SIGHUP)
            for n in range(4, 40):
                sent(daemon, "kept", n)
                time.sleep(0.02)
            daemon.wait_for_log("replaced", seconds=60)
            sent(daemon, "kept", 40)
            data = [json.loads(process.stdout.readline())["data"] for _ in range(39)]
            _, out, err = stop(process)
    assert data == list(range(2, 41))
    assert out == ""
    assert "subscribed to kept again" in err
    assert "missed" not in err
