"""conf/prometheus-alerts.yml and conf/grafana-dashboard.json, against the metrics that the code has."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from daemon import ROOT
from programs import promtool
from prometheus_client.parser import text_string_to_metric_families
from test_metrics import row

from tornado_bcast.metrics import exposition
from tornado_bcast.settings import SlowConsumer

ALERTS_PATH = ROOT / "conf/prometheus-alerts.yml"
GROUPS: dict[str, Any] = yaml.safe_load(ALERTS_PATH.read_text())
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in GROUPS["groups"] for rule in group["rules"]
}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "conf/grafana-dashboard.json").read_text())
OPERATIONS = (ROOT / "docs/OPERATIONS.md").read_text()

# What Prometheus adds: to every sample, and as a metric of its own.
SCRAPED = {"job", "instance"}
FAMILIES = list(text_string_to_metric_families(exposition([row(0)], 0, 1000).decode()))
SAMPLES = {sample.name: set(sample.labels) for family in FAMILIES for sample in family.samples} | {
    "up": set()
}
# The values that a label may have; of others any.
VALUES = {"via": {"ws", "http"}, "reason": {"disconnected", *get_args(SlowConsumer)} - {"disconnect"}}


def problems(query: str) -> Iterator[str]:
    """What a PromQL expression names that no scrape has."""
    bare = re.sub(r'"[^"]*"', '""', query)
    names = set(re.findall(r"\bbcast_\w+|\bup\b(?=\{)", bare))
    yield from (f"no metric {name}" for name in names - SAMPLES.keys())
    labels = set().union(*(SAMPLES.get(name, set()) for name in names), SCRAPED)
    for name, inside in re.findall(r"(\w+)\{([^}]*)\}", query):
        for label, value in re.findall(r'(\w+)\s*(?:=~|!=|!~|=)\s*"([^"]*)"', inside):
            if label not in SAMPLES.get(name, set()) | SCRAPED:
                yield f"{name} has no label {label}"
            elif label in VALUES and value not in VALUES[label]:
                yield f"{label} is never {value}"
    for group in re.findall(r"\bby \(([^)]*)\)", bare):
        yield from (f"no label {label}" for label in set(re.findall(r"\w+", group)) - labels)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum(bcast_nothing) > 1", "no metric bcast_nothing"),
        ("rate(bcast_delivered[5m])", "no metric bcast_delivered"),
        ('bcast_connections{via="ws"}', "bcast_connections has no label via"),
        ('bcast_published_total{via="tcp"}', "via is never tcp"),
        ("sum by (job, reason) (bcast_connections)", "no label reason"),
        ('sum by (instance, reason) (bcast_dropped_total{reason!="latest"}) > up{job="a"}', None),
    ],
)
def test_problems_are_found(query: str, problem: str | None) -> None:
    assert list(problems(query)) == ([problem] if problem else [])


class TestAlerts:
    @pytest.mark.parametrize("name", ALERTS)
    def test_what_it_asks_for_exists(self, name: str) -> None:
        rule = ALERTS[name]
        assert list(problems(rule["expr"])) == []
        # Its texts show labels that the result has.
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", rule["expr"]))))
        shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert shown <= (kept or set().union(*SAMPLES.values(), SCRAPED))

    @pytest.mark.parametrize("name", ALERTS)
    def test_it_says_what_to_do(self, name: str) -> None:
        rule = ALERTS[name]
        assert rule["annotations"]["runbook_url"] == f"docs/OPERATIONS.md#{name.lower()}"
        runbook = OPERATIONS.partition(f"\n### {name}\n")[2].partition("\n#")[0]
        assert len(runbook) > 100, "a heading in docs/OPERATIONS.md, with what to do below it"
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]

    def test_no_runbook_is_left_over(self) -> None:
        assert re.findall(r"^### (Bcast\w+)$", OPERATIONS, re.MULTILINE) == list(ALERTS)


def series(metric: str, **labels: str) -> str:
    given = {"job": "tornado-bcast", "instance": "a", **labels}
    return metric + "{" + ", ".join(f'{label}="{value}"' for label, value in given.items()) + "}"


def lag(bound: str) -> str:
    return series("bcast_delivery_lag_seconds_bucket", worker="0", le=bound)


def dropped(reason: str) -> str:
    return series("bcast_dropped_total", worker="0", reason=reason)


UP = series("up")
REDIS_UP = series("bcast_redis_up", worker="0")
ROUNDTRIP = series("bcast_redis_roundtrip_seconds", worker="0")
RESTARTS = series("bcast_worker_restarts_total")
LOOP_LAG = series("bcast_event_loop_lag_seconds", worker="0")
CONNECTIONS = series("bcast_connections", worker="0")
DELIVERED = series("bcast_delivered_total", worker="0")
REDELIVERED = series("bcast_redelivered_total", worker="0")
# A site on which nothing is wrong, by the minute, as promtool writes series: `start+step x count`.
HEALTHY = {
    UP: "1x60",
    REDIS_UP: "1x60",
    ROUNDTRIP: "0.001x60",
    RESTARTS: "0x60",
    LOOP_LAG: "0.001x60",
    CONNECTIONS: "500x60",
    series("bcast_connections_limit"): "1000x60",
    series("bcast_subscriptions", worker="0"): "500x60",
    series("bcast_published_total", worker="0", via="ws"): "0+60x60",
    DELIVERED: "0+6000x60",
    REDELIVERED: "0x60",
    dropped("latest"): "0+600x60",
    lag("0.005"): "0+6000x60",
    lag("1.0"): "0+6000x60",
    lag("+Inf"): "0+6000x60",
}
# What is otherwise when each alert comes, which must come alone.
FAULTS = {
    "BcastDown": {UP: "1x30 0x30"},
    "BcastRedisDown": {REDIS_UP: "1x30 0x30"},
    "BcastRedisSlow": {ROUNDTRIP: "0.3x60"},
    "BcastWorkerRestarts": {RESTARTS: "0x50 1+1x9"},
    "BcastLoopLag": {LOOP_LAG: "0.4x60"},
    "BcastMessagesDropped": {dropped("drop_oldest"): "0+60x60"},
    "BcastDeliveryLag": {lag("0.005"): "0+3000x60"},
    "BcastConnectionsNearLimit": {CONNECTIONS: "900x60"},
    "BcastConnectionsLost": {CONNECTIONS: "500x55 100x5"},
    "BcastNoDeliveries": {DELIVERED: "7x60"},
    "BcastRedeliveries": {REDELIVERED: "0+1200x60"},
}


def run_promtool(*arguments: str | Path) -> str:
    done = subprocess.run([promtool(), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules() -> None:
    assert f"{len(ALERTS)} rules found" in run_promtool("check", "rules", ALERTS_PATH)


def test_each_alert_comes_for_its_fault_and_no_other(tmp_path: Path) -> None:
    """Prometheus itself works the rules out, over an hour of a healthy site and of one with each fault."""
    assert FAULTS.keys() == ALERTS.keys()
    firing = 'sum by (alertname) (ALERTS{alertstate="firing"})'
    tests = [
        {
            "name": fault,
            "interval": "1m",
            "input_series": [
                {"series": name, "values": values} for name, values in (HEALTHY | changes).items()
            ],
            "promql_expr_test": [
                {
                    "expr": firing,
                    "eval_time": "59m",
                    "exp_samples": [{"labels": f'{{alertname="{fault}"}}', "value": 1}] if changes else [],
                }
            ],
        }
        for fault, changes in {"healthy": {}, **FAULTS}.items()
    ]
    path = tmp_path / "tests.yml"
    path.write_text(json.dumps({"rule_files": [str(ALERTS_PATH)], "tests": tests}))
    run_promtool("test", "rules", path)


class TestDashboard:
    PANELS: tuple[dict[str, Any], ...] = tuple(DASHBOARD["panels"])

    @pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
    def test_what_it_shows_exists(self, panel: dict[str, Any]) -> None:
        assert panel["targets"] and panel["description"]
        for target in panel["targets"]:
            query = re.sub(r'=~"\$(\w+)"', r'="\1"', target["expr"])
            assert list(problems(query)) == []
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(re.findall(r"\w+", query))
        for variable in re.findall(r"\$(\w+)", " ".join(target["expr"] for target in panel["targets"])):
            known = {one["name"] for one in DASHBOARD["templating"]["list"]}
            assert variable in known | {"__rate_interval", "__range"}

    def test_panels_do_not_overlap(self) -> None:
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in self.PANELS)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
        assert len({panel["id"] for panel in self.PANELS}) == len(self.PANELS)

    def test_every_metric_has_its_panel(self) -> None:
        shown = " ".join(target["expr"] for panel in self.PANELS for target in panel["targets"])
        assert not [family.name for family in FAMILIES if family.name not in shown]


def test_every_metric_is_explained() -> None:
    """A row of the table in docs/OPERATIONS.md, with the labels that it has."""
    for family in FAMILIES:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        (cells,) = re.findall(rf"^\| `{name}` \|\s*([^|]*?)\s*\| ([^|]+) \|$", OPERATIONS, re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", cells[0])) == labels, name
        assert len(cells[1]) > 20
