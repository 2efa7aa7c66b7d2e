"""Two and three replicas behind Ray Serve, over HTTP."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.ray.cluster import Cluster, World, cluster, wait_for
from tests.ray.conftest import NAMES


def zipf(count: int, seed: int) -> list[str]:
    """Names of adapters, the n-th 1/n times as often as the first."""
    return random.Random(seed).choices(NAMES, weights=[1 / (rank + 1) for rank in range(len(NAMES))], k=count)


def loads_of(cluster: Cluster, names: list[str]) -> Counter[str]:
    """Ask for each name, eight at a time; return how many adapters each replica has loaded for that."""
    before = cluster.samples("manylora_adapter_loads_total")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: cluster.complete(model=name), names))
    assert {answer.status_code for answer in answers} == {200}
    after = cluster.samples("manylora_adapter_loads_total")
    return Counter({replica: int(after[replica] - before[replica]) for replica in after})


def test_an_adapter_is_loaded_by_one_of_two_replicas(two: Cluster) -> None:
    names = zipf(200, seed=7)
    loads = loads_of(two, names)
    assert len(loads) == 2
    assert min(loads.values()) > 0, "both serve"
    assert loads.total() <= 1.1 * len(set(names)), loads


def test_an_adapter_is_loaded_by_one_of_three_replicas_and_a_dead_one_gives_its_adapters_up(world: World) -> None:
    names = zipf(200, seed=8)
    with cluster(world, 3) as three:
        loads = loads_of(three, names)
        assert len(loads) == 3
        assert min(loads.values()) > 0
        assert loads.total() <= 1.1 * len(set(names)), loads
        time.sleep(2)  # residency is reported each second
        os.kill(three.engines()[0].pid, signal.SIGKILL)
        wait_for(lambda: len(three.samples("manylora_requests_running")) == 2)
        again = loads_of(three, sorted(set(names)))
        kept = set(loads) & set(again)
        lost = loads.total() - sum(loads[replica] for replica in kept)
        assert again.total() <= 1.1 * lost + 1, "only its adapters are loaded again"


def test_an_answer_has_the_bits_that_a_lone_server_gives(two: Cluster) -> None:
    alone = two.complete(model="a03").json()["choices"][0]["text"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: two.complete(model="a03"), range(32)))  # more than spill over at
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {alone}
    with two.http.stream(
        "POST",
        "/v1/completions",
        json={
            "model": "a03",
            "prompt": "Once upon",
            "max_tokens": 16,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        },
    ) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == alone


def test_an_acknowledged_change_is_known_to_every_replica(two: Cluster, world: World) -> None:
    for number in range(3):
        assert two.push(f"new-{number}", world.adapter(f"new-{number}", 100 + number)).status_code == 201
        with ThreadPoolExecutor(16) as pool:  # more than one replica takes before others get some
            answers = list(pool.map(lambda _, name=f"new-{number}": two.complete(model=name), range(24)))
        assert Counter(answer.status_code for answer in answers) == {200: 24}
        assert two.http.delete(f"/v1/adapters/new-{number}").status_code in (200, 204)
        assert {two.complete(model=f"new-{number}").status_code for _ in range(6)} == {404}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_the_engine(two: Cluster, stream: bool) -> None:
    before = two.samples("manylora_output_tokens_total").total()
    fields = {"model": "a01", "prompt": "hi", "n": 16, "max_tokens": 240, "ignore_eos": True, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{two.url}/v1/completions", json=fields, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{two.url}/v1/completions", json=fields, timeout=httpx.Timeout(60, read=0.3))
    wait_for(lambda: not two.samples("manylora_requests_running").total())
    assert 0 <= two.samples("manylora_output_tokens_total").total() - before < 16 * 240
    assert two.samples("manylora_requests_total").total() > 0


def test_metrics_name_the_replica(two: Cluster) -> None:
    assert len(two.samples("manylora_adapter_loads_total")) == 2
    page = two.http.get("/metrics").text
    assert page.count("# TYPE manylora_adapter_loads_total") == 1


def test_a_killed_replica_loses_its_running_requests_and_nothing_that_was_acknowledged(
    two: Cluster, world: World
) -> None:
    stop, acknowledged, codes = threading.Event(), list[str](), Counter[object]()

    def ask(caller: int) -> None:
        with httpx.Client(base_url=two.url, timeout=120) as http:
            draw = random.Random(caller)
            while not stop.is_set():
                body = {"model": draw.choice(NAMES), "prompt": "hello", "max_tokens": 16, "ignore_eos": True}
                try:
                    codes[http.post("/v1/completions", json=body).status_code] += 1
                except httpx.TransportError as error:
                    codes[type(error)] += 1

    folder = world.adapter("pushed", 500)

    def push() -> None:
        for number in range(1000):
            if stop.is_set():
                return
            answer = two.push(f"pushed-{number}", folder)
            assert answer.status_code in (201, 503), answer.text
            if answer.status_code == 201:
                acknowledged.append(f"pushed-{number}")

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    callers.append(threading.Thread(target=push))
    for caller in callers:
        caller.start()
    time.sleep(4)
    os.kill(two.engines()[0].pid, signal.SIGKILL)
    time.sleep(6)
    stop.set()
    for caller in callers:
        caller.join()
    assert codes.keys() <= {200, 503}, codes
    assert codes[200] > 50
    assert codes[503] <= 6, "what the six callers had running"
    known = {entry["id"] for entry in two.http.get("/v1/models", params={"limit": 1000}).json()["data"]}
    assert len(acknowledged) > 3
    assert set(acknowledged) <= known
    two.wait_replicas(2)


def test_sigterm_lets_a_running_answer_end(world: World) -> None:
    with cluster(world, 1) as one, ThreadPoolExecutor(1) as pool:
        running = pool.submit(one.complete, model="a00", max_tokens=200)
        wait_for(lambda: one.samples("manylora_requests_running").total() or running.done())
        one.process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 200
        assert one.process.wait(60) == 0


def ask_at_once(cluster: Cluster, names: list[str], key: dict[str, str], **fields: object) -> Counter[int]:
    """Ask for each name, sixteen at a time; return how many answers of which status there were."""
    bodies = [{"model": name, "prompt": "hi", "max_tokens": 1, **fields} for name in names]
    with ThreadPoolExecutor(16) as pool:
        answers = pool.map(lambda body: cluster.http.post("/v1/completions", json=body, headers=key), bodies)
        return Counter(answer.status_code for answer in answers)


def check_limits(cluster: Cluster, admin: dict[str, str]) -> None:
    """Assert that the limits of a key are those of all replicas."""

    def limited(name: str, **limits: int) -> dict[str, str]:
        body = {"name": name, "scopes": ["infer"], "limits": limits}
        made = cluster.http.post("/v1/keys", json=body, headers=admin)
        assert made.status_code == 201, made.text
        return {"authorization": f"Bearer {made.json()['secret']}"}

    minute = limited("minute", requests_per_minute=30)
    began = time.monotonic()
    codes = ask_at_once(cluster, NAMES * 2, minute)
    assert codes.keys() == {200, 429}
    assert 30 <= codes[200] <= 30 * (1 + (time.monotonic() - began + 3) / 60)
    assert min(cluster.samples("manylora_key_limit_refusals_total", admin).values()) > 0, "both replicas refuse some"
    codes = ask_at_once(cluster, NAMES[:16], limited("parallel", parallel_requests=2), max_tokens=200)
    assert codes.keys() == {200, 429}


def test_keys_are_checked_before_an_upload_and_hold_on_every_replica(two: Cluster, world: World) -> None:
    # The last test: after the last key is revoked, a registry serves nobody.
    made = two.http.post("/v1/keys", json={"name": "ops", "scopes": ["admin"]})
    assert made.status_code == 201, made.text
    key = {"authorization": f"Bearer {made.json()['secret']}"}
    try:
        assert {two.complete(model="a00").status_code for _ in range(8)} == {401}
        assert two.push("nobody", world.adapter("nobody", 600)).status_code == 401
        assert {two.http.get("/v1/models", headers=key).status_code for _ in range(8)} == {200}
        assert two.push("somebody", world.adapter("somebody", 601), key).status_code == 201
        check_limits(two, key)
    finally:
        assert two.http.delete(f"/v1/keys/{made.json()['id']}", headers=key).status_code in (200, 204)
    assert {two.http.get("/v1/models", headers=key).status_code for _ in range(8)} == {401}
