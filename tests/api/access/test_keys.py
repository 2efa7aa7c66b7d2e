"""``/v1/keys``: an admin's key makes, lists, rotates and revokes others."""

import time
from typing import Any

import httpx
import pytest

from tests.api.access.conftest import Keyed, client
from tests.api.operation.test_document import Documented

KEY = "/v1/keys/{id}"


@pytest.fixture
def admin(keyed: Keyed) -> httpx.Client:
    return keyed["admin"]


@pytest.fixture
def documented(admin: httpx.Client) -> Documented:
    return Documented(admin.get("/openapi.json").json())


def test_the_life_of_a_key(keyed: Keyed, admin: httpx.Client, documented: Documented) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_month": 10**9}
    body = {"name": "acme", "adapters": ["acme/*"], "limits": limits, "weight": 2, "expires": 4102444800}
    made = documented.check(admin.post("/v1/keys", json=body), "/v1/keys")
    assert made.status_code == 201
    secret = made.json()["secret"]
    shown = {key: value for key, value in made.json().items() if key != "secret"}
    assert shown == {
        "id": shown["id"],
        "object": "key",
        "name": "acme",
        "prefix": secret[:12],
        "scopes": ["infer"],
        "adapters": ["acme/*"],
        "limits": {"tokens_per_minute": None, "parallel_requests": None, **limits},
        "weight": 2.0,
        "created": shown["created"],
        "expires": 4102444800,
        "revoked": None,
        "old_secret_until": None,
    }
    assert abs(shown["created"] - time.time()) < 60
    place = f"/v1/keys/{shown['id']}"
    assert documented.check(admin.get(place), KEY).json() == shown
    assert shown in documented.check(admin.get("/v1/keys"), "/v1/keys").json()["data"]
    with client(keyed.live, secret) as old:
        assert old.get("/v1/models").status_code == 200
        turned = documented.check(admin.post(f"{place}/rotate", json={"overlap_seconds": 60}), f"{KEY}/rotate")
        assert turned.json()["old_secret_until"] - time.time() == pytest.approx(60, abs=5)
        with client(keyed.live, turned.json()["secret"]) as new:
            assert old.get("/v1/models").status_code == new.get("/v1/models").status_code == 200
            admin.post(f"{place}/rotate", json={}).raise_for_status()
            assert old.get("/v1/models").status_code == new.get("/v1/models").status_code == 401
    gone = documented.check(admin.delete(place), KEY)
    assert gone.json() == {"id": shown["id"], "object": "key", "deleted": True}
    assert admin.get(place).json()["revoked"] is not None
    assert shown["id"] not in [key["id"] for key in admin.get("/v1/keys").json()["data"]]
    for response in (admin.delete(place), admin.post(f"{place}/rotate", json={}), admin.get("/v1/keys/key_nothing")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "key_not_found"


def test_every_example_works(admin: httpx.Client, documented: Documented) -> None:
    made = []
    for example in documented.document["components"]["schemas"]["KeyRequest"]["examples"]:
        made.append(documented.check(admin.post("/v1/keys", json=example), "/v1/keys").json()["id"])
    for example in documented.document["components"]["schemas"]["RotateRequest"]["examples"]:
        documented.check(admin.post(f"/v1/keys/{made[0]}/rotate", json=example), f"{KEY}/rotate").raise_for_status()
    for id_ in made:
        documented.check(admin.delete(f"/v1/keys/{id_}"), KEY).raise_for_status()


def test_pages(admin: httpx.Client) -> None:
    every = [key["id"] for key in admin.get("/v1/keys").json()["data"]]
    assert len(every) >= 7
    found: list[str] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        page = admin.get("/v1/keys", params={"limit": 3, **({"after": found[-1]} if found else {})}).json()
        found += [key["id"] for key in page["data"]]
    assert found == every
    assert admin.get("/v1/keys", params={"after": "key_nothing"}).json()["error"]["param"] == "after"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": "x", "adapters": ["a*b"]}, "adapters.0"),
        ({"name": "x", "adapters": "a"}, "adapters"),
        ({"name": "x", "adapters": ["a"] * 257}, "adapters"),
        ({"name": "x", "scopes": ["admin"], "adapters": ["a"]}, "adapters"),
        ({"name": "x", "limits": {"rpm": 1}}, "limits.rpm"),
        ({"name": "x", "limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"name": "x", "weight": 0}, "weight"),
        ({"name": "x", "weight": 1e9}, "weight"),
        ({"name": "x", "expires": 1}, "expires"),
        ({"name": "x", "expires": 1e300}, "expires"),
        ({"name": "x", "secret": "mine"}, "secret"),
    ],
)
def test_keys_that_are_refused(admin: httpx.Client, body: dict[str, Any], param: str) -> None:
    before = admin.get("/v1/keys").json()
    response = admin.post("/v1/keys", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert admin.get("/v1/keys").json() == before


def test_a_name_is_taken_once(admin: httpx.Client) -> None:
    response = admin.post("/v1/keys", json={"name": "infer"})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "key_exists")
    assert response.headers["x-should-retry"] == "false"


def test_an_overlap_is_bounded(keyed: Keyed, admin: httpx.Client) -> None:
    (id_,) = (key["id"] for key in admin.get("/v1/keys").json()["data"] if key["name"] == "train")
    response = admin.post(f"/v1/keys/{id_}/rotate", json={"overlap_seconds": 10**9})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "overlap_seconds")
    assert keyed["train"].get("/v1/models").status_code == 200
