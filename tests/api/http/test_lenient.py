"""Unknown fields: refused with the most similar known one, or with ``--lenient`` ignored and named."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from server.api.http.ignored_fields import MAX_NAMED, header_value
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request, running, tiny_service

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
HEADER = "x-manylora-ignored"


@pytest.fixture(scope="module")
def lenient(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    adapter = {"red": folders["red"]}
    settings: dict[str, Any] = {"adapter": adapter, "adapter_root": folders["red"].parent, "lenient": True}
    with running(tiny_service(tmp_path_factory.mktemp("lenient"), **settings, cors_origin=("*",))) as live:
        yield live


@pytest.mark.parametrize(
    ("path", "fields", "param", "nearest"),
    [
        (COMPLETIONS, request(temprature=1), "temprature", "temperature"),
        (COMPLETIONS, request(max_token=1), "max_token", "max_tokens"),
        (COMPLETIONS, request(Stop="x"), "Stop", "stop"),
        (COMPLETIONS, request(adapters="red"), "adapters", "adapter"),
        (
            COMPLETIONS,
            request(stream_options={"include_usages": True}),
            *("stream_options." + x for x in ("include_usages", "include_usage")),
        ),
        (COMPLETIONS, request(adapter=[{"name": "red", "wieght": 1}]), "adapter.0.wieght", "adapter.0.weight"),
        (CHAT, {"messages": [{"role": "user", "contents": "x"}]}, "messages.0.contents", "messages.0.content"),
        (
            COMPLETIONS,
            request(response_format={"type": "json_schema", "json_schema": {"shcema": {}}}),
            *("response_format.json_schema." + field for field in ("shcema", "schema")),
        ),
        (
            COMPLETIONS,
            request(structured_outputs={"regexp": "x"}),
            *("structured_outputs." + field for field in ("regexp", "regex")),
        ),
        ("/tokenize", {"promt": "x"}, "promt", "prompt"),
        ("/v1/adapters", {"name": "x", "source": "y", "pined": True}, "pined", "pinned"),
        ("/v1/load_lora_adapter", {"lora_nam": "x"}, "lora_nam", "lora_name"),
    ],
    ids=str,
)
def test_an_unknown_field_is_refused_with_the_nearest(
    live: Live, path: str, fields: Any, param: str, nearest: str
) -> None:
    error = refused(live, live.http.post(path, json=fields), 400, param)
    assert error["message"] == f"Unknown field `{param}`; did you mean `{nearest}`?"
    assert error["code"] == "unknown_parameter"


def test_an_unknown_field_that_resembles_nothing(live: Live) -> None:
    error = refused(live, live.http.post(COMPLETIONS, json=request(zzz=1)), 400, "zzz")
    assert error["message"] == "Unknown field `zzz`."


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_values_of_unknown_fields_are_accepted(live: Live, empty: Any) -> None:
    assert HEADER not in live.http.post(COMPLETIONS, json=request(zzz=empty)).raise_for_status().headers


@pytest.mark.parametrize("stream", [False, True])
def test_lenient_ignores_unknown_fields_and_names_them(lenient: Live, stream: bool) -> None:
    plain = lenient.http.post(COMPLETIONS, json=request(adapter="red"))
    assert HEADER not in plain.headers
    adapter = [{"name": "red", "colour": 1}]
    options = {"include_usage": False, "more": 2}
    extra = {"foo": 1, "bar": [2], "temprature": 9, "adapter": adapter, "stream_options": options, "stream": stream}
    response = lenient.http.post(COMPLETIONS, json=request(**extra))
    assert response.status_code == 200, response.text
    assert set(response.headers[HEADER].split(", ")) == {"foo", "bar", "temprature", "colour", "more"}
    if not stream:
        assert response.json()["choices"] == plain.json()["choices"]
    message = {"messages": [{**HI[0], "mood": "good"}], "max_tokens": 1}
    assert lenient.http.post(CHAT, json=message).headers[HEADER] == "mood"
    assert lenient.http.post("/tokenize", json={"prompt": "x", "foo": 1}).headers[HEADER] == "foo"


def test_lenient_refuses_the_rest(lenient: Live) -> None:
    for fields, param in (({"suffix": "x"}, "suffix"), ({"temperature": 3, "foo": 1}, "temperature")):
        response = lenient.http.post(COMPLETIONS, json=request(**fields))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert response.headers[HEADER] == "foo", "errors name them, too"


def test_lenient_does_not_apply_to_changes_of_the_registry(lenient: Live) -> None:
    for method, path, fields in (
        ("POST", "/v1/adapters", {"name": "x", "path": "red", "foo": 1}),
        ("POST", "/v1/adapters/red/pin", {"pinned": True, "foo": 1}),
        ("PUT", "/v1/aliases/x", {"targets": [{"adapter": "red", "foo": 1}]}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "red", "foo": 1}),
    ):
        response = lenient.http.request(method, path, json=fields)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].endswith("foo")
    assert [entry.name for entry in lenient.service.registry.entries()] == ["red"]


def test_the_header_is_short_and_plain() -> None:
    assert header_value(["a", "b", "a"]) == "a, b"
    assert header_value(["a b", "é", "x\r\nset-cookie: y", ","]) == "a%20b, %C3%A9, x%0D%0Aset-cookie%3A%20y, %2C"
    many = header_value(f"{number}{'x' * 1000}" for number in range(1000))
    assert many.endswith(", ...")
    assert len(many) < MAX_NAMED * 90


def test_many_unknown_fields(lenient: Live) -> None:
    response = lenient.http.post(COMPLETIONS, json=request(**{f"x{number}": 1 for number in range(10_000)}))
    assert response.status_code == 200
    assert response.headers[HEADER].startswith("x0, x1, ")
