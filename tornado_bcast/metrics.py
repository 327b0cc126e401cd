"""What one worker counts, as a row: the one source of `/stats`, `/metrics` and the systemd status line.

A row is a JSON object of plain numbers. Each worker puts its own on the board for its siblings each second,
and the broker carries it to the other nodes. Nothing here is touched once for each delivery: fan-out adds
the number of subscribers once for each batch.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

# Upper bounds, in seconds, of the delivery lag histogram.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

Row = dict[str, Any]


class Metrics:
    """The counters of one worker. Owner: the worker; node, hub and connections add to them."""

    __slots__ = (
        "_last",
        "bytes_out",
        "connections",
        "delivered",
        "dropped",
        "lag_count",
        "lag_sum",
        "lags",
        "loop_lag",
        "published",
        "rates",
        "redelivered",
        "subscriptions",
    )

    def __init__(self) -> None:
        self.connections = 0
        self.subscriptions = 0
        # Messages taken by the broker, by entrance.
        self.published = {"ws": 0, "http": 0}
        # Messages handed to connections: one for each subscriber.
        self.delivered = 0
        self.redelivered = 0
        # Bytes of messages; answers and pings are not counted.
        self.bytes_out = 0
        # Messages that a subscriber did not get, by reason.
        self.dropped: dict[str, int] = {}
        self.lags = [0] * (len(LAG_BUCKETS) + 1)
        self.lag_sum = 0.0
        self.lag_count = 0
        # Seconds that the loop was late at its last tick.
        self.loop_lag = 0.0
        self.rates = (0.0, 0.0)
        self._last = (0.0, 0, 0)

    def drop(self, reason: str, count: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def observe_lag(self, seconds: float, count: int) -> None:
        """`count` deliveries were written so many seconds after their publishing."""
        self.lags[bisect_left(LAG_BUCKETS, seconds)] += count
        self.lag_sum += seconds * count
        self.lag_count += count

    def tick(self, now: float) -> None:
        """Take the rates since the last call. `now` is in seconds, of any steady clock."""
        then, published, delivered = self._last
        total = sum(self.published.values())
        self._last = (now, total, self.delivered)
        if then and now > then:
            self.rates = ((total - published) / (now - then), (self.delivered - delivered) / (now - then))

    def row(self) -> Row:
        return {
            "connections": self.connections,
            "subscriptions": self.subscriptions,
            "published": sum(self.published.values()),
            "publishedVia": dict(self.published),
            "delivered": self.delivered,
            "dropped": sum(self.dropped.values()),
            "droppedReason": dict(self.dropped),
            "redelivered": self.redelivered,
            "bytesOut": self.bytes_out,
            "publishedPerSecond": round(self.rates[0], 1),
            "deliveredPerSecond": round(self.rates[1], 1),
            "lags": list(self.lags),
            "lagSum": round(self.lag_sum, 3),
            "loopLag": round(self.loop_lag, 4),
        }


# What /stats adds up over the workers, and what it shows of each.
_TOTALS = ("connections", "subscriptions", "published", "delivered", "dropped", "redelivered", "bytesOut")
_RATES = ("publishedPerSecond", "deliveredPerSecond")


def summary(rows: Iterable[Row], *, channels: int, version: str, uptime: float) -> dict[str, Any]:
    """The body of `/stats` from the rows of all workers of all nodes."""
    rows = sorted(rows, key=lambda row: (row["node"], row["worker"]))
    totals: dict[str, int] = {name: sum(row[name] for row in rows) for name in _TOTALS}
    totals["channels"] = channels
    return {
        "version": version,
        "uptimeSeconds": round(uptime, 1),
        "totals": totals,
        "rates": {name: round(sum(row[name] for row in rows), 1) for name in _RATES},
        "workers": [
            {name: row[name] for name in ("node", "worker", "pid", "redis", *_TOTALS, *_RATES)}
            for row in rows
        ],
    }


def status_line(rows: Iterable[Row]) -> str:
    """A sentence for `systemctl status` from the rows of this node's workers."""
    rows = list(rows)
    connections = sum(row["connections"] for row in rows)
    published, delivered = (sum(row[name] for row in rows) for name in _RATES)
    redis = "up" if all(row["redisUp"] for row in rows) else "down"
    return (
        f"workers: {len(rows)}, connections: {connections}, published: {published:.0f}/s, "
        f"delivered: {delivered:.0f}/s, Redis: {redis}"
    )


class _Rows(Collector):
    def __init__(self, rows: list[Row], restarts: int, capacity: int) -> None:
        self._rows = rows
        self._restarts = restarts
        self._capacity = capacity

    def collect(self) -> Iterable[Any]:
        for name, key, text in (
            ("bcast_connections", "connections", "Open WebSocket connections."),
            ("bcast_subscriptions", "subscriptions", "Subscriptions of open connections."),
            ("bcast_redis_up", "redisUp", "1 while the worker can publish to Redis and hears it."),
            (
                "bcast_redis_roundtrip_seconds",
                "redisRoundtrip",
                "The last canary's way through Redis and back.",
            ),
            ("bcast_event_loop_lag_seconds", "loopLag", "How late the loop was at its last tick."),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["worker"])
            for row in self._rows:
                gauge.add_metric([str(row["worker"])], row[key])
            yield gauge
        for name, key, text in (
            ("bcast_delivered", "delivered", "Messages handed to subscribers, one for each."),
            ("bcast_redelivered", "redelivered", "Messages sent again because no ack came."),
        ):
            counter = CounterMetricFamily(name, text, labels=["worker"])
            for row in self._rows:
                counter.add_metric([str(row["worker"])], row[key])
            yield counter
        for name, key, label, text in (
            ("bcast_published", "publishedVia", "via", "Messages taken, by entrance."),
            ("bcast_dropped", "droppedReason", "reason", "Messages that a subscriber did not get."),
        ):
            counter = CounterMetricFamily(name, text, labels=["worker", label])
            for row in self._rows:
                for value, count in row[key].items():
                    counter.add_metric([str(row["worker"]), value], count)
            yield counter
        lag = HistogramMetricFamily(
            "bcast_delivery_lag_seconds", "From a message's publishing to its writing.", labels=["worker"]
        )
        for row in self._rows:
            lag.add_metric([str(row["worker"])], _cumulative(row["lags"]), row["lagSum"])
        yield lag
        restarts = CounterMetricFamily("bcast_worker_restarts", "Workers of this node that died.")
        restarts.add_metric([], self._restarts)
        yield restarts
        text = "How many connections this node takes over all its workers."
        yield GaugeMetricFamily("bcast_connections_limit", text, value=self._capacity)


def _cumulative(lags: list[int]) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, LAG_BUCKETS), "+Inf"), lags, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def exposition(rows: Iterable[Mapping[str, Any]], restarts: int, capacity: int) -> bytes:
    """The body of `/metrics`: the workers of this node, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Rows([dict(row) for row in rows], restarts, capacity))
    return generate_latest(registry)
