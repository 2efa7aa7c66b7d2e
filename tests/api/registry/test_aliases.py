"""``/v1/aliases``: names that mean one of several versions, and requests that use them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, request, unchanged


def put(live: Live, name: str, *targets: tuple[str, float], **headers: str) -> httpx.Response:
    body = {"targets": [{"adapter": adapter, "weight": weight} for adapter, weight in targets]}
    return live.http.put(f"/v1/aliases/{name}", json=body, headers=headers)


@pytest.fixture
def prod(live: Live) -> Iterator[str]:
    """An alias for three parts ``red`` and one part ``green@1``."""
    assert put(live, "prod", ("red", 3), ("green@1", 1)).status_code == 201
    yield "prod"
    live.http.delete("/v1/aliases/prod")
    assert live.http.get("/v1/aliases/prod").status_code == 404


def served(live: Live, **fields: Any) -> str:
    """Return the version that served the response."""
    (applied,) = live.complete(max_tokens=1, **fields)["adapter"]
    name: str = applied["name"]
    return name


def test_put_get_change_and_delete(live: Live) -> None:
    response = put(live, "team/prod", ("red", 3), ("green@1", 1))
    assert response.status_code == 201
    card = response.json()
    assert (card["id"], card["object"]) == ("team/prod", "alias")
    assert card["targets"] == [
        {"adapter": "red", "weight": 3, "serves": "red@1"},
        {"adapter": "green@1", "weight": 1, "serves": "green@1"},
    ]
    shown = live.http.get("/v1/aliases/team/prod")
    assert (shown.json(), shown.headers["etag"]) == (card, response.headers["etag"])
    assert live.http.get("/v1/adapters/red").json()["aliases"] == ["team/prod"]
    changed = put(live, "team/prod", ("green", 1))
    assert (changed.status_code, changed.json()["created"]) == (200, card["created"])
    assert [target["serves"] for target in changed.json()["targets"]] == ["green@1"]
    assert live.http.get("/v1/adapters/red").json()["aliases"] == []
    gone = live.http.delete("/v1/aliases/team/prod")
    assert (gone.status_code, gone.json()) == (200, {"id": "team/prod", "object": "alias", "deleted": True})
    refused(live, live.http.get("/v1/aliases/team/prod"), 404, "adapter")
    refused(live, live.http.post("/v1/completions", json=request(model="team/prod")), 404, "model")


def test_pages(live: Live) -> None:
    names = ["a", "b", "c"]
    for name in names:
        put(live, name, ("red", 1))
    first = live.http.get("/v1/aliases", params={"limit": 2}).json()
    assert ([alias["id"] for alias in first["data"]], first["has_more"]) == (["a", "b"], True)
    second = live.http.get("/v1/aliases", params={"limit": 2, "after": "b"}).json()
    assert ([alias["id"] for alias in second["data"]], second["has_more"]) == (["c"], False)
    for name in names:
        assert live.http.delete(f"/v1/aliases/{name}").status_code == 200
    assert live.http.get("/v1/aliases").json() == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize("field", ["model", "adapter"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_version_and_the_alias(live: Live, prod: str, field: str, stream: bool) -> None:
    put(live, prod, ("green", 1))
    content = live.service.registry.version("green").content
    expected = [{"name": "green@1", "id": content, "weight": 1.0, "alias": "prod"}]
    if stream:
        events = live.stream(**request(**{field: prod}))
        assert all(event["adapter"] == expected for event in events)
        text = "".join(event["choices"][0]["text"] for event in events)
    else:
        response = live.http.post("/v1/completions", json=request(**{field: prod}))
        assert response.headers["x-manylora-adapter"] == f"green@1={content}"
        assert response.json()["adapter"] == expected
        assert response.json()["model"] == (prod if field == "model" else "tiny")
        text = response.json()["choices"][0]["text"]
    assert text == live.text(adapter="green")


def test_an_alias_in_a_mix(live: Live, prod: str) -> None:
    put(live, prod, ("red@1", 1))
    halves = [{"name": prod, "weight": 0.5}, {"name": "red", "weight": 0.5}]
    answer = live.complete(adapter=halves)
    assert answer["choices"][0]["text"] == live.text(adapter="red")
    assert [applied.get("alias") for applied in answer["adapter"]] == [prod, None]


def test_a_user_gets_the_same_version_each_time(live: Live, prod: str) -> None:
    first = {user: served(live, adapter=prod, user=user) for user in map(str, range(24))}
    assert set(first.values()) == {"red@1", "green@1"}
    assert {user: served(live, adapter=prod, user=user) for user in first} == first
    assert Counter(first.values())["red@1"] > 12  # a user's target is deterministic


def test_without_a_user_targets_are_random(live: Live, prod: str) -> None:
    # The probability that 100 draws all choose one target is 1e-13.
    for nobody in ({}, {"user": None}, {"user": ""}):
        assert {served(live, adapter=prod, **nobody) for _ in range(100)} == {"red@1", "green@1"}


def test_an_alias_means_one_version_throughout_a_request(live: Live, prod: str) -> None:
    put(live, prod, ("red@1", 1), ("green@1", 1))
    halves = [{"name": prod, "weight": 0.5}] * 2
    for _ in range(20):  # if two draws were made, all would agree once in a million
        first, second = live.complete(max_tokens=1, adapter=halves)["adapter"]
        assert (first["name"], second["weight"]) == (second["name"], 0.5)


def test_weight_of_0_gets_no_requests(live: Live, prod: str) -> None:
    put(live, prod, ("red@1", 0), ("green@1", 1))
    assert {served(live, adapter=prod, user=str(user)) for user in range(20)} == {"green@1"}


def test_target_without_version_follows_the_active_one(live: Live, prod: str, folders: Mapping[str, Path]) -> None:
    first, second = (
        live.service.registry.register_folder("moving", folders[name]).version for name in ("spare", "red")
    )
    put(live, prod, ("moving", 1))
    assert served(live, model=prod) == second.name
    live.http.post("/v1/adapters/moving/activate", json={"version": first.number})
    assert served(live, model=prod) == first.name
    assert live.http.get(f"/v1/aliases/{prod}").json()["targets"][0]["serves"] == first.name
    put(live, prod, ("moving", 1), (second.name, 1))
    with unchanged(live):
        for reference in ("moving", second.name):
            response = live.http.delete(f"/v1/adapters/{reference}")
            assert refused(live, response, 409, None)["code"] == "aliased"
            assert response.headers["x-should-retry"] == "false"
    live.http.delete(f"/v1/aliases/{prod}")
    assert live.http.delete("/v1/adapters/moving").status_code == 200


@pytest.mark.parametrize(
    ("name", "targets", "status", "param"),
    [
        ("x", None, 400, "targets"),
        ("x", [], 400, "targets"),
        ("x", "red", 400, "targets"),
        ("x", ["red"], 400, "targets.0"),
        ("x", [{"weight": 1}], 400, "targets.0.adapter"),
        ("x", [{"adapter": "red", "weight": -1}], 400, "targets.0.weight"),
        ("x", [{"adapter": "red", "weight": "1"}], 400, "targets.0.weight"),
        ("x", [{"adapter": "red", "weight": 1e10}], 400, "targets.0.weight"),
        ("x", [{"adapter": "red", "wieght": 1}], 400, "targets.0.wieght"),
        ("x", [{"adapter": "red", "weight": 0}], 400, "targets"),
        ("x", [{"adapter": "red"}, {"adapter": "red"}], 400, "targets"),
        ("x", [{"adapter": f"a{i}"} for i in range(17)], 400, "targets"),
        ("x", [{"adapter": "nobody"}], 404, "adapter"),
        ("x", [{"adapter": "red@2"}], 404, "adapter"),
        ("x", [{"adapter": "red@x"}], 404, "adapter"),
        ("x", [{"adapter": "prod"}], 404, "adapter"),
        ("x", [{"adapter": "tiny"}], 404, "adapter"),
        ("red", [{"adapter": "green"}], 409, None),
        ("tiny", [{"adapter": "red"}], 400, "name"),
        ("x@1", [{"adapter": "red"}], 400, "name"),
        ("x,y", [{"adapter": "red"}], 400, "name"),
        ("PROD", [{"adapter": "red"}], 400, "name"),
        ("", [{"adapter": "red"}], 405, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_aliases_that_are_refused(
    live: Live, prod: str, name: str, targets: object, status: int, param: str | None
) -> None:
    with unchanged(live):
        body = {} if targets is None else {"targets": targets}
        refused(live, live.http.put(f"/v1/aliases/{name}", json=body), status, param)


def test_an_adapter_cannot_take_an_alias_s_name(live: Live, prod: str) -> None:
    with unchanged(live):
        response = live.http.post("/v1/adapters", json={"name": prod, "path": "spare"})
        assert refused(live, response, 409, None)["code"] == "name_taken"


def test_if_match_of_another_revision_is_refused(live: Live, prod: str) -> None:
    seen = live.http.get(f"/v1/aliases/{prod}").headers["etag"]
    assert put(live, prod, ("green", 1), **{"if-match": seen}).status_code == 200
    with unchanged(live):
        refused(live, put(live, prod, ("red", 1), **{"if-match": seen}), 412, "If-Match")
        refused(live, live.http.delete(f"/v1/aliases/{prod}", headers={"if-match": seen}), 412, "If-Match")
