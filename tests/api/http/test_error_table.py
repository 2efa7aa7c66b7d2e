"""Every row of the table of errors in ``docs/openai.md`` happens, and in OpenAI's shape."""

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import CONFIG, WEIGHTS
from server.api.http.errors import CODES, STATUS
from server.api.protocol.request_head import MAX_HEAD
from tests.api.generation.test_lifecycle import LONG, begin, unanswered
from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for
from tests.openai_page import ROOT, is_test, table

CHAT, COMPLETIONS, ADAPTERS = "/v1/chat/completions", "/v1/completions", "/v1/adapters"
JSON = {"content-type": "application/json"}
Row = tuple[int, str | None, str | None]
"""Status, code and param."""
Call = Callable[[Live], httpx.Response]


def rows() -> list[Row]:
    """Return the rows of the page's table of errors."""
    return [(int(status), _value(code), _value(param)) for status, code, param, _ in table("Errors")]


def _value(cell: str) -> str | None:
    return None if cell == "null" else cell.strip("`")


def post(path: str, **fields: Any) -> Call:
    return lambda live: live.http.post(path, json=fields)


def send(method: str, path: str, **options: Any) -> Call:
    return lambda live: live.http.request(method, path, **options)


def upload(files: Mapping[str, bytes], **fields: str) -> Call:
    parts = [("file", (name, data)) for name, data in files.items()]
    return lambda live: live.http.post(ADAPTERS, data={"name": "x", **fields}, files=parts)


def on_red(live: Live, change: Callable[[dict[str, Any]], None]) -> httpx.Response:
    """Upload ``red`` with another config."""
    config = json.loads((live.content("red") / CONFIG).read_bytes())
    change(config)
    weights = (live.content("red") / WEIGHTS).read_bytes()
    return upload({CONFIG: json.dumps(config).encode(), WEIGHTS: weights})(live)


def other_base(live: Live) -> httpx.Response:
    files = {name: (live.content("red") / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    return upload({**files, "manylora.json": b'{"base_fingerprint": "abc"}'})(live)


def aliased(live: Live, call: Call) -> httpx.Response:
    """Call while the alias ``prod`` targets ``red``."""
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "red"}]}).raise_for_status()
    try:
        return call(live)
    finally:
        live.http.delete("/v1/aliases/prod").raise_for_status()


def inactive(live: Live) -> httpx.Response:
    """Make an alias of an adapter without an active version."""
    live.http.post(ADAPTERS, json={"name": "idle", "path": "red", "activate": False}).raise_for_status()
    try:
        return live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "idle"}]})
    finally:
        live.http.delete(f"{ADAPTERS}/idle").raise_for_status()


CALLS: Mapping[Row, Call] = {
    (400, None, None): send("POST", COMPLETIONS, content=b"{", headers=JSON),
    (400, None, "temperature"): post(COMPLETIONS, prompt="x", temperature=3),
    (400, "unknown_parameter", "temprature"): post(COMPLETIONS, prompt="x", temprature=1),
    (400, "unsupported_parameter", "suffix"): post(COMPLETIONS, prompt="x", suffix="y"),
    (400, "context_length_exceeded", "messages"): post(
        CHAT, messages=[{"role": "user", "content": "x" * 300}], stream=True
    ),
    (400, "invalid_adapter_name", "name"): post(ADAPTERS, name="a b", source="hf://org/legal"),
    (400, "source_refused", "source"): post(ADAPTERS, name="x", source="hf://org/legal"),
    (404, "model_not_found", "model"): post(CHAT, messages=[{"role": "user", "content": "x"}], model="nobody"),
    (404, "adapter_not_found", "adapter"): post(COMPLETIONS, prompt="x", adapter="nobody"),
    (404, "run_not_found", "name"): send("GET", "/v1/training/runs/nothing"),
    (404, "key_not_found", "id"): send("DELETE", "/v1/keys/key_nothing"),
    (404, "unknown_url", None): send("GET", "/v1/files"),
    (403, "host_not_allowed", None): send("GET", "/v1/models", headers={"host": "evil.example.com"}),
    (403, "cross_site", None): send("POST", COMPLETIONS, json=request(), headers={"sec-fetch-site": "cross-site"}),
    (405, None, None): send("PUT", COMPLETIONS),
    (409, "name_taken", None): lambda live: aliased(live, send("POST", ADAPTERS, json={"name": "prod", "path": "red"})),
    (409, "aliased", None): lambda live: aliased(live, send("DELETE", f"{ADAPTERS}/red")),
    (409, "no_active_version", None): inactive,
    (409, "version_active", None): send("DELETE", f"{ADAPTERS}/red@1"),
    (412, "revision_mismatch", "If-Match"): send("DELETE", f"{ADAPTERS}/red", headers={"if-match": '"0"'}),
    (413, None, None): post(COMPLETIONS, prompt="x" * 300_000),
    (415, None, None): send("POST", ADAPTERS, content=b"x"),
    (422, "adapter_rejected", "file"): upload({CONFIG: b"{}"}),
    (422, "base_mismatch", "file"): other_base,
    (431, None, None): send("GET", "/livez", headers={"x": "y" * MAX_HEAD}),
    (422, "unknown_fields", "file"): lambda live: on_red(live, lambda config: config.update(colour=1)),
}
"""Row -> a call that gets it from the shared server."""
ELSEWHERE: Mapping[Row, str] = {
    (401, "invalid_api_key", None): "api/access/test_authentication.py::test_without_a_key",
    (403, "insufficient_permissions", None): "api/access/test_authentication.py::test_each_scope_allows_its_routes",
    (403, "insufficient_permissions", "name"): (
        "api/access/test_visibility.py::test_names_are_registered_only_where_the_key_sees_them"
    ),
    (
        400,
        "grammar_too_complex",
        None,
    ): "api/generation/test_structured.py::test_an_answer_whose_grammar_grows_too_much",
    (408, None, None): "api/registry/test_limits.py::test_stalled_upload_times_out",
    (409, "key_exists", None): "api/access/test_keys.py::test_a_name_is_taken_once",
    (409, "too_many_pins", None): "api/registry/test_adapters.py::test_more_pins_than_slots_are_refused",
    (422, "adapter_unavailable", "adapter"): (
        "api/registry/test_adapters.py::test_unservable_adapter_is_listed_and_refused"
    ),
    (429, "queue_full", None): "api/http/test_error_table.py::test_a_full_queue_and_a_drain",
    (429, "rate_limit_exceeded", None): "api/access/test_limits.py::test_requests_a_minute",
    (429, "insufficient_quota", None): "api/access/test_limits.py::test_the_budget_of_a_month",
    (429, "too_many_uploads", None): "api/registry/test_limits.py::test_concurrent_uploads_are_limited",
    (429, "too_many_fetches", None): "api/registry/test_on_request.py::test_too_many_fetches_at_once",
    (500, None, None): "api/generation/test_lifecycle.py::test_unexpected_error_is_a_500_with_an_error_object",
    (500, "poisoned_request", None): "api/operation/test_faults.py::test_a_poisoned_request_fails_alone",
    (503, "out_of_memory", None): "api/operation/test_faults.py::test_a_request_without_memory_is_503",
    (503, "too_many_connections", None): (
        "api/edge/test_too_many_connections.py::test_one_address_cannot_take_all_connections"
    ),
    (503, "too_many_bodies", None): "api/edge/test_slow_clients.py::test_incomplete_bodies_share_a_limited_memory",
    (503, "draining", None): "api/http/test_error_table.py::test_a_full_queue_and_a_drain",
    (503, "registry_unavailable", None): (
        "api/registry/test_shared_servers.py::test_postgres_stopped_and_started_under_traffic"
    ),
    (504, "deadline_exceeded", "timeout"): "api/operation/test_deadlines.py::test_a_request_ends_at_its_timeout",
    (507, "quota_exceeded", None): "api/registry/test_on_request.py::test_the_quota_holds",
    (507, "store_full", None): "api/registry/test_upload.py::test_a_full_disk",
}
"""Row -> the test that has a server in that state."""


def checked(response: httpx.Response, row: Row) -> httpx.Response:
    """Assert that the response is the row's."""
    status, code, param = row
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert (response.headers.get("x-should-retry") == "false") == (status in (409, 504, 507))
    body = response.json()
    assert set(body) == {"error"}
    assert {"message", "type", "param", "code"} <= set(body["error"])
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    assert (body["error"]["type"], body["error"]["code"], body["error"]["param"]) == (kind, code, param)
    return response


def test_the_table_is_complete() -> None:
    assert [test for test in ELSEWHERE.values() if not is_test(test)] == []
    listed = rows()
    assert len(set(listed)) == len(listed)
    assert set(listed) == CALLS.keys() | ELSEWHERE.keys()
    assert {status for status, _, _ in listed} == set(STATUS.values()) - {499} | {401, 403, 405, 408, 415, 431}


def test_every_code_in_the_source_is_in_the_table() -> None:
    listed = {code for _, code, _ in rows()} - {None}
    assert sent_codes() - listed == set()


def sent_codes() -> set[str]:
    """Return the codes that the source gives to errors: as arguments, as defaults of parameters, and in assignments."""
    files = [file for package in ("server", "adapters") for file in (ROOT / package).rglob("*.py")]
    nodes = [value for file in files for node in ast.walk(ast.parse(file.read_text())) for value in _codes_in(node)]
    texts = {node.value for value in nodes for node in ast.walk(value) if isinstance(node, ast.Constant)}
    return {text for text in texts if isinstance(text, str)} | set(CODES.values())


def _codes_in(node: ast.AST) -> list[ast.expr]:
    """Return the values that a node of a syntax tree gives to something called ``code``."""
    match node:
        case ast.keyword(arg="code", value=value):
            return [value]
        case ast.arguments(kwonlyargs=names, kw_defaults=values):
            return [value for name, value in zip(names, values, strict=True) if name.arg == "code" and value]
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
            pairs = zip(names, values, strict=True)
            return [value for name, value in pairs if isinstance(name, ast.Name) and name.id == "code"]
    return []


@pytest.mark.parametrize("row", CALLS, ids=str)
def test_the_error_of_a_row(live: Live, row: Row) -> None:
    checked(CALLS[row](live), row)


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Live]:
    """A server with one place in the batch, which is taken, and one in the queue."""
    service = tiny_service(tmp_path, enduring_model(), max_queue=1, max_batch_sequences=1, drain_seconds=60)
    with running(service) as live:
        yield live


def test_a_full_queue_and_a_drain(busy: Live) -> None:
    with ExitStack() as stack:
        begin(busy, stack)
        stack.enter_context(unanswered(busy, request(**LONG)))
        wait_for(lambda: busy.service.engine.stats().waiting == 1)
        for stream in (False, True):
            checked(busy.http.post(COMPLETIONS, json=request(stream=stream)), (429, "queue_full", None))
        busy.server.drain()
        wait_for(lambda: busy.service.event_router.draining)
        for stream in (False, True):
            checked(busy.http.post(COMPLETIONS, json=request(stream=stream)), (503, "draining", None))
