"""Metrics of several replicas on one page."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.ray.metrics_page import merged


def page(requests: int) -> str:
    registry = CollectorRegistry()
    counter = Counter("requests", "Requests", ["route", "text"], registry=registry)
    counter.labels("/v1", 'a "quoted\\ {name}, with space').inc(requests)
    Gauge("running", "Running", registry=registry).set(1)
    Histogram("seconds", "Seconds", registry=registry, buckets=(1.0,)).observe(requests)
    return generate_latest(registry).decode()


def test_each_sample_has_its_replica_and_each_family_is_in_one_place() -> None:
    whole = merged({"r1": page(1), "r2": page(2)})
    families = list(text_string_to_metric_families(whole))
    assert len({family.name for family in families}) == len(families) == 5  # and two of creation times
    assert whole.count("# TYPE requests_total counter") == 1
    alone = [sample for family in text_string_to_metric_families(page(2)) for sample in family.samples]
    of_two = [sample for family in families for sample in family.samples if sample.labels["replica"] == "r2"]
    assert len(alone) == len(of_two)
    for sample, labelled in zip(alone, of_two, strict=True):
        assert labelled.labels == {**sample.labels, "replica": "r2"}
        assert (labelled.name, labelled.value) == (sample.name, sample.value) or sample.name.endswith("_created")
