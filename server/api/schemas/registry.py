"""Schemas of requests that change the registry."""

import json
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from adapters.format.selection import MAX_NAMED, Selection
from adapters.registry.registration import RegistrationOptions
from server.api.schemas.base import ENCODABLE, Name, Schema

MAX_TARGETS = 16
FILES = {
    "type": "array",
    "items": {"type": "string", "format": "binary"},
    "minItems": 1,
    "description": "`adapter_config.json` and `adapter_model.safetensors`, identified by their filenames, or one "
    "archive of them: .tar, .tar.gz or .zip. Other files are skipped; the receipt lists them.",
}
"""Schema of the form's files in the OpenAPI document."""


class RegistrySchema(Schema):
    """Base of changes to the registry. They outlast the request, so nothing in them is ignored."""

    always_strict: ClassVar[bool] = True


class Registration(RegistrySchema):
    """Fields of every registration, whatever the source of the adapter."""

    name: Name
    activate: bool = True
    pinned: bool | None = None
    preload: bool = False
    allow_base_mismatch: bool = False
    allow_unknown_fields: bool = False

    def options(self, expected: int | None) -> RegistrationOptions:
        """Return the registry's options. ``expected`` is the revision from ``If-Match``."""
        return RegistrationOptions(
            activate=self.activate,
            pinned=self.pinned,
            allow_base_mismatch=self.allow_base_mismatch,
            allow_unknown_fields=self.allow_unknown_fields,
            expected=expected,
            preload=self.preload,
        )


Address = Annotated[str, Field(min_length=1, max_length=4096), ENCODABLE]


class AdapterRequest(Registration):
    """Body of ``POST /v1/adapters`` as JSON: either a folder on the server, or a remote source."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "legal", "path": "legal"}]})

    path: Address | None = None
    source: Address | None = None

    @field_validator("path")
    @classmethod
    def _no_nul(cls, path: str | None) -> str | None:
        if path is not None and "\0" in path:
            raise ValueError("must not contain NUL")
        return path

    @model_validator(mode="after")
    def _one_origin(self) -> "AdapterRequest":
        if (self.path is None) == (self.source is None):
            raise PydanticCustomError(
                "field",
                "Give either `path` or `source`, or upload the files as multipart/form-data.",
                {"field": "path"},
            )
        return self


def _flag(value: object) -> object:
    if value not in ("true", "false"):
        raise ValueError('must be "true" or "false"')
    return value == "true"


Flag = Annotated[bool, BeforeValidator(_flag)]
"""A boolean in a form or a query, sent as text."""


def _json(value: object) -> object:
    """Parse a form field that contains JSON."""
    try:
        return json.loads(str(value))
    except (ValueError, RecursionError):
        raise ValueError("must be JSON") from None


Names = Annotated[list[Annotated[str, Field(max_length=1024), ENCODABLE]], Field(max_length=MAX_NAMED)]


class LeftOut(RegistrySchema):
    """Files that the client skipped when it uploaded the adapter, for the receipt."""

    files: Names = Field(default=[])
    count: int = Field(default=0, ge=0, lt=10**9)
    """Number of skipped files; ``files`` may list fewer."""
    adapters: Names = Field(default=[])
    """Folders that contain other adapters."""


class AdapterUpload(Registration):
    """Fields of ``POST /v1/adapters`` as a form; its files are received separately."""

    activate: Flag = True
    pinned: Flag | None = None
    preload: Flag = False
    allow_base_mismatch: Flag = False
    allow_unknown_fields: Flag = False
    left_out: Annotated[LeftOut, BeforeValidator(_json)] = LeftOut()

    def with_left_out(self, selection: Selection) -> Selection:
        """Return ``selection`` that also counts the files which the client did not send."""
        return selection.with_ignored(self.left_out.files, self.left_out.count, self.left_out.adapters)

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of the form including its files."""
        schema = handler(core)
        described = handler.resolve_ref_schema(schema)
        described["properties"]["file"] = FILES
        described["required"].append("file")
        return schema


class ActivateRequest(RegistrySchema):
    """Body of ``POST /v1/adapters/NAME/activate``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 1}]})

    version: int = Field(ge=1, lt=10**9)


class PinRequest(RegistrySchema):
    """Body of ``POST /v1/adapters/NAME/pin``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pinned": True}]})

    pinned: bool


class TargetEntry(RegistrySchema):
    """One target of an alias."""

    adapter: Name
    weight: float = Field(1.0, ge=0, le=1e9)


class AliasRequest(RegistrySchema):
    """Body of ``PUT /v1/aliases/NAME``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"targets": [{"adapter": "legal@1", "weight": 90}, {"adapter": "german", "weight": 10}]},
            ]
        }
    )

    targets: Annotated[list[TargetEntry], Field(min_length=1, max_length=MAX_TARGETS, fail_fast=True)]

    @field_validator("targets")
    @classmethod
    def _weighted(cls, targets: list[TargetEntry]) -> list[TargetEntry]:
        names = [target.adapter for target in targets]
        if len(set(names)) < len(names):
            raise ValueError("names a target twice")
        if not any(target.weight for target in targets):
            raise ValueError("needs a weight above 0")
        return targets


class LoadRequest(RegistrySchema):
    """Body of ``POST /v1/load_lora_adapter``, as in vLLM."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "legal", "lora_path": "legal"}]})

    lora_name: Name = ""
    lora_path: Annotated[str, Field(max_length=4096), ENCODABLE] = ""
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadRequest(RegistrySchema):
    """Body of ``POST /v1/unload_lora_adapter``, as in vLLM."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "legal"}]})

    lora_name: Name = ""
    lora_int_id: int | None = None
    """Ignored, as in vLLM."""
