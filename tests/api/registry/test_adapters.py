"""``/v1/adapters``: register, show, activate and remove, also during requests."""

import json
import logging
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.format.files import CONFIG, ORIGIN, WEIGHTS
from tests.adapter_folders import DEFECTS, set_config, write_adapter
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, events, request, running, tiny_service, unchanged, wait_for
from tests.tiny import save_adapter, tiny_model


def register(live: Live, name: str, path: Path | str, **fields: Any) -> dict[str, Any]:
    """Register by path; return the adapter's JSON."""
    response = live.http.post("/v1/adapters", json={"name": name, "path": str(path), **fields})
    assert response.status_code in (200, 201), response.text
    card: dict[str, Any] = response.json()
    return card


def upload(live: Live, folder: Path, **fields: str) -> httpx.Response:
    """Register by upload; return the response."""
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    return live.http.post("/v1/adapters", data=fields, files=files)


def card_of(live: Live, reference: str) -> dict[str, Any]:
    response = live.http.get(f"/v1/adapters/{reference}")
    assert response.status_code == 200, response.text
    card: dict[str, Any] = response.json()
    return card


@pytest.fixture
def temporary(live: Live, folders: Mapping[str, Path]) -> Iterator[str]:
    """The name of an adapter that is removed after the test."""
    assert register(live, "temporary", folders["spare"])["active"]
    yield "temporary"
    live.http.delete("/v1/adapters/temporary")
    assert live.http.get("/v1/adapters/temporary").status_code == 404


def test_register_get_and_remove(live: Live, folders: Mapping[str, Path]) -> None:
    registered = live.http.post("/v1/adapters", json={"name": "some/new", "path": "spare"})
    assert registered.status_code == 201
    card = registered.json()
    number = card.pop("version")
    assert (card["id"], card["object"], card["rank"], card["targets"]) == ("some/new", "adapter", 3, 2)
    assert card["size_bytes"] == (folders["spare"] / WEIGHTS).stat().st_size
    assert (card["active"], card["versions"], card["pinned"], card["aliases"]) == (number, [number], False, [])
    assert card["status"] == "ready"
    assert card["source"] == "folder spare"
    assert live.http.get("/v1/adapters").json()["data"][2] == card
    shown = card_of(live, "some/new")
    assert shown["receipt"]["source"] == "folder spare"
    (version,) = shown.pop("version_details")
    assert (version["version"], version["content"]) == (number, card["content"])
    assert version["source"] == "folder spare"
    assert shown == {**card, "receipt": shown["receipt"]}
    names = [a["id"] for a in live.http.get("/v1/adapters").json()["data"]]
    assert names == ["green", "red", "some/new", "team/blue"]
    content = live.content("some/new")
    assert content.is_dir()
    answer = live.http.delete("/v1/adapters/some/new")
    assert (answer.status_code, answer.json()) == (200, {"id": "some/new", "object": "adapter", "deleted": True})
    wait_for(lambda: not content.exists())
    assert live.http.get("/v1/adapters/some/new").status_code == 404
    assert live.http.post("/v1/completions", json=request(adapter="some/new")).status_code == 404


def test_residency_follows_use(live: Live, temporary: str) -> None:
    live.complete(adapter=temporary)
    assert card_of(live, temporary)["residency"] == "device"


def test_pages(live: Live) -> None:
    first = live.http.get("/v1/adapters", params={"limit": 2}).json()
    assert ([a["id"] for a in first["data"]], first["has_more"]) == (["green", "red"], True)
    second = live.http.get("/v1/adapters", params={"limit": 2, "after": "red"}).json()
    assert ([a["id"] for a in second["data"]], second["has_more"]) == (["team/blue"], False)
    usage = live.service.registry.usage()
    assert first["store"] == {"bytes": usage.bytes, "quota_bytes": None}
    assert first["refused"] == []


def test_new_content_is_a_new_version(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    """With the same prompt each time, so that the prefix cache could return the old weights' keys and values."""
    before, old = live.text(adapter=temporary), card_of(live, temporary)
    new = register(live, temporary, folders["red"])
    assert new["version"] == new["active"] == old["active"] + 1
    assert new["versions"] == [old["active"], new["active"]]
    assert new["content"] == card_of(live, "red")["content"] != old["content"]
    assert live.text(adapter=temporary) == live.text(adapter="red") != before
    assert live.text(adapter=f"{temporary}@{old['active']}") == before


def test_the_same_content_again_is_the_same_version(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    old = card_of(live, temporary)["active"]
    register(live, temporary, folders["red"])
    response = live.http.post("/v1/adapters", json={"name": temporary, "path": "spare"})
    card = response.json()
    assert (response.status_code, card["version"], card["active"]) == (200, old, old)
    assert card["versions"] == [old, old + 1]


def test_roll_out_and_back(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    before, old = live.text(adapter=temporary), card_of(live, temporary)["active"]
    stored = register(live, temporary, folders["red"], activate=False)
    new = stored["version"]
    assert (stored["active"], stored["versions"]) == (old, [old, new])
    assert live.text(adapter=temporary) == before
    assert live.text(model=f"{temporary}@{new}") == live.text(adapter="red")
    for number, text in ((new, live.text(adapter="red")), (old, before)):
        response = live.http.post(f"/v1/adapters/{temporary}/activate", json={"version": number})
        assert (response.status_code, response.json()["active"]) == (200, number)
        assert response.json()["content"] == card_of(live, f"{temporary}@{number}")["content"]
        answer = live.complete(adapter=temporary)
        assert (answer["choices"][0]["text"], answer["adapter"][0]["name"]) == (text, f"{temporary}@{number}")
    with unchanged(live):
        refused(live, live.http.post(f"/v1/adapters/{temporary}/activate", json={"version": 999}), 404, "adapter")


def test_a_name_without_an_active_version(live: Live) -> None:
    card = register(live, "stored", "spare", activate=False)
    fields = ("active", "content", "rank", "size_bytes", "source", "residency", "status")
    assert [card[key] for key in fields] == [None] * len(fields)
    assert card_of(live, "stored")["receipt"] is None
    version = f"stored@{card['version']}"
    assert card_of(live, version)["receipt"]["source"] == "folder spare"
    refused(live, live.http.post("/v1/completions", json=request(adapter="stored")), 404, "adapter")
    assert live.complete(adapter=version)["adapter"][0]["name"] == version
    assert live.http.delete("/v1/adapters/stored").status_code == 200


def test_one_version_can_be_removed(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    old = card_of(live, temporary)["active"]
    new = register(live, temporary, folders["red"])["active"]
    content = live.content(f"{temporary}@{old}")
    with unchanged(live):
        response = live.http.delete(f"/v1/adapters/{temporary}@{new}")
        assert refused(live, response, 409, None)["code"] == "version_active"
        assert response.headers["x-should-retry"] == "false"
    answer = live.http.delete(f"/v1/adapters/{temporary}@{old}")
    assert answer.json() == {"id": f"{temporary}@{old}", "object": "adapter", "deleted": True}
    assert card_of(live, temporary)["versions"] == [new]
    wait_for(lambda: not content.exists())


def test_pins(live: Live, temporary: str) -> None:
    card = live.http.post(f"/v1/adapters/{temporary}/pin", json={"pinned": True}).json()
    assert card["pinned"] is True
    wait_for(lambda: card_of(live, temporary)["residency"] == "device")
    assert live.http.post(f"/v1/adapters/{temporary}/pin", json={"pinned": False}).json()["pinned"] is False


def test_preload_brings_it_to_the_device(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = save_adapter(tiny_model(), folders["spare"].parent / "early", seed=5, r=2, target_modules=["q_proj"])
    assert register(live, "early", folder, preload=True)["residency"] == "device"
    live.http.delete("/v1/adapters/early")
    shutil.rmtree(folder)


def test_more_pins_than_slots_are_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    service = tiny_service(tmp_path, adapter={"red": folders["red"]}, adapter_root=folders["red"].parent,
                           max_device_adapters=1, max_rank=16)  # fmt: skip
    with running(service) as live, unchanged(live):
        ways: list[tuple[str, dict[str, Any]]] = [
            ("/v1/adapters/red/pin", {"pinned": True}),
            ("/v1/adapters", {"name": "spare", "path": "spare", "pinned": True}),
        ]
        for path, body in ways:
            wait_for(lambda: len(live.registered()[2]) == 2)  # the content and the lock
            assert refused(live, live.http.post(path, json=body), 409, None)["code"] == "too_many_pins"
        wait_for(lambda: len(live.registered()[2]) == 2)


def test_if_match_of_another_revision_is_refused(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    seen = live.http.get(f"/v1/adapters/{temporary}").headers["etag"]
    number = card_of(live, temporary)["active"]
    register(live, temporary, folders["red"])
    stale = {"if-match": seen}
    with unchanged(live):
        for method, path, body in (
            ("POST", f"{temporary}/activate", {"version": number}),
            ("POST", f"{temporary}/pin", {"pinned": True}),
            ("DELETE", temporary, None),
            ("DELETE", f"{temporary}@{number}", None),
            ("POST", "", {"name": temporary, "path": "green"}),
        ):
            url = f"/v1/adapters/{path}".rstrip("/")
            response = live.http.request(method, url, json=body, headers=stale)
            assert refused(live, response, 412, "If-Match")["code"] == "revision_mismatch"
            for bad in ("*", "5", 'W/"5"', '"x"', '"1", "2"'):
                refused(live, live.http.request(method, url, json=body, headers={"if-match": bad}), 400, "If-Match")
            twice = [("if-match", '"5"'), ("if-match", seen)]
            refused(live, live.http.request(method, url, json=body, headers=twice), 400, "If-Match")
            unserved = {"if-none-match": "*"}
            refused(live, live.http.request(method, url, json=body, headers=unserved), 400, "If-None-Match")
    fresh = live.http.get(f"/v1/adapters/{temporary}").headers["etag"]
    activate = {"url": f"/v1/adapters/{temporary}/activate", "json": {"version": number}}
    response = live.http.post(**activate, headers={"if-match": fresh})
    assert response.status_code == 200
    assert live.http.post(**activate, headers={"if-match": fresh}).status_code == 412
    assert live.http.post(**activate, headers={"if-match": response.headers["etag"]}).status_code == 200


def test_an_upload(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    response = upload(live, folders["red"], name=temporary, activate="false")
    card = response.json()
    assert response.status_code == 201, response.text
    version = card_of(live, f"{temporary}@{card['version']}")
    assert version["content"] == card_of(live, "red")["content"]
    assert version["receipt"]["source"] == "upload"
    assert card["active"] != card["version"]
    again = upload(live, folders["red"], name=temporary)
    assert (again.status_code, again.json()["active"]) == (200, card["version"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "name"),
        ({"name": "a,b"}, "name"),
        ({"name": "a@1"}, "name"),
        ({"name": "x", "activate": "yes"}, "activate"),
        ({"name": "x", "pinned": ""}, "pinned"),
        ({"name": "x", "preload": "1"}, "preload"),
        ({"name": "x", "allow_base_mismatch": "True"}, "allow_base_mismatch"),
        ({"name": "x", "allow_unknown_fields": "1"}, "allow_unknown_fields"),
        ({"name": "x", "path": "spare"}, "path"),
        ({"name": "x", "colour": "blue"}, "colour"),
    ],
    ids=str,
)
def test_uploads_whose_fields_are_refused(
    live: Live, folders: Mapping[str, Path], fields: dict[str, str], param: str
) -> None:
    with unchanged(live):
        refused(live, upload(live, folders["spare"], **fields), 400, param)


def test_upload_without_an_adapter(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "defect", live.service.base.layout)
    DEFECTS["nan"].spoil(folder)
    with unchanged(live):
        error = refused(live, upload(live, folder, name="x"), 422, "file")
    assert (error["file"], error["tensor"]) == (WEIGHTS, DEFECTS["nan"].tensor)
    assert (error["code"], DEFECTS["nan"].reason in error["message"]) == ("adapter_rejected", True)


def test_disconnect_during_upload_leaves_nothing(live: Live, folders: Mapping[str, Path]) -> None:
    boundary, weights = "b" * 20, (folders["spare"] / WEIGHTS).read_bytes()
    head = f"--{boundary}\r\nContent-Disposition: form-data; name=files; filename={WEIGHTS}\r\n\r\n".encode()
    with unchanged(live):
        with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0)) as client:
            client.sendall(
                b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n"
                + f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n".encode()
                + head
                + weights
            )
            wait_for(lambda: any(name.startswith(".tmp-") for name in live.registered()[2]))
        wait_for(lambda: not any(name.startswith(".tmp-") for name in live.registered()[2]))


def test_disconnect_does_not_end_a_registration(live: Live) -> None:
    body = json.dumps({"name": "left", "path": "spare"}).encode()
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0)) as client:
        head = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    wait_for(lambda: live.service.registry.knows("left"))
    live.complete(adapter="left")
    live.http.delete("/v1/adapters/left")


def test_unknown_fields_are_refused_unless_allowed(live: Live, folders: Mapping[str, Path]) -> None:
    folder = shutil.copytree(folders["spare"], folders["spare"].parent / "odd")
    set_config(folder, shift=0.5, use_next_year=True)
    body = {"name": "odd", "path": "odd"}
    with unchanged(live):
        for param, response in (
            ("path", live.http.post("/v1/adapters", json=body)),
            ("file", upload(live, folder, name="odd")),
        ):
            error = refused(live, response, 422, param)
            assert (error["code"], error["file"]) == ("unknown_fields", CONFIG)
            assert "shift, use_next_year: are not known" in error["message"]
    allowed = {"allow_unknown_fields": True}
    for register in (
        lambda: live.http.post("/v1/adapters", json={**body, **allowed}),
        lambda: upload(live, folder, name="odd", allow_unknown_fields="true"),
    ):
        assert register().status_code == 201
        assert card_of(live, "odd")["receipt"]["unknown_fields_allowed"] == ["shift", "use_next_year"]
        assert live.text(adapter="odd") != live.text()
        live.http.delete("/v1/adapters/odd")
    shutil.rmtree(folder)


def test_unservable_adapter_is_listed_and_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Registered by a server that takes larger ranks."""
    adapters = {"green": folders["green"], "red": folders["red"]}
    with running(tiny_service(tmp_path, adapter=adapters, max_rank=16)):
        pass
    with running(tiny_service(tmp_path, max_rank=4)) as live:
        card = card_of(live, "green")
        assert (card["status"], card_of(live, "red")["status"]) == ("refused", "ready")
        assert "--max-rank 4" in card["reason"]
        for fields in ({"adapter": "green"}, {"adapter": "green@1"}, {"model": "green"}):
            response = live.http.post("/v1/completions", json=request(**fields))
            error = refused(live, response, 422, "adapter")
            assert (error["code"], card["reason"] in error["message"]) == ("adapter_unavailable", True)
        live.complete(adapter="red")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", ""])
def test_other_bodies_are_415(live: Live, kind: str) -> None:
    body = json.dumps({"name": "x", "path": "spare"})
    with unchanged(live):
        response = live.http.post("/v1/adapters", content=body, headers={"content-type": kind} if kind else {})
        assert "application/json" in refused(live, response, 415, None)["message"]


def test_another_base_is_refused_unless_allowed(live: Live, folders: Mapping[str, Path]) -> None:
    folder = shutil.copytree(folders["spare"], folders["spare"].parent / "foreign")
    (folder / ORIGIN).write_text(json.dumps({"base_fingerprint": "abc"}))
    body = {"name": "foreign", "path": "foreign"}
    with unchanged(live):
        error = refused(live, live.http.post("/v1/adapters", json=body), 422, "path")
    assert (error["code"], error["file"]) == ("base_mismatch", ORIGIN)
    assert live.service.base.layout.fingerprint in error["message"]
    assert live.http.post("/v1/adapters", json={**body, "allow_base_mismatch": True}).status_code == 201
    live.complete(adapter="foreign")
    live.http.delete("/v1/adapters/foreign")
    shutil.rmtree(folder)


def test_a_full_store_is_507_and_changes_nothing(folders: Mapping[str, Path], tmp_path: Path) -> None:
    service = tiny_service(tmp_path, adapter_root=folders["red"].parent, store_quota_gib=1e-6, max_rank=16)
    with running(service) as live:
        with unchanged(live):
            response = live.http.post("/v1/adapters", json={"name": "red", "path": "red"})
            assert refused(live, response, 507, None)["code"] == "quota_exceeded"
        assert response.headers["x-should-retry"] == "false"
        assert live.http.get("/v1/adapters").json()["store"] == {"bytes": 0, "quota_bytes": 1073}


def test_refused_watched_folder_is_listed(folders: Mapping[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "watched"
    shutil.copytree(folders["red"], root / "good")
    shutil.copytree(folders["red"], root / "bad")
    (root / "bad" / CONFIG).unlink()
    with running(tiny_service(tmp_path, adapter_dir=root, max_rank=16)) as live:
        wait_for(lambda: live.service.registry.knows("good") and live.http.get("/v1/adapters").json()["refused"])
        (refusal,) = live.http.get("/v1/adapters").json()["refused"]
        assert (refusal["name"], CONFIG in refusal["reason"]) == ("bad", True)
        assert set(refusal) == {"name", "source", "reason", "since"}


@pytest.mark.parametrize("replace", [False, True])
def test_a_running_stream_keeps_its_weights(
    live: Live, temporary: str, folders: Mapping[str, Path], replace: bool
) -> None:
    expected = live.complete(adapter=temporary, max_tokens=200)
    content = live.content(temporary)
    body = request(adapter=temporary, max_tokens=200, stream=True)
    with live.http.stream("POST", "/v1/completions", json=body) as response:
        if replace:
            change = live.http.post("/v1/adapters", json={"name": temporary, "path": str(folders["red"])})
        else:
            change = live.http.delete(f"/v1/adapters/{temporary}")
        assert change.status_code == (201 if replace else 200)
        got = events(response)
    assert "".join(e["choices"][0]["text"] for e in got) == expected["choices"][0]["text"]
    assert {e["adapter"][0]["name"] for e in got} == {expected["adapter"][0]["name"]}
    if replace:
        assert live.complete(adapter=temporary)["adapter"][0]["name"] != expected["adapter"][0]["name"]
    else:
        assert live.http.post("/v1/completions", json=request(adapter=temporary)).status_code == 404
        wait_for(lambda: not content.exists())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "name"),
        ({"name": "x"}, 400, "path"),
        ({"name": "x", "path": 5}, 400, "path"),
        ({"name": "x", "path": ""}, 400, "path"),
        ({"name": "x", "path": "spare", "rank": 1}, 400, "rank"),
        ({"name": "x", "path": "spare", "source": "hf://a/b"}, 400, "path"),
        ({"name": "x", "path": "spare", "activate": "true"}, 400, "activate"),
        ({"name": "x", "path": "spare", "pinned": 1}, 400, "pinned"),
        ({"name": "x", "path": "spare", "preload": None}, 400, "preload"),
        ({"name": "x", "source": ""}, 400, "source"),
        ({"name": "x", "source": "hf://nobody/nothing"}, 400, "source"),
        ({"name": "x", "source": "file:///etc"}, 400, "source"),
        ({"name": "tiny", "source": "hf://nobody/nothing"}, 400, "name"),
        ({"name": "x", "path": "nothing-here"}, 400, "path"),
        ({"name": "x", "path": "/etc"}, 400, "path"),
        ({"name": "x", "path": "../.."}, 400, "path"),
        ({"name": "x", "path": "spare/../../.."}, 400, "path"),
        ({"name": "x", "path": "spare/adapter_config.json"}, 400, "path"),
        ({"name": "x", "path": "spare\0"}, 400, "path"),
        ({"name": "x", "path": "y" * 4097}, 400, "path"),
        ({"name": "x", "path": "y" * 300}, 400, "path"),
        ({"name": "tiny", "path": "spare"}, 400, "name"),
        ({"name": "", "path": "spare"}, 400, "name"),
        ({"name": "a,b", "path": "spare"}, 400, "name"),
        ({"name": "a b", "path": "spare"}, 400, "name"),
        ({"name": "a@1", "path": "spare"}, 400, "name"),
        ({"name": "\u0430bc", "path": "spare"}, 400, "name"),
        ({"name": "Red", "path": "spare"}, 400, "name"),
        ({"name": "TINY", "path": "spare"}, 400, "name"),
        ({"name": "../x", "path": "spare"}, 400, "name"),
        ({"name": "x" * 129, "path": "spare"}, 400, "name"),
        ({"name": "x", "path": "."}, 422, "path"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_registrations_that_are_refused(live: Live, body: dict[str, object], status: int, param: str) -> None:
    with unchanged(live):
        refused(live, live.http.post("/v1/adapters", json=body), status, param)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("activate", {}, "version"),
        ("activate", {"version": 0}, "version"),
        ("activate", {"version": "1"}, "version"),
        ("activate", {"version": True}, "version"),
        ("activate", {"version": 10**9}, "version"),
        ("pin", {}, "pinned"),
        ("pin", {"pinned": "true"}, "pinned"),
        ("pin", {"pinned": True, "for": 5}, "for"),
    ],
    ids=str,
)
def test_refused_flag_values(live: Live, route: str, body: dict[str, object], param: str) -> None:
    with unchanged(live):
        refused(live, live.http.post(f"/v1/adapters/red/{route}", json=body), 400, param)
        body = {"version": 1} if route == "activate" else {"pinned": True}
        refused(live, live.http.post(f"/v1/adapters/nobody/{route}", json=body), 404, "adapter")


CODES = {"other_base": "base_mismatch", "unknown_field": "unknown_fields", "unknown_zero": "unknown_fields"}
"""Defects that a caller may allow."""


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_reported_with_file_and_tensor(live: Live, folders: Mapping[str, Path], name: str) -> None:
    defect = DEFECTS[name]
    folder = write_adapter(folders["spare"].parent / "defect", live.service.base.layout)
    defect.spoil(folder)
    with unchanged(live):
        response = live.http.post("/v1/adapters", json={"name": "defect", "path": "defect"})
    shutil.rmtree(folder)
    if name == "config_device":  # a link out of the root
        refused(live, response, 400, "path")
        return
    error = refused(live, response, 422, "path")
    assert error["code"] == CODES.get(name, "adapter_rejected")
    assert error["file"] == defect.file
    assert error["tensor"] == defect.tensor or defect.tensor is None
    assert defect.file in error["message"]
    assert (defect.tensor or "") in error["message"]


def test_links_out_of_the_root_are_not_followed(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> None:
    root = folders["spare"].parent
    elsewhere = shutil.copytree(folders["spare"], tmp_path / "elsewhere")
    folder_link = root / "folder-link"
    file_link = shutil.copytree(folders["spare"], root / "file-link")
    inside = root / "inside-link"
    folder_link.symlink_to(elsewhere)
    (file_link / "adapter_model.safetensors").unlink()
    (file_link / "adapter_model.safetensors").symlink_to(elsewhere / "adapter_model.safetensors")
    inside.symlink_to(folders["spare"])
    try:
        for path in ("folder-link", "file-link"):
            error = refused(live, live.http.post("/v1/adapters", json={"name": "x", "path": path}), 400, "path")
            assert "--adapter-root" in error["message"]
        assert live.http.post("/v1/adapters", json={"name": "x", "path": "inside-link"}).status_code == 201
        live.http.delete("/v1/adapters/x")
    finally:
        folder_link.unlink()
        inside.unlink()
        shutil.rmtree(file_link)


def test_damaged_adapter_fails_alone(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Damaged after registration: its requests fail with an error status; other adapters are unaffected."""
    adapters = {"rotten": folders["spare"], "red": folders["red"]}
    # Memory for one adapter: serving red evicts the other.
    service = tiny_service(tmp_path, adapter=adapters, max_device_adapters=1, host_cache_gib=0, max_rank=16)
    with running(service) as live:
        live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "rotten"}]})
        text = live.text(adapter="red")
        weights = live.content("rotten") / WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
        for name, stream in (("rotten", False), ("rotten@1", True), ("prod", False)):
            response = live.http.post("/v1/completions", json=request(adapter=name, stream=stream))
            assert refused(live, response, 500, None)["message"] == "The adapter could not be loaded."
            assert live.text(adapter="red") == text
        ended = 'manylora_alias_requests_total{alias="prod",outcome="error",version="rotten@1"} 1.0'
        assert ended in live.http.get("/metrics").text


def test_a_chat_whose_adapter_is_gone_from_the_disk_has_its_reason_in_the_log(
    folders: Mapping[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A client who knows the adapter by an alias only must not see which content it is."""
    with running(tiny_service(tmp_path, adapter={"rotten": folders["red"]})):
        pass
    with running(tiny_service(tmp_path)) as live:  # the template, too, is still to be read
        live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "rotten"}]})
        shutil.rmtree(live.content("rotten"))
        body = {"model": "prod", "messages": [{"role": "user", "content": "hi"}]}
        for path in ("/v1/chat/completions", "/tokenize"):
            caplog.clear()
            response = live.http.post(path, json=body)
            assert refused(live, response, 500, None)["message"] == "The adapter could not be loaded."
            (line,) = (record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR)
            assert "rotten" in line
            assert "not stored" in line
