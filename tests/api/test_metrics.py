"""``/metrics`` and the health routes."""

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.api.live import Live, request, wait_for


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


def test_alive_and_ready(live: Live) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert live.http.get(path).status_code == 200


def test_an_idle_server_says_so(live: Live) -> None:
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


def test_answers_are_counted_by_status(live: Live) -> None:
    before = [value(live, "manylora_http_requests_total", status=status) for status in ("400", "404")]
    live.http.post("/v1/completions", json=request(temperature=9))
    live.http.post("/v1/completions", json=request(model="nobody"))
    after = [value(live, "manylora_http_requests_total", status=status) for status in ("400", "404")]
    assert [a - b for a, b in zip(after, before, strict=True)] == [1, 1]


def test_one_live_label_set_names_the_residents(live: Live) -> None:
    for adapter in ("green", "red", None):
        live.complete(adapter=adapter)
    wait_for(live.idle)
    (info,) = samples(live)["vllm:lora_requests_info"]
    assert set(info.labels) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert info.labels["max_lora"] == "16"
    assert {"green", "red"} <= set(info.labels["running_lora_adapters"].split(","))
    assert info.labels["waiting_lora_adapters"] == ""
    assert info.value > 1_700_000_000
