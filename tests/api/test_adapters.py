"""``/v1/adapters``: registering, looking, removing; and what runs while that happens."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.adapter_folders import DEFECTS, write_adapter
from tests.api.live import Live, events, request, wait_for
from tests.api.test_bad_input import refused
from tests.tiny import save_adapter, tiny_model


@pytest.fixture
def temporary(live: Live, folders: Mapping[str, Path]) -> Iterator[str]:
    """The name of an adapter over HTTP, gone again after the test."""
    response = live.http.post("/v1/adapters", json={"name": "temporary", "path": str(folders["spare"])})
    assert response.status_code == 201, response.text
    yield "temporary"
    live.http.delete("/v1/adapters/temporary")
    assert live.http.get("/v1/adapters/temporary").status_code == 404


def test_register_look_remove(live: Live, folders: Mapping[str, Path]) -> None:
    registered = live.http.post("/v1/adapters", json={"name": "some/new", "path": "spare"})
    assert registered.status_code == 201
    card = registered.json()
    assert (card["id"], card["object"], card["rank"], card["targets"]) == ("some/new", "adapter", 3, 2)
    assert card["size_bytes"] == (folders["spare"] / "adapter_model.safetensors").stat().st_size
    assert card["residency"] == "disk"
    assert live.http.get("/v1/adapters/some/new").json() == card
    names = [a["id"] for a in live.http.get("/v1/adapters").json()["data"]]
    assert names == ["green", "red", "some/new", "team/blue"]
    content = live.content("some/new")
    assert content.is_dir()
    answer = live.http.delete("/v1/adapters/some/new")
    assert (answer.status_code, answer.json()) == (200, {"id": "some/new", "object": "adapter", "deleted": True})
    assert not content.exists()
    assert live.http.get("/v1/adapters/some/new").status_code == 404
    assert live.http.post("/v1/completions", json=request(adapter="some/new")).status_code == 404


def test_residency_follows_use(live: Live, temporary: str) -> None:
    assert live.http.get(f"/v1/adapters/{temporary}").json()["residency"] == "disk"
    live.complete(adapter=temporary)
    assert live.http.get(f"/v1/adapters/{temporary}").json()["residency"] == "device"


def test_pages(live: Live) -> None:
    first = live.http.get("/v1/adapters", params={"limit": 2}).json()
    assert ([a["id"] for a in first["data"]], first["has_more"]) == (["green", "red"], True)
    second = live.http.get("/v1/adapters", params={"limit": 2, "after": "red"}).json()
    assert ([a["id"] for a in second["data"]], second["has_more"]) == (["team/blue"], False)


def test_a_name_can_be_given_new_weights(live: Live, temporary: str, folders: Mapping[str, Path]) -> None:
    """With the same prompt each time: the prefix cache is warm and must not serve the old weights' keys and values."""
    before, content = live.text(adapter=temporary), live.content(temporary)
    response = live.http.post("/v1/adapters", json={"name": temporary, "path": str(folders["red"])})
    assert response.status_code == 200
    assert response.json()["content"] == live.service.registry.get("red").spec.id
    assert live.text(adapter=temporary) == live.text(adapter="red") != before
    assert not content.exists()


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
        assert change.status_code == 200
        got = events(response)
    assert "".join(e["choices"][0]["text"] for e in got) == expected["choices"][0]["text"]
    assert {e["adapter"][0]["id"] for e in got} == {expected["adapter"][0]["id"]}
    wait_for(lambda: not content.exists())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "name"),
        ({"name": "x"}, 400, "path"),
        ({"name": "x", "path": 5}, 400, "path"),
        ({"name": "x", "path": ""}, 400, "path"),
        ({"name": "x", "path": "spare", "rank": 1}, 400, "rank"),
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
        ({"name": "../x", "path": "spare"}, 400, "name"),
        ({"name": "x" * 129, "path": "spare"}, 400, "name"),
        ({"name": "x", "path": "."}, 422, "path"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_registrations_that_are_refused(live: Live, body: dict[str, object], status: int, param: str) -> None:
    before = live.http.get("/v1/adapters").json()
    refused(live, live.http.post("/v1/adapters", json=body), status, param)
    after = live.http.get("/v1/adapters").json()
    assert [a["content"] for a in after["data"]] == [a["content"] for a in before["data"]]


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_told_with_its_place(live: Live, folders: Mapping[str, Path], name: str) -> None:
    defect = DEFECTS[name]
    folder = write_adapter(folders["spare"].parent / "defect", live.service.base.layout)
    defect.spoil(folder)
    response = live.http.post("/v1/adapters", json={"name": "defect", "path": "defect"})
    shutil.rmtree(folder)
    if name == "config_device":  # a link that leads out of the root, whatever it leads to
        refused(live, response, 400, "path")
        return
    error = refused(live, response, 422, "path")
    assert error["code"] == "adapter_rejected"
    assert defect.file in error["message"]
    assert (defect.tensor or "") in error["message"]


def test_links_that_lead_out_are_not_followed(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> None:
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


def test_an_adapter_whose_bytes_rot_fails_alone(live: Live, folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Damaged after it was accepted: its requests fail with a status, whole or streamed; the others do not notice."""
    folder = save_adapter(tiny_model(), folders["spare"].parent / "rotten", seed=77, r=2, target_modules=["q_proj"])
    live.http.post("/v1/adapters", json={"name": "rotten", "path": "rotten"}).raise_for_status()
    (weights,) = live.content("rotten").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    try:
        for stream in (False, True):
            response = live.http.post("/v1/completions", json=request(adapter="rotten", stream=stream))
            assert refused(live, response, 500, None)["message"] == "The adapter could not be loaded."
    finally:
        live.http.delete("/v1/adapters/rotten")
        shutil.rmtree(folder)
