"""RaySettings: the options of ``manylora ray``, which are those of ``manylora serve`` and some more."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from server.config import Settings, make_settings
from server.ray.policy import SPILL_FACTOR, SPILL_REQUESTS, Policy

PROXYS = (
    *("max_connections", "max_connections_per_address", "forwarded_allow_ips", "write_timeout_seconds"),
    "drain_delay_seconds",
)
"""Options of connections and of leaving a balancer, which are the business of Ray's proxy and have no equal there."""


class RaySettings(Settings):
    """Serve a base model and its adapters over HTTP by several replicas, on one machine or more, with Ray Serve.

    A request goes to a replica that already holds its adapter. Joins the cluster of this machine (`ray start`) or of
    RAY_ADDRESS; without one, starts Ray on this machine.

    Example: manylora ray --replicas 2 --threads 4 --database-url postgresql://db/manylora --store-url s3://bucket/adapters
    """

    panels: ClassVar[Mapping[str, Sequence[str]]] = {
        "Replicas": (
            *("replicas", "max_replicas", "target_requests", "upscale_delay_seconds", "downscale_delay_seconds"),
            *("spill_factor", "spill_requests", "gateways"),
        ),
        **Settings.panels,
    }

    replicas: int = Field(1, ge=1, le=10_000, description="replicas of the engine; with --max-replicas, the fewest")
    max_replicas: int | None = Field(
        None, ge=1, le=10_000, description="most replicas: Ray adds and removes some by their load (unset: --replicas)"
    )
    target_requests: float = Field(
        16, gt=0, description="with --max-replicas: requests for each replica, waiting and running, that Ray aims at"
    )
    upscale_delay_seconds: float = Field(
        30, ge=0, description="with --max-replicas: how long there must be too many requests before a replica is added"
    )
    downscale_delay_seconds: float = Field(
        600, ge=0, description="with --max-replicas: how long there must be too few before one is removed"
    )
    spill_factor: float = Field(
        SPILL_FACTOR,
        gt=1,
        description="a replica gets no further requests while it has this many times the mean of all replicas, ...",
    )
    spill_requests: int = Field(SPILL_REQUESTS, ge=1, description="... and this many requests")
    gateways: int = Field(1, ge=1, le=1000, description="processes that read requests and choose replicas for them")

    @field_validator("max_replicas")
    @classmethod
    def _not_fewer(cls, most: int | None, info: ValidationInfo) -> int | None:
        if most is not None and most < info.data.get("replicas", 1):
            raise ValueError(f"must be at least --replicas, {info.data['replicas']} (got {most})")
        return most

    @model_validator(mode="after")
    def _shared(self) -> Self:
        if self.most_replicas > 1 and self.database_url is None:
            raise ValueError(
                "--replicas: several replicas share a registry, so they need --database-url and --store-url"
            )
        for field in PROXYS:
            if field in self.model_fields_set:
                raise ValueError(f"{self.flag(field)}: has no effect here: Ray's proxy has the connections")
        return self

    @property
    def most_replicas(self) -> int:
        """The most replicas that there may be."""
        return self.max_replicas or self.replicas

    @property
    def policy(self) -> Policy:
        """How a replica is chosen."""
        return Policy(self.spill_factor, self.spill_requests)

    @property
    def max_ongoing(self) -> int:
        """Requests that a replica takes: those that its engine runs and queues, and others that need no engine.

        With more the engine itself answers 429, as it does in ``manylora serve``.
        """
        return self.max_batch_sequences + self.max_queue + 64


def make_ray_settings(given: Mapping[str, Any]) -> RaySettings:
    """Make settings from values by field, then the environment. Raises ConfigError, one line per error."""
    return make_settings(dict(given), RaySettings)
