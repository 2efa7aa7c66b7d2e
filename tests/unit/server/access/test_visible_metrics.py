"""Metrics of which a key sees a part."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.access.visible_metrics import VisibleMetrics


def test_samples_that_name_what_is_not_seen_are_left_out() -> None:
    source = CollectorRegistry()
    requests = Counter("requests", "Requests", ["adapter", "status"], registry=source)
    for adapter in ("a", "b", "b@2", "", "other"):
        requests.labels(adapter, "200").inc()
    Histogram("seconds", "Seconds", ["alias", "version"], registry=source).labels("a", "b@1").observe(1)
    Gauge("queue", "Queue", registry=source).set(3)
    Gauge("info", "Info", ["running_lora_adapters"], registry=source).labels("a,a@2,b,c").set(1)
    text = generate_latest(VisibleMetrics(source, lambda name: name == "a")).decode()  # type: ignore[arg-type]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() >= {"requests", "seconds", "queue", "info"}
    counted = {sample.labels["adapter"] for sample in families["requests"].samples}
    assert counted == {"a", "", "other"}
    assert families["seconds"].samples == []
    assert families["queue"].samples[0].value == 3
    assert families["info"].samples[0].labels == {"running_lora_adapters": "a,a@2"}
    assert "b" in {sample.labels.get("adapter") for family in source.collect() for sample in family.samples}
