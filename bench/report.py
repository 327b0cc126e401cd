"""From samples to `RESULTS.md` and `results.svg`."""

import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from rows import ROWS, Samples
from servers import redis_binary, version_of

_MARKS = {True: "met", False: "**missed**", None: "-"}
# Server -> its name in the chart. The first one is the measure of the others, not a server.
_BARS = {
    "paced": {
        "floor": "floor (C, no protocol)",
        "daemon memory:": "tornado_bcast",
        "daemon redis:": "tornado_bcast, Redis",
        "nchan": "nchan (nginx, C)",
        "NATS": "NATS (Go)",
        "Node": "Node ws + Redis",
    },
    "window": {
        "floor batching": "floor (C, batching)",
        "daemon memory:": "tornado_bcast",
        "daemon redis:": "tornado_bcast, Redis",
        "nchan": "nchan (nginx, C)",
        "NATS": "NATS (Go)",
        "Node": "Node ws + Redis",
    },
}
_TITLES = {
    "paced": "50 messages/s to 1000 subscribers: CPU time for each delivery, us",
    "window": "the same, as fast as it goes (16 messages outstanding)",
}


def results(
    samples: Samples, rounds: int, seconds: float, missing: dict[str, str], failures: list[str]
) -> str:
    """The text of RESULTS.md."""
    lines = [
        "# Results",
        "",
        f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}, {rounds} rounds in {seconds / 60:.0f} min."
        " Each figure is the median of its rounds, a ratio that of the ratios round by round; the spread is"
        " the lowest and the highest. CPU is that of the server's whole process tree, Redis not included.",
        "",
        "![CPU time for each delivery](results.svg)",
        "",
        "| workload | to reach | measured | spread | |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        for index, figure in enumerate(row.figures(samples)):
            title, target = ("", "") if index else (row.title, row.target)
            lines.append(f"| {title} | {target} | {figure.text} | {figure.spread} | {_MARKS[figure.met]} |")
    lines += [
        "",
        "## All of it",
        "",
        "| server | what | median | lowest | highest |",
        "|---|---|---|---|---|",
    ]
    for (server, sample), values in sorted(samples.items()):
        row = f"{median(values):.3f} | {min(values):.3f} | {max(values):.3f}"
        lines.append(
            f"| {server} | {_WHAT.get(sample.removeprefix('kept '), sample)}"
            f"{', persistent' if sample.startswith('kept ') else ''} | {row} |"
        )
    lines += ["", "## Machine", "", *(f"- {line}" for line in _machine())]
    if missing:
        lines += ["", "## Not here", "", *(f"- {name}: {how}" for name, how in missing.items())]
    if failures:
        lines += ["", "## What went wrong", "", *(f"- {line}" for line in dict.fromkeys(failures))]
    return "\n".join(lines) + "\n"


_WHAT = {
    "paced": "paced, us a delivery",
    "p99": "paced, p99 in ms",
    "window": "saturated, us a delivery",
    "many": "many channels, us a message",
    "batch": "HTTP batches, us a message",
    "large": "16 KB, us a delivery",
    "idle": "idle, % of a core",
    "memory": "memory, KB a connection",
    "memory half": "memory of the first half, KB a connection",
    "connect": "accept, upgrade and subscribe, us",
    "back": "burst: all back, s",
    "complete": "burst: all back with all messages, s",
    "lost": "burst: messages lost",
    "others p99": "burst: p99 of the others, ms",
    "resume": "burst: us of CPU a connection",
    "uneven": "connections off even, %",
}


def _machine() -> list[str]:
    model, memory = "?", 0.0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal"):
            memory = int(line.split()[1]) / 1024 / 1024
    load = os.getloadavg()[2]
    lines = [
        f"{model}, {os.cpu_count()} cores, {memory:.0f} GB, Linux {platform.release()}; load over the last"
        f" 15 minutes {load:.1f} (what else runs makes every figure worse, the floor's too)",
        f"Python {sys.version.partition(' [')[0]}, "
        + ", ".join(f"{name} {_version(name)}" for name in ("tornado", "hiredis", "redis", "ujson")),
    ]
    binary = redis_binary()
    for name, command in (
        ("Redis", [binary or "redis-server", "--version"]),
        ("nginx", ["nginx", "-v"]),
        ("NATS", [_beside("nats-server"), "--version"]),
        ("Node", ["node", "--version"]),
    ):
        if shutil.which(command[0]):
            lines.append(f"{name}: {version_of(command)}")
    return lines


def _beside(name: str) -> str:
    return os.environ.get("NATS_SERVER") or shutil.which(name) or str(Path(sys.executable).parent / name)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
.value { font-variant-numeric: tabular-nums; }
.bar { fill: #8c959f; }
.own { fill: #0969da; }
.floor { fill: #d0d7de; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .bar { fill: #6e7681; }
  .own { fill: #58a6ff; }
  .floor { fill: #30363d; }
}
"""


def chart(samples: Samples) -> str:
    """Bars for the two fan-out workloads. Its colours follow the reader's light or dark scheme."""
    left, width, right, line = 180, 420, 120, 26
    body: list[str] = []
    y = 24
    for sample, names in _BARS.items():
        found = {server: median(samples[server, sample]) for server in names if samples.get((server, sample))}
        if not found:
            continue
        body.append(f'<text class="title" x="8" y="{y}">{_TITLES[sample]}</text>')
        y += 12
        floor = samples.get((next(iter(names)), sample), [])
        for server, value in found.items():
            size = max(2.0, width * value / max(found.values()))
            kind = "floor" if server.startswith("floor") else "own" if server.startswith("daemon") else "bar"
            middle = y + 17
            body.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{names[server]}</text>')
            body.append(
                f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{size:.0f}" height="18" rx="2"/>'
            )
            # As in the table: the median of the ratios, round by round.
            ratios = [a / b for a, b in zip(samples[server, sample], floor, strict=False) if b]
            more = f" ({median(ratios):.1f} x)" if ratios and not server.startswith("floor") else ""
            body.append(
                f'<text class="value" x="{left + size + 8:.0f}" y="{middle}">{value:.2f}{more}</text>'
            )
            y += line
        y += 30
    height = max(y - 20, 40)
    total = left + width + right
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}"'
        f' height="{height}" role="img" aria-label="CPU time for each delivery, by server">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )
