"""Schemas of responses, for the OpenAPI document only.

The server builds its responses without these models, because some are long lists or streams.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseModel(BaseModel):
    """A JSON object in a response. Only fields with a default may be absent; others may be null."""

    model_config = ConfigDict(use_attribute_docstrings=True)


# --- errors


class Error(ResponseModel):
    """An error in OpenAI's format."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "insufficient_quota", "server_error"]
    param: str | None
    """Request field that caused the error."""
    code: str | None
    """Machine-readable reason."""
    file: str | None = None
    """File that caused an adapter's rejection."""
    tensor: str | None = None
    """Tensor that caused an adapter's rejection."""


class ErrorAnswer(ResponseModel):
    """Body of every error response."""

    error: Error


class VllmError(ResponseModel):
    """An error in vLLM's format."""

    message: str
    type: str
    param: str | None
    code: int | str | None
    """HTTP status, or OpenAI's code for errors that vLLM does not have."""


class VllmErrorAnswer(ResponseModel):
    """Body of an error response of the vLLM-compatible endpoints."""

    error: VllmError


# --- tokens


class Tokens(ResponseModel):
    """The token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None
    """The tokens as strings of the vocabulary, if requested."""


class Detokenized(ResponseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(ResponseModel):
    """What clients need to know of the base's tokenizer."""

    tokenizer_class: str
    model_max_length: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


# --- models, adapters, aliases


class Model(ResponseModel):
    """A model: the base, an adapter, a version or an alias."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["manylora"]
    root: str
    """Name of the base or the alias, or SHA-256 of the adapter's content."""
    parent: str | None
    """Name of the base; null for the base itself."""
    max_model_len: int


class Listing(ResponseModel):
    """A page of a list."""

    object: Literal["list"]
    has_more: bool
    """Whether more items follow; request them with `after` set to the last item's id."""


class Models(Listing):
    """The base, then adapters and aliases ordered by name, and versions if the request asks for them."""

    data: list[Model]


class VersionFields(ResponseModel):
    """Details of a version."""

    content: str | None
    """SHA-256 of the adapter's content."""
    rank: int | None
    targets: int | None
    """Number of layers that it changes."""
    size_bytes: int | None
    source: str | None
    """Where it came from: `upload`, `folder NAME`, or an address with the revision that was taken."""
    residency: Literal["device", "host", "disk"] | None
    """Fastest memory that currently holds the content."""
    status: Literal["ready", "refused"] | None
    reason: str | None = None
    """Why this server cannot serve the version, if its status is `refused`."""


class AdapterVersion(VersionFields):
    """One version of an adapter."""

    version: int
    created: int


class Adapter(VersionFields):
    """An adapter with the details of its active version, which are null if no version is active."""

    id: str
    object: Literal["adapter"]
    created: int
    active: int | None
    """Version used for requests that name the adapter without a version."""
    pinned: bool
    aliases: list[str]
    """Aliases that have this adapter as a target."""
    versions: list[int]
    """Numbers of all versions of the adapter."""


class RegisteredAdapter(Adapter):
    """An adapter that has just been registered."""

    version: int
    """Number of the registered version."""


class Curves(ResponseModel):
    """Figures by step: pairs of step and value. Of many points, 2,000 are kept."""

    loss: list[tuple[int, float]]
    """Training loss, nats per token."""
    evaluation: list[tuple[int, float]]
    """Loss on the held-out rows."""
    learning_rate: list[tuple[int, float]]


class Card(ResponseModel):
    """What an adapter's trainer left beside it: no part of its content, and nothing that this server has checked."""

    markdown: str | None
    """Its README.md. Anybody may have written it."""
    manifest: dict[str, Any] | None
    """Its `manylora.json`."""
    curves: Curves | None
    samples: list[Any] | None
    """Held-out rows with the answers of base and adapter, as of `GET /v1/training/runs/NAME`; null for keys that have
    neither the scope `train` nor `adapters`."""


class AdapterDetails(Adapter):
    """An adapter or one version of it."""

    version_details: list[AdapterVersion] | None = None
    """Details of all versions; present for an adapter, absent for a single version."""
    receipt: dict[str, Any] | None
    """Results of the checks at registration, and the source of the adapter."""
    card: Card | None = None
    """Present if the request includes it."""


class RefusedFolder(ResponseModel):
    """A folder under `--adapter-dir` whose content could not be registered."""

    name: str
    source: str
    reason: str
    since: int


class StoreUsage(ResponseModel):
    """Disk space used by adapters, and its limit."""

    bytes: int
    quota_bytes: int | None


class Adapters(Listing):
    """Adapters ordered by name."""

    data: list[Adapter]
    refused: list[RefusedFolder]
    store: StoreUsage


class AliasTarget(ResponseModel):
    """One target of an alias."""

    adapter: str
    weight: float
    serves: str | None
    """Version that the target currently resolves to."""


class Alias(ResponseModel):
    """A name that resolves to one of several adapters or versions, according to their weights."""

    id: str
    object: Literal["alias"]
    created: int
    targets: list[AliasTarget]


class Aliases(Listing):
    """Aliases ordered by name."""

    data: list[Alias]


class Deleted(ResponseModel):
    """Confirms a deletion."""

    id: str
    object: Literal["adapter", "alias", "key"]
    deleted: Literal[True]


# --- the server


class Status(ResponseModel):
    """State of the server."""

    status: Literal["alive", "ready", "draining", "engine failing"]


class ServerVersion(ResponseModel):
    """The version of manylora, and the fingerprint of its base."""

    version: str
    base_fingerprint: str
    """An adapter whose `manylora.json` names a base must name this one."""


class Index(ResponseModel):
    """Basic facts about the server, and links."""

    name: Literal["manylora"]
    version: str
    model: str
    """Name of the base."""
    links: dict[str, str]
    """Link name -> path."""
