"""Requests with a timeout or a priority, over HTTP."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.api.live import Live, enduring_model, request, running, tiny_service, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
LONG = {"max_tokens": 15_000}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI, "max_tokens": 2}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 2}),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2}),
    ("/v1/messages", {"model": "tiny", "messages": HI, "max_tokens": 2}),
    ("/v1/embeddings", {"input": "hi"}),
    ("/v1/score", {"prompt": "a", "continuations": ["b"]}),
]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with one place in the batch."""
    service = tiny_service(tmp_path_factory.mktemp("narrow"), enduring_model(), max_batch_sequences=1)
    with running(service) as live:
        yield live


@pytest.fixture
def single(narrow: Live) -> Iterator[Live]:
    """The same; asserts that it is idle again after the test."""
    yield narrow
    wait_for(narrow.idle)


def too_late(response: httpx.Response) -> dict[str, Any]:
    """Assert that a request has failed for its timeout; return the error."""
    assert response.status_code == 504, response.text
    assert response.headers["x-should-retry"] == "false"
    error: dict[str, Any] = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("server_error", "timeout", "deadline_exceeded")
    return error


@pytest.mark.parametrize("how", ["field", "header", "both"])
def test_a_request_ends_at_its_timeout(single: Live, how: str) -> None:
    fields = {"timeout": 60.0 if how == "both" else 0.3} if how != "header" else {}
    headers = {"x-request-timeout": "0.3"} if how != "field" else {}
    started = time.monotonic()
    too_late(single.http.post(COMPLETIONS, json=request(**LONG, **fields), headers=headers))
    assert 0.3 <= time.monotonic() - started < 10
    assert single.complete(timeout=30)["choices"][0]["finish_reason"] == "length"


def test_a_stream_that_has_begun_ends_with_an_error(single: Live) -> None:
    with single.http.stream("POST", COMPLETIONS, json=request(**LONG, stream=True, timeout=0.5)) as response:
        assert response.status_code == 200
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert len(lines) > 2
    assert json.loads(lines[-1])["error"]["code"] == "deadline_exceeded"


def test_a_request_that_still_waits_at_its_timeout_costs_no_step(single: Live) -> None:
    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(single.http.post, COMPLETIONS, json=request(**LONG, timeout=2.0))
        wait_for(lambda: single.service.engine.stats().running == 1)
        computed = single.service.engine.stats().prompt_tokens
        too_late(single.http.post(COMPLETIONS, json=request(prompt="waits", timeout=0.2)))
        assert single.service.engine.stats().prompt_tokens == computed
        too_late(holder.result())


def test_anthropics_error_of_a_timeout(single: Live) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 15_000, "timeout": 0.2, "ignore_eos": True}
    response = single.http.post("/v1/messages", json=body)
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", "", "86401"])
def test_a_header_that_is_no_timeout_is_refused(single: Live, given: str) -> None:
    response = single.http.post(COMPLETIONS, json=request(), headers={"x-request-timeout": given})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-timeout"


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", 0), ("timeout", 86_401), ("timeout", "5"), ("priority", 101), ("priority", 0.5)]
)
def test_a_field_out_of_its_range_is_refused(single: Live, field: str, value: object) -> None:
    response = single.http.post(COMPLETIONS, json=request(**{field: value}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
def test_every_route_has_both_fields(single: Live, path: str, body: dict[str, Any]) -> None:
    served = single.http.post(path, json={**body, "priority": -5, "timeout": 60})
    assert served.status_code == 200, served.text
    late = single.http.post(path, json={**body, "timeout": 1e-6})
    assert late.status_code == 504, late.text


def test_a_lower_priority_is_earlier(single: Live) -> None:
    """The second of three requests that wait for the only place is served first, because it says so."""
    ended: list[int] = []

    def ask(priority: int) -> None:
        single.complete(prompt=f"priority {priority}", max_tokens=40, priority=priority)
        ended.append(priority)

    with ThreadPoolExecutor(4) as pool:
        holder = pool.submit(single.http.post, COMPLETIONS, json=request(**LONG, timeout=1.0))
        wait_for(lambda: single.service.engine.stats().running == 1)
        asked: list[Future[None]] = []
        for count, priority in enumerate((0, -10, 10), start=1):
            asked.append(pool.submit(ask, priority))
            wait_for(lambda count=count: single.service.engine.stats().waiting == count)
        for each in asked:
            each.result()
        too_late(holder.result())
    assert ended == [-10, 0, 10]
