"""The value of one series of a running server."""

import httpx
from prometheus_client.parser import text_string_to_metric_families


def value(http: httpx.Client, name: str, **labels: str) -> float:
    """Return the value of the only sample with this name and these labels."""
    response = http.get("/metrics")
    assert response.status_code == 200, response.text
    samples = (each for family in text_string_to_metric_families(response.text) for each in family.samples)
    (found,) = (each.value for each in samples if each.name == name and each.labels == labels)
    return float(found)
