"""The options of ``manylora ray``."""

import pytest

from bases.errors import ConfigError
from server.ray.policy import Policy
from server.ray.settings import RaySettings, make_ray_settings

SHARED = {"database_url": "postgresql://db/manylora", "store_url": "s3://bucket/adapters"}


def test_one_replica_needs_no_shared_registry() -> None:
    settings = make_ray_settings({})
    assert (settings.replicas, settings.most_replicas, settings.policy) == (1, 1, Policy())


def test_several_replicas_need_a_shared_registry() -> None:
    for given in ({"replicas": "2"}, {"max_replicas": "3"}):
        with pytest.raises(ConfigError, match="--database-url and --store-url"):
            make_ray_settings(given)
        assert make_ray_settings({**given, **SHARED}).most_replicas > 1


def test_a_replica_takes_what_its_engine_takes_and_more() -> None:
    settings = RaySettings(max_queue=10, max_batch_sequences=4)
    assert settings.max_ongoing > 14, "the engine itself says 429"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**SHARED, "replicas": "3", "max_replicas": "2"}, "--max-replicas: must be at least --replicas, 3"),
        ({"replicas": "0"}, "--replicas: must be at least 1"),
        ({"downscale_delay_seconds": "-1"}, "--downscale-delay-seconds: must be at least 0"),
        ({"spill_factor": "1"}, "--spill-factor: must be more than 1"),
        ({"max_connections": "9"}, "--max-connections: has no effect here"),
        ({"forwarded_allow_ips": ("*",)}, "--forwarded-allow-ips: has no effect here"),
    ],
)
def test_bad_options_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_ray_settings(given)
    assert message in str(raised.value)
