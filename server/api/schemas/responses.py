"""What the routes answer, for the document of the API.

The answers themselves are made without these models, for there are long lists and streams among them.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class ResponseModel(BaseModel):
    """A JSON object in an answer. A field with a default may be missing; others may be null, but are there."""

    model_config = ConfigDict(use_attribute_docstrings=True)


# --- errors


class Error(ResponseModel):
    """What went wrong, in OpenAI's terms."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field at fault."""
    code: str | None
    """The reason, for programs."""
    file: str | None = None
    """Of an adapter that is rejected: the file at fault. So is the next."""
    tensor: str | None = None


class ErrorAnswer(ResponseModel):
    """The body of every answer that tells of an error."""

    error: Error


class VllmError(ResponseModel):
    """What went wrong, in vLLM's terms."""

    message: str
    type: str
    param: str | None
    code: int | str | None
    """The HTTP status; of errors that vLLM does not know, OpenAI's code."""


class VllmErrorAnswer(ResponseModel):
    """The body of an error where vLLM's operators look for vLLM's."""

    error: VllmError


# --- completions


class AppliedAdapter(ResponseModel):
    """One adapter that took part in an answer."""

    name: str
    """Of the version, as in `legal@2`."""
    id: str
    """The sha256 of its content."""
    weight: float
    alias: str | None = None
    """The alias that it was asked for by, if it was."""


class PromptTokens(ResponseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class Usage(ResponseModel):
    """Tokens counted as OpenAI does; the stop token is one of the answer's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Generated(ResponseModel):
    """What each object of an answer says."""

    id: str
    created: int
    """Unix time, seconds."""
    model: str
    """As it was asked for."""
    system_fingerprint: str
    """Of the base."""
    adapter: list[AppliedAdapter]
    """Empty for the base alone."""


class AssistantMessage(ResponseModel):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(ResponseModel):
    """The one choice of an answer."""

    index: Literal[0]
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(Generated):
    """A chat's answer, whole."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class Delta(ResponseModel):
    """What has come since the last chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(ResponseModel):
    """The one choice of a chunk."""

    index: Literal[0]
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Generated):
    """One event of a streamed chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """Empty in the chunk that ends a stream with its usage."""
    usage: Usage | None = None


class TextChoice(ResponseModel):
    """The one choice of a completion, or of a chunk of one."""

    index: Literal[0]
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class Completion(Generated):
    """What follows a prompt, whole."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionChunk(Generated):
    """One event of a streamed completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    """Empty in the chunk that ends a stream with its usage."""
    usage: Usage | None = None


class Tokens(ResponseModel):
    """The token ids of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None
    """As the vocabulary writes them, where that was asked for."""


class Detokenized(ResponseModel):
    """The text of tokens."""

    prompt: str


# --- models, adapters, aliases


class Model(ResponseModel):
    """The base, or a name that stands for an adapter, as a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["manylora"]
    root: str
    """The base: its name. An adapter: the sha256 of its content. An alias: its name."""
    parent: str | None
    """The base's name; null for the base itself."""
    max_model_len: int


class Listing(ResponseModel):
    """A page of a list."""

    object: Literal["list"]
    has_more: bool
    """Whether more come after the last; ask for them with `after`, its id."""


class Models(Listing):
    """The base, then adapters, versions and aliases in the order of their names."""

    data: list[Model]


class Particulars(ResponseModel):
    """What is true of a version."""

    content: str | None
    """The sha256 of its content."""
    rank: int | None
    targets: int | None
    """How many layers it changes."""
    size_bytes: int | None
    residency: Literal["device", "host", "disk"] | None
    """The place nearest to the device that has the content."""
    status: Literal["ready", "refused"] | None
    reason: str | None = None
    """Why this server cannot serve it, where it is refused."""


class AdapterVersion(Particulars):
    """One version of an adapter."""

    version: int
    created: int


class Adapter(Particulars):
    """An adapter, with the particulars of its active version; null where it has none."""

    id: str
    object: Literal["adapter"]
    created: int
    active: int | None
    """The version that the name means."""
    pinned: bool
    aliases: list[str]
    """Those that may mean it."""
    versions: list[int]
    """Of the adapter, all."""


class RegisteredAdapter(Adapter):
    """An adapter that has just been registered."""

    version: int
    """The one that this content is."""


class AdapterDetails(Adapter):
    """An adapter or one version of it."""

    version_details: list[AdapterVersion] | None = None
    """Of an adapter, the particulars of each of its versions; a version has none of its own."""
    receipt: dict[str, Any] | None
    """What the checks found, and where it came from."""


class RefusedFolder(ResponseModel):
    """A folder under `--adapter-dir` whose content could not be registered."""

    name: str
    source: str
    reason: str
    since: int


class StoreUsage(ResponseModel):
    """Disk space that adapters take, and may take."""

    bytes: int
    quota_bytes: int | None


class Adapters(Listing):
    """Adapters in the order of their names."""

    data: list[Adapter]
    refused: list[RefusedFolder]
    store: StoreUsage


class AliasTarget(ResponseModel):
    """One target of an alias."""

    adapter: str
    weight: float
    serves: str | None
    """The version that it means now."""


class Alias(ResponseModel):
    """A name that means one of several adapters or versions, by weight."""

    id: str
    object: Literal["alias"]
    created: int
    targets: list[AliasTarget]


class Aliases(Listing):
    """Aliases in the order of their names."""

    data: list[Alias]


class Deleted(ResponseModel):
    """What is gone."""

    id: str
    object: Literal["adapter", "alias"]
    deleted: Literal[True]


# --- the server


class Status(ResponseModel):
    """How the server is."""

    status: Literal["alive", "ready", "draining", "engine failing"]


class ServerVersion(ResponseModel):
    """The version of manylora, and what its base is."""

    version: str
    base_fingerprint: str
    """What an adapter's `manylora.json` must name, where it names a base."""


class Index(ResponseModel):
    """What this is, and where to go from here."""

    name: Literal["manylora"]
    version: str
    model: str
    """The base."""
    links: dict[str, str]
    """What there is to see -> its path."""
