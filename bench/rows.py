"""What is measured: the rows of the table, each with its jobs, its figure and its target.

A job is one run of the load client against one server, and gives samples by name. A row compares samples of
the same round, so that what the machine did at that time hits both sides of a ratio alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

# (server, sample) -> its values, one for each round.
Samples = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Size:
    """How much is done. `QUICK` only shows that everything works."""

    rounds: int
    subscribers: int
    paced: int
    window: int
    large: int
    many: int
    batches: int
    idle: int
    idle_seconds: int
    connections: int
    resumed: int
    settle_ms: int


FULL = Size(
    rounds=5,
    subscribers=1000,
    paced=125,
    window=1200,
    large=100,
    many=20_000,
    batches=100,
    idle=1000,
    idle_seconds=3,
    connections=16_000,
    resumed=8000,
    settle_ms=300,
)
QUICK = Size(
    rounds=1,
    subscribers=40,
    paced=15,
    window=60,
    large=10,
    many=400,
    batches=3,
    idle=40,
    idle_seconds=1,
    connections=80,
    resumed=40,
    settle_ms=100,
)


@dataclass(frozen=True)
class Job:
    """`options` of the load client, and how its lines of JSON become samples: (kind, field) -> name."""

    server: str
    options: dict[str, str | list[str]]
    samples: dict[tuple[str, str], str]
    # Started for this job alone: its memory is that of a new process.
    fresh: bool = False


def jobs(size: Size) -> list[Job]:
    """One round, in an order in which those that are compared stand next to each other."""
    paced = f"rate=50,messages={size.paced}"
    window = f"window=16,messages={size.window}"
    fan = {"subs": str(size.subscribers)}
    both = {
        ("paced", "us_per_delivery"): "paced",
        ("paced", "p99_ms"): "p99",
        ("window", "us_per_delivery"): "window",
    }
    one = {"channels": str(size.subscribers), "run": [f"window=500,messages={size.many}"]}
    batch = {
        "subs": "1",
        "http": "/broadcast",
        "publish": '{"channel":"b0","data":"%P"}',
        "wrap": '{"messages":[%I]}',
        "run": [f"window=200,batch=100,messages={size.batches * 100}"],
    }
    large = {"subs": str(max(size.subscribers // 5, 10)), "size": "16384"}
    large_run = {"run": [f"rate=50,messages={size.large}"]}
    listed = [
        Job("floor", {**fan, "run": [paced]}, both),
        Job("daemon memory:", {**fan, "run": [paced, window]}, both),
        Job("floor batching", {**fan, "run": [window]}, both),
        Job("daemon redis:", {**fan, "run": [paced, window]}, both),
        Job("daemon redis:", {**fan, **_persistent(), "run": [paced, window]}, _named(both, "kept ")),
        Job("daemon 2 workers", {**fan, "run": [paced]}, both),
        Job("floor 2 processes", {**fan, "run": [paced]}, both),
        Job("nchan", {**fan, "run": [paced, window]}, both),
        Job("NATS", {**fan, "run": [paced, window]}, both),
        Job("Node", {**fan, "run": [paced, window]}, both),
        Job("daemon redis:", {**fan, **one}, {("window", "us_per_message"): "many"}),
        Job("Node", {**fan, **one}, {("window", "us_per_message"): "many"}),
        Job("daemon redis:", batch, {("window", "us_per_message"): "batch"}),
        Job("floor", {**large, **large_run}, {("paced", "us_per_delivery"): "large"}),
        Job("daemon memory:", {**large, **large_run}, {("paced", "us_per_delivery"): "large"}),
        Job(
            "daemon redis:",
            # The work of coming is over by then.
            {"subs": str(size.idle), "idle": str(size.idle_seconds), "settle": "4000"},
            {("idle", "percent"): "idle"},
        ),
        Job(
            "daemon memory:",
            {"subs": str(size.connections), "half": "1"},
            {
                ("connect", "half_kb_per_connection"): "memory half",
                ("connect", "kb_per_connection"): "memory",
                ("connect", "us_per_connection"): "connect",
            },
            fresh=True,
        ),
        Job(
            "daemon 2 workers",
            {
                **_persistent(acks=True),
                "subs": str(size.resumed),
                "channels": "8",
                "others": str(max(size.resumed // 40, 10)),
                "others-subscribe": '{"type":"subscribe","channel":"others"}',
                "others-publish": '{"type":"broadcast","channel":"others","data":"%P"}',
                "resume": '"resumed":true',
                "missed": "8",
                "run": ["rate=20"],
            },
            {
                ("resume", "back_s"): "back",
                ("resume", "complete_s"): "complete",
                ("resume", "lost"): "lost",
                ("resume", "p99_ms"): "others p99",
                ("resume", "us_per_resume"): "resume",
            },
        ),
    ]
    return [
        Job(job.server, {"settle": str(size.settle_ms), **job.options}, job.samples, job.fresh)
        for job in listed
    ]


def _persistent(*, acks: bool = False) -> dict[str, str]:
    more = ',"ack":true' if acks else ""
    return {
        "subscribe": '{"type":"subscribe","channel":"p.%C"' + more + "}",
        "publish": '{"type":"broadcast","channel":"p.%C","data":"%P"}',
    }


def _named(samples: dict[tuple[str, str], str], prefix: str) -> dict[tuple[str, str], str]:
    return {key: prefix + name for key, name in samples.items()}


@dataclass(frozen=True)
class Figure:
    """One comparison of a row: the median, its spread over the rounds, and whether the target is met."""

    text: str
    spread: str
    # None: not measured, as a side of it is not there.
    met: bool | None


@dataclass(frozen=True)
class Row:
    title: str
    target: str
    figures: Callable[[Samples], list[Figure]]


def _at_most(value: float, low: float, high: float, limit: float, text: str, digits: int) -> Figure:
    return Figure(text, f"{low:.{digits}f} - {high:.{digits}f}", value <= limit)


def _value(server: str, sample: str, limit: float, unit: str, digits: int = 2) -> Callable[[Samples], Figure]:
    def figure(samples: Samples) -> Figure:
        values = samples.get((server, sample))
        if not values:
            return Figure(f"{server}: not measured", "", None)
        middle = median(values)
        text = f"{middle:.{digits}f} {unit}"
        return _at_most(middle, min(values), max(values), limit, text, digits)

    return figure


def _ratio(
    server: str, sample: str, other: str, limit: float, against: str = ""
) -> Callable[[Samples], Figure]:
    """`server` by `other`, round by round."""

    def figure(samples: Samples) -> Figure:
        values = samples.get((server, sample), [])
        others = samples.get((other, against or sample), [])
        ratios = [a / b for a, b in zip(values, others, strict=False) if b]
        if not ratios:
            return Figure(f"{other}: not measured", "", None)
        middle = median(ratios)
        unit = "ms" if "p99" in sample else "us"
        text = f"**{middle:.2f} x** {other} ({median(values):.2f} and {median(others):.2f} {unit})"
        return _at_most(middle, min(ratios), max(ratios), limit, text, 2)

    return figure


def _beside(server: str, sample: str, other: str) -> Callable[[Samples], Figure]:
    """What the machine does to both sides of a row: to be known, and no target."""

    def figure(samples: Samples) -> Figure:
        measured = _ratio(server, sample, other, 0.0)(samples)
        return Figure(f"{server}: {measured.text}", measured.spread, None)

    return figure


def _all(*figures: Callable[[Samples], Figure]) -> Callable[[Samples], list[Figure]]:
    return lambda samples: [figure(samples) for figure in figures]


ROWS = [
    Row(
        "paced: one channel, 50 messages/s",
        "at most 1.15 x the floor, below nchan",
        _all(
            _ratio("daemon memory:", "paced", "floor", 1.15), _ratio("daemon memory:", "paced", "nchan", 1.0)
        ),
    ),
    Row(
        "saturated: one channel, 16 messages outstanding",
        "at most 1.4 x the batching floor, below NATS",
        _all(
            _ratio("daemon memory:", "window", "floor batching", 1.4),
            _ratio("daemon memory:", "window", "NATS", 1.0),
        ),
    ),
    Row(
        "the same two with Redis, 1 worker",
        "at most 1.10 x those with memory:",
        _all(
            _ratio("daemon redis:", "paced", "daemon memory:", 1.10),
            _ratio("daemon redis:", "window", "daemon memory:", 1.10),
        ),
    ),
    Row(
        "persistent, acks off, with Redis",
        "at most 1.15 x ephemeral",
        _all(
            _ratio("daemon redis:", "kept paced", "daemon redis:", 1.15, "paced"),
            _ratio("daemon redis:", "kept window", "daemon redis:", 1.15, "window"),
        ),
    ),
    Row(
        "many channels with one subscriber each, 500 outstanding, through Redis",
        "below Node, CPU of a message with its publishing",
        _all(_ratio("daemon redis:", "many", "Node", 1.0)),
    ),
    Row(
        "HTTP batches of 100 on `/broadcast`, with Redis",
        "at most 25 us a message",
        _all(_value("daemon redis:", "batch", 25.0, "us")),
    ),
    Row(
        "16 KB payloads to 200 subscribers, 50 messages/s",
        "at most 1.15 x the floor",
        _all(_ratio("daemon memory:", "large", "floor", 1.15)),
    ),
    Row(
        "memory of an idle subscribed connection (PSS)",
        "at most 10 KB, of 8000 and of 16,000",
        _all(
            _value("daemon memory:", "memory half", 10.0, "KB, the first half of them"),
            _value("daemon memory:", "memory", 10.0, "KB, all of them"),
        ),
    ),
    Row(
        "CPU to accept, upgrade and subscribe a connection",
        "at most 300 us",
        _all(_value("daemon memory:", "connect", 300.0, "us", 0)),
    ),
    Row(
        "a burst of 8000 reconnects with `session=`, 2 workers",
        "all back within 15 s, nothing lost, p99 of the others below 250 ms",
        _all(
            _value("daemon 2 workers", "complete", 15.0, "s until all are back and have what they missed"),
            _value("daemon 2 workers", "lost", 0.0, "messages lost", 0),
            _value("daemon 2 workers", "others p99", 250.0, "ms, p99 of the others", 0),
        ),
    ),
    Row(
        "p99 latency, paced",
        "not above nchan's",
        _all(_ratio("daemon memory:", "p99", "nchan", 1.0)),
    ),
    Row(
        "two workers, with Redis",
        "connections within 5 % of even, no more CPU for a delivery than with one",
        _all(
            _value("daemon 2 workers", "uneven", 5.0, "% off even", 1),
            _ratio("daemon 2 workers", "paced", "daemon redis:", 1.0),
            _beside("floor 2 processes", "paced", "floor"),
        ),
    ),
    Row(
        "an idle daemon with 1000 connections",
        "under 0.5 % of a core for a worker",
        _all(_value("daemon redis:", "idle", 0.5, "%")),
    ),
]
