"""The rules, the scrape configuration and the dashboard: what they ask for exists, and every alert fires when it should.

Owns the reading of expressions as far as names of metrics go; that they are PromQL is for promtool to say.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from smg.telemetry.catalog import FAMILIES
from tests.deploy.front import DEPLOY, NODES, found

RULES_TESTS = [Path(__file__).with_name(name) for name in ("rules_test.yml", "rules_day_test.yml")]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
KINDS = {family.name: family.kind for family in FAMILIES}
LABELS = {family.name: set(family.labels) for family in FAMILIES}
SELECTOR = re.compile(r"\b((?:smg|process)_\w+)(?:\{([^}]*)\})?")
PROCESS_METRICS = {
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
    "process_max_fds",
}
"""Of the exporter's own, which docs/reference/metrics.md names as a group."""

ADDED_LABELS = {"job", "instance", "process", "le"}


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            yield panel


def expressions() -> list[tuple[str, str]]:
    found_ones = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    found_ones += [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    return found_ones


def promtool(*words: str) -> None:
    run = subprocess.run([found("promtool"), *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(("name", "expression"), expressions())
def test_every_metric_and_label_of_an_expression_exists(name: str, expression: str) -> None:
    text = re.sub(r"\b(by|on|group_left)\s*\(([^)]*)\)", "", expression)
    names = SELECTOR.findall(text)
    assert names or "up{" in text or "smg:" in text, f"{name} asks for nothing of ours"
    for metric, labels in names:
        if metric in PROCESS_METRICS:
            continue
        family = metric.removesuffix("_bucket") if metric not in KINDS else metric
        assert family in KINDS, f"{name}: there is no {metric}"
        assert (KINDS[family] == "histogram") == (family != metric), f"{name}: {metric} is a {KINDS[family]}"
        used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))
        assert used <= LABELS[family] | ADDED_LABELS, f"{name}: {metric} has no label {used - LABELS[family]}"


def test_the_rules_and_the_configuration_are_accepted_by_prometheus():
    promtool("check", "rules", str(DEPLOY / "prometheus-rules.yml"))
    promtool("check", "config", str(DEPLOY / "prometheus.yml"))


def test_every_alert_fires_when_it_should_and_not_else():
    promtool("test", "rules", *map(str, RULES_TESTS))
    tests = [test for path in RULES_TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert fired == alerts


def test_every_alert_has_a_line_in_the_page_of_troubles():
    page = (DEPLOY.parent / "docs" / "operate" / "troubleshooting.md").read_text()
    missing = [rule["alert"] for rule in rules() if "alert" in rule and f"`{rule['alert']}`" not in page]
    assert missing == []


def test_the_dashboard_can_be_imported_and_its_queries_are_promql(tmp_path):
    assert DASHBOARD["uid"] and DASHBOARD["schemaVersion"] >= 36 and DASHBOARD.get("id") is None
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    made = []
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "5m")
            for name in re.findall(r"\$(\w+)", expression):
                assert name in variables, f"{panel['title']}: no variable {name}"
            made.append({"record": f"panel:{panel['id']}_{target['refId']}", "expr": expression})
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    promtool("check", "rules", str(path))


def test_no_two_panels_of_the_dashboard_lie_on_each_other():
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_the_same_nodes_stand_in_all_files():
    addresses = [f"10.0.0.{11 + place}" for place in range(len(NODES))]
    for name in ("haproxy.cfg", "nginx.conf", "prometheus.yml", "compose.yaml"):
        text = (DEPLOY / name).read_text()
        assert [address for address in addresses if address not in text] == [], name
