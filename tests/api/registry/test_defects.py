"""Every defect, by every way in: it is told with its place, nothing changes, and the corrected adapter is then served.

By path it is in ``test_adapters.py``.
"""

import os
import re
import tarfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from adapters.format.files import WEIGHTS
from adapters.sources.watched_folder import RETRY_SECONDS
from bases.base import Base, make_base
from bases.errors import ConfigError
from tests.adapter_folders import DEFECTS, Defect, write_adapter
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, running, tiny_service, unchanged, wait_for
from tests.api.registry.test_adapters import upload
from tests.tiny import tiny_model, tiny_tokenizer

LONG_AGO = 1e9
"""Unix time of files that count as settled."""
OTHERWISE: Mapping[str, str] = {
    "header_giant": "is larger than",
    "weights_folder": "is missing",
    "weights_fifo": "only plain files are taken",
    "config_device": "only plain files are taken",
    "dangling": "only plain files are taken",
}
"""Messages of uploads that fail before the folder is checked."""
CODES: Mapping[str, str] = {
    "other_base": "base_mismatch",
    "unknown_field": "unknown_fields",
    "unknown_zero": "unknown_fields",
}
"""Error codes of defects that a registration may allow."""


def spoiled(folder: Path, live: Live, defect: Defect) -> Path:
    defect.spoil(write_adapter(folder, live.service.base.layout))
    return folder


def packed(folder: Path) -> bool:
    """Return whether the folder has something that only an archive can contain."""
    return any(path.is_symlink() or not path.is_file() for path in folder.iterdir())


def upload_archive(live: Live, folder: Path, name: str) -> httpx.Response:
    file = folder.parent / "adapter.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return live.http.post("/v1/adapters", data={"name": name}, files={"file": (file.name, file.read_bytes())})


def told(name: str, message: str, live: Live) -> bool:
    """Return whether a message contains the defect's place and reason."""
    defect = DEFECTS[name]
    reasons = {"other_base": live.service.base.layout.fingerprint, "header_giant": OTHERWISE["header_giant"]}
    return all(part in message for part in (defect.file, defect.tensor or "", reasons.get(name, defect.reason)))


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_in_an_upload(live: Live, name: str, tmp_path: Path) -> None:
    folder = spoiled(tmp_path / "spoiled", live, DEFECTS[name])
    send = upload_archive if packed(folder) else lambda live, folder, name: upload(live, folder, name=name)
    with unchanged(live):
        response = send(live, folder, f"defects/{name}")
        error = refused(live, response, 422, "file")
        assert live.http.get(f"/v1/adapters/defects/{name}").status_code == 404
    assert error["code"] == CODES.get(name, "adapter_rejected")
    assert error["file"] == DEFECTS[name].file
    assert OTHERWISE[name] in error["message"] if name in OTHERWISE else told(name, error["message"], live)
    corrected = upload(live, write_adapter(tmp_path / "corrected", live.service.base.layout), name=f"defects/{name}")
    assert (corrected.status_code, corrected.json()["version"]) == (201, 1), corrected.text
    live.complete(adapter=f"defects/{name}")
    live.http.delete(f"/v1/adapters/defects/{name}").raise_for_status()


@pytest.fixture(scope="module")
def base() -> Base:
    return make_base(tiny_model(), tiny_tokenizer(), "tiny")


def test_defect_in_the_watched_folder(tmp_path: Path, base: Base) -> None:
    """All defects exist at startup: each is listed, valid folders are served, and each is repaired."""
    root = tmp_path / "watched"
    for name, defect in DEFECTS.items():
        defect.spoil(write_adapter(root / name, base.layout))
    for name in ("a-first", "z-last"):
        write_adapter(root / name, base.layout, seed=1)
    settle(root)
    with running(tiny_service(tmp_path, adapter_dir=root, max_rank=16)) as live:
        wait_for(lambda: live.service.registry.knows("z-last") and len(refusals(live)) == len(DEFECTS))
        told_of = refusals(live)
        assert {name for name in DEFECTS if not told(name, told_of[name], live)} == set()
        assert [entry.name for entry in live.service.registry.entries()] == ["a-first", "z-last"]
        live.complete(adapter="a-first")
        for seed, name in enumerate(DEFECTS):
            corrected = upload(live, write_adapter(tmp_path / "corrected", base.layout, seed=seed), name=name)
            assert (corrected.status_code, corrected.json()["version"]) == (201, 1), corrected.text
            live.complete(adapter=name, max_tokens=1)
        assert refusals(live) == told_of, "what lies in the folder is as bad as before"


def test_defect_in_a_folder_served_before(tmp_path: Path, base: Base) -> None:
    """A replacement that is refused, before and after a restart, leaves the previous version active."""
    names = ("nan", "no_weights", "config_text")
    root = tmp_path / "watched"
    for name in names:
        write_adapter(root / name, base.layout)
    settle(root)
    settings = {"adapter_dir": root, "max_rank": 16}
    with running(tiny_service(tmp_path, **settings)) as live:
        wait_for(lambda: all(map(live.service.registry.knows, names)) and len(live.registered()[2]) == 2)
        before, answer = live.registered(), live.text(adapter="nan")
        for name in names:
            DEFECTS[name].spoil(root / name)
        wait_for(lambda: refusals(live).keys() == set(names))
        wait_for(lambda: live.registered() == before)
        assert live.text(adapter="nan") == answer
    with running(tiny_service(tmp_path, **settings)) as live:
        wait_for(lambda: refusals(live).keys() == set(names))
        wait_for(lambda: live.registered() == before)
        assert live.text(adapter="nan") == answer
        for name in names:
            (root / name / WEIGHTS).unlink(missing_ok=True)
            write_adapter(root / name, base.layout, seed=1)
        wait_for(lambda: not refusals(live) and all(live.service.registry.knows(f"{name}@2") for name in names))
        assert live.text(adapter="nan") != answer


def refusals(live: Live) -> dict[str, str]:
    """Return name -> reason of the refused folders."""
    return {each["name"]: each["reason"] for each in live.http.get("/v1/adapters").json()["refused"]}


def settle(root: Path) -> None:
    """Give all files in the folder an old modification time."""
    for path in root.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


@pytest.mark.parametrize(
    "names", [list(DEFECTS)[::10], pytest.param(list(DEFECTS), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_defect_in_a_folder_named_at_startup(tmp_path: Path, base: Base, names: list[str]) -> None:
    """``--adapter``: the server does not start, and the data folder is unchanged."""
    good = write_adapter(tmp_path / "good", base.layout)

    def start(name: str, folder: Path) -> None:
        tiny_service(tmp_path, adapter={name: folder}, max_rank=16).close()

    def stored() -> set[str]:
        return {path.name for path in (tmp_path / "data" / "adapters").iterdir()}

    start("good", good)
    before = stored()
    for name in names:
        defect, folder = DEFECTS[name], tmp_path / name
        defect.spoil(write_adapter(folder, base.layout))
        with pytest.raises(ConfigError, match=f"--adapter: {name}={re.escape(str(folder))}: .*{defect.file}"):
            start(name, folder)
        assert stored() == before
    start(names[0], write_adapter(tmp_path / "corrected", base.layout, seed=1))
    with running(tiny_service(tmp_path, max_rank=16)) as live:
        assert {entry.name for entry in live.service.registry.entries()} == {"good", names[0]}


def test_no_room_beside_pinned_adapters(tmp_path: Path, base: Base) -> None:
    """The adapter is valid, but the device is full: every route reports that, and the folder is retried."""
    small = {"max_device_adapters": 4, "device_ranks": 16, "max_rank": 16}
    large = write_adapter(tmp_path / "watched" / "large", base.layout, rank=16)
    settle(tmp_path / "watched")
    with running(tiny_service(tmp_path, **small)) as live:
        upload(live, write_adapter(tmp_path / "kept", base.layout, rank=8), name="kept").raise_for_status()
        live.http.post("/v1/adapters/kept/pin", json={"pinned": True}).raise_for_status()
        with unchanged(live):
            error = refused(live, upload(live, large, name="large"), 409, None)
            wait_for(lambda: len(live.registered()[2]) == 2)
    assert error["code"] == "too_many_pins"
    threads = set(threading.enumerate())
    with pytest.raises(ConfigError, match=r"--adapter: large=.*do not fit the device"):
        tiny_service(tmp_path, adapter={"large": large}, **small)
    assert set(threading.enumerate()) <= threads, "what did not start is still running"
    with running(tiny_service(tmp_path, adapter_dir=large.parent, **small)) as live:
        wait_for(lambda: refusals(live))
        assert "do not fit the device" in refusals(live)["large"]
        live.http.post("/v1/adapters/kept/pin", json={"pinned": False}).raise_for_status()
        assert live.service.watched_folder
        live.service.watched_folder.scan(time.time() + RETRY_SECONDS)
        assert live.service.registry.knows("large")
