"""KeySpec: what is asked of a new key, on the command line, over HTTP or in a file."""

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from adapters.registry.names import MAX_NAME_LENGTH
from server.access.key import ApiKey, KeyLimits, Scope

MAX_PATTERNS = 256
MAX_LIMIT = 10**15
_PATTERN = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._/-]*\*?")


def _check_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("must be the name of an adapter or an alias, or the beginning of names and a *, as in acme/*")
    return pattern


def _distinct(values: list[Scope]) -> list[Scope]:
    return list(dict.fromkeys(values))


def _moment(value: object) -> object:
    """Take a date of a YAML file as the moment at which it begins, and times without a zone as UTC."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime) and value.tzinfo is None:
        return value.replace(tzinfo=UTC)
    return value


KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
"""What people call a key. It is in logs and lists, and no two valid keys share one."""
Scopes = Annotated[list[Scope], Field(min_length=1), AfterValidator(_distinct)]
Pattern = Annotated[str, Field(max_length=MAX_NAME_LENGTH + 1), AfterValidator(_check_pattern)]
Patterns = Annotated[list[Pattern], Field(max_length=MAX_PATTERNS)]
Weight = Annotated[float, Field(gt=0, le=1000)]
Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


def check_sees_all(scopes: Sequence[Scope], adapters: Sequence[str] | None) -> None:
    """Raise ValueError if a key would have the scope ``admin`` and yet see some adapters only.

    It could make itself another key that sees all of them.
    """
    if "admin" in scopes and adapters is not None:
        raise ValueError("a key with the scope admin sees all adapters: leave out the list, or the scope")


class Limits(BaseModel):
    """Limits of a key, as in :class:`~server.access.key.KeyLimits`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    parallel_requests: Limit | None = None
    tokens_per_month: Limit | None = None


class KeySpec(BaseModel):
    """All that a key allows. Raises pydantic's ValidationError."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: KeyName
    scopes: Scopes = ["infer"]
    adapters: Patterns | None = None
    limits: Limits = Limits()
    weight: Weight = 1.0
    expires: Annotated[datetime | None, BeforeValidator(_moment)] = None

    @model_validator(mode="after")
    def _admin_sees_all(self) -> Self:
        check_sees_all(self.scopes, self.adapters)
        return self

    def key(self, id_: str) -> ApiKey:
        """Return the key with this id."""
        return ApiKey(
            id_,
            self.name,
            frozenset(self.scopes),
            None if self.adapters is None else tuple(self.adapters),
            KeyLimits(**self.limits.model_dump()),
            self.weight,
            self.expires,
        )
