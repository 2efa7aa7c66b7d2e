"""Usage is what clients were told, whatever becomes of their requests, of the server and of its database."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from manylora import main
from server.access.usage import FLUSH_SECONDS
from tests.api.access.callers import Caller, caller
from tests.api.access.test_limits import BODIES, CHAT, COMPLETIONS, EMBEDDINGS, LONG
from tests.api.live import Live, events, request, running, tiny_service, wait_for
from tests.api.registry.test_kill import Zygote
from tests.postgres import Postgres, postgres
from tests.tiny import save_adapter, tiny_model

COUNTS = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


def counts(rows: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(row[name] for name in COUNTS) for row in rows]


def today() -> str:
    return str(datetime.now(UTC).date())


@pytest.mark.parametrize("adapter", ["", "red@1"])
def test_every_route_is_counted_as_its_client_was_told(guarded: Live, adapter: str) -> None:
    applied: Any = adapter or []
    with caller(guarded) as asking:
        expected = [0, 0, 0, 0]

        def told(prompt: int, output: int, cached: int) -> None:
            for index, value in enumerate((1, prompt, cached, output)):
                expected[index] += value

        for path, body in BODIES.items():
            usage = asking.http.post(path, json={**body, "adapter": applied}).json()["usage"]
            if path in (CHAT, COMPLETIONS):
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                told(usage["prompt_tokens"], usage["completion_tokens"], cached)
            elif path == "/v1/responses":
                told(usage["input_tokens"], usage["output_tokens"], usage["input_tokens_details"]["cached_tokens"])
            elif path == "/v1/messages":
                cached = usage["cache_read_input_tokens"]
                told(usage["input_tokens"] + cached, usage["output_tokens"], cached)
            else:
                told(usage["prompt_tokens"], 0, 0)
        for path in (CHAT, COMPLETIONS):
            options = {"stream": True, "stream_options": {"include_usage": True}, "adapter": applied}
            with asking.http.stream("POST", path, json={**BODIES[path], **options}) as response:
                usage = events(response)[-1]["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            told(usage["prompt_tokens"], usage["completion_tokens"], cached)
        (row,) = asking.used()
        assert row["prompt_tokens"] > 50
        assert row["output_tokens"] > 50
        # Embeddings do not say how much of their prompts was cached.
        assert [row[name] for name in COUNTS if name != "cached_tokens"] == [expected[index] for index in (0, 1, 3)]
        assert row["cached_tokens"] >= expected[2]
        key = asking.key.id
        assert row["id"] == f"{today()}/{key}/{adapter or '-'}"
        assert (row["day"], row["key"], row["adapter"], row["key_name"]) == (today(), key, adapter, asking.key.name)


def test_a_stop_string_and_a_mix(guarded: Live) -> None:
    with caller(guarded) as asking:
        body = request(max_tokens=40, adapter=[{"name": "red", "weight": 0.5}])
        text = asking.http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
        usage = asking.http.post(COMPLETIONS, json={**body, "stop": text[5:8]}).json()["usage"]
        (row,) = asking.used()
        assert row["adapter"] == "red@1"
        assert row["output_tokens"] == 40 + usage["completion_tokens"]


def test_what_a_client_that_has_left_has_used(guarded: Live) -> None:
    with caller(guarded) as asking:
        body = {"prompt": "Once", **LONG, "stream": True, "adapter": "red"}
        with asking.http.stream("POST", COMPLETIONS, json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(40):
                next(lines)
            seen = asking.used()[0]["output_tokens"]
            assert seen > 5, "counted while it runs"
            wait_for(lambda: asking.used()[0]["output_tokens"] > seen + 100)
        wait_for(guarded.idle)
        (row,) = asking.used()
        assert (row["requests"], row["prompt_tokens"]) == (1, 4)
        assert seen < row["output_tokens"] < 12_000
        time.sleep(0.1)
        assert asking.used() == [row]


def test_requests_that_never_ran_are_not_counted(guarded: Live) -> None:
    with caller(guarded) as asking:
        for body in ({"prompt": "x", "colour": 1}, {"prompt": "x", "model": "nobody"}, {"prompt": "x" * 20_000}):
            assert asking.http.post(COMPLETIONS, json=body).status_code in (400, 404)
        assert asking.used() == []


def test_a_request_that_fails_is_counted_as_far_as_it_came(guarded: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    run, steps = guarded.service.engine.runner.run, 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 20:
            raise RuntimeError("broken")
        return run(*arguments, **options)

    with caller(guarded) as asking:
        with monkeypatch.context() as fault:
            fault.setattr(guarded.service.engine.runner, "run", failing)
            assert asking.http.post(COMPLETIONS, json=request(max_tokens=500)).status_code == 500
        (row,) = asking.used()
        assert counts([row]) == [(1, 16, 0, row["output_tokens"])]
        assert 10 < row["output_tokens"] <= 20 * 9, "drafts may be accepted"


def test_who_sees_what(guarded: Live, admin: Caller) -> None:
    with caller(guarded) as one, caller(guarded) as two:
        for each in (one, two):
            each.http.post(EMBEDDINGS, json={"input": "x"}).raise_for_status()
            assert [row["key"] for row in each.used()] == [each.key.id]
        assert one.used(key=one.key.id) == one.used()
        assert one.used(key=two.key.id) == one.used(key="nobody") == []
        keys = {row["key"] for row in admin.used()}
        assert {one.key.id, two.key.id} <= keys
        assert admin.used(key=two.key.id) == two.used()
        assert admin.used(key=two.key.id)[0]["key_name"] == two.key.name
        guarded.service.keyring.store.revoke(two.key.id)
        assert admin.used(key=two.key.id)[0]["key_name"] == two.key.name, "its usage stays, and its name"


def test_sums_filters_and_pages(guarded: Live, admin: Caller) -> None:
    with caller(guarded) as one, caller(guarded) as two:
        for each, adapter in ((one, "red"), (one, None), (two, "red"), (two, "red@1")):
            each.http.post(EMBEDDINGS, json={"input": "abc", "adapter": adapter}).raise_for_status()
        ours = {one.key.id, two.key.id}

        def found(**params: Any) -> list[tuple[Any, ...]]:
            rows = [row for row in admin.used(**params) if row["key"] in (*ours, None)]
            return [(row["day"], row["key"], row["adapter"], row["requests"]) for row in rows]

        assert set(found(group_by="key")) == {(None, one.key.id, None, 2), (None, two.key.id, None, 2)}
        assert set(found(group_by=["adapter", "key"], adapter="red")) == {
            (None, one.key.id, "red@1", 1),
            (None, two.key.id, "red@1", 2),
        }
        assert found(adapter="", key=one.key.id) == [(today(), one.key.id, "", 1)]
        yesterday = str(datetime.now(UTC).date() - timedelta(days=1))
        assert found(start="2020-01-01", end=yesterday, key=one.key.id) == []
        assert found(start=today(), end=today(), key=two.key.id) == [(today(), two.key.id, "red@1", 2)]
        for by in (["day", "key", "adapter"], ["key"], ["adapter"], ["day", "key"]):
            pages: list[dict[str, Any]] = []
            page, params = {"has_more": True}, {"group_by": by, "limit": 1}
            while page["has_more"]:
                page = admin.http.get("/v1/usage", params=params).json()
                pages += page["data"]
                params["after"] = page["data"][-1]["id"]
                assert len(pages) < 100
            assert pages == admin.used(group_by=by)
        assert [model.id for model in admin.openai().models.list()][:1] == ["tiny"], "lists of the same form as these"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"start": "yesterday"}, "start"),
        ({"end": "2026-13-01"}, "end"),
        ({"group_by": "colour"}, "group_by"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"after": "2026-11-30"}, "after"),
        ({"after": "x/y/z"}, "after"),
    ],
)
def test_bad_questions(admin: Caller, params: dict[str, Any], param: str) -> None:
    response = admin.http.get("/v1/usage", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition(".")[0] == param


def test_the_command(guarded: Live, capsys: pytest.CaptureFixture[str]) -> None:
    with caller(guarded) as asking:
        where = ["--url", str(asking.http.base_url), "--api-key", asking.secret]
        assert main(["usage", *where]) == 0
        assert "nothing was used" in capsys.readouterr().err
        for adapter in ("red", None):
            asking.http.post(EMBEDDINGS, json={"input": "abc", "adapter": adapter}).raise_for_status()
        assert main(["usage", *where]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        key = asking.key
        assert lines[0] == [
            *("day", "key", "adapter", "name", "requests", "prompt tokens", "cached tokens", "output tokens"),
        ]
        assert lines[1:] == [
            [today(), key.id, adapter, key.name, "1", "3", "0", "0"] for adapter in ("(base)", "red@1")
        ]
        assert main(["usage", *where, "--by", "day", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["data"]
        assert (row["day"], row["key"], row["requests"]) == (today(), None, 2)
        assert main(["usage", *where, "--start", "soon"]) == 1
        assert "start" in capsys.readouterr().err
        assert main(["usage", "--url", str(asking.http.base_url), "--api-key", "wrong"]) == 1


# kill -9


@dataclass
class Told:
    """What one client was told, and when."""

    ended: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, prompt tokens, output tokens) of each complete answer."""
    tokens: list[float] = field(default_factory=list)
    """Times of the tokens of the stream that has not ended."""

    def until(self, moment: float) -> tuple[int, int, int]:
        """Return the requests and tokens that it was told of before ``moment``; of a running one the output only."""
        ended = [each for each in self.ended if each[0] < moment]
        live = [time for time in self.tokens if time < moment]
        return len(ended), sum(each[1] for each in ended), sum(each[2] for each in ended) + len(live)


def load(client: httpx.Client, told: Told, lengths: list[int]) -> None:
    """Stream answers one after the other until the server has gone."""
    turn = 0
    with httpx.Client(base_url=client.base_url, timeout=60) as own:
        while True:
            options = {"stream_options": {"include_usage": True}, "return_token_ids": True}
            body = request(max_tokens=lengths[turn % len(lengths)], stream=True, speculation=False, **options)
            turn += 1
            try:
                with own.stream("POST", COMPLETIONS, json=body) as response:
                    for line in response.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        chunk = json.loads(line.removeprefix("data: "))
                        if usage := chunk.get("usage"):
                            told.tokens.clear()
                            told.ended.append((time.monotonic(), usage["prompt_tokens"], usage["completion_tokens"]))
                        elif chunk["choices"]:
                            told.tokens += [time.monotonic()] * len(chunk["choices"][0].get("token_ids", ()))
            except httpx.TransportError:
                return


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


def test_kill_loses_at_most_the_last_second(zygote: Zygote, tmp_path: Path) -> None:
    clients = [Told() for _ in range(4)]
    lengths = [[3], [8], [20], [240]]
    with zygote.server(tmp_path) as client:
        threads = [
            threading.Thread(target=load, args=(client, told, each))
            for told, each in zip(clients, lengths, strict=True)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: sum(len(told.ended) for told in clients) > 20)
        time.sleep(1.5)
        killed = time.monotonic()
        os.kill(zygote.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
    least = [sum(values) for values in zip(*(told.until(killed - 1) for told in clients), strict=True)]
    most = [sum(values) for values in zip(*(told.until(killed + 60) for told in clients), strict=True)]
    assert least[0] > 15, "too little load to show anything"
    with zygote.server(tmp_path) as client:
        (row,) = client.get("/v1/usage").json()["data"]
    assert (row["key"], row["key_name"], row["adapter"]) == ("", "anonymous", "")
    # Running requests were told nothing of their prompts; what was on its way when the server died, of no token.
    running = len(clients)
    assert least[0] <= row["requests"] <= most[0] + running
    assert least[1] <= row["prompt_tokens"] <= most[1] + 16 * running
    assert least[2] <= row["output_tokens"] <= most[2] + 40 * running


def test_a_server_that_ends_loses_nothing(tmp_path: Path) -> None:
    told = Told()
    with running(tiny_service(tmp_path / "s")) as live:
        for _ in range(3):
            usage = live.complete()["usage"]
            told.ended.append((0.0, usage["prompt_tokens"], usage["completion_tokens"]))
    with running(tiny_service(tmp_path / "s")) as live:
        (row,) = live.http.get("/v1/usage").json()["data"]
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == told.until(1.0)


# Servers that share a database


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as server:
        yield server


def test_two_servers_add_up_also_after_an_outage(server: Postgres, tmp_path: Path) -> None:
    red = save_adapter(tiny_model(), tmp_path / "red", seed=1, r=2, target_modules=["q_proj"])
    shared = {"database_url": server.fresh(), "store_url": f"file://{tmp_path}/shared", "max_rank": 8}
    with ExitStack() as stack:
        pair = [stack.enter_context(running(tiny_service(tmp_path / name, **shared))) for name in ("one", "two")]
        pair[0].service.registry.register_folder("red", red)
        wait_for(lambda: pair[1].service.registry.knows("red"))
        with caller(pair[0], tokens_per_month=150) as asking, caller(pair[0], "admin") as admin:
            wait_for(lambda: pair[1].service.keyring.store.stored()[1:])
            secret = {"authorization": f"Bearer {asking.secret}"}
            body = request(adapter="red", max_tokens=4)
            for live in pair:
                assert live.http.post(COMPLETIONS, json=body, headers=secret).status_code == 200
            server.stop()
            try:
                time.sleep(3 * FLUSH_SECONDS)
                for live in pair:
                    assert live.http.post(COMPLETIONS, json=body, headers=secret).status_code == 200
                time.sleep(2 * FLUSH_SECONDS)
                assert admin.http.get("/v1/usage").status_code == 503
            finally:
                server.start()
            wait_for(lambda: counts(admin.used(key=asking.key.id)) == [(4, 64, 0, 16)])
            for total in (80, 100, 120, 140):  # 20 tokens each: the budget is for both
                for live in pair:
                    wait_for(lambda live=live, total=total: live.service.usage.spent(asking.key.id) == total)
                live = pair[total // 20 % 2]
                assert live.http.post(COMPLETIONS, json=body, headers=secret).status_code == 200
            for live in pair:
                wait_for(lambda live=live: live.service.usage.spent(asking.key.id) == 160)
                response = live.http.post(COMPLETIONS, json=body, headers=secret)
                assert response.json()["error"]["code"] == "insufficient_quota"
            assert counts(admin.used(key=asking.key.id)) == [(8, 128, 0, 32)]
