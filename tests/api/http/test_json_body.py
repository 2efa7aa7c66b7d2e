"""What JSON allows that no request may contain, and what is no JSON: 400 in OpenAI's shape, at every route."""

import json
import socket
import time
from typing import Any

import pytest

from server.api.http.json_body import MAX_DEPTH, MalformedBody, parse_json
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request

JSON = {"content-type": "application/json"}
BODIES: list[tuple[bytes, str, str | None]] = [
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12", None),
    ('{"prompt": "x"}'.encode("utf-16"), "not UTF-8", None),
    (b'{"prompt": "x",}', "not valid JSON", None),
    (b'{"prompt": "x"} {}', "not valid JSON: Extra data", None),
    (b"{'prompt': 'x'}", "not valid JSON", None),
    (b'{"prompt": "a\nb"}', "not valid JSON: Invalid control character", None),
    (b'{"prompt": "\\x"}', "not valid JSON", None),
    (b"[" * 100_000, "nested more than 100 levels", None),
    (b'{"a":' * 10_000, "nested more than 100 levels", None),
    (b'{"metadata": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 levels", None),
    (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits", None),
    (b'{"prompt": "x", "prompt": "x"}', "`prompt` twice", "prompt"),
    (b'{"prompt": "x", "metadata": {"a": 1, "b": {}, "a": 1}}', "`a` twice", "a"),
    (b'{"\\ud800": 1, "\\ud800": 1}', "twice", "\ud800"),
    (b'{"prompt": "x", "metadata": {"a": [0, NaN]}}', "finite", "metadata.a.1"),
    (b'{"prompt": "x", "metadata": -1e999}', "finite", "metadata"),
    (b"NaN", "finite", None),
]


@pytest.mark.parametrize(("body", "message", "param"), BODIES, ids=lambda value: repr(value)[:40])
def test_bodies_that_no_request_may_have(live: Live, body: bytes, message: str, param: str | None) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/adapters", "/v1/load_lora_adapter"):
        response = live.http.post(path, content=body, headers=JSON)
        assert message in refused(live, response, 400, param)["message"]


def test_every_route_with_a_body_parses_it_strictly(live: Live) -> None:
    document = live.http.get("/openapi.json").json()
    places = {"name": "red", "reference": "red", "response_id": "x", "id": "x"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if "application/json" in operation.get("requestBody", {}).get("content", {}):
                response = live.http.request(method, path.format(**places), content=b'{"a": 1, "a": 1}', headers=JSON)
                assert (response.status_code, response.json()["error"]["param"]) == (400, "a"), path


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, -0.0, None, True, "é", {"b": []}]},
        [[[]]] * 60,
        "[" * 500,
        {"a": {"x": "}" * 500}},
        10**4000,
        1.7976931348623157e308,
    ],
    ids=lambda value: repr(value)[:40],
)
def test_other_values_are_parsed_as_by_python(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text.encode()) == value
        assert parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a": ', "}")])
def test_the_deepest_value(begin: str, end: str, depth: int) -> None:
    body = (begin * depth + "1" + end * depth).encode()
    if depth > MAX_DEPTH:
        with pytest.raises(MalformedBody):
            parse_json(body)
    else:
        parse_json(body)


def test_hostile_bodies_take_no_time() -> None:
    many = ", ".join(f'"{number}": 1' for number in range(100_000))
    for body in (f'{{{many}, "99999": 1}}', "[" + ", ".join(["[0.5]"] * 100_000) + ", NaN]"):
        start = time.process_time()
        with pytest.raises(MalformedBody):
            parse_json(body.encode())
        assert time.process_time() - start < 2


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_compressed_bodies_are_named(live: Live, encoding: str) -> None:
    headers = {**JSON, "content-encoding": encoding}
    response = live.http.post("/v1/completions", content=b"\x1f\x8b", headers=headers)
    assert encoding in refused(live, response, 400, None)["message"]
    assert live.http.post("/v1/completions", json=request(), headers={"content-encoding": "identity"}).is_success


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application/jsonx",
        ";",
        "\xff",
        "x" * 5000,
    ],
)
def test_other_content_types(live: Live, kind: str) -> None:
    headers = {b"content-type": kind.encode("latin-1")}
    response = live.http.post("/v1/completions", content=json.dumps(request()), headers=headers)
    assert "Content-Type: application/json" in refused(live, response, 400, None)["message"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_content_types_of_json(live: Live, kind: str) -> None:
    body = json.dumps(request(max_tokens=1))
    assert live.http.post("/v1/completions", content=body, headers={"content-type": kind}).is_success


@pytest.mark.parametrize("number", ["1e400", "9" * 4000, "-" + "9" * 4000, "1e-400", "1.5", "-0", "1e2"])
def test_huge_numbers_in_every_number_field(live: Live, number: str) -> None:
    for field in ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "presence_penalty", "n"):
        body = f'{{"prompt": "x", "{field}": {number}}}'.encode()
        response = live.http.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            assert response.json()["error"]["param"] in (field, "prompt")
    for value in (f"[{number}]", f"[[{number}]]"):
        body = f'{{"prompt": {value}}}'.encode()
        assert live.http.post("/v1/completions", content=body, headers=JSON).status_code in (200, 400)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"nonsense\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",  # no Host
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data)[:40],
)
def test_what_is_not_http_gets_the_same_kind_of_error(live: Live, data: bytes) -> None:
    url = live.http.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=60) as client:
        client.sendall(data)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "http/1.1 400 bad request"
    assert {"connection: close", "content-type: application/json"} <= set(lines)
    assert any(line.startswith("x-request-id: ") for line in lines)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert live.complete(max_tokens=1)
