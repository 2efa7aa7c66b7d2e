"""The grammar of a request: from the fields that prescribe the form of its answer."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from server.api.schemas.generation import GenerationRequest
from server.api.service import Service
from server.engine.grammar import Grammar
from server.errors import InvalidRequest
from server.structured.spec import GrammarSpec


class ToolsGrammar(NamedTuple):
    """The grammar of an answer with tool calls."""

    spec: GrammarSpec
    param: str
    """The request's field that asks for it."""
    demanded: bool
    """Whether the answer is calls only, so that it ends with them."""


async def compile_grammar(
    service: Service, request: GenerationRequest, tools: ToolsGrammar | None = None
) -> Grammar | None:
    """Return the grammar that the answer to ``request`` must follow, or None.

    ``tools``: the grammar of its tool calls, if it has one. Raises InvalidRequest, with the field and the
    reason, if a grammar is invalid, too large or not supported, or if two fields prescribe the answer.
    """
    given = [*_given(request), *([(tools.param, tools.spec)] if tools else ())]
    if not given:
        return None
    param, spec = given[0]
    if len(given) > 1:
        other = given[1][0]
        raise InvalidRequest(f"`{param}` and `{other}` both prescribe the form of the answer; give one.", param=other)
    ends = tools is None or tools.demanded
    for field in ("ignore_eos", "min_tokens") if ends else ("ignore_eos",):
        if getattr(request, field):
            reason = (
                "the answer ends when its form is complete" if ends else "a strict function is enforced by a grammar"
            )
            raise InvalidRequest(f"`{field}` cannot be combined with `{param}`: {reason}.", param=field)
    return await service.grammars.compile(spec, param)


def prescribes_answer(request: GenerationRequest) -> bool:
    """Whether the request says what form its answer has."""
    return next(_given(request), None) is not None


def _given(request: GenerationRequest) -> Iterator[tuple[str, GrammarSpec]]:
    """The grammars that a request asks for, with the fields they come from."""
    match request.response_format:
        case None:
            pass
        case format_ if format_.json_schema is not None:
            schema = format_.json_schema.get("schema")
            field = "response_format.json_schema.schema"
            yield field, GrammarSpec("json_object") if schema is None else _json_schema(schema, field)
        case format_ if format_.type == "json_object":
            yield "response_format", GrammarSpec("json_object")
    outputs: dict[str, Any] = dict(request.structured_outputs or {})
    if outputs.get("json_object"):
        yield "structured_outputs.json_object", GrammarSpec("json_object")
    for name in ("json", "regex", "choice", "grammar"):
        for field, value in (
            (f"structured_outputs.{name}", outputs.get(name)),
            (f"guided_{name}", getattr(request, f"guided_{name}")),
        ):
            if value is not None:
                yield field, _spec(name, value, field)


def _spec(name: str, value: Any, field: str) -> GrammarSpec:
    match name:
        case "json":
            return _json_schema(value, field)
        case "choice":
            return GrammarSpec("choice", json.dumps(value))
        case "regex":
            return GrammarSpec("regex", value)
        case _:
            return GrammarSpec("lark", value)


def _json_schema(schema: dict[str, Any] | str, field: str) -> GrammarSpec:
    if isinstance(schema, str):
        return GrammarSpec("json_schema", schema)
    try:
        return GrammarSpec("json_schema", json.dumps(schema, separators=(",", ":")))
    except RecursionError as error:
        raise InvalidRequest(f"`{field}` is nested too deeply.", param=field) from error
