"""Which requests need a key, and what one with each scope may do."""

import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi.routing import iter_route_contexts
from starlette.routing import Mount

from server.access.key import ALL_SCOPES
from server.access.key_spec import KeySpec
from server.api.access.authentication import INVALID, MISSING
from server.api.access.scopes import ROUTES, access_of
from server.api.app import create_app
from tests.api.access.conftest import Keyed, client
from tests.api.live import request
from tests.api.operation.test_document import Documented

FILES = "/assets/{path:path}"
"""Files of the web page, of which the test asks for one that there is not."""
CALLS = [(*route.partition(" ")[::2], access) for route, access in ROUTES.items()]


def ask(http: httpx.Client, method: str, path: str, **fields: Any) -> httpx.Response:
    """Call a route with a name that nothing has, and an empty body."""
    body = {} if method in ("GET", "DELETE") else {"json": {}}
    return http.request(method, re.sub(r"\{[^}]*\}", "nothing", path), **{**body, **fields})


def test_every_route_says_what_it_asks_for(keyed: Keyed) -> None:
    app = create_app(keyed.live.service)
    found = set()
    for route in iter_route_contexts(app.routes):
        if isinstance(route.route, Mount):
            found.add(f"GET {route.path}/{{path:path}}")
        else:
            found |= {f"{method} {route.path}" for method in (route.methods or ()) if method != "HEAD"}
    assert found == ROUTES.keys()


def test_every_change_needs_a_scope() -> None:
    for method, path, access in CALLS:
        assert method == "GET" or access not in ("open", "any"), path
    assert {path for _, path, access in CALLS if access == "open"} == {"/livez", "/readyz", "/health", FILES}


def test_names_with_slashes_have_the_access_of_their_route() -> None:
    assert access_of("POST", "/v1/adapters/team/blue/activate") == "adapters"
    assert access_of("DELETE", "/v1/adapters/a/activate") == "adapters"
    assert access_of("GET", "/v1/adapters/a/activate") == "any"
    assert access_of("POST", "/v1/keys/x/rotate") == "admin"
    assert access_of("GET", "/static-offline-docs/swagger-ui.css") == "any"
    assert access_of("GET", "/no/such/path") == "any"


@pytest.mark.parametrize(("method", "path", "access"), CALLS)
def test_without_a_key(keyed: Keyed, method: str, path: str, access: str) -> None:
    response = ask(keyed["nobody"], method, path)
    if path == FILES:
        assert response.json()["error"]["code"] == "unknown_url"
        return
    if access == "open":
        assert response.status_code == 200
        assert response.json().keys() == {"status"}, "no details for those without a key"
        return
    assert response.status_code == 401
    assert response.headers["www-authenticate"].startswith("Bearer")
    error = response.json()["error"]
    assert (error["message"], error["code"], error["param"]) == (MISSING, "invalid_api_key", None)
    anthropic = path.startswith("/v1/messages")
    assert error["type"] == ("authentication_error" if anthropic else "invalid_request_error")
    assert (response.json().get("type") == "error") is anthropic
    assert "x-request-id" in response.headers


@pytest.mark.parametrize("scope", sorted(ALL_SCOPES))
def test_each_scope_allows_its_routes(keyed: Keyed, scope: str) -> None:
    for method, path, access in CALLS:
        response = ask(keyed[scope], method, path)
        allowed = access in ("open", "any", scope) or scope == "admin"
        assert (response.status_code == 403) is not allowed, (method, path, response.text)
        assert response.status_code not in (401, 500), (method, path, response.text)
        if allowed:
            continue
        error = response.json()["error"]
        assert error["message"] == f"This API key lacks the scope `{access}`."
        assert error["code"] == "insufficient_permissions"
        anthropic = path.startswith("/v1/messages")
        assert error["type"] == ("permission_error" if anthropic else "invalid_request_error")


def test_rejections_are_documented(keyed: Keyed) -> None:
    documented = Documented(keyed["admin"].get("/openapi.json").json())
    # Each has routes for which it lacks the scope.
    unlike = {"infer": "metrics", "metrics": "infer", "adapters": "infer", "admin": "infer", "train": "infer"}
    for method, path, access in CALLS:
        template = path.replace(":path", "")
        if access == "open" or template not in documented.document["paths"]:
            continue
        response = documented.check(ask(keyed["nobody"], method, path), template)
        assert response.status_code == 401
        if access != "any":
            assert documented.check(ask(keyed[unlike[access]], method, path), template).status_code == 403
    for path in ("/livez", "/readyz", "/health"):
        assert documented.document["paths"][path]["get"]["security"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer SECRET"},
        {"authorization": "bearer  SECRET"},
        {"x-api-key": "SECRET"},
        {"x-api-key": "SECRET", "authorization": "Basic dXNlcjpwYXNz"},
        {"x-api-key": "SECRET", "authorization": "Bearer"},
        {"x-api-key": "nonsense", "authorization": "Bearer SECRET"},
    ],
)
def test_headers_that_carry_a_key(keyed: Keyed, headers: dict[str, str]) -> None:
    sent = {name: value.replace("SECRET", keyed.secrets["infer"]) for name, value in headers.items()}
    assert keyed["nobody"].get("/v1/models", headers=sent).status_code == 200


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, MISSING),
        ({"authorization": "SECRET"}, MISSING),
        ({"authorization": "Basic SECRET"}, MISSING),
        ({"authorization": "Bearer"}, MISSING),
        ({"x-api-key": ""}, MISSING),
        ({"authorization": "Bearer SECRET."}, INVALID),
        ({"authorization": "Bearer SECRET SECRET"}, INVALID),
        ({"authorization": "Bearer sk-ml-"}, INVALID),
        ({"authorization": "Bearer \xe9\xff"}, INVALID),
        ({"authorization": "Bearer nonsense", "x-api-key": "SECRET"}, INVALID),
    ],
)
def test_headers_that_carry_none(keyed: Keyed, headers: dict[str, str], message: str) -> None:
    sent = {name: value.replace("SECRET", keyed.secrets["infer"]).encode("latin-1") for name, value in headers.items()}
    response = keyed["nobody"].get("/v1/models", headers=sent)
    assert (response.status_code, response.json()["error"]["message"]) == (401, message)
    assert keyed["nobody"].get("/v1/models", params={"api_key": keyed.secrets["infer"]}).status_code == 401


def test_who_has_no_key_does_not_learn_what_paths_there_are(keyed: Keyed) -> None:
    assert keyed["nobody"].get("/no/such/path").status_code == 401
    assert keyed["infer"].get("/no/such/path").status_code == 404


def test_a_path_written_otherwise_asks_for_the_same(keyed: Keyed) -> None:
    for path in ("/v1//keys/", "/v1/%6beys", "/v1/keys?x=/livez"):
        assert keyed["nobody"].get(path).status_code == 401, path
        assert keyed["infer"].get(path).status_code == 403, path
    assert keyed["nobody"].head("/metrics").status_code == 401
    assert keyed["infer"].head("/metrics").status_code == 403
    assert keyed["metrics"].head("/metrics").status_code == 200


def test_a_body_without_a_key_is_not_awaited(keyed: Keyed) -> None:
    """Whoever has no key cannot make the server receive anything."""
    url = keyed.live.http.base_url
    assert url.port is not None
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.settimeout(10)
            head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 100000000"
            connection.sendall(f"{head}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_revoked_under_traffic(keyed: Keyed) -> None:
    """Every answer before the revocation is whole, and none begins after it; a stream that runs ends normally."""
    store = keyed.live.service.keyring.store
    stored, secret = store.add(KeySpec(name="traffic", scopes=["infer"]))
    revoked, seen = threading.Event(), []

    def run() -> None:
        with client(keyed.live, secret) as http:
            while True:
                before = revoked.is_set()
                response = http.post("/v1/completions", json=request(max_tokens=2))
                seen.append((before, response.status_code))
                if response.status_code != 200:
                    return

    threads = [threading.Thread(target=run) for _ in range(3)]
    with (
        client(keyed.live, secret) as http,
        http.stream("POST", "/v1/completions", json=request(max_tokens=60, stream=True)) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        for thread in threads:
            thread.start()
        while len(seen) < 6:
            time.sleep(0.005)
        assert keyed["admin"].delete(f"/v1/keys/{stored.key.id}").status_code == 200
        revoked.set()
        for thread in threads:
            thread.join()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert {status for _, status in seen} == {200, 401}
    assert (True, 200) not in seen


def test_an_expired_key_is_refused(keyed: Keyed) -> None:
    moment = datetime.now(UTC) + timedelta(seconds=1.5)
    _, secret = keyed.live.service.keyring.store.add(KeySpec(name="brief", expires=moment))
    with client(keyed.live, secret) as http:
        assert http.get("/v1/models").status_code == 200
        time.sleep(2)
        response = http.get("/v1/models")
    assert (response.status_code, response.json()["error"]["message"]) == (401, INVALID)
