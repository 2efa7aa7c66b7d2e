"""The audit log: every change, with who made it and from where."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.registry import audit
from manylora import main
from server.access import forbidden, history
from tests.api.access.callers import Caller, caller
from tests.api.live import Live, running, tiny_service, wait_for
from tests.tiny import save_adapter, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, model = tmp_path_factory.mktemp("folders"), tiny_model()
    return [save_adapter(model, root / str(seed), seed=seed, r=2, target_modules=["q_proj"]) for seed in range(2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("audited")
    watched = root / "watched"
    watched.mkdir()
    service = tiny_service(root, adapter={"own": folders[0]}, adapter_dir=watched, adapter_root=folders[0].parent)
    with running(service) as live:
        yield live


@pytest.fixture(scope="module")
def boss(server: Live) -> Iterator[Caller]:
    with caller(server, "admin") as boss:
        yield boss


@pytest.fixture(scope="module")
def editor(server: Live) -> Iterator[Caller]:
    with caller(server, "adapters") as editor:
        yield editor


def done(entries: list[dict[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(entry["action"], entry["name"], entry["detail"]) for entry in reversed(entries)]


def test_every_change_of_an_adapter_is_recorded(boss: Caller, editor: Caller, folders: list[Path]) -> None:
    http, adapter = editor.http, "/v1/adapters/legal"
    before = datetime.now(UTC) - timedelta(seconds=1)
    for number, folder in enumerate(folders):
        body = {"name": "legal", "path": folder.name}
        response = http.post("/v1/adapters", json=body, headers={"x-request-id": f"register-{number}"})
        assert response.status_code == 201
    assert http.post("/v1/adapters", json=body).status_code == 200, "nothing changes"
    assert http.post(f"{adapter}/activate", json={"version": 1}).status_code == 200
    assert http.post(f"{adapter}/activate", json={"version": 2}).status_code == 200
    assert http.post(f"{adapter}/activate", json={"version": 3}).status_code == 404
    for pinned in (True, False):
        assert http.post(f"{adapter}/pin", json={"pinned": pinned}).status_code == 200
    targets = [{"adapter": "legal@1", "weight": 9}, {"adapter": "legal", "weight": 1}]
    assert http.put("/v1/aliases/prod", json={"targets": targets}).status_code == 201
    assert http.delete(adapter).status_code == 409
    assert http.delete("/v1/aliases/prod").status_code == 200
    assert http.delete(f"{adapter}@1").status_code == 200
    assert http.delete(adapter).status_code == 200
    entries = boss.changes(name="legal")
    first, second = (entry["detail"]["content"] for entry in reversed(entries) if "content" in entry["detail"])
    registered = {"source": "folder 0", "active": 1, "pinned": False, "version": 1, "content": first}
    again = {**registered, "source": "folder 1", "active": 2, "version": 2, "content": second}
    assert done(entries) == [
        ("adapter.registered", "legal", registered),
        ("adapter.registered", "legal", again),
        ("adapter.rolled_back", "legal", {"version": 1, "before": 2}),
        ("adapter.activated", "legal", {"version": 2, "before": 1}),
        ("adapter.pinned", "legal", {}),
        ("adapter.unpinned", "legal", {}),
        ("version.removed", "legal", {"version": 1}),
        ("adapter.removed", "legal", {}),
    ]
    assert done(boss.changes(name="prod")) == [
        ("alias.set", "prod", {"targets": {"legal@1": 9.0, "legal": 1.0}}),
        ("alias.removed", "prod", {}),
    ]
    for entry in entries:
        assert (entry["key"], entry["key_name"], entry["address"]) == (editor.key.id, editor.key.name, "127.0.0.1")
        assert before.timestamp() - 1 <= entry["created"] <= datetime.now(UTC).timestamp()
    assert [entry["request_id"] for entry in reversed(entries)][:2] == ["register-0", "register-1"]


def test_uploads_and_vllms_routes_are_recorded_with_their_key(
    server: Live, boss: Caller, editor: Caller, folders: list[Path]
) -> None:
    headers = {"authorization": f"Bearer {editor.secret}"}
    files = [("file", (path.name, path.read_bytes())) for path in sorted(folders[0].glob("adapter_*"))]
    assert httpx.post(
        f"{server.http.base_url}/v1/adapters", data={"name": "up"}, files=files, headers=headers
    ).is_success
    assert editor.http.post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": "1"}).is_success
    assert editor.http.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).is_success
    for name, actions in (("up", ["adapter.registered"]), ("v", ["adapter.registered", "adapter.removed"])):
        entries = boss.changes(name=name)
        assert [action for action, _, _ in done(entries)] == actions
        assert {entry["key"] for entry in entries} == {editor.key.id}
    editor.http.delete("/v1/adapters/up").raise_for_status()


def test_what_the_server_does_by_itself(server: Live, boss: Caller, folders: list[Path]) -> None:
    watched = server.service.settings.adapter_dir
    assert watched is not None
    save_adapter(tiny_model(), watched / "seen", seed=7, r=2, target_modules=["q_proj"])
    for name in ("own", "seen"):
        wait_for(lambda name=name: boss.changes(name=name))
        (entry,) = boss.changes(name=name)
        assert (entry["key"], entry["key_name"], entry["address"], entry["request_id"]) == ("", "server", None, None)


def test_keys_are_recorded_without_their_secrets(server: Live, boss: Caller) -> None:
    made = boss.http.post("/v1/keys", json={"name": "temporary", "scopes": ["infer"]}).json()
    rotated = boss.http.post(f"/v1/keys/{made['id']}/rotate", json={}).json()
    assert boss.http.delete(f"/v1/keys/{made['id']}").status_code == 200
    entries = boss.changes(name="temporary")
    assert [action for action, _, _ in done(entries)] == ["key.added", "key.rotated", "key.revoked"]
    assert all(entry["detail"]["id"] == made["id"] and entry["key"] == boss.key.id for entry in entries)
    text = json.dumps(boss.changes(limit=1000))
    assert not [secret for secret in (made["secret"], rotated["secret"], boss.secret) if secret in text]


def test_what_a_key_may_not_do_is_recorded(server: Live, boss: Caller, editor: Caller) -> None:
    with caller(server, "infer") as asking:
        assert asking.http.delete("/v1/adapters/own", headers={"x-request-id": "attempt"}).status_code == 403
        wait_for(lambda: boss.changes(key=asking.key.id))
        (entry,) = boss.changes(key=asking.key.id)
        assert done([entry]) == [("request.forbidden", "/v1/adapters/own", {"method": "DELETE"})]
        assert (entry["request_id"], entry["address"]) == ("attempt", "127.0.0.1")
        assert asking.http.get("/v1/audit").status_code == 403
        assert boss.changes(key="") == [each for each in boss.changes() if each["key"] == ""]
        before = len(boss.changes(action="request.forbidden", limit=1000))
        for _ in range(2 * forbidden.MAX_PER_MINUTE):
            asking.http.delete("/v1/adapters/own")
        wait_for(lambda: len(boss.changes(action="request.forbidden", limit=1000)) > before)
        assert len(boss.changes(action="request.forbidden", limit=1000)) < before + 1.5 * forbidden.MAX_PER_MINUTE


def test_filters_and_pages(server: Live, boss: Caller, editor: Caller) -> None:
    for weight in range(1, 6):
        body = {"targets": [{"adapter": "own", "weight": weight}]}
        assert editor.http.put("/v1/aliases/paged", json=body).is_success
    whole = boss.changes(name="paged")
    assert [entry["detail"]["targets"]["own"] for entry in whole] == [5, 4, 3, 2, 1]
    pages: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    while True:
        page = boss.http.get("/v1/audit", params={"name": "paged", "limit": 2, **more}).json()
        pages += page["data"]
        if not page["has_more"]:
            break
        more = {"after": page["data"][-1]["id"]}
    assert pages == whole
    assert boss.changes(name="paged", action="alias.removed") == []
    assert boss.changes(name="paged", key=editor.key.name) == boss.changes(name="paged", key=editor.key.id) == whole
    assert boss.changes(name="paged", key=boss.key.id) == []
    now = datetime.now(UTC)
    tomorrow, yesterday = (now + timedelta(days=1)).isoformat(), (now - timedelta(days=1)).date().isoformat()
    assert boss.changes(name="paged", since=yesterday, until=tomorrow) == whole
    assert boss.changes(name="paged", until=yesterday) == boss.changes(name="paged", since=tomorrow) == []
    editor.http.delete("/v1/aliases/paged").raise_for_status()


@pytest.mark.parametrize("params", [{"since": "soon"}, {"action": "colour"}, {"after": "x"}, {"after": "9" * 30}])
def test_bad_questions(boss: Caller, params: dict[str, str]) -> None:
    response = boss.http.get("/v1/audit", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["param"].partition(".")[0] == next(iter(params))


def test_the_command(server: Live, boss: Caller, editor: Caller, capsys: pytest.CaptureFixture[str]) -> None:
    editor.http.post(
        "/v1/adapters/own/pin", json={"pinned": False}, headers={"x-request-id": "mine"}
    ).raise_for_status()
    where = ["--url", str(server.http.base_url), "--api-key", boss.secret]
    assert main(["audit", *where, "--name", "own", "--action", "adapter.unpinned"]) == 0
    head, line = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert head == ["time (UTC)", "action", "name", "detail", "by", "from", "request"]
    assert line[1:] == ["adapter.unpinned", "own", "-", editor.key.name, "127.0.0.1", "mine"]
    assert main(["audit", *where, "--last", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["data"]) == 1
    assert main(["audit", "--url", str(server.http.base_url), "--api-key", editor.secret]) == 1
    assert "admin" in capsys.readouterr().err


@pytest.mark.parametrize(("trusted", "seen"), [((), "127.0.0.1"), (("127.0.0.0/8",), "198.51.100.7")])
def test_only_a_trusted_proxy_says_where_a_request_comes_from(
    tmp_path: Path, folders: list[Path], trusted: tuple[str, ...], seen: str
) -> None:
    service = tiny_service(tmp_path, adapter={"own": folders[0]}, forwarded_allow_ips=trusted)
    with running(service) as live:
        headers = {"x-forwarded-for": "203.0.113.9, 198.51.100.7"}
        live.http.post("/v1/adapters/own/pin", json={"pinned": False}, headers=headers).raise_for_status()
        entry = live.http.get("/v1/audit").json()["data"][0]
        assert (entry["action"], entry["address"], entry["key_name"]) == ("adapter.unpinned", seen, "anonymous")


def test_a_server_deletes_what_is_older_than_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "LOOK_SECONDS", 0.05)
    with running(tiny_service(tmp_path, history_days=2)) as live:
        names = ("old", "new")
        with live.service.database.adding() as connection:
            for name, days in zip(names, (4, 1), strict=True):
                at = int((datetime.now(UTC) - timedelta(days=days)).timestamp() * 1e6)
                audit.write(connection, at, audit.SERVER, "adapter.removed", name, {})
        wait_for(lambda: [entry["name"] for entry in live.http.get("/v1/audit").json()["data"]] == ["new"])
