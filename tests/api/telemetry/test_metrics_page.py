"""``docs/metrics.md``, the dashboard and the alert rules tell of the metrics that a server has, and of no others."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.api.live import Live, wait_for
from tests.api.telemetry.conftest import Observed

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "helm" / "manylora" / "dashboards" / "manylora.json"
RULES = ROOT / "helm" / "manylora" / "rules" / "manylora.yaml"
RUNBOOK = ROOT / "docs" / "operations.md"
PROMTOOL = shutil.which("promtool")
OF_SAMPLES = {"le", "quantile"}
"""Labels that a histogram's or a summary's samples have besides the metric's own."""
_NAME = re.compile(r"\b(?:manylora|process|vllm)[_:][a-z_:]+")


@pytest.fixture(scope="module")
def live(everything: Observed) -> Live:
    """The server, after a request of each kind."""
    server = everything.live
    server.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "left"}]}).raise_for_status()
    server.complete(model="prod")
    server.http.post("/v1/adapters", json={"name": "x", "path": "y"})
    wait_for(server.idle)
    return server


@pytest.fixture(scope="module")
def page(live: Live) -> str:
    return live.http.get("/metrics").text


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels, of the page's table."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    metrics = [row for row in rows if len(row) == 4]
    return {name.strip("`"): (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in metrics}


def served(page: str) -> dict[str, tuple[str, set[str]]]:
    """The same, of a server's answer."""
    found = {}
    for family in parse_text(page):
        labels = {label for sample in family.samples for label in sample.labels} - OF_SAMPLES
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, labels)
    return found


def test_the_page_lists_exactly_the_metrics_of_a_server(page: str) -> None:
    in_text = {name: ("gauge" if kind == "info" else kind, labels) for name, (kind, labels) in documented().items()}
    assert served(page) == in_text
    assert len(in_text) > 60


def test_openmetrics_if_asked(live: Live, page: str) -> None:
    response = live.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families: Iterable[Metric] = parse_openmetrics(response.text)
    kinds = {f"{f.name}_total" if f.type == "counter" else f.name: f.type for f in families}
    assert kinds.pop("manylora_build") == "info"
    assert kinds == {name: kind for name, (kind, _) in served(page).items() if name != "manylora_build_info"}


@pytest.mark.parametrize("accept", ["text/plain;version=0.0.4", "*/*", "text/plain;version=x,application/openmetrics"])
def test_prometheus_text_else(live: Live, accept: str) -> None:
    plain = live.http.get("/metrics", headers={"accept": accept})
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_promtool_accepts_the_page(page: str) -> None:
    done = promtool("check", "metrics", stdin=page)
    # vLLM's names have colons, which promtool reserves for rules; its own clients read them nevertheless.
    assert [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("vllm:")] == []


def series_names(page: str) -> set[str]:
    """Names of all series, also of histograms."""
    names = set()
    for family in parse_text(page):
        names |= {sample.name for sample in family.samples}
        names |= {f"{family.name}_total"} if family.type == "counter" else {family.name}
    return names


def expressions() -> list[str]:
    """All queries of the dashboard and of the alert rules."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return panels + variables + [rule["expr"] for rule in rules()]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_queries_name_metrics_of_a_server(page: str) -> None:
    known = series_names(page)
    asked = {name for query in expressions() for name in _NAME.findall(query)}
    assert asked <= known
    assert len(asked) > 50


def test_queries_group_by_labels_that_their_metrics_have(page: str) -> None:
    """Of each ``by (...)``, every label is one of the metrics in its query, or of the scrape."""
    labels = {name: {*found, "le", "job", "instance"} for name, (_, found) in served(page).items()}
    for query in expressions():
        metrics = [re.sub(r"_(bucket|sum|count)$", "", name) for name in _NAME.findall(query)]
        for group in re.findall(r"by \(([^)]*)\)", query):
            for metric in metrics:
                assert {label.strip() for label in group.split(",")} <= labels[metric], query


def test_promql_is_valid(tmp_path: Path) -> None:
    fixed = [query.replace("$__rate_interval", "5m") for query in expressions() if "label_values" not in query]
    names = [{"record": f"dashboard:query:{number}", "expr": query} for number, query in enumerate(fixed)]
    queries = tmp_path / "queries.yaml"
    queries.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": names}]}))
    for file in (RULES, queries):
        done = promtool("check", "rules", "--lint=none", str(file))
        assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_its_section_of_the_runbook() -> None:
    for rule in rules():
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#alert-{rule['alert']}"
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in {"warning", "critical"}
    if RUNBOOK.exists():
        anchors = set(re.findall(r'(?:id|name)="(alert-\w+)"', RUNBOOK.read_text()))
        assert {f"alert-{rule['alert']}" for rule in rules()} <= anchors


def promtool(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    if PROMTOOL is None:
        pytest.skip("promtool is not installed; Debian's package prometheus has it")
    return subprocess.run([PROMTOOL, *words], input=stdin, capture_output=True, text=True)
