"""Limits of keys, over HTTP and with the clients of OpenAI and Anthropic."""

import re
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import anthropic
import httpx
import openai
import pytest

from adapters.errors import RegistryUnavailable
from server.api.access.metering import GENERATING
from server.errors import EngineError
from tests.api.access.callers import Caller, caller
from tests.api.live import Live, request, wait_for
from tests.api.telemetry.samples import value

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "Why?"}]
LONG = {"max_tokens": 12_000, "temperature": 0, "ignore_eos": True}
BODIES: Mapping[str, Mapping[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 4, "n": 2},
    COMPLETIONS: {"prompt": ["Once", "upon a time"], "max_tokens": 4, "n": 2},
    "/v1/responses": {"input": "Why?", "max_output_tokens": 16},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    EMBEDDINGS: {"input": ["Once", "upon a time"]},
    "/v1/score": {"prompt": "Once", "continuations": ["upon", "a time"]},
}
"""Path -> the body of a small request with several prompts or answers, where it can have them."""


def assert_nothing_is_held(live: Live, caller: Caller) -> None:
    """Wait until no request of a caller runs or has tokens reserved."""
    ledger = live.service.usage

    def free() -> bool:
        state = ledger.limiter._states.get(caller.key.id)
        return state is None or (state.running, state.reserved) == (0, 0)

    wait_for(free)
    wait_for(live.idle)
    assert not [meter for meter in ledger._running if meter.key.id == caller.key.id]
    assert ledger._live.get(caller.key.id) is None


def refusal(response: httpx.Response, code: str = "rate_limit_exceeded") -> str:
    """Assert that a response is a 429 in OpenAI's shape; return its message."""
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    kind = "insufficient_quota" if code == "insufficient_quota" else "rate_limit_error"
    assert (error["type"], error["code"], error["param"]) == (kind, code, None)
    message: str = error["message"]
    return message


def test_every_generating_path_is_tried_here() -> None:
    assert BODIES.keys() == GENERATING


def test_openai_reads_the_headers(guarded: Live) -> None:
    with caller(guarded, requests_per_minute=6, tokens_per_minute=2000) as limited, limited.openai() as client:
        raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=5)  # type: ignore[call-overload]
        usage = raw.parse().usage
        assert raw.headers["x-ratelimit-limit-requests"] == "6"
        assert raw.headers["x-ratelimit-remaining-requests"] == "5"
        assert raw.headers["x-ratelimit-limit-tokens"] == "2000"
        left = 2000 - usage.total_tokens
        assert left <= int(raw.headers["x-ratelimit-remaining-tokens"]) <= left + 40, "settled before it is sent"
        assert re.fullmatch(r"\d(\.\d+)?s|10s", raw.headers["x-ratelimit-reset-requests"])
        assert re.fullmatch(r"\d+ms|\d+(\.\d+)?s", raw.headers["x-ratelimit-reset-tokens"])
        stream = client.completions.with_raw_response.create(
            model="tiny", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        assert int(stream.headers["x-ratelimit-remaining-tokens"]) < 500, "reserved while it runs"
        assert stream.headers["x-ratelimit-remaining-requests"] == "4"
        answer = stream.parse()
        next(iter(answer))
        answer.close()
    assert_nothing_is_held(guarded, limited)


def test_every_answer_to_a_limited_key_has_the_headers(guarded: Live) -> None:
    with caller(guarded, requests_per_minute=600, tokens_per_minute=10**6) as limited:
        kinds = ("limit", "remaining", "reset")
        names = [f"x-ratelimit-{kind}-{of}" for kind in kinds for of in ("requests", "tokens")]
        for path, body in BODIES.items():
            for each in (body, {**body, "colour": 1}, {**body, "model": "nobody"}):
                response = limited.http.post(path, json=each)
                assert response.status_code in (200, 400, 404)
                assert all(name in response.headers for name in names), (path, response.text)
        for path in ("/v1/models", "/v1/nothing"):
            assert all(name in limited.http.get(path).headers for name in names)
    with caller(guarded) as free:
        assert not [name for name in free.http.post(CHAT, json=BODIES[CHAT]).headers if "ratelimit" in name]


def test_requests_a_minute(guarded: Live) -> None:
    with caller(guarded, requests_per_minute=2) as limited:
        for _ in range(2):
            assert limited.http.post(CHAT, json=BODIES[CHAT]).status_code == 200
        response = limited.http.post(CHAT, json=BODIES[CHAT])
        assert "limit 2, used 2, requested 1" in refusal(response)
        assert response.headers["retry-after"] == "30"
        assert "x-should-retry" not in response.headers
        assert response.headers["x-ratelimit-remaining-requests"] == "0"
        assert limited.http.get("/v1/models").status_code == 200
        assert limited.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
        with limited.openai() as client, pytest.raises(openai.RateLimitError) as caught:
            client.embeddings.create(model="tiny", input="x")
        assert caught.value.code == "rate_limit_exceeded"
        with (
            anthropic.Anthropic(base_url=str(limited.http.base_url), api_key=limited.secret, max_retries=0) as claude,
            pytest.raises(anthropic.RateLimitError) as refused,
        ):
            claude.messages.create(model="tiny", max_tokens=3, messages=[{"role": "user", "content": "Why?"}])
        body: Any = refused.value.body
        assert body["error"]["type"] == "rate_limit_error"
        with caller(guarded, requests_per_minute=2) as other:
            assert other.http.post(CHAT, json=BODIES[CHAT]).status_code == 200


def test_openai_retries_when_it_is_told_to(guarded: Live) -> None:
    with caller(guarded, requests_per_minute=40) as limited, limited.openai(max_retries=1) as client:
        for _ in range(40):
            assert limited.http.post(EMBEDDINGS, json={"input": "x"}).status_code == 200
        while limited.http.get("/v1/models").headers["x-ratelimit-remaining-requests"] != "0":
            limited.http.post(EMBEDDINGS, json={"input": "x"})  # those that came back meanwhile
        raw = client.embeddings.with_raw_response.create(model="tiny", input="x")
        assert raw.retries_taken == 1


def test_tokens_a_minute(guarded: Live) -> None:
    with caller(guarded, tokens_per_minute=600) as limited:
        assert limited.http.post(EMBEDDINGS, json={"input": "x" * 600}).status_code == 200
        response = limited.http.post(COMPLETIONS, json={"prompt": "x" * 100, "max_tokens": 500})
        assert "tokens per min (TPM): limit 600" in refusal(response)
        assert 30 <= int(response.headers["retry-after"]) <= 60
        response = limited.http.post(EMBEDDINGS, json={"input": "x" * 601})
        assert "Request too large" in refusal(response)
        assert "retry-after" not in response.headers
        assert response.headers["x-should-retry"] == "false"
    assert_nothing_is_held(guarded, limited)


def test_refusals_are_counted_by_their_limit(guarded: Live, admin: Caller) -> None:
    def refused() -> dict[str, float]:
        names = ("requests_per_minute", "tokens_per_minute", "parallel_requests", "tokens_per_month")
        return {name: value(admin.http, "manylora_key_limit_refusals_total", limit=name) for name in names}

    before = refused()
    body = {"prompt": "x" * 30, "max_tokens": 4}
    codes = {"tokens_per_month": "insufficient_quota"}
    for limit, most in (("requests_per_minute", 1), ("tokens_per_minute", 40), ("tokens_per_month", 5)):
        with caller(guarded, **{limit: most}) as limited:
            assert limited.http.post(COMPLETIONS, json=body).status_code == 200
            refusal(limited.http.post(COMPLETIONS, json=body), codes.get(limit, "rate_limit_exceeded"))
    assert {name: number - before[name] for name, number in refused().items()} == {
        "requests_per_minute": 1,
        "tokens_per_minute": 1,
        "parallel_requests": 0,
        "tokens_per_month": 1,
    }


def test_a_refused_request_uses_nothing(guarded: Live) -> None:
    with caller(guarded, tokens_per_minute=100, requests_per_minute=10) as limited:
        assert limited.http.post(EMBEDDINGS, json={"input": "x" * 90}).status_code == 200
        for _ in range(20):
            refusal(limited.http.post(EMBEDDINGS, json={"input": "x" * 90}))
        assert limited.http.get("/v1/models").headers["x-ratelimit-remaining-requests"] == "9"
    assert_nothing_is_held(guarded, limited)


def test_the_budget_of_a_month(guarded: Live) -> None:
    with caller(guarded, tokens_per_month=100) as limited:
        body = request(prompt="x" * 40, max_tokens=30)
        for _ in range(2):  # the second goes beyond: some tokens were left
            assert limited.http.post(COMPLETIONS, json=body).status_code == 200
        response = limited.http.post(COMPLETIONS, json=body)
        assert refusal(response, "insufficient_quota").endswith("140 of 100.")
        assert response.headers["x-should-retry"] == "false"
        assert 1 <= int(response.headers["retry-after"]) <= 31 * 86_400
        began = time.monotonic()
        with limited.openai(max_retries=5) as client, pytest.raises(openai.RateLimitError) as caught:
            client.embeddings.create(model="tiny", input="x")
        assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
        assert time.monotonic() - began < 5, "it was tried again"
        assert [row["requests"] for row in limited.used()] == [2]


def streaming(limited: Caller, **fields: Any) -> Any:
    return limited.http.stream("POST", COMPLETIONS, json={"prompt": "Once", **LONG, "stream": True, **fields})


def test_requests_at_once(guarded: Live) -> None:
    with caller(guarded, parallel_requests=2) as limited:
        with streaming(limited) as one, streaming(limited, n=3) as two:
            for stream in (one, two):
                assert stream.status_code == 200
            response = limited.http.post(CHAT, json=BODIES[CHAT])
            assert "parallel requests: limit 2, running 2" in refusal(response)
            assert response.headers["retry-after"] == "1"
        assert_nothing_is_held(guarded, limited)
        assert limited.http.post(CHAT, json=BODIES[CHAT]).status_code == 200


@pytest.fixture(scope="module")
def all_limits(guarded: Live) -> Iterator[Caller]:
    limits = {"requests_per_minute": 1000, "tokens_per_minute": 10**6, "parallel_requests": 3}
    with caller(guarded, **limits, tokens_per_month=10**9) as limited:
        yield limited


@pytest.mark.parametrize("path", sorted(BODIES))
def test_nothing_leaks_however_a_request_ends(
    guarded: Live, all_limits: Caller, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = dict(BODIES[path])
    for _ in range(5):  # more than may run at once
        for status, changed in ((200, body), (400, {**body, "colour": 1}), (404, {**body, "adapter": "nobody"})):
            assert all_limits.http.post(path, json=changed).status_code == status
        assert all_limits.http.post(path, content=b"{").status_code == 400
    with monkeypatch.context() as fault:
        fault.setattr(guarded.service.engine, "submit", failing)
        for _ in range(4):
            assert all_limits.http.post(path, json=body).status_code == 500
    with monkeypatch.context() as fault:
        fault.setattr(guarded.service.engine.runner, "run", failing)
        assert all_limits.http.post(path, json=body).status_code == 500
    for _ in range(4):
        leave(all_limits, path, body)
    assert_nothing_is_held(guarded, all_limits)
    assert int(all_limits.http.get("/v1/models").headers["x-ratelimit-remaining-tokens"]) > 10**6 - 3000


def failing(*_: object) -> None:
    raise EngineError("broken")


def leave(limited: Caller, path: str, body: Mapping[str, Any]) -> None:
    """Send a request and close the connection without reading the answer."""
    content = httpx.Request("POST", "http://x", json=body).content
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {limited.secret}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    url = limited.http.base_url
    with socket.create_connection((url.host, url.port or 0)) as client:
        client.sendall(head.encode() + content)
        time.sleep(0.01)


def test_a_client_that_leaves_gives_back_what_it_has_not_used(guarded: Live) -> None:
    with caller(guarded, tokens_per_minute=20_000, parallel_requests=1) as limited:
        with streaming(limited) as stream:
            lines = stream.iter_lines()
            for _ in range(20):
                next(lines)
            assert int(limited.http.get("/v1/models").headers["x-ratelimit-remaining-tokens"]) < 9000
        assert_nothing_is_held(guarded, limited)
        used = limited.used()[0]
        assert 10 <= used["output_tokens"] < 6000
        left = int(limited.http.get("/v1/models").headers["x-ratelimit-remaining-tokens"])
        assert left >= 20_000 - used["output_tokens"] - used["prompt_tokens"]


def test_a_lost_database_stops_only_keys_whose_budget_is_not_known(
    guarded: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise RegistryUnavailable("the registry's database cannot be reached; try again later")

    with caller(guarded, tokens_per_month=10**6) as known, caller(guarded, tokens_per_month=10**6) as unknown:
        assert known.http.post(CHAT, json=BODIES[CHAT]).status_code == 200
        with monkeypatch.context() as fault:
            fault.setattr(guarded.service.usage.table, "month_tokens", gone)
            fault.setattr(guarded.service.usage.table, "write", gone)
            assert known.http.post(CHAT, json=BODIES[CHAT]).status_code == 200
            response = unknown.http.post(CHAT, json=BODIES[CHAT])
            assert (response.status_code, response.json()["error"]["code"]) == (503, "registry_unavailable")
            assert unknown.http.get("/v1/usage").status_code == 503
        assert unknown.http.post(CHAT, json=BODIES[CHAT]).status_code == 200
        assert [row["requests"] for row in known.used()] == [2]
