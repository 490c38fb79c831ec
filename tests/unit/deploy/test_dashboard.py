"""Dashboard, alerts and documentation name the metrics that the code has, with their labels."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

from treadle.telemetry.loop_lag import LoopLag
from treadle.telemetry.service import Telemetry
from treadle_gateway.config import GatewayConfig
from treadle_gateway.metrics import GatewayMetrics
from treadle_registry.config import RegistryConfig
from treadle_tokenizer.config import TokenizerConfig
from treadle_trainer.config import TrainerConfig
from treadle_worker.config import WorkerConfig
from treadle_worker.metrics import WorkerMetrics

ROOT = Path(__file__).parents[3]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/treadle.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
SCRAPES: dict[str, Any] = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
DOCUMENTATION = (ROOT / "docs/metrics.md").read_text()

TARGET_LABELS = {"service", "replica", "instance", "job"}
"""What the scraper adds."""
METRIC = re.compile(r"\b(?:treadle:|process_)\w+")
GROUPING = re.compile(r"by \(([^)]*)\)")
CONFIGS = {
    "gateway": GatewayConfig,
    "registry": RegistryConfig,
    "tokenizer": TokenizerConfig,
    "trainer": TrainerConfig,
    "worker": WorkerConfig,
}


def counted_elsewhere() -> set[str]:
    """The names of counters that are made where somebody counts anyway."""
    found = set()
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CountedElsewhere":
                assert isinstance(node.args[0], ast.Constant)
                found.add(f"{node.args[0].value}_total")
    return found


class Code:
    """Every metric that the code has: its samples' names with their labels, and the families they are of."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        Telemetry(registry)
        LoopLag(registry)
        GatewayMetrics(registry)
        WorkerMetrics(registry)
        self.labels: dict[str, set[str]] = {}
        self.families: dict[str, set[str]] = {}
        for collector, names in registry._collector_to_names.items():
            # A histogram's and a counter's own name is none of their samples'.
            samples = [name for name in names if not name.endswith("_created")]
            samples = [name for name in samples if len(samples) == 1 or name != collector._name]
            self.families[collector._name] = set(samples)
            for name in samples:
                self.labels[name] = {*collector._labelnames, *(["le"] if name.endswith("_bucket") else [])}
        for family in ProcessCollector(registry=None).collect():
            self.labels |= {sample.name: set() for sample in family.samples}
        for name in counted_elsewhere():
            self.labels[name] = set()
            self.families[name.removesuffix("_total")] = {name}


@pytest.fixture(scope="module")
def code() -> Code:
    return Code()


def expressions() -> list[tuple[str, str, str]]:
    """(where, expression, legend) of every panel and alert."""
    found = [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    ]
    for group in ALERTS["groups"]:
        found += [(rule["alert"], rule["expr"], "") for rule in group["rules"]]
    return found


def matched_labels(expression: str) -> list[tuple[str, set[str]]]:
    """Each metric of an expression, with the labels that its selector matches."""
    found = []
    for match in METRIC.finditer(expression):
        selector = re.match(r"\{([^}]*)\}", expression[match.end() :])
        found.append(
            (match[0], set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector[1])) if selector else set())
        )
    return found


def test_every_expression_names_metrics_that_there_are_with_labels_that_they_have(code):
    names, labels, groups = 0, 0, 0
    for where, expression, legend in expressions():
        metrics = matched_labels(expression)
        assert metrics or expression.startswith("up{"), where
        for name, matched in metrics:
            assert name in code.labels, f"{where}: there is no {name}"
            assert matched <= code.labels[name] | TARGET_LABELS, f"{where}: {name} has no {matched}"
            names, labels = names + 1, labels + len(matched)
        known = TARGET_LABELS.union(*(code.labels[name] for name, _ in metrics))
        grouped = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
        assert grouped <= known, f"{where}: by {grouped - known}"
        shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
        assert shown <= (grouped or known), f"{where}: the legend's {shown} are summed up"
        groups += len(grouped)
    assert names > 50
    print(f"{len(expressions())} expressions: {names} metrics, {labels} matched labels, {groups} to group by")


def test_a_quantile_is_one_of_buckets_and_a_rate_one_of_a_counter(code):
    quantiles, rates = 0, 0
    for where, expression, _ in expressions():
        if "histogram_quantile" in expression:
            assert re.search(r"by \([^)]*\ble\b[^)]*\)", expression), where
            assert all(name.endswith("_bucket") for name, _ in matched_labels(expression)), where
            quantiles += 1
        for name in re.findall(r"(?:rate|increase)\(\s*((?:treadle:|process_)\w+)", expression):
            assert name.endswith(("_total", "_bucket", "_sum", "_count")), where
            rates += 1
    assert quantiles > 15
    assert rates > 30
    print(f"{quantiles} quantiles, {rates} rates")


def test_every_metric_is_on_the_dashboard_and_in_the_documentation(code):
    shown = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
        for name, _ in matched_labels(target["expr"])
    }
    own = code.families
    missing = sorted(family for family, names in own.items() if not names & shown)
    assert missing == []
    documented = set(re.findall(r"^\| `(treadle:\w+)`", DOCUMENTATION, re.MULTILINE))
    in_code = {f"{family}_total" if f"{family}_total" in names else family for family, names in own.items()}
    assert documented == in_code
    assert len(own) >= 32
    print(f"{len(own)} metrics, each on the dashboard and in docs/metrics.md; {len(shown)} samples shown")


def test_the_dashboard_is_whole():
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "model_name", "replica"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["legendFormat"]
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, panel["title"]
            assert "replica" in used, panel["title"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Requests", "Latency", "Tokens", "Engines", "Resilience", "Services", "Tasks"]
    print(f"{len(panels) - len(rows)} panels in {len(rows)} rows")


def test_prometheus_looks_where_the_services_of_compose_are():
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (scrape,) = SCRAPES["scrape_configs"]
    ports = {name: entry["port"] for entry in scrape["dns_sd_configs"] for name in entry["names"]}
    assert set(ports) == set(CONFIGS)
    for name, config in CONFIGS.items():
        variable = composed[name]["environment"][f"TREADLE_{name.upper()}_METRICS_ADDRESS"]
        default = config.model_fields["metrics_address"].default
        assert variable == f"0.0.0.0:{ports[name]}"
        assert default == f"127.0.0.1:{ports[name]}"
    labels = {relabel["target_label"] for relabel in scrape["relabel_configs"]}
    assert labels == {"service", "replica"}
    assert SCRAPES["rule_files"] == ["alerts.yml"]
