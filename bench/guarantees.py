"""What the guarantees cost, and how fast everybody is back: figures for docs/PERFORMANCE.md.

    .venv/bin/python bench/guarantees.py [--quick]

Part one publishes to 100 subscribers at a steady pace, on an ephemeral channel, on a persistent one, and on a
persistent one with acks, with `appendfsync` always and everysec: CPU of the daemon's processes (the embedded
server among them) for each publish with its deliveries, and the time from publish to receipt. Part two kills
one of two workers while 2,000 sessions are subscribed: the time until the last of them has everything.
Everything runs on loopback and ends by itself within a few minutes.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

ROOT = Path(__file__).parents[1]
INI = "[limits]\nrate = 0\n[channel p*]\npersistent = yes\n"
TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in tree(int(child)))]


def cpu_seconds(pid: int) -> float:
    """CPU time of a process tree so far."""
    total = 0
    for one in tree(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


class Daemon:
    """`tornado-bcast serve` with its embedded server, on a free port."""

    def __init__(self, place: str, *, workers: int, fsync: str) -> None:
        self._ini = Path(place, "bench.ini")
        self._ini.write_text(INI)
        self._variables = {
            "PORT": "0",
            "WORKERS": str(workers),
            "BCAST_REDIS_DATA_DIR": str(Path(place, "data")),
            "BCAST_REDIS_APPENDFSYNC": fsync,
            "BCAST_LOG_FORMAT": "json",
        }
        self.url = ""
        self.pid = 0

    async def __aenter__(self) -> "Daemon":
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tornado_bcast.cli",
            "serve",
            "-c",
            str(self._ini),
            cwd=ROOT,
            env=os.environ | self._variables,
            stderr=asyncio.subprocess.PIPE,
        )
        self.pid = self._process.pid
        assert self._process.stderr is not None
        async with asyncio.timeout(30):
            while True:
                line = json.loads(await self._process.stderr.readline())
                if line["event"] == "serving":
                    self.url = "ws" + line["message"].split()[1].removeprefix("http") + "/ws"
                    break
        self._drain = asyncio.create_task(self._read(self._process.stderr))
        return self

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while await stream.readline():
            pass

    async def __aexit__(self, *exception: object) -> None:
        self._process.terminate()
        await self._process.wait()
        await self._drain

    def workers(self) -> list[int]:
        """The pids of the workers: the children that are Python."""
        return [pid for pid in tree(self.pid)[1:] if "python" in Path(f"/proc/{pid}/comm").read_text()]


async def dial(url: str, session: str = "") -> tuple[ClientConnection, dict[str, Any]]:
    protocols = ["bcast.v1", *([f"session.{session}"] if session else [])]
    socket = await connect(
        url,
        subprotocols=protocols,  # type: ignore[arg-type]
        compression=None,
        ping_interval=None,
        max_queue=None,
        proxy=None,
    )
    return socket, json.loads(await socket.recv())


async def ask(socket: ClientConnection, **command: Any) -> dict[str, Any]:
    await socket.send(json.dumps(command))
    while True:
        answer: dict[str, Any] = json.loads(await socket.recv())
        if answer["type"] in ("ack", "error"):
            assert answer["type"] == "ack", answer
            return answer


async def receive(socket: ClientConnection, channel: str, number: int, acks: bool, lags: list[float]) -> None:
    for count in range(1, number + 1):
        event = json.loads(await socket.recv())
        while event["type"] != "message":
            event = json.loads(await socket.recv())
        lags.append(time.monotonic() - event["data"])
        if acks and (count % 32 == 0 or count == number):
            await socket.send(json.dumps({"type": "ack", "channel": channel, "seq": event["seq"]}))


async def cost(place: str, fsync: str, channel: str, acks: bool, number: int) -> tuple[float, float, float]:
    """CPU us for each publish, and median and 99th percentile of the time to receipt in ms."""
    subscribers, pace = 100, 100
    async with Daemon(place, workers=1, fsync=fsync) as daemon:
        sockets = [(await dial(daemon.url))[0] for _ in range(subscribers)]
        for socket in sockets:
            await ask(socket, type="subscribe", channel=channel, ack=acks)
        publisher, _ = await dial(daemon.url)
        lags: list[float] = []
        tasks = [asyncio.create_task(receive(one, channel, number, acks, lags)) for one in sockets]
        before, begun = cpu_seconds(daemon.pid), time.monotonic()
        for count in range(number):
            await asyncio.sleep(max(0.0, begun + count / pace - time.monotonic()))
            await ask(publisher, type="broadcast", channel=channel, data=time.monotonic())
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        used = cpu_seconds(daemon.pid) - before
        for socket in (*sockets, publisher):
            await socket.close()
    lags.sort()
    return used * 1e6 / number, statistics.median(lags) * 1000, lags[int(len(lags) * 0.99)] * 1000


class Follower:
    """A session on a persistent channel that comes back when its connection ends, and acks what it has."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = ""
        self.seq = 0
        self.lost = 0
        self.resumed = 0

    async def run(self, ready: asyncio.Semaphore) -> None:
        subscribed = False
        while True:
            try:
                socket, hello = await dial(self._url, self._session)
                self.resumed += hello["resumed"]
                self._session = hello["session"]
                if not subscribed:
                    self.seq = (await ask(socket, type="subscribe", channel="p", ack=True))["seq"]
                    subscribed = True
                    ready.release()
                elif self.seq:
                    await socket.send(json.dumps({"type": "ack", "channel": "p", "seq": self.seq}))
                async for text in socket:
                    event = json.loads(text)
                    if event["type"] == "message" and event["seq"] > self.seq:
                        self.lost += event["seq"] != self.seq + 1
                        self.seq = event["seq"]
                        await socket.send(json.dumps({"type": "ack", "channel": "p", "seq": self.seq}))
            except (OSError, ConnectionClosed, InvalidHandshake, TimeoutError):
                pass
            await asyncio.sleep(random.uniform(0.05, 1.0))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is no event, and 20 ms are fine enough
        await asyncio.sleep(0.02)


async def recovery(place: str, sessions: int) -> dict[str, Any]:
    """Kill one of two workers under 5 messages a second; when has the last follower everything?"""
    async with Daemon(place, workers=2, fsync="always") as daemon:
        followers = [Follower(daemon.url) for _ in range(sessions)]
        ready = asyncio.Semaphore(0)
        tasks = []
        for follower in followers:
            tasks.append(asyncio.create_task(follower.run(ready)))
            await ready.acquire()
        head = 0

        async def publish() -> None:
            nonlocal head
            publisher, _ = await dial(daemon.url)
            while True:
                try:
                    answer = await ask(publisher, type="broadcast", channel="p", data=head)
                    head = answer["seq"]
                except (OSError, ConnectionClosed):
                    publisher, _ = await dial(daemon.url)
                await asyncio.sleep(0.2)

        publishing = asyncio.create_task(publish())
        await asyncio.sleep(2)
        killed = time.monotonic()
        os.kill(daemon.workers()[0], signal.SIGKILL)
        await asyncio.sleep(0.5)
        async with asyncio.timeout(120):
            # All that was said up to some moment after everybody is back.
            await until(lambda: sum(one.resumed for one in followers) >= sessions * 0.45)
            goal = head
            await until(lambda: min(one.seq for one in followers) >= goal)
        took = time.monotonic() - killed
        for task in (publishing, *tasks):
            task.cancel()
        await asyncio.gather(publishing, *tasks, return_exceptions=True)
        return {
            "sessions": sessions,
            "resumed": sum(one.resumed for one in followers),
            "seconds": round(took, 2),
            "holes": sum(one.lost for one in followers),
        }


async def main() -> None:
    parser = argparse.ArgumentParser(description="What the guarantees cost.")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few messages, few sessions")
    quick = parser.parse_args().quick
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'channel':<28}{'appendfsync':<14}{'CPU us/publish':>15}{'median ms':>11}{'p99 ms':>9}")
    number, runs = (50, 1) if quick else (500, 3)
    for fsync in ("always", "everysec"):
        for name, channel, acks in (
            ("ephemeral", "e", False),
            ("persistent", "p", False),
            ("persistent, acks", "p", True),
        ):
            figures = []
            for _ in range(runs):
                with tempfile.TemporaryDirectory(prefix="bcast") as place:
                    figures.append(await cost(place, fsync, channel, acks, number))
            used, median, p99 = (statistics.median(column) for column in zip(*figures, strict=True))
            print(f"{name:<28}{fsync:<14}{used:>15.0f}{median:>11.2f}{p99:>9.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="bcast") as place:
        found = await recovery(place, 100 if quick else 2000)
    print(
        "kill -9 of one of two workers, {sessions} sessions: {resumed} resumed, the last had everything after"
        " {seconds} s, {holes} holes".format(**found)
    )


if __name__ == "__main__":
    asyncio.run(main())
