"""``/metrics`` and the health routes."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.adapter_folders import DEFECTS, write_adapter
from tests.api.live import Live, request, running, tiny_service, wait_for


def samples(live: Live) -> dict[str, list[Sample]]:
    response = live.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(live: Live, name: str, **labels: str) -> float:
    return sum(s.value for s in samples(live).get(name, []) if labels.items() <= s.labels.items())


def test_health_and_readiness(live: Live) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert live.http.get(path).status_code == 200


def test_version_is_that_of_the_package(live: Live) -> None:
    base = live.service.base.layout.fingerprint
    assert live.http.get("/version").json() == {"version": metadata.version("manylora"), "base_fingerprint": base}


def test_gauges_of_an_idle_server(live: Live) -> None:
    for name in (
        "manylora_requests_waiting",
        "manylora_requests_running",
        "manylora_kv_blocks_used",
        "vllm:num_requests_waiting",
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
    ):
        assert [sample.value for sample in samples(live)[name]] == [0], name
    assert value(live, "manylora_healthy") == 1
    assert value(live, "manylora_kv_blocks") == live.service.engine.stats().blocks_total


def test_requests_are_counted(live: Live) -> None:
    names = ["manylora_prompt_tokens_total", "manylora_output_tokens_total", "manylora_request_seconds_count"]
    names += ["manylora_time_to_first_token_seconds_count", "manylora_time_between_tokens_seconds_count"]
    before = [value(live, name) for name in names]
    live.complete()
    assert [value(live, name) - old for name, old in zip(names, before, strict=True)] == [16, 12, 1, 1, 11]


def test_responses_are_counted_by_status(live: Live) -> None:
    before = [value(live, "manylora_http_requests_total", status=status) for status in ("400", "404")]
    live.http.post("/v1/completions", json=request(temperature=9))
    live.http.post("/v1/completions", json=request(model="nobody"))
    after = [value(live, "manylora_http_requests_total", status=status) for status in ("400", "404")]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1]


def test_lora_info_has_one_label_set_with_the_adapters_on_the_device(live: Live) -> None:
    for adapter in ("green", "red", None):
        live.complete(adapter=adapter)
    wait_for(live.idle)
    (info,) = samples(live)["vllm:lora_requests_info"]
    assert set(info.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert info.labels["max_lora"] == "16"
    assert {"green", "red"} <= set(info.labels["running_lora_adapters"].split(","))
    assert info.labels["waiting_lora_adapters"] == ""
    assert info.value > 1_700_000_000


def test_gauges_of_the_registry(live: Live) -> None:
    usage = live.service.registry.usage()
    assert value(live, "manylora_adapters") == usage.adapters == 3
    assert value(live, "manylora_adapter_versions") == usage.versions == 3
    assert value(live, "manylora_store_bytes") == usage.bytes > 0
    assert value(live, "manylora_registry_available") == 1
    assert "manylora_store_quota_bytes" not in samples(live)


def test_a_quota_is_shown_and_refused_registrations_are_counted(folders: Mapping[str, Path], tmp_path: Path) -> None:
    service = tiny_service(tmp_path, adapter_root=folders["red"].parent, store_quota_gib=1e-6, max_rank=16)
    with running(service) as live:
        assert value(live, "manylora_store_quota_bytes") == 1073
        live.http.post("/v1/adapters", json={"name": "red", "path": "red"})
        assert value(live, "manylora_registrations_total", outcome="failed") == 1


def test_registrations_are_counted(live: Live, folders: Mapping[str, Path]) -> None:
    outcomes = ["accepted", "same", "refused", "failed"]
    before = [value(live, "manylora_registrations_total", outcome=outcome) for outcome in outcomes]
    folder = write_adapter(folders["spare"].parent / "counted", live.service.base.layout)
    DEFECTS["nan"].spoil(folder)
    for path in ("spare", "spare", "counted", "nothing-here"):
        live.http.post("/v1/adapters", json={"name": "counted", "path": path})
    live.http.post("/v1/adapters", files={"file": ("x.exe", b"MZ")}, data={"name": "counted"})
    live.http.delete("/v1/adapters/counted")
    after = [value(live, "manylora_registrations_total", outcome=outcome) for outcome in outcomes]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1, 3, 0]


def aliased(live: Live) -> set[tuple[str, str]]:
    """The pairs of alias and version that have metrics."""
    found = samples(live)
    names = ["manylora_alias_requests_total", "manylora_alias_output_tokens_total"]
    names += ["manylora_alias_time_to_first_token_seconds_count", "manylora_alias_request_seconds_count"]
    pairs = [{(s.labels["alias"], s.labels["version"]) for s in found.get(name, [])} for name in names]
    assert all(each == pairs[0] for each in pairs)
    return pairs[0]


def test_an_alias_has_metrics_for_each_version(live: Live, folders: Mapping[str, Path]) -> None:
    assert aliased(live) == set()
    put = {"url": "/v1/aliases/prod", "json": {"targets": [{"adapter": "red", "weight": 1}, {"adapter": "green@1"}]}}
    live.http.put(**put)
    served = [live.complete(model="prod", user=str(user))["adapter"][0]["name"] for user in range(8)]
    wait_for(live.idle)
    assert set(served) == {"red@1", "green@1"}
    assert aliased(live) == {("prod", "red@1"), ("prod", "green@1")}
    for version in set(served):
        labels = {"alias": "prod", "version": version}
        assert value(live, "manylora_alias_requests_total", **labels, outcome="ok") == served.count(version)
        assert value(live, "manylora_alias_output_tokens_total", **labels) == 12 * served.count(version)
        for name in ("time_to_first_token_seconds", "request_seconds"):
            assert value(live, f"manylora_alias_{name}_count", **labels) == served.count(version)
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "green@1"}]})
    assert aliased(live) == {("prod", "green@1")}
    live.http.delete("/v1/aliases/prod")
    assert aliased(live) == set()


def test_metrics_of_a_deleted_version_are_removed(live: Live, folders: Mapping[str, Path]) -> None:
    first, second = (
        live.service.registry.register_folder("moving", folders[name]).version for name in ("red", "spare")
    )
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "moving"}]})
    live.complete(model="prod")
    live.http.post("/v1/adapters/moving/activate", json={"version": first.number})
    live.complete(model="prod")
    live.complete(model="moving")
    wait_for(live.idle)
    assert aliased(live) == {("prod", first.name), ("prod", second.name)}
    assert live.http.delete(f"/v1/adapters/{second.name}").status_code == 200
    assert aliased(live) == {("prod", first.name)}
    live.http.delete("/v1/aliases/prod")
    live.http.delete("/v1/adapters/moving")


def test_requests_of_an_alias_are_counted_by_outcome(live: Live) -> None:
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "red"}]})
    with live.http.stream("POST", "/v1/completions", json=request(model="prod", max_tokens=200, stream=True)) as stream:
        next(stream.iter_lines())
    wait_for(live.idle)
    live.complete(model="prod")
    live.complete(adapter=[{"name": "prod", "weight": 0}, {"name": "green", "weight": 1}])  # not counted for the alias
    wait_for(live.idle)
    ends = {s.labels["outcome"]: s.value for s in samples(live)["manylora_alias_requests_total"]}
    live.http.delete("/v1/aliases/prod")
    assert ends == {"cancelled": 1, "ok": 1}
