"""Counting, and the two forms in which it is told."""

import json
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tornado_bcast.metrics import LAG_BUCKETS, Metrics, exposition, summary


def row(worker: int, node: str = "n", **changes: Any) -> dict[str, Any]:
    metrics = Metrics()
    metrics.connections = 2 + worker
    metrics.subscriptions = 5
    metrics.published["ws"] = 3
    metrics.published["http"] = 4
    metrics.delivered = 100
    metrics.redelivered = 1
    metrics.bytes_out = 1000
    metrics.drop("latest", 6)
    metrics.drop("disconnected")
    metrics.observe_lag(0.003, 90)
    metrics.observe_lag(60.0, 10)
    about = {"node": node, "worker": worker, "pid": 100 + worker, "redis": "up", "redisUp": 1}
    return {**about, "redisRoundtrip": 0.002, **metrics.row(), **changes}


def test_rates_are_those_of_the_last_second() -> None:
    metrics = Metrics()
    metrics.tick(10.0)
    metrics.published["ws"] += 20
    metrics.published["http"] += 10
    metrics.delivered += 300
    metrics.tick(12.0)
    assert metrics.rates == (15.0, 150.0)
    metrics.tick(13.0)
    assert metrics.rates == (0.0, 0.0)
    metrics.tick(13.0)


def test_a_row_is_json() -> None:
    assert json.loads(json.dumps(row(0))) == row(0)
    assert row(0)["published"] == 7 and row(0)["dropped"] == 7


def test_a_row_does_not_change_afterwards() -> None:
    metrics = Metrics()
    first = metrics.row()
    copy = json.dumps(first)
    metrics.published["ws"] += 1
    metrics.drop("latest")
    metrics.observe_lag(0.1, 1)
    assert json.dumps(first) == copy


def test_the_summary_adds_up_and_keeps_the_rows() -> None:
    body = summary([row(1), row(0, "m"), row(0)], channels=3, version="1", uptime=12.345)
    assert body["totals"] == {
        "connections": 7,
        "subscriptions": 15,
        "channels": 3,
        "published": 21,
        "delivered": 300,
        "dropped": 21,
        "redelivered": 3,
        "bytesOut": 3000,
    }
    assert set(body) == {"version", "uptimeSeconds", "totals", "rates", "workers"}
    assert set(body["rates"]) == {"publishedPerSecond", "deliveredPerSecond"}
    assert body["uptimeSeconds"] == 12.3
    assert [(each["node"], each["worker"]) for each in body["workers"]] == [("m", 0), ("n", 0), ("n", 1)]
    assert {"pid", "connections", "published", "delivered"} <= set(body["workers"][0])


def test_no_worker_at_all() -> None:
    body = summary([], channels=0, version="1", uptime=0)
    assert body["totals"]["connections"] == 0 and body["workers"] == []
    assert exposition([], 0, 1)


def families(rows: list[dict[str, Any]], restarts: int = 0) -> dict[str, Any]:
    text = exposition(rows, restarts, 1000).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_the_names_of_the_contract() -> None:
    text = exposition([row(0), row(1)], 2, 1000).decode()
    samples = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    assert samples == {
        "bcast_connections",
        "bcast_subscriptions",
        "bcast_published_total",
        "bcast_delivered_total",
        "bcast_dropped_total",
        "bcast_redelivered_total",
        "bcast_delivery_lag_seconds_bucket",
        "bcast_delivery_lag_seconds_count",
        "bcast_delivery_lag_seconds_sum",
        "bcast_redis_up",
        "bcast_redis_roundtrip_seconds",
        "bcast_worker_restarts_total",
        "bcast_event_loop_lag_seconds",
        "bcast_connections_limit",
    }
    found = families([row(0), row(1)], 2)
    assert {sample.labels["via"] for sample in found["bcast_published"].samples} == {"ws", "http"}
    assert {sample.labels["reason"] for sample in found["bcast_dropped"].samples} == {
        "latest",
        "disconnected",
    }
    assert [sample.value for sample in found["bcast_worker_restarts"].samples] == [2]
    assert [sample.value for sample in found["bcast_connections"].samples] == [2, 3]
    # One for the node: its workers share it.
    assert [(sample.labels, sample.value) for sample in found["bcast_connections_limit"].samples] == [
        ({}, 1000)
    ]


def test_the_histogram_is_cumulative() -> None:
    samples = families([row(0)])["bcast_delivery_lag_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert len(buckets) == len(LAG_BUCKETS) + 1
    assert (buckets["0.0025"], buckets["0.005"], buckets["5.0"], buckets["+Inf"]) == (0, 90, 90, 100)
    assert next(sample.value for sample in samples if sample.name.endswith("_count")) == 100
    assert next(sample.value for sample in samples if sample.name.endswith("_sum")) == 600.27


def test_a_lag_on_the_edge_is_within() -> None:
    metrics = Metrics()
    metrics.observe_lag(0.001, 1)
    assert metrics.lags[0] == 1
    metrics.observe_lag(0.0, 1)
    assert metrics.lags[0] == 2
