"""Series of single adapters, the cap on their number, and the times of loads, queues and steps."""

from collections.abc import Iterator

import pytest

from adapters.registry.snapshot import Target
from server.metrics.adapters import HALF_LIFE, MIN_REMEMBERED, AdapterCollector
from server.metrics.aliases import AliasCollector
from server.metrics.requests import EndedRequest
from tests.api.live import Live, request, wait_for
from tests.api.operation.test_metrics import samples, value
from tests.api.telemetry.conftest import Observed

ADAPTER_COUNTERS = [f"manylora_adapter_{name}_tokens_total" for name in ("prompt", "cached", "output")]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def collector(shared: Live, clock: Clock) -> AdapterCollector:
    """Series for one of the adapters red, green and team/blue."""
    return AdapterCollector("tiny", shared.service.registry, 1, clock)


def use(collector: AdapterCollector, adapter: str, times: int = 1) -> None:
    for _ in range(times):
        collector.responded([adapter], "/v1/completions", 200)
        collector.first_token([adapter], 0.5)
        collector.ended(EndedRequest("ok", 2.0, 10, 4, 3, [adapter], ()))


def shown(collector: AdapterCollector) -> dict[str, float]:
    """Adapter -> requests, after a scrape."""
    collector.update()
    families = {family.name: family for family in collector.collect()}
    requests = families["manylora_adapter_requests"].samples
    tokens = {s.labels["adapter"]: s.value for s in families["manylora_adapter_prompt_tokens"].samples}
    found = {s.labels["adapter"]: s.value for s in requests}
    assert all(tokens[adapter] == 10 * count for adapter, count in found.items())
    return found


def test_the_most_used_adapter_takes_the_series_and_no_count_moves(collector: AdapterCollector) -> None:
    use(collector, "red", 2)
    use(collector, "green", 4)
    assert shown(collector) == {"red": 2, "other": 4}, "twice as many are not enough"
    use(collector, "green")
    assert shown(collector) == {"other": 5}
    use(collector, "green", 3)
    use(collector, "red", 1)
    assert shown(collector) == {"green": 3, "other": 6}
    use(collector, "red", 20)
    assert shown(collector) == {"red": 2, "other": 26}, "it goes on where it was"
    use(collector, "red", 1)
    assert shown(collector) == {"red": 3, "other": 26}


def test_requests_of_hours_ago_count_less(collector: AdapterCollector, clock: Clock) -> None:
    use(collector, "red", 16)
    shown(collector)
    clock.now += 4 * HALF_LIFE
    assert shown(collector) == {"red": 16}
    use(collector, "green", 3)
    shown(collector)
    use(collector, "green", 1)
    assert shown(collector) == {"green": 1, "other": 3}


def test_a_removed_adapter_gives_its_series_back(collector: AdapterCollector) -> None:
    use(collector, "nobody")
    use(collector, "red")
    assert shown(collector) == {"other": 1}
    use(collector, "red")
    assert shown(collector) == {"red": 1, "other": 1}


def test_adapters_that_come_and_go_are_forgotten_although_nobody_scrapes(collector: AdapterCollector) -> None:
    use(collector, "red")
    for number in range(2 * MIN_REMEMBERED):
        use(collector, f"job-{number}")  # removed meanwhile
    assert len(collector) <= MIN_REMEMBERED
    assert shown(collector) == {"red": 1, "other": 2 * MIN_REMEMBERED}


def test_aliases_have_so_many_series_and_the_others_one_together(shared: Live) -> None:
    registry = shared.service.registry
    collector = AliasCollector(registry, 2)

    def shown() -> dict[tuple[str, str], float]:
        """Alias and version -> requests, after a scrape."""
        collector.update()
        families = {family.name: family for family in collector.collect()}
        samples = families["manylora_alias_requests"].samples
        return {(s.labels["alias"], s.labels["version"]): s.value for s in samples}

    def use(alias: str) -> None:
        collector.first_token(alias, "red@1", 0.5)
        collector.ended(alias, "red@1", EndedRequest("ok", 2.0, 10, 4, 3, ["red"], [(alias, "red@1")]))

    names = [f"capped-{number}" for number in range(4)]
    for name in names:
        registry.put_alias(name, [Target("red", None, 1.0)])
        use(name)
    assert shown() == {("capped-0", "red@1"): 1, ("capped-1", "red@1"): 1, ("other", "other"): 2}
    registry.remove_alias("capped-0")
    shown()
    use("capped-3")
    assert shown() == {("capped-1", "red@1"): 1, ("capped-3", "red@1"): 1, ("other", "other"): 2}, "no count moves"
    for name in names[1:]:
        registry.remove_alias(name)
    assert shown() == {("other", "other"): 2}


def test_a_mix_counts_for_each_adapter_and_the_base_for_itself(shared: Live) -> None:
    collector = AdapterCollector("tiny", shared.service.registry, 200)
    collector.responded(["red", "green"], "/v1/completions", 200)
    collector.responded([], "/v1/completions", 500)
    (requests,) = [family for family in collector.collect() if family.name == "manylora_adapter_requests"]
    counted = {(s.labels["adapter"], s.labels["status"]): s.value for s in requests.samples}
    assert counted == {("red", "200"): 1, ("green", "200"): 1, ("tiny", "500"): 1}


def test_an_adapter_named_other_has_no_series_of_its_own(shared: Live) -> None:
    collector = AdapterCollector("tiny", shared.service.registry, 200)
    collector.responded(["other"], "/v1/completions", 200)
    (requests,) = [family for family in collector.collect() if family.name == "manylora_adapter_requests"]
    assert [(s.labels["adapter"], s.value) for s in requests.samples] == [("other", 1)]


@pytest.fixture
def live(observed: Observed) -> Iterator[Live]:
    yield observed.live
    wait_for(observed.live.idle)


def test_requests_and_tokens_are_counted_by_adapter(live: Live) -> None:
    prompt = list(range(50, 90))

    def ask() -> list[float]:
        before = [value(live, name, adapter="left") for name in ADAPTER_COUNTERS]
        live.complete(adapter="left", prompt=prompt)
        wait_for(live.idle)
        return [value(live, name, adapter="left") - old for name, old in zip(ADAPTER_COUNTERS, before, strict=True)]

    labels = {"adapter": "left", "route": "/v1/completions", "status": "200"}
    requests = value(live, "manylora_adapter_requests_total", **labels)
    hits = value(live, "manylora_prefix_cache_hits_total")
    assert ask() == [40, 0, 12]
    assert ask() == [40, 32, 12]
    assert value(live, "manylora_adapter_requests_total", **labels) == requests + 2
    assert value(live, "manylora_prefix_cache_hits_total") == hits + 1
    assert value(live, "manylora_adapter_time_to_first_token_seconds_count", adapter="left") >= 2
    assert value(live, "manylora_adapter_request_seconds_sum", adapter="left") > 0


def test_answers_are_counted_by_route(live: Live) -> None:
    def count(**labels: str) -> float:
        return value(live, "manylora_http_requests_total", **labels)

    named = {"method": "GET", "route": "/v1/adapters/{reference}", "status": "200"}
    nowhere = {"method": "GET", "route": "other", "status": "404"}
    brewed = {"method": "other", "status": "405"}
    before = [count(**labels) for labels in (named, nowhere, brewed)]
    live.http.get("/v1/adapters/left")
    live.http.get("/no/such/page")
    live.http.request("BREW", "/v1/adapters/left")
    assert [count(**labels) for labels in (named, nowhere, brewed)] == [each + 1 for each in before]
    routes = {sample.labels["route"] for sample in samples(live)["manylora_http_requests_total"]}
    assert not any("left" in route or "such" in route for route in routes)


def test_a_removed_adapter_has_no_metrics(live: Live) -> None:
    registry = live.service.registry
    registry.register_folder("short-lived", live.content("left"))
    live.complete(adapter="short-lived")
    assert 'adapter="short-lived"' in live.http.get("/metrics").text
    live.http.delete("/v1/adapters/short-lived").raise_for_status()
    assert "short-lived" not in live.http.get("/metrics").text


def test_loads_are_cold_or_warm(live: Live) -> None:
    """Both adapters are in host memory since they were registered, and take turns in the one slot."""
    live.complete(adapter="left")
    wait_for(live.idle)
    names = ["manylora_adapter_load_seconds_count", "manylora_host_cache_hits_total", "manylora_slot_misses_total"]
    names += ["manylora_adapter_evictions_total", "manylora_adapter_wait_seconds_count", "manylora_slot_hits_total"]
    warm = {"start": "warm"}
    before = [value(live, name, **(warm if "start" in name else {})) for name in names]
    loads = value(live, "manylora_adapter_load_seconds_count", start="warm")
    for adapter in ("right", "left", "left"):
        live.complete(adapter=adapter)
        wait_for(live.idle)
    after = [value(live, name) for name in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [2, 2, 2, 2, 3, 1]
    assert value(live, "manylora_adapter_load_seconds_count", start="warm") == loads + 2
    assert value(live, "manylora_adapter_load_seconds_count", start="cold") >= 2
    assert value(live, "manylora_host_cache_misses_total") >= 2
    assert value(live, "manylora_host_cache_bytes") > 0


def test_queue_prefill_and_phases_are_measured(live: Live) -> None:
    phases = ("load", "schedule", "forward", "sample", "commit")

    def measured() -> list[float]:
        names = ["manylora_queue_seconds_count", "manylora_prefill_seconds_count"]
        counts = [value(live, name) for name in names]
        counts += [value(live, "manylora_step_rows_total", kind=kind) for kind in ("prefill", "decode")]
        return counts

    before, steps = measured(), value(live, "manylora_engine_steps_total")
    live.complete(prompt=list(range(100, 120)), n=2, temperature=0.5)
    wait_for(live.idle)
    after = measured()
    assert [a - b for a, b in zip(after, before, strict=True)][:2] == [2, 2]
    assert after[2] - before[2] >= 20
    assert after[3] - before[3] >= 22
    assert value(live, "manylora_engine_steps_total") > steps
    counts = {value(live, "manylora_step_phase_seconds_count", phase=phase) for phase in phases}
    assert counts == {value(live, "manylora_engine_steps_total")}
    sums = {phase: value(live, "manylora_step_phase_seconds_sum", phase=phase) for phase in phases}
    assert all(0 < seconds < 60 for seconds in sums.values())
    assert sums["forward"] > sums["schedule"]


def test_a_request_that_leaves_the_queue_has_waited(live: Live) -> None:
    before = value(live, "manylora_queue_seconds_count")
    with live.http.stream("POST", "/v1/completions", json=request(max_tokens=100, stream=True)) as stream:
        next(stream.iter_lines())
    wait_for(live.idle)
    assert value(live, "manylora_queue_seconds_count") == before + 1
    assert value(live, "manylora_requests_total", outcome="cancelled") >= 1
