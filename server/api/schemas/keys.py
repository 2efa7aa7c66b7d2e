"""Schemas of ``/v1/keys``."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.access.key import Scope
from server.access.key_spec import KeyName, KeySpec, Limit, Limits, Patterns, Scopes, Weight, check_sees_all
from server.api.schemas.registry import RegistrySchema
from server.api.schemas.responses import Listing, ResponseModel

LATEST = 253_402_300_799
"""The last second of the year 9999, in Unix time."""
MAX_OVERLAP = 30 * 86400
"""Maximum number of seconds for which two secrets of a key are accepted."""
UnixTime = Annotated[int, Field(ge=0, le=LATEST)]


class LimitsRequest(RegistrySchema):
    """Limits of a key; null is none. Tokens are those of prompts and answers together."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    parallel_requests: Limit | None = None
    tokens_per_month: Limit | None = None


class KeyRequest(RegistrySchema):
    """Body of ``POST /v1/keys``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"name": "acme", "adapters": ["acme/*"], "limits": {"requests_per_minute": 60}, "weight": 2},
                {"name": "ci", "scopes": ["adapters"], "expires": 4102444800},
            ]
        }
    )

    name: KeyName
    scopes: Scopes = Field(default=["infer"])
    adapters: Patterns | None = None
    """Names of adapters and aliases that the key sees, or their beginnings with a `*`. Null: all."""
    limits: LimitsRequest = LimitsRequest()
    weight: Weight = 1.0
    """Share of the server's time, against the weights of other keys that have requests."""
    expires: UnixTime | None = None
    """Unix time in seconds."""

    @model_validator(mode="after")
    def _possible(self) -> "KeyRequest":
        try:
            check_sees_all(self.scopes, self.adapters)
        except ValueError as error:
            raise PydanticCustomError("field", "{reason}.", {"field": "adapters", "reason": str(error)}) from None
        return self

    @property
    def spec(self) -> KeySpec:
        """What the key is to allow."""
        return KeySpec(
            name=self.name,
            scopes=self.scopes,
            adapters=self.adapters,
            limits=Limits(**self.limits.model_dump()),
            weight=self.weight,
            expires=None if self.expires is None else datetime.fromtimestamp(self.expires, UTC),
        )


class RotateRequest(RegistrySchema):
    """Body of ``POST /v1/keys/ID/rotate``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_seconds": 3600}]})

    overlap_seconds: int = Field(0, ge=0, le=MAX_OVERLAP)
    """For how long the old secret is accepted, too."""


class KeyLimits(ResponseModel):
    """Limits of a key; null is none."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    parallel_requests: int | None
    tokens_per_month: int | None


class Key(ResponseModel):
    """An API key, without its secret. Times are Unix times in seconds."""

    id: str
    object: Literal["key"]
    name: str
    prefix: str
    """The first characters of its secret."""
    scopes: list[Scope]
    adapters: list[str] | None
    """Names of adapters and aliases that it sees, or their beginnings with a `*`; null is all."""
    limits: KeyLimits
    weight: float
    created: int
    expires: int | None
    revoked: int | None
    """When it was revoked."""
    old_secret_until: int | None
    """Until when the secret before the last rotation is accepted."""


class NewKey(Key):
    """A key with a new secret, which no later answer has."""

    secret: str


class Keys(Listing):
    """The keys of the registry's database that are not revoked, oldest first."""

    data: list[Key]


class ServerFacts(ResponseModel):
    """Facts about the server."""

    version: str
    base: str
    """Name of the base."""
    base_fingerprint: str
    max_model_len: int
    """Maximum number of tokens of a prompt and its answer."""
    max_rank: int
    max_device_adapters: int
    max_upload_bytes: int
    """Maximum size of an uploaded adapter."""
    max_data_bytes: int
    """Maximum size of a file of training data."""
    max_body_bytes: int
    """Maximum size of any other body."""
    model: str | None
    """`--model` as the server was started with; null without the scope admin."""
    data_dir: str | None
    """Absolute path of the server's data folder, where `manylora train` leaves runs; null without the scope admin."""


class Whoami(ResponseModel):
    """What the key of a request allows, and facts about the server."""

    object: Literal["whoami"]
    keys: bool
    """Whether the server asks for keys."""
    id: str
    """Id of the key. Empty on a server without keys."""
    name: str
    scopes: list[Scope]
    """What the key may do. A key with `admin` may do everything."""
    adapters: list[str] | None
    """Names of adapters and aliases that it sees, or their beginnings with a `*`; null is all."""
    limits: KeyLimits
    expires: int | None
    """Unix time in seconds."""
    server: ServerFacts
    features: list[str]
    """What the server can do that others cannot, as `chat`: its base has a chat template."""
