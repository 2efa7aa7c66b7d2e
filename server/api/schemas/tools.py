"""Schemas of tools: functions that the model may call, and which of them it must."""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from server.api.schemas.base import ENCODABLE, Name, Text, TolerantSchema

MAX_TOOLS = 512
MAX_CALLS = 512
"""Calls in one message."""
MAX_DEPTH = 100
"""Maximum number of arrays and objects inside each other in arguments given as JSON text: that of a body."""


def plain_json(value: Any) -> Any:
    """Check that all text in a JSON value is valid Unicode, and that it is not nested too deep to be written."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode text") from error
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    if not _is_shallow(value):
        raise ValueError("is nested too deep")
    return value


def _is_shallow(value: Any) -> bool:
    """Whether a JSON value is nested at most :data:`MAX_DEPTH` deep, so that later code may walk it by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return True
    return not any(isinstance(each, dict | list) for each in level)


JsonObject = Annotated[dict[str, Any], AfterValidator(plain_json)]
FunctionName = Annotated[str, Field(min_length=1, max_length=256), ENCODABLE]


def _of_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Check that a schema of arguments is one of an object, as far as its own ``type`` tells."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise ValueError("must be the schema of an object: its `type` is `object`")
    return schema


class FunctionDefinition(TolerantSchema):
    """A function: its name, what it does, and a JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: Annotated[JsonObject, AfterValidator(_of_object)] | None = None
    strict: bool | None = None
    """true: the arguments of each call follow the schema. Those of calls that must be made always do."""

    def for_template(self) -> dict[str, Any]:
        """Return the fields that are given, for a chat template."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in fields.items() if value is not None}


def _is_function(value: object) -> object:
    if isinstance(value, dict) and value.get("type", "function") != "function":
        raise ValueError("only tools of type `function` are supported")
    return value


class Tool(TolerantSchema):
    """A tool of type ``function``."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    type: Literal["function"] = "function"
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """Return the tool for a chat template."""
        return {"type": "function", "function": self.function.for_template()}


def _few_tools(value: object) -> object:
    """Check the length before the items are validated."""
    if isinstance(value, list) and len(value) > MAX_TOOLS:
        raise ValueError(f"must have at most {MAX_TOOLS} tools (got {len(value)})")
    return value


def _unique(tools: list[Tool]) -> list[Tool]:
    names: set[str] = set()
    for tool in tools:
        if tool.function.name in names:
            raise ValueError(f"two tools have the name `{tool.function.name[:80]}`")
        names.add(tool.function.name)
    return tools


Tools = Annotated[
    list[Annotated[Tool, BeforeValidator(_is_function)]],
    Field(fail_fast=True),
    BeforeValidator(_few_tools),
    AfterValidator(_unique),
]


class FunctionChoice(TolerantSchema):
    """The name of a function."""

    name: FunctionName


class NamedTool(TolerantSchema):
    """The tool that the model must call."""

    type: Literal["function"] = "function"
    function: FunctionChoice


class AllowedFunctions(TolerantSchema):
    """Some of the functions: the model is told of no others."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class AllowedTools(TolerantSchema):
    """The model may call, or with the mode ``required`` must call, some of the functions only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


ToolMode = Literal["none", "auto", "required"]


def _choice(value: object) -> object:
    if not isinstance(value, dict | NamedTool | AllowedTools) and value not in ("none", "auto", "required"):
        raise ValueError("must be `none`, `auto`, `required`, a function to call, or the functions that are allowed")
    if isinstance(value, dict) and value.get("type", "function") not in ("function", "allowed_tools"):
        raise ValueError("must be of type `function` or `allowed_tools`")
    return value


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "mode"
    return str((value.get("type") if isinstance(value, dict) else getattr(value, "type", None)) or "function")


ToolChoice = Annotated[
    Annotated[ToolMode, Tag("mode")]
    | Annotated[NamedTool, Tag("function")]
    | Annotated[AllowedTools, Tag("allowed_tools")],
    Discriminator(_kind),
    BeforeValidator(_choice, json_schema_input_type=ToolMode | NamedTool | AllowedTools),
]


def _arguments(value: object) -> object:
    """Read arguments given as JSON text; some servers give none as empty text."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError("must be a JSON object, as text") from error
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object, as text")  # noqa: TRY004 - pydantic takes only ValueError
    return parsed


class CalledFunction(TolerantSchema):
    """A function that the assistant has called."""

    harmless: ClassVar[frozenset[str]] = frozenset({"parsed_arguments"})  # what ``parse`` of OpenAI's client adds

    name: FunctionName
    arguments: Annotated[JsonObject, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])] = Field(
        default_factory=dict
    )
    """A JSON object, as text or as it is."""


class ToolCall(TolerantSchema):
    """A call in an assistant's message."""

    harmless: ClassVar[frozenset[str]] = frozenset({"index", "extra_content", "provider_specific_fields"})

    id: Name | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Return the call for a chat template, with its arguments as an object."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {**({"id": self.id} if self.id else {}), "type": "function", "function": function}


Calls = Annotated[list[Annotated[ToolCall, BeforeValidator(_is_function)]], Field(max_length=MAX_CALLS, fail_fast=True)]


def check_choice(tools: list[Tool] | None, choice: ToolMode | NamedTool | AllowedTools | None) -> None:
    """Check that the tools that a choice names, or demands, are there."""
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise PydanticCustomError("field", "`tool_choice` needs `tools`.", {"field": "tool_choice"})
    named = [choice] if isinstance(choice, NamedTool) else []
    named += choice.allowed_tools.tools if isinstance(choice, AllowedTools) else []
    known = {tool.function.name for tool in tools}
    for name in (tool.function.name for tool in named):
        if name not in known:
            raise PydanticCustomError(
                "field",
                "`tool_choice` names a function that is not in `tools`: `{name}`.",
                {"field": "tool_choice", "name": name[:80]},
            )
