"""``manylora top``: what it makes of two answers of /metrics."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console

from adapters.cli.top.scrape import Change, Scrape, parse_scrape
from adapters.cli.top.view import Sort, frame

CASES = Path(__file__).parents[4] / "server/page/src/lib/change_cases.json"
"""Cases that the web page's own code is tested with as well."""


class Server:
    """Metrics as a server has them."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        labels = ["adapter", "route", "status"]
        self.requests = Counter("manylora_adapter_requests", "", labels, registry=registry)
        self.tokens = Counter("manylora_adapter_output_tokens", "", ["adapter"], registry=registry)
        self.http = Counter("manylora_http_requests", "", ["route", "status"], registry=registry)
        for route in ("/metrics", "/v1/completions"):
            self.http.labels(route, "200").inc(0)
        self.running = Gauge("manylora_requests_running", "", registry=registry)
        self.first = Histogram("manylora_time_to_first_token_seconds", "", buckets=(0.1, 0.2, 1), registry=registry)
        self.info = Gauge("vllm:lora_requests_info", "", ["max_lora", "running_lora_adapters"], registry=registry)
        self.info.labels("4", "legal@2,x@1").set(1)
        for name in ("legal", "german"):
            self.requests.labels(name, "/v1/completions", "200").inc(5)
            self.requests.labels(name, "/v1/completions", "404").inc(0)
            self.tokens.labels(name).inc(0)

    def scrape(self, at: float) -> Scrape:
        return parse_scrape(generate_latest(self.registry).decode(), at)


@pytest.fixture
def change() -> Change:
    """Ten seconds with 20 requests of legal, 5 of german, of which one failed."""
    server = Server()
    before = server.scrape(0)
    server.requests.labels("legal", "/v1/completions", "200").inc(20)
    server.requests.labels("german", "/v1/completions", "200").inc(4)
    server.requests.labels("german", "/v1/completions", "404").inc(1)
    server.tokens.labels("german").inc(300)
    server.http.labels("/metrics", "200").inc(100)
    server.http.labels("/v1/completions", "200").inc(20)
    server.running.set(3)
    for seconds in (0.05, 0.15, 0.15, 5):
        server.first.observe(seconds)
    return Change(before, server.scrape(10))


def drawn(change: Change, sort: Sort, rows: int = 10, width: int = 160) -> list[str]:
    """Return the lines of a frame."""
    console = Console(file=io.StringIO(), width=width)
    console.print(frame(change, "http://here", sort, rows))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_rates_are_of_the_time_between(change: Change) -> None:
    assert change.rate("manylora_adapter_requests_total") == 2.5
    assert change.rate_by("manylora_adapter_requests_total", "adapter") == {"legal": 2.0, "german": 0.5}
    assert change.rate("manylora_no_such_total") is None


def test_quantiles_are_of_what_was_observed_between(change: Change) -> None:
    name = "manylora_time_to_first_token_seconds"
    assert change.quantile(name, 0.25) == pytest.approx(0.1)
    assert change.quantile(name, 0.5) == pytest.approx(0.15)
    assert change.quantile(name, 0.99) == 1  # the last bound: more is not known
    assert change.mean(name) == pytest.approx(5.35 / 4)
    assert Change(change.now, Scrape(20, change.now.series)).quantile(name, 0.5) is None


def test_restarted_server_has_no_negative_rate(change: Change) -> None:
    restarted = Change(Scrape(0, change.now.series), Scrape(10, change.before.series))
    assert restarted.rate("manylora_adapter_requests_total") == 1.0


@pytest.mark.parametrize("case", json.loads(CASES.read_text()), ids=lambda case: case["case"])
def test_terminal_and_page_make_the_same_of_two_scrapes(case: dict[str, Any]) -> None:
    before, now = (parse_scrape("\n".join(case[moment]) + "\n", 0) for moment in ("before", "now"))
    change = Change(before, Scrape(case["seconds"], now.series))
    assert {name: change.rate(name) for name in case.get("rate", {})} == pytest.approx(case.get("rate", {}))
    for name, wanted in case.get("rate_by", {}).items():
        assert change.rate_by(name, wanted["label"]) == pytest.approx(wanted["rates"])
    assert {name: change.mean(name) for name in case.get("mean", {})} == pytest.approx(case.get("mean", {}))
    for name, wanted in case.get("quantile", {}).items():
        assert {share: change.quantile(name, float(share)) for share in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(("sort", "first"), [("requests", "legal"), ("tokens", "german"), ("name", "german")])
def test_adapters_are_sorted(change: Change, sort: Sort, first: str) -> None:
    lines = drawn(change, sort)
    rows = [line for line in lines if line.startswith(("legal", "german"))]
    assert rows[0].startswith(first)
    legal = next(line for line in rows if line.startswith("legal"))
    assert legal.split() == ["legal", "2", "0", "0", "0", "-", "25", "yes"]
    assert next(line for line in rows if line.startswith("german")).split()[:4] == ["german", "0.5", "0.1", "30"]


def test_scrapes_are_no_requests(change: Change) -> None:
    assert any(line.startswith("requests   2/s, 3 running") for line in drawn(change, "requests"))


def test_rows_that_do_not_fit_are_counted(change: Change) -> None:
    assert any(line.startswith("... and 1 more") for line in drawn(change, "requests", rows=1))


def test_missing_metrics_are_named(change: Change) -> None:
    text = "\n".join(drawn(change, "requests"))
    assert "this server has no manylora_queue_seconds" in " ".join(text.split())
    assert "manylora_time_to_first_token_seconds" not in text
    empty = Change(Scrape(0, {}), Scrape(1, {}))
    assert "by adapter: this server has no manylora_adapter_requests_total" in "\n".join(drawn(empty, "name"))


def test_80_columns_show_every_figure(change: Change) -> None:
    wide, narrow = (drawn(change, "requests", width=width) for width in (160, 80))
    assert max(map(len, narrow)) <= 80
    table = [line.split() for line in narrow if line.startswith(("adapter ", "legal", "german"))]
    assert table == [line.split() for line in wide if line.startswith(("adapter ", "legal", "german"))]
    assert "…" not in "\n".join(narrow)
