"""Structured output over HTTP: every field, contradictions, and hostile grammars; with the tiny model."""

import json
from typing import Any

import jsonschema
import pytest

from tests.api.live import Live, request

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
OPENAI = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
GIVEN: list[tuple[dict[str, Any], str]] = [
    ({"response_format": OPENAI}, "schema"),
    ({"response_format": {"type": "json_object"}}, "object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "description": None}}}, "object"),
    ({"structured_outputs": {"json": SCHEMA}}, "schema"),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None, "json_object": False}}, "schema"),
    ({"structured_outputs": {"json_object": True}}, "object"),
    ({"structured_outputs": {"regex": "(ja|nein){2}"}}, "choice"),
    ({"structured_outputs": {"choice": ["jaja", "neinja"]}}, "choice"),
    ({"structured_outputs": {"grammar": 'start: W W\nW: "ja" | "nein"'}}, "choice"),
    ({"guided_json": SCHEMA}, "schema"),
    ({"guided_json": json.dumps(SCHEMA)}, "schema"),
    ({"guided_regex": "(ja|nein){2}"}, "choice"),
    ({"guided_choice": ["jaja", "neinja"]}, "choice"),
    ({"guided_grammar": 'root ::= w w\nw ::= "ja" | "nein"'}, "choice"),
]
BODIES = {
    "/v1/completions": {"prompt": "Answer: "},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Answer!"}]},
}


def check(text: str, form: str) -> None:
    if form == "choice":
        assert text in {"jaja", "janein", "neinja", "neinnein"}
    else:
        jsonschema.validate(json.loads(text), SCHEMA if form == "schema" else {"type": "object"})


def text_of(choice: dict[str, Any]) -> str:
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "form"), GIVEN)
def test_each_field_prescribes_the_answer(live: Live, path: str, fields: dict[str, Any], form: str) -> None:
    limit = 60 if form == "object" else 150
    for seed, adapter in enumerate(("", "green")):
        body = {
            **BODIES[path],
            **fields,
            "max_tokens": limit,
            "seed": seed,
            **({"adapter": adapter} if adapter else {}),
        }
        response = live.http.post(path, json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            check(text_of(choice), form)
        else:
            assert form == "object", "any object: a random model need not come to an end"
            assert text_of(choice).startswith("{")


def test_a_stream_joins_to_the_answer(live: Live) -> None:
    body = {"messages": BODIES["/v1/chat/completions"]["messages"], "response_format": OPENAI, "temperature": 0}
    chunks = live.stream("/v1/chat/completions", **body, max_tokens=150)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    check(text, "schema")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert text == text_of(live.http.post("/v1/chat/completions", json=body).json()["choices"][0])


def test_an_answer_that_is_cut_ends_by_length(live: Live) -> None:
    answer = live.complete(structured_outputs={"regex": "[a-z]{50}"}, max_tokens=20, ignore_eos=False)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["text"]) == 20
    assert (
        live.complete(structured_outputs={"regex": "[a-z]{20}"}, max_tokens=21, ignore_eos=False)["choices"][0][
            "finish_reason"
        ]
        == "stop"
    )


def test_each_of_several_answers_has_the_form(live: Live) -> None:
    body = request(prompt=["One", "Two"], n=3, temperature=1, ignore_eos=False, max_tokens=150)
    answer = live.http.post("/v1/completions", json={**body, "response_format": OPENAI, "logprobs": 1}).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 6
    for text in texts:
        check(text, "schema")


def test_an_answer_whose_grammar_grows_too_much(live: Live) -> None:
    """What follows an inner brace may be any name of five objects: a limit that only the answer itself meets."""
    several = [{"type": "object", "properties": {f"{i}{j}": {} for j in range(390)}} for i in "abcde"]
    body = request(
        structured_outputs={"json": {"type": "array", "items": {"anyOf": several}, "minItems": 1}},
        max_tokens=60,
        ignore_eos=False,
    )
    refused = live.http.post("/v1/completions", json=body)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "grammar_too_complex", None)
    assert "too complex to be followed further" in error["message"]
    with live.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert "grammar_too_complex" in lines[-1]
    schema = body["structured_outputs"]["json"]
    asked = {"input": "x", "stream": True, "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    with live.http.stream("POST", "/v1/responses", json=asked) as stream:
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "invalid_prompt"


@pytest.mark.parametrize(
    "fields",
    [{"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": {"regex": None}},
     {"structured_outputs": {}}, {"guided_json": None, "guided_choice": None}],
)  # fmt: skip
def test_nothing_is_prescribed_by_these(live: Live, fields: dict[str, Any]) -> None:
    assert live.text(**fields) == live.text()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object", "more": 1}}, "response_format.more"),
    ({"response_format": "json_object"}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice.1"),
    ({"structured_outputs": {"choice": ["a"] * 5001}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"regex": "a"}, "response_format": OPENAI}, "structured_outputs.regex"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_grammar": "start: foo"}, "guided_grammar"),
    ({"guided_json": {"type": "integer", "multipleOf": 99999989}}, "guided_json"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"guided_regex": "a", "min_tokens": 3}, "min_tokens"),
]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("fields", "param"), BAD)
def test_bad_input_is_named(live: Live, path: str, fields: dict[str, Any], param: str) -> None:
    response = live.http.post(path, json={**BODIES[path], **fields, "max_tokens": 5})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


def test_plain_requests_beside_it_are_not_changed(live: Live) -> None:
    assert live.complete()["choices"] == live.complete(**request())["choices"]
