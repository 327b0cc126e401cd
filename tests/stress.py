"""`make stress`: too much of everything, on a large scale and with times; the small form is test_flood.py.

    .venv/bin/python tests/stress.py [--scale 0.1] [stopped] [overload] [flood]

Each part runs the real daemon on a real Redis with one worker, prints what it measures as it goes on, and
ends by itself within a few minutes. The exit code is 1 where a promise was not kept.

stopped   500 of 2,000 subscribers stop reading while 500 messages/s of 1 KB come, under each policy
overload  twice the publishes that the worker can carry, beside as many as it answers
flood     connections beyond `max_connections`, and peers that finish no handshake, beside 200 subscribers
"""

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from client import handshake
from daemon import Daemon
from plain_crowd import Crowd, Member, percentile
from redis_server import RedisServer, binaries
from test_flood import MB, dropped, memory

QUEUE = 1 << 20
# What the log of a daemon may say that has far too much to do.
LOUD = ("overloaded", "worker_hung", "redis_down", "redis_refused")
# Seconds that everything may take to arrive.
QUIET = 60.0
# In which strangers come.
WAVES = 10
INI = """[limits]
rate = 0
handshake_timeout = 2s
[server]
max_connections = {room}
[channel drop_oldest]
slow_consumer = drop_oldest
[channel latest]
slow_consumer = latest
[channel persistent]
persistent = yes
history_size = 1000000
"""


@dataclass
class Scale:
    subscribers: int
    stopped: int
    rate: int
    seconds: float
    rounds: int
    peers: int


FULL = Scale(subscribers=2000, stopped=500, rate=500, seconds=12, rounds=3, peers=3000)


class Report:
    """Prints each finding, and remembers whether all promises were kept."""

    def __init__(self) -> None:
        self.kept = True

    def say(self, text: str) -> None:
        print(text, flush=True)

    def check(self, promise: str, holds: bool) -> None:
        self.kept = self.kept and holds
        self.say(f"    {'kept  ' if holds else 'BROKEN'} {promise}")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def watch(members: Sequence[Member]) -> list[Member]:
    """Count what comes to these, from now on."""
    for member in members:
        member.counts = True
    return list(members)


def paced(
    crowd: Crowd, publisher: list[Member], watched: list[Member], channel: str, scale: Scale, size: int
) -> float:
    """Publish, and return the p99 of what came in each second, in milliseconds: the median over all seconds.

    The median, for other work on the machine comes in bursts.
    """
    found = []
    for _ in range(int(scale.seconds)):
        for member in watched:
            member.late.clear()
        crowd.publish(publisher, channel, rate=scale.rate, seconds=1, size=size)
        if late := [one for member in watched for one in member.late]:
            found.append(1000 * percentile(late, 0.99))
    crowd.quiet(QUIET)
    return statistics.median(found)


# Subscribers that stop reading


def stopped(scale: Scale, report: Report, redis: RedisServer) -> None:
    for policy in ("disconnect", "drop_oldest", "latest", "persistent"):
        with Daemon(INI.format(room=0), redis=redis.url) as daemon, Crowd(daemon.port) as crowd:
            daemon.expect(*LOUD)
            good = crowd.join(scale.subscribers - scale.stopped, policy)
            publisher = watch(crowd.join(1))
            watched = watch(good[:: max(1, len(good) // 20)])

            before = paced(crowd, publisher, watched, policy, scale, 1024)
            slow = crowd.join(scale.stopped, policy, window=4096)
            watch(slow)
            at_first = memory(daemon)
            sent, received = publisher[0].sent, watched[0].messages
            crowd.stop_reading(slow)
            during = paced(crowd, publisher, watched, policy, scale, 1024)
            grown = memory(daemon) - at_first
            sent, received = publisher[0].sent - sent, watched[0].messages - received
            crowd.read_again(slow)
            crowd.quiet(QUIET)
            missed = sum(sent - member.messages for member in slow)
            counts = dropped(daemon)
            report.say(
                f"{policy}: p99 {before:.0f} ms, {during:.0f} ms with {len(slow)} that stop;"
                f" {grown / MB:.0f} MB more; dropped {counts}"
            )
            report.check(f"all {received} of {sent} messages to the others", received == sent)
            report.check("p99 within twice that without them", during <= 2 * before)
            bound = scale.stopped * QUEUE + 64 * MB
            report.check(f"memory within {bound / MB:.0f} MB, as configured", grown < bound)
            report.check("nobody who reads is closed", all(member.closed is None for member in good))
            if policy == "persistent":
                report.check("those that stopped have recovered everything", missed == 0 and not counts)
            elif policy == "disconnect":
                # The close frame reaches only those who read on within 5 s.
                report.check("each was closed", {member.closed for member in slow} <= {4008, 1006})
                report.check("and counted", counts == {"disconnected": len(slow)})
            else:
                report.check(f"each of the {missed} that they missed is counted", counts == {policy: missed})


# Overload


def overload(scale: Scale, report: Report, redis: RedisServer) -> None:
    for number in (20, 500):
        with Daemon(INI.format(room=0), redis=redis.url) as daemon, Crowd(daemon.port) as crowd:
            daemon.expect(*LOUD)
            _overload(scale, report, daemon, crowd, number)


def _overload(scale: Scale, report: Report, daemon: Daemon, crowd: Crowd, number: int) -> None:
    listeners = crowd.join(200, "news")
    publishers = watch(crowd.join(number))
    window = max(2, 1000 // number)
    watch(listeners[:1])
    (worker,) = daemon.workers()
    crowd.saturate(publishers, "news", window=window, seconds=1)
    crowd.quiet()
    # Bytes of one delivery.
    size = listeners[0].bytes / listeners[0].messages
    listeners[0].counts = False

    def measure(load: Callable[[], object]) -> tuple[float, float, float]:
        """Deliveries a second, and for each second of the worker's CPU; messages taken a second."""
        taken, received = sum(one.taken for one in publishers), sum(one.bytes for one in listeners)
        cpu, begun = cpu_seconds(worker), time.monotonic()
        load()
        seconds = time.monotonic() - begun
        delivered = (sum(one.bytes for one in listeners) - received) / size
        rate = (sum(one.taken for one in publishers) - taken) / seconds
        return delivered / seconds, delivered / (cpu_seconds(worker) - cpu), rate

    def saturate() -> tuple[float, float, float]:
        return measure(lambda: crowd.saturate(publishers, "news", window=window, seconds=scale.seconds / 3))

    ratios, by_cpu = [], []
    at_first = memory(daemon)
    for _ in range(scale.rounds):
        best = saturate()
        twice = measure(
            lambda rate=2 * best[2]: crowd.publish(publishers, "news", rate=rate, seconds=scale.seconds)
        )
        crowd.quiet(QUIET)
        after = saturate()
        ratios.append(twice[0] / statistics.mean((best[0], after[0])))
        by_cpu.append(twice[1] / statistics.mean((best[1], after[1])))
        report.say(
            f"overload, {number} publishers: {best[0] / 1e6:.2f}, twice as much {twice[0] / 1e6:.2f},"
            f" {after[0] / 1e6:.2f} million deliveries/s; {by_cpu[-1]:.2f} of the best for each second of CPU"
        )
    grown = memory(daemon) - at_first
    refused = sum(one.refused for one in publishers)
    begun = len(daemon.events("overloaded"))
    report.say(f"    {refused} refused, {begun} times overloaded, {grown / MB:.0f} MB more")
    report.say(
        f"    medians: {statistics.median(ratios):.2f} of the best, by CPU {statistics.median(by_cpu):.2f}"
    )
    report.check("deliveries stay above 80 %", statistics.median(by_cpu) > 0.8)
    report.check("memory is bounded", grown < 100 * MB)
    report.check("nobody who reads is closed", all(one.closed is None for one in crowd.members))


# Floods


def flood(scale: Scale, report: Report, redis: RedisServer) -> None:
    with Daemon(INI.format(room=300), redis=redis.url) as daemon, Crowd(daemon.port) as crowd:
        listeners = crowd.join(200, "news")
        publisher = watch(crowd.join(1))
        watched = watch(listeners[::10])

        few = replace(scale, rate=50)
        before = paced(crowd, publisher, watched, "news", few, 200)
        at_first = memory(daemon)
        with ExitStack() as stack:
            sockets: list[socket.socket] = []
            found = []
            for _ in range(WAVES):
                for _ in range(scale.peers // WAVES):
                    peer = stack.enter_context(crowd.stranger())
                    if len(sockets) % 2:
                        # A whole request, for which there may be no room; the others say nothing.
                        peer.send(handshake("127.0.0.1"))
                    sockets.append(peer)
                found.append(paced(crowd, publisher, watched, "news", replace(few, seconds=2), 200))
                report.say(f"    {len(sockets)} strangers: p99 {found[-1]:.1f} ms")
            during = statistics.median(found)
            grown = memory(daemon) - at_first
            # The last ones have their time too.
            paced(crowd, publisher, watched, "news", replace(few, seconds=4), 200)
            ends = [peer.recv(4096) for peer in sockets]
        silent, asked = ends[::2], ends[1::2]
        report.say(f"flood: p99 {before:.1f} ms, {during:.1f} ms with {len(sockets)} strangers")
        report.check("silent peers are cut", silent.count(b"") == len(silent))
        refused = sum(answer.startswith(b"HTTP/1.1 503 ") for answer in asked)
        let_in = sum(answer.startswith(b"HTTP/1.1 101 ") for answer in asked)
        report.check(f"{refused} were refused with 503, {let_in} let in", refused + let_in == len(asked))
        crowd.quiet()
        report.check("everybody has every message", all(one.messages == publisher[0].sent for one in watched))
        report.check(f"memory is bounded: {grown / MB:.0f} MB more", grown < 64 * MB)
        report.check("nobody who reads is closed", all(one.closed is None for one in crowd.members))


PARTS: dict[str, Callable[[Scale, Report, RedisServer], None]] = {
    "stopped": stopped,
    "overload": overload,
    "flood": flood,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1, help="the part of all connections to open (1)")
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], help="which; all of them where none is named"
    )
    arguments = parser.parse_args()
    report = Report()
    scale = replace(
        FULL,
        subscribers=int(FULL.subscribers * arguments.scale),
        stopped=int(FULL.stopped * arguments.scale),
        rounds=max(1, round(FULL.rounds * arguments.scale)),
        peers=int(FULL.peers * arguments.scale),
    )
    with RedisServer(next(iter(binaries().values()))) as redis:
        for name in arguments.parts or PARTS:
            begun = time.monotonic()
            PARTS[name](scale, report, redis)
            report.say(f"{name}: {time.monotonic() - begun:.0f} s")
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
