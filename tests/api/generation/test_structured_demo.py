"""Structured output of the demo model at temperature 1: valid in every try, for the base and an adapter."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest

from tests.api.live import Live, wait_for

pytestmark = pytest.mark.demo

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 30},
        "city": {"enum": ["Köln", "München", "東京", "New York"]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["street", "city", "zip"],
    "additionalProperties": False,
}
SCHEMA = {
    "$defs": {"address": ADDRESS},
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "married": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "addresses": {"type": "array", "items": {"$ref": "#/$defs/address"}, "minItems": 1, "maxItems": 2},
        "contact": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, "value": {"type": "string", "maxLength": 20}},
                    "required": ["kind", "value"],
                    "additionalProperties": False,
                }
                for kind in ("email", "phone")
            ]
        },
        "scores": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "age", "married", "addresses", "contact", "scores"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "Invent a person with one or two addresses, as JSON."}]


def ask(live: Live, seed: int, adapter: str | None) -> str:
    """Return an answer; every third one streamed."""
    body: dict[str, Any] = {
        "messages": MESSAGES,
        "response_format": FORMAT,
        "temperature": 1,
        "seed": seed,
        "max_tokens": 1900,  # one in 100 is longer than 800 tokens, of which most indent its lines
        "model": adapter,
    }
    if seed % 3 == 0:
        chunks = live.stream("/v1/chat/completions", **body)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"]
    return text


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/v1/completions", {"prompt": "Once upon"}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_a_mask_that_meets_a_limit_is_the_requests_fault(demo: Live, path: str, asked: dict[str, Any]) -> None:
    """Its answer may end nowhere yet, and must not look complete: llguidance lets end tokens come after an error."""
    regex = "[a-z ]*((a|e|i|o|u)[a-z ]{29}|(n|r|s|t|l)[a-z ]{32})[.]"
    body = {**asked, "structured_outputs": {"regex": regex}, "max_tokens": 60, "temperature": 0}
    refused = demo.http.post(path, json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "grammar_too_complex", None)
    with demo.http.stream("POST", path, json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "grammar_too_complex"
    wait_for(demo.idle)


@pytest.mark.parametrize("tries", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapter", [None, "red"])
def test_every_answer_is_valid(demo: Live, adapter: str | None, tries: int) -> None:
    with ThreadPoolExecutor(16) as clients:
        texts = list(clients.map(lambda seed: ask(demo, seed, adapter), range(tries)))
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > tries / 2, "they differ"
