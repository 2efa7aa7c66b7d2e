"""vLLM's own routes for adapters, as its operators' scripts use them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.adapter_folders import DEFECTS, write_adapter
from tests.api.live import Live, request, unchanged


def load(live: Live, **body: Any) -> httpx.Response:
    return live.http.post("/v1/load_lora_adapter", json=body)


def unload(live: Live, **body: Any) -> httpx.Response:
    return live.http.post("/v1/unload_lora_adapter", json=body)


def error(response: httpx.Response, status: int, kind: str) -> str:
    """Return the message of an error in vLLM's format."""
    assert response.status_code == status, response.text
    (name, body), *more = response.json().items()
    assert (name, more) == ("error", [])
    message: str = body.pop("message")
    assert body == {"type": kind, "param": None, "code": status}
    return message


@pytest.fixture
def loaded(live: Live) -> Iterator[str]:
    """An adapter loaded by vLLM's route, removed after the test."""
    response = load(live, lora_name="loaded", lora_path="spare")
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'loaded' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    yield "loaded"
    live.http.delete("/v1/adapters/loaded")


def test_load_use_unload(live: Live, loaded: str) -> None:
    assert live.http.get(f"/v1/adapters/{loaded}").json()["residency"] == "device"
    assert live.complete(model=loaded)["adapter"][0]["name"].startswith("loaded@")
    response = unload(live, lora_name=loaded, lora_int_id=7)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'loaded' removed successfully.")
    assert live.http.post("/v1/completions", json=request(model=loaded)).status_code == 404
    assert error(unload(live, lora_name=loaded), 404, "NotFoundError") == ("The lora adapter 'loaded' cannot be found.")


def test_a_known_name_needs_load_inplace(live: Live, loaded: str, folders: Mapping[str, Path]) -> None:
    with unchanged(live):
        message = error(load(live, lora_name=loaded, lora_path=str(folders["red"])), 400, "InvalidUserInput")
    assert message == (
        "The lora adapter 'loaded' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    assert load(live, lora_name=loaded, lora_path=str(folders["red"]), load_inplace=True).status_code == 200
    assert live.text(model=loaded) == live.text(model="red")
    assert len(live.service.registry.entry(loaded).versions) == 2
    assert unload(live, lora_name=loaded).status_code == 200
    assert not live.service.registry.knows(loaded)


@pytest.mark.parametrize("body", [{}, {"lora_name": "x"}, {"lora_path": "spare"}, {"lora_name": "", "lora_path": ""}])
def test_both_fields_are_needed(live: Live, body: dict[str, str]) -> None:
    with unchanged(live):
        message = error(load(live, **body), 400, "InvalidUserInput")
    assert message == "Both 'lora_name' and 'lora_path' must be provided."


def test_the_name_is_needed_to_unload(live: Live) -> None:
    for body in ({}, {"lora_name": ""}):
        assert "needs to be provided" in error(unload(live, **body), 400, "InvalidUserInput")


def test_base_name_is_refused(live: Live) -> None:
    message = error(load(live, lora_name="tiny", lora_path="spare"), 400, "InvalidUserInput")
    assert message == "The lora adapter 'tiny' conflicts with a served base model."
    error(unload(live, lora_name="tiny"), 404, "NotFoundError")


@pytest.mark.parametrize("path", ["spare\0", "\0", "x" * 4096])
def test_a_path_that_no_folder_can_have(live: Live, path: str) -> None:
    with unchanged(live):
        error(load(live, lora_name="x", lora_path=path), 400, "BadRequestError")


@pytest.mark.parametrize("path", ["/etc", "../..", "nothing-here"])
def test_a_path_outside_the_root(live: Live, path: str) -> None:
    with unchanged(live):
        assert "--adapter-root" in error(load(live, lora_name="x", lora_path=path), 400, "BadRequestError")


def test_a_rejected_adapter(live: Live, folders: Mapping[str, Path]) -> None:
    folder = write_adapter(folders["spare"].parent / "vllm-defect", live.service.base.layout)
    DEFECTS["nan"].spoil(folder)
    with unchanged(live):
        message = error(load(live, lora_name="x", lora_path=str(folder)), 400, "BadRequestError")
    assert DEFECTS["nan"].reason in message


def test_versions_and_aliases_cannot_be_unloaded(live: Live) -> None:
    live.http.put("/v1/aliases/prod", json={"targets": [{"adapter": "red"}]})
    with unchanged(live):
        error(unload(live, lora_name="red@1"), 404, "NotFoundError")
        error(unload(live, lora_name="prod"), 404, "NotFoundError")
        error(load(live, lora_name="prod", lora_path="spare"), 409, "Conflict")
        error(unload(live, lora_name="red"), 409, "Conflict")
    live.http.delete("/v1/aliases/prod")


def test_unknown_fields_of_vllm_routes(live: Live) -> None:
    with unchanged(live):
        for body, param in (
            ({"lora_name": 5}, "lora_name"),
            ({"colour": 1}, "colour"),
            ({"is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ):
            response = load(live, **{"lora_name": "x", "lora_path": "spare", **body})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
