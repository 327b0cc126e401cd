"""Runs the whole table of the benchmark: the floor, the peers that are installed, and the daemon.

    python bench/run.py            # at most 10 minutes; writes bench/RESULTS.md and bench/results.svg
    python bench/run.py --quick    # half a minute, only to see that all of it works; writes into the build

Builds the load client and the floor with cc, starts every server once, and goes through all jobs round by
round: what is compared was measured within seconds of each other, and each figure is a median over rounds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
from rows import FULL, QUICK, Job, Samples, Size, jobs
from servers import ROOT, Server, Servers

HERE = Path(__file__).resolve().parent


def build(target: Path) -> None:
    """Compile the load client and the floor into `target`."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("bench: there is no C compiler (cc): apt-get install gcc libc6-dev")
    target.mkdir(parents=True, exist_ok=True)
    for name in ("load", "floor"):
        subprocess.run(
            [compiler, "-O2", "-Wall", "-Wextra", "-o", str(target / name), str(HERE / f"{name}.c")],
            check=True,
        )


class Bench:
    """One run of the table. `samples` has what has been measured so far."""

    def __init__(self, target: Path, size: Size, deadline: float) -> None:
        self._target = target
        self._size = size
        self._deadline = deadline
        self.samples: Samples = {}
        self.failures: list[str] = []
        self.rounds = 0

    def run(self, servers: Servers, only: str, peers: bool) -> None:
        """Go through the rounds, as many as fit before the deadline."""
        redis = servers.redis()
        running: dict[str, Server | None] = {
            "floor": servers.floor(),
            "floor batching": servers.floor("floor batching", "batch"),
            "floor 2 processes": servers.floor("floor 2 processes", "pair"),
            "daemon memory:": servers.daemon("daemon memory:"),
            "daemon redis:": servers.daemon("daemon redis:", redis=redis) if redis else None,
            "daemon 2 workers": servers.daemon("daemon 2 workers", redis=redis, workers=2) if redis else None,
            "nchan": servers.nchan() if peers else None,
            "NATS": servers.nats() if peers else None,
            "Node": servers.node(redis) if peers else None,
        }
        for name, how in servers.missing.items():
            print(f"not here: {name}. To compare with it: {how}", flush=True)
        todo = [job for job in jobs(self._size) if only in f"{job.server} {' '.join(job.samples.values())}"]
        longest = 0.0
        for number in range(1, self._size.rounds + 1):
            begun = time.monotonic()
            if begun + longest > self._deadline:
                print(f"no time for round {number}: stopping at {number - 1}", flush=True)
                break
            for index, job in enumerate(todo, 1):
                server = running.get(job.server)
                if server is not None:
                    self._say(number, index, len(todo), job)
                    self._do(servers, server, job)
            self.rounds = number
            longest = max(longest, time.monotonic() - begun)
        print(" " * 100, end="\r", flush=True)

    def _say(self, number: int, index: int, count: int, job: Job) -> None:
        left = max(0, self._deadline - time.monotonic())
        what = ", ".join(dict.fromkeys(job.samples.values()))
        where = f"round {number}/{self._size.rounds}, job {index}/{count} ({left:.0f} s left)"
        line = f"{where}: {job.server} {what}"
        if sys.stdout.isatty():
            print(f"{line:<100.100}", end="\r", flush=True)
        else:
            print(line, flush=True)

    def _do(self, servers: Servers, server: Server, job: Job) -> None:
        if job.fresh:
            server = servers.daemon(f"{job.server} fresh")
        hooks: dict[str, Callable[[], None]] = {}
        if job.server == "daemon 2 workers" and "paced" in job.samples.values():
            hooks["connect"] = lambda: self._add(job.server, "uneven", _uneven(server.port))
        try:
            for line in self._load(server, job, hooks):
                if line.get("expected", 0) != line.get("delivered", 0):
                    self.failures.append(f"{job.server}: {line['delivered']} of {line['expected']} delivered")
                for (kind, name), sample in job.samples.items():
                    if line["kind"] == kind:
                        self._add(job.server, sample, line[name])
        except RuntimeError as error:
            self.failures.append(str(error))
        finally:
            if job.fresh:
                servers.stop(server)

    def _load(self, server: Server, job: Job, hooks: dict[str, Callable[[], None]]) -> list[dict[str, Any]]:
        """Run the load client; its lines."""
        command = [str(self._target / "load"), "--port", str(server.port), "--pid", str(server.pid)]
        for name, value in {**server.load, **job.options}.items():
            for one in value if isinstance(value, list) else [value]:
                command += [f"--{name}", one]
        lines: list[dict[str, Any]] = []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None and process.stderr is not None
            for text in process.stdout:
                lines.append(json.loads(text))
                if (hook := hooks.get(lines[-1]["kind"])) is not None:
                    hook()
            if process.wait(120):
                raise RuntimeError(f"{job.server}: {process.stderr.read().strip()}")
        finally:
            process.kill()
            process.wait()
        return lines

    def _add(self, server: str, sample: str, value: float) -> None:
        self.samples.setdefault((server, sample), []).append(value)


def _uneven(port: int) -> float:
    """How far the workers' connections are from even, in per cent."""
    time.sleep(1.2)  # Each worker tells its row once a second.
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=5) as answer:
        counts = [worker["connections"] for worker in json.load(answer)["workers"]]
    even = sum(counts) / len(counts)
    return 100 * max(abs(count - even) for count in counts) / even if even else 100.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round of little, no results")
    parser.add_argument(
        "--build", type=Path, default=ROOT / "build" / "bench", help="where binaries and logs go"
    )
    parser.add_argument("--out", type=Path, help="where RESULTS.md and results.svg go (default: bench/)")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin no round that would end later")
    parser.add_argument("--rounds", type=int, help="how many runs each figure is the median of (default: 5)")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="jobs whose server or samples have this text"
    )
    parser.add_argument("--no-peers", action="store_true", help="the floor and the daemon alone")
    options = parser.parse_args()

    size = QUICK if options.quick else FULL
    if options.rounds:
        size = Size(**{**vars_of(size), "rounds": options.rounds})
    target = options.build.resolve()
    build(target)
    out = options.out or (target if options.quick or options.only else HERE)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    bench = Bench(target, size, began + 60 * options.minutes)
    with Servers(target) as servers:
        bench.run(servers, options.only, not options.no_peers)
        missing = dict(servers.missing)
    (target / "samples.json").write_text(
        json.dumps({" / ".join(key): values for key, values in bench.samples.items()}, indent=1)
    )
    text = report.results(bench.samples, bench.rounds, time.monotonic() - began, missing, bench.failures)
    (out / "RESULTS.md").write_text(text)
    (out / "results.svg").write_text(report.chart(bench.samples))
    print(text)
    return 1 if bench.failures else 0


def vars_of(size: Size) -> dict[str, int]:
    return {name: getattr(size, name) for name in size.__dataclass_fields__}


if __name__ == "__main__":
    sys.exit(main())
