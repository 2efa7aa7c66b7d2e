"""``docs/openai.md`` lists exactly the fields of the request schemas, with their state and an existing test."""

import re
from collections.abc import Sequence

import pytest

from server.api.schemas.anthropic.requests import MessagesRequest
from server.api.schemas.base import Schema
from server.api.schemas.chat import ChatRequest
from server.api.schemas.completion import CompletionRequest
from server.api.schemas.embeddings import EmbeddingRequest
from server.api.schemas.messages import Message
from server.api.schemas.responses_api.requests import ResponsesRequest
from server.api.schemas.score import ScoreRequest
from tests.openai_page import PAGE, is_test, table

TABLES: dict[str, Sequence[type[Schema]]] = {
    "Chat and text completions": (ChatRequest, CompletionRequest),
    "Messages of a chat": (Message,),
    "Embeddings": (EmbeddingRequest,),
    "Scores": (ScoreRequest,),
    "Responses, and Anthropic's messages": (ResponsesRequest, MessagesRequest),
}
"""Heading -> the schemas of the table's columns of states."""
NOT_A_FIELD = "-"


def state(schema: type[Schema], field: str) -> str:
    """Return what the schema does with a field."""
    if field in schema.model_fields:
        return "honoured"
    if field in getattr(schema, "unsupported", ()):
        return "refused"
    return "ignored" if field in getattr(schema, "harmless", ()) else NOT_A_FIELD


def fields(schema: type[Schema]) -> set[str]:
    return {*schema.model_fields, *getattr(schema, "unsupported", ()), *getattr(schema, "harmless", ())}


@pytest.mark.parametrize("heading", TABLES)
def test_the_table_has_every_field_with_its_state(heading: str) -> None:
    schemas = TABLES[heading]
    listed = {row[0].strip("`"): row[1 : 1 + len(schemas)] for row in table(heading)}
    assert len(listed) == len(table(heading)), "a field is listed twice"
    assert listed.keys() == set().union(*(fields(schema) for schema in schemas))
    assert listed == {field: [state(schema, field) for schema in schemas] for field in listed}


@pytest.mark.parametrize("heading", TABLES)
def test_every_field_names_its_test(heading: str) -> None:
    for row in table(heading):
        references = [reference.strip("` ") for reference in row[-1].split(",")]
        assert [reference for reference in references if not is_test(reference)] == [], row[0]


def test_every_test_file_on_the_page_exists() -> None:
    named = set(re.findall(r"`(?:api|unit|numeric)/[\w/]+\.py", PAGE.read_text()))
    assert len(named) > 3
    assert {name for name in named if not (PAGE.parents[1] / "tests" / name.strip("`")).is_file()} == set()
