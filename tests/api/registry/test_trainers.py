"""Folders of training tools, unchanged: the adapter is served, and its receipt names the ignored files."""

import copy
import io
import json
import shutil
import socket
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from adapters.cli.client import AdapterClient
from adapters.errors import AdapterRejected
from adapters.format.archive import max_bytes
from adapters.format.content import content_id
from adapters.format.files import FILES, ORIGIN, TOKENIZER_CONFIG
from tests.api.generation.test_bad_input import refused
from tests.api.live import Live, running, tiny_service, unchanged, wait_for
from tests.api.registry.test_defects import settle
from tests.tiny import tiny_model, tiny_tokenizer
from tests.trainers import FORMATS, TRAINERS, Output

LARGE = 1 << 20
"""Bytes of an optimizer's state; the adapter has some thousands."""


def files_of(folder: Path) -> dict[str, bytes]:
    """Return path below the folder -> content, in path order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def as_tar(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, ".")
    return [("file", ("legal.tar.gz", file.getvalue()))]


def as_zip(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files_of(folder).items():
            archive.writestr(name, content)
    return [("file", ("legal.zip", file.getvalue()))]


def as_files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", item) for item in files_of(folder).items()]


WAYS: Mapping[str, Callable[[Path], list[tuple[str, tuple[str, bytes]]]]] = {
    "tar.gz": as_tar,
    "zip": as_zip,
    "multipart": as_files,
}


def laid_out(folder: Path, output: Output, adapter: Path) -> Path:
    """Write a tool's output around ``adapter``; other adapters in it have other content."""
    for name in output.files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        own = (path.parent.relative_to(folder).as_posix().replace(".", "", 1) or "") == output.adapter
        if own and (adapter / path.name).exists():
            shutil.copy(adapter / path.name, path)
        elif own and path.name in (ORIGIN, TOKENIZER_CONFIG):
            path.write_text("{}")
        else:
            path.write_bytes(bytes(LARGE) if path.name == "optimizer.pt" else b"older")
    return folder


@pytest.fixture(scope="module")
def outputs(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Path]]:
    """A folder for each tool, under the server's ``adapter_root``."""
    root = folders["spare"].parent / "trainers"
    yield {tool: laid_out(root / tool, output, folders["spare"]) for tool, output in TRAINERS.items()}
    shutil.rmtree(root)


@pytest.fixture
def gone(live: Live) -> Iterator[str]:
    """The name of an adapter that is removed after the test."""
    yield "trained"
    live.http.delete("/v1/adapters/trained")


def receipt(live: Live, name: str) -> dict[str, Any]:
    found: dict[str, Any] = live.http.get(f"/v1/adapters/{name}").raise_for_status().json()["receipt"]
    return found


def check_receipt(found: Mapping[str, Any], output: Output) -> None:
    assert found["taken_from"] == (output.adapter or ".")
    assert sorted(found["ignored_files"]) == sorted(output.beside())
    assert found["ignored_count"] == len(output.beside())
    assert sorted(found["other_adapters"]) == sorted(output.others)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tool", TRAINERS)
def test_trainer_folder_as_archive(live: Live, outputs: Mapping[str, Path], gone: str, tool: str, way: str) -> None:
    response = live.http.post("/v1/adapters", data={"name": gone}, files=WAYS[way](outputs[tool]))
    assert response.status_code == 201, response.text
    assert response.json()["content"] == content_id(outputs[tool] / TRAINERS[tool].adapter)
    check_receipt(receipt(live, gone), TRAINERS[tool])
    live.complete(adapter=gone)


def by_path(live: Live, name: str, folder: Path) -> httpx.Response:
    return live.http.post("/v1/adapters", json={"name": name, "path": str(folder)})


@pytest.mark.parametrize("tool", TRAINERS)
def test_trainer_folder_by_path_and_by_push(live: Live, outputs: Mapping[str, Path], gone: str, tool: str) -> None:
    """The path must be the adapter's folder; if it is a sub-folder, the error names that."""
    output, folder = TRAINERS[tool], outputs[tool]
    with AdapterClient(str(live.http.base_url)) as client:
        if output.adapter:
            error = refused(live, by_path(live, gone, folder), 422, "path")
            with pytest.raises(AdapterRejected) as told:
                client.push(folder, gone)
            assert str(told.value) == error["message"]
            assert f"{tool}: holds no adapter itself, but {output.adapter} in it does" in error["message"]
            return
        by_path(live, gone, folder).raise_for_status()
        check_receipt(receipt(live, gone), output)
        live.http.delete(f"/v1/adapters/{gone}").raise_for_status()
        pushed = client.push(folder, gone)
        check_receipt(receipt(live, gone), output)
    assert pushed.adapter["content"] == content_id(folder)


def test_trainer_folder_in_the_watched_folder(outputs: Mapping[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(outputs["trl"].parent, tmp_path / "watched")
    settle(root)
    with running(tiny_service(tmp_path, adapter_dir=root, max_rank=16)) as live:
        tops = {tool for tool, output in TRAINERS.items() if not output.adapter}
        wait_for(lambda: len(live.http.get("/v1/adapters").json()["refused"]) == len(TRAINERS) - len(tops))
        assert {entry.name for entry in live.service.registry.entries()} == tops
        for tool in tops:
            check_receipt(receipt(live, tool), TRAINERS[tool])
        reasons = {each["name"]: each["reason"] for each in live.http.get("/v1/adapters").json()["refused"]}
        assert "but checkpoint-93 in it does" in reasons["ms-swift"]


def test_trainer_folder_file_by_file(live: Live, outputs: Mapping[str, Path], gone: str) -> None:
    """curl sends names without their folders."""
    folder = outputs["llama-factory"]
    files = sorted(path for path in folder.iterdir() if path.is_file())
    words = [word for path in files for word in ("-F", f"file=@{path}")]
    command = ["curl", "-sS", f"{live.http.base_url}/v1/adapters", "-F", f"name={gone}", *words]
    card = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert card["content"] == content_id(folder), card
    left = [path.name for path in files if path.name not in FILES]
    assert receipt(live, gone)["ignored_files"] == left


@pytest.mark.parametrize("way", ["tar.gz", "multipart"])
def test_ignored_files_may_be_larger_than_any_adapter(
    live: Live, folders: Mapping[str, Path], tmp_path: Path, gone: str, way: str
) -> None:
    folder = shutil.copytree(folders["spare"], tmp_path / "large")
    (folder / "tokenizer.json").write_bytes(bytes(live.service.store.limit + (20 << 20)))
    response = live.http.post("/v1/adapters", data={"name": gone}, files=WAYS[way](folder))
    assert response.status_code == 201, response.text
    assert "tokenizer.json" in receipt(live, gone)["ignored_files"]


def test_too_large_upload_is_told_what_to_leave_out(live: Live) -> None:
    """From its Content-Length, before the body is read."""
    size = max_bytes(live.service.store.limit) + 1
    head = (
        f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n"
        "Content-Type: multipart/form-data; boundary=cut\r\n\r\n"
    )
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0), timeout=20) as client:
        client.sendall(head.encode())
        answer = b""
        while not answer.endswith(b"}") and (piece := client.recv(4096)):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"pack only the adapter's own files: adapter_config.json, adapter_model.safetensors" in answer


def test_receipt_belongs_to_the_version(live: Live, outputs: Mapping[str, Path], gone: str) -> None:
    """The same content was uploaded under two names with different ignored files."""
    for name, tool in ((gone, "trl"), ("trained/too", "unsloth")):
        live.http.post("/v1/adapters", data={"name": name}, files=as_zip(outputs[tool])).raise_for_status()
    check_receipt(receipt(live, gone), TRAINERS["trl"])
    check_receipt(receipt(live, "trained/too"), TRAINERS["unsloth"])
    live.http.delete("/v1/adapters/trained/too").raise_for_status()


# Folders made by the tools themselves


def trained(folder: Path) -> Path:
    """A run of transformers' Trainer: two checkpoints, and the adapter that ``save_model`` writes."""
    model = copy.deepcopy(tiny_model())
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = Trainer(peft, arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    trainer.save_model()
    return folder


def added(folder: Path) -> Path:
    """transformers' own ``add_adapter`` and ``save_pretrained``."""
    model = copy.deepcopy(tiny_model())
    model.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def two_in_one(folder: Path) -> Path:
    """PEFT's ``save_pretrained`` of a model with two adapters."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(tiny_model()), config)
    model.add_adapter("german", LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


TOOLS: Mapping[str, tuple[Callable[[Path], Path], list[str], int]] = {
    "Trainer": (trained, ["checkpoint-2", "checkpoint-4"], 10),
    "add_adapter": (added, [], 0),
    "two in one": (two_in_one, ["german"], 2),
}
"""Tool -> function, other adapters in its folder, and minimum number of files besides the adapter's."""


@pytest.mark.parametrize("way", [*WAYS, "path", "push"])
@pytest.mark.parametrize("tool", TOOLS)
def test_output_of_the_real_trainers(live: Live, gone: str, tool: str, way: str, folders: Mapping[str, Path]) -> None:
    make, others, beside = TOOLS[tool]
    folder = folders["spare"].parent / "made" / tool.replace(" ", "-")
    if not folder.exists():
        make(folder)
    if way == "path":
        by_path(live, gone, folder).raise_for_status()
    elif way == "push":
        with AdapterClient(str(live.http.base_url)) as client:
            client.push(folder, gone)
    else:
        live.http.post("/v1/adapters", data={"name": gone}, files=WAYS[way](folder)).raise_for_status()
    found = receipt(live, gone)
    assert live.http.get(f"/v1/adapters/{gone}").json()["content"] == content_id(folder)
    assert (found["taken_from"], found["other_adapters"]) == (".", others)
    assert sorted(found["ignored_files"]) == sorted(files_of(folder).keys() - set(FILES))
    assert found["ignored_count"] >= beside


# Folders without an adapter of PEFT's format


@pytest.mark.parametrize("format", FORMATS)
def test_foreign_format_is_reported_the_same_by_every_route(
    live: Live, folders: Mapping[str, Path], tmp_path: Path, format: str
) -> None:
    files, file, reason = FORMATS[format]
    folder = folders["spare"].parent / "format"
    shutil.rmtree(folder, ignore_errors=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    with unchanged(live):
        told = {
            way: refused(live, live.http.post("/v1/adapters", data={"name": "x"}, files=pack(folder)), 422, "file")
            for way, pack in WAYS.items()
            if way != "multipart" or format != "an archive in an archive"  # as the only file of a form it is unpacked
        }
        told["path"] = refused(live, by_path(live, "x", folder), 422, "path")
    assert {(error["file"], reason in error["message"]) for error in told.values()} == {(file, True)}
    with AdapterClient(str(live.http.base_url)) as client, pytest.raises(AdapterRejected) as pushed:
        client.push(folder, "x")
    assert {error["message"] for error in told.values()} == {str(pushed.value)}
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("left_out", "field"),
    [
        ("no JSON", "left_out"),
        ("[]", "left_out"),
        ('{"files": "README.md"}', "left_out.files"),
        ('{"files": ["x"], "bytes": 1}', "left_out.bytes"),
        ('{"count": -1}', "left_out.count"),
        (json.dumps({"files": ["x"] * 101}), "left_out.files"),
        (json.dumps({"adapters": ["x" * 1025]}), "left_out.adapters.0"),
    ],
)
def test_left_out_field_is_validated(live: Live, folders: Mapping[str, Path], left_out: str, field: str) -> None:
    data = {"name": "x", "left_out": left_out}
    with unchanged(live):
        refused(live, live.http.post("/v1/adapters", data=data, files=as_zip(folders["spare"])), 400, field)


def test_source_address_given_as_a_path(live: Live) -> None:
    response = live.http.post("/v1/adapters", json={"name": "x", "path": "hf://org/name"})
    assert (
        "Send it in the field `source`; the server's --allow-source must permit it."
        in refused(live, response, 400, "path")["message"]
    )
