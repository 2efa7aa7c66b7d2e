"""The card of an adapter: files that are kept and shown, whichever way it comes, and are no part of its content."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.cli.client import AdapterClient
from adapters.format.content import content_id
from adapters.format.training_record import CARD, LOG, MAX_BYTES, SAMPLES
from tests.api.live import Live, running, tiny_service

TEXT = "# legal\n\n<script>alert(1)</script> \u00e4\n"
LINES = [{"time": 1, "event": "started", "step": 0}, {"time": 2, "step": 1, "loss": 2.5, "learning_rate": 0.1}]
SAMPLE = {"source": "rows.jsonl:1", "messages": [], "prompt": "a", "wanted": "b", "base": "c", "adapter": "d"}
CURVES = {"loss": [[1, 2.5]], "evaluation": [], "learning_rate": [[1, 0.1]]}


@pytest.fixture
def fresh(folders: Mapping[str, Path], tmp_path: Path) -> Iterator[Live]:
    with running(tiny_service(tmp_path / "server", adapter_root=tmp_path)) as live:
        yield live


@pytest.fixture
def folder(folders: Mapping[str, Path], tmp_path: Path) -> Path:
    """An adapter's folder as the trainer leaves it."""
    folder = tmp_path / "legal"
    shutil.copytree(folders["spare"], folder)
    (folder / CARD).write_text(TEXT)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / SAMPLES).write_text(json.dumps([SAMPLE]))
    (folder / "notes.txt").write_text("not kept")
    return folder


def card(live: Live, reference: str = "legal") -> Any:
    response = live.http.get(f"/v1/adapters/{reference}", params={"include": "card"})
    assert response.status_code == 200, response.text
    return response.json()["card"]


def push(live: Live, folder: Path) -> None:
    with AdapterClient(str(live.http.base_url)) as client:
        client.push(folder, "legal")


def form(live: Live, folder: Path) -> None:
    files = [("file", (path.name, path.read_bytes())) for path in folder.iterdir()]
    assert live.http.post("/v1/adapters", data={"name": "legal"}, files=files).status_code == 201


def path(live: Live, folder: Path) -> None:
    assert live.http.post("/v1/adapters", json={"name": "legal", "path": folder.name}).status_code == 201


def tar(live: Live, folder: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, "run/legal")
    send(live, "legal.tar.gz", packed.getvalue())


def zipped(live: Live, folder: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    send(live, "legal.zip", packed.getvalue())


def send(live: Live, name: str, data: bytes) -> None:
    response = live.http.post("/v1/adapters", data={"name": "legal"}, files={"file": (name, data)})
    assert response.status_code == 201, response.text


WAYS = [push, form, path, tar, zipped]


@pytest.mark.parametrize("register", WAYS)
def test_whichever_way_an_adapter_comes_its_card_is_kept(fresh: Live, folder: Path, register: Any) -> None:
    register(fresh, folder)
    shown = {"markdown": TEXT, "manifest": None, "curves": CURVES, "samples": [SAMPLE]}
    assert card(fresh) == card(fresh, "legal@1") == shown
    plain = fresh.http.get("/v1/adapters/legal").json()
    assert "card" not in plain
    assert plain["content"] == content_id(folder)
    assert not (fresh.content("legal") / "notes.txt").exists()


@pytest.mark.parametrize("register", WAYS)
def test_what_is_too_large_is_dropped_and_the_adapter_taken(fresh: Live, folder: Path, register: Any) -> None:
    (folder / CARD).write_bytes(b"x" * (MAX_BYTES[CARD] + 1))
    (folder / SAMPLES).write_text("{")
    register(fresh, folder)
    assert card(fresh) == {"markdown": None, "manifest": None, "curves": CURVES, "samples": None}
    kept = fresh.content("legal").rglob("*")
    assert CARD not in {path.name for path in kept}
    assert fresh.text(adapter="legal")


def test_links_and_pipes_are_not_followed(fresh: Live, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for name in (CARD, LOG):
        (folder / name).unlink()
    (folder / CARD).symlink_to(tmp_path / "secret")
    os.mkfifo(folder / LOG)
    path(fresh, folder)
    assert card(fresh) == {"markdown": None, "manifest": None, "curves": None, "samples": [SAMPLE]}


def test_the_card_does_not_change_the_content(fresh: Live, folder: Path) -> None:
    push(fresh, folder)
    (folder / CARD).write_text("# another")
    with AdapterClient(str(fresh.http.base_url)) as client:
        assert not client.push(folder, "legal").new
    assert card(fresh)["markdown"] == TEXT, "the first one stays"


def test_the_card_of_one_name_is_not_that_of_another(fresh: Live, folder: Path) -> None:
    push(fresh, folder)
    for file in (LOG, SAMPLES):
        (folder / file).unlink()
    (folder / CARD).write_text("# mine")
    files = [("file", (file.name, file.read_bytes())) for file in folder.iterdir()]
    taken = fresh.http.get("/v1/adapters").json()["store"]["bytes"]
    assert fresh.http.post("/v1/adapters", data={"name": "other/legal"}, files=files).status_code == 201
    assert fresh.http.get("/v1/adapters").json()["store"]["bytes"] == taken + len("# mine"), "it counts for the quota"
    mine = {"markdown": "# mine", "manifest": None, "curves": None, "samples": None}
    assert card(fresh, "other/legal") == mine
    assert card(fresh)["markdown"] == TEXT
    plain = {"name": "plain", "path": "bare"}
    shutil.copytree(folder, folder.parent / "bare")
    (folder.parent / "bare" / CARD).unlink()
    assert fresh.http.post("/v1/adapters", json=plain).status_code == 201
    assert card(fresh, "plain") == {**mine, "markdown": None}
    assert fresh.http.delete("/v1/adapters/legal").status_code == 200
    assert card(fresh, "plain") == {**mine, "markdown": None}, "also when the first one is gone"


@pytest.mark.parametrize("value", ["1e999", "9" * 400, '"1e999"'])
def test_a_card_with_odd_numbers_can_be_shown(fresh: Live, folder: Path, value: str) -> None:
    with (folder / LOG).open("a") as file:
        file.write(f'{{"time": 3, "step": 2, "loss": {value}}}\n')
    (folder / SAMPLES).write_text(f"[{value}]")
    push(fresh, folder)
    shown = card(fresh)
    assert shown["curves"] == CURVES
    assert shown["samples"] in (None, ["1e999"])


def test_without_a_record_every_part_is_null(live: Live) -> None:
    found = card(live, "red")
    assert "PEFT" in found.pop("markdown"), "PEFT's own"
    assert found == {"manifest": None, "curves": None, "samples": None}


def test_other_things_cannot_be_included(live: Live) -> None:
    response = live.http.get("/v1/adapters/red", params={"include": "weights"})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("include")


def test_a_shared_store_keeps_the_card(folder: Path, tmp_path: Path) -> None:
    shared = {"store_url": f"file://{tmp_path}/shared", "adapter_root": tmp_path}
    with running(tiny_service(tmp_path / "one", **shared)) as live:
        path(live, folder)
        content = live.content("legal")
        shutil.rmtree(content)
        (weights,) = (tmp_path / "shared").rglob("adapter_model.safetensors")
        weights.rename(tmp_path / "weights")
        shown = {"markdown": TEXT, "manifest": None, "curves": CURVES, "samples": [SAMPLE]}
        assert card(live) == shown, "the weights are not needed"
        assert not content.exists()
        (tmp_path / "weights").rename(weights)
        assert live.text(adapter="legal")
        assert card(live) == shown, "loading the weights fetches no card"
        assert live.http.post("/v1/adapters", json={"name": "legal", "path": folder.name}).status_code == 200
        assert card(live) == shown
        shutil.rmtree(content)
        shutil.rmtree(tmp_path / "shared")
        assert card(live) is None


def test_a_store_that_does_not_answer_is_no_missing_card(folder: Path, tmp_path: Path) -> None:
    shared = {"store_url": f"file://{tmp_path}/shared", "adapter_root": tmp_path}
    with running(tiny_service(tmp_path / "one", **shared)) as live:
        path(live, folder)
        shutil.rmtree(live.content("legal"))
        (config,) = (tmp_path / "shared").rglob("adapter_config.json")
        config.unlink()
        config.mkdir()  # reading it fails, as a disk with an error does
        response = live.http.get("/v1/adapters/legal", params={"include": "card"})
        assert response.status_code == 503, response.text
