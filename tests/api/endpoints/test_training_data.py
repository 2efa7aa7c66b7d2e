"""``POST /v1/training/data``: the trainer's own report, and rows as the model sees them."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from server import training_data
from tests.api.live import Live, running, tiny_service, wait_for
from tests.training.rows import question
from training.data.dataset import build_dataset
from training.settings import TrainSettings

PATH = "/v1/training/data"
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = [question(index) for index in range(24)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def send(live: Live, content: bytes, name: str = "rows.jsonl", **fields: Any) -> httpx.Response:
    return live.http.post(PATH, files={"file": (name, content)}, data=fields)


def test_the_report_is_that_of_the_trainer(live: Live, tmp_path: Any) -> None:
    rows = [*ROWS, ROWS[0], {"instruction": "Why?", "output": ""}, {"wrong": 1}]
    response = send(live, lines(rows), rows="3", eval_share="0.25")
    assert response.status_code == 200, response.text
    answer = response.json()
    report = answer["report"]
    (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    settings = TrainSettings(data=(str(tmp_path / "rows.jsonl"),), name="x", skip_bad=True, eval_share=0.25)
    base = live.service.base
    expected = build_dataset(settings, base.tokenizer, base.max_model_len)
    counts = expected.report.counts()
    shared = counts.keys() - {"files", "left_out"}
    assert {name: report[name] for name in shared} == {name: counts[name] for name in shared}
    assert (report["rows"], report["evaluation"], report["left_out"]) == (27, 6, {"duplicate": 1, "bad": 2})
    assert [line.partition(": ")[0] for line in report["bad"]] == ["rows.jsonl:26", "rows.jsonl:27"]
    assert sum(bar["rows"] for bar in report["histogram"]) == report["train"] == 18
    assert any("Only 18 rows" in sentence for sentence in report["advice"])
    (file,) = report["files"]
    assert (file["file"], file["format"], file["rows"]) == ("rows.jsonl", "alpaca", 27)
    assert len(answer["rows"]) == 3
    for shown, example in zip(answer["rows"], expected.train, strict=False):
        assert shown["source"] == example.source.rpartition("/")[2]
        assert (shown["tokens"], shown["trained"]) == (len(example.input_ids), example.trained)
        assert "".join(span["text"] for span in shown["spans"]) == base.tokenizer.decode(example.input_ids)
        (trained,) = [span["text"] for span in shown["spans"] if span["trained"]]
        assert trained.startswith(example.answer)
        assert not shown["spans"][0]["trained"]


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("../~share=2.json", json.dumps([CHAT]).encode(), "chat"),
        ("\u4e9c" * 90 + ".jsonl", lines([CHAT]), "chat"),
        ("received-rows.*[a-z]\U0001f600.jsonl", lines([CHAT]), "chat"),
        ("folder/rows.CSV", b"instruction,output\nWhy?,So.\n", "alpaca"),
    ],
)
def test_formats_and_names(live: Live, name: str, content: bytes, format: str) -> None:
    response = send(live, content, name)
    assert response.status_code == 200, response.text
    (file,) = response.json()["report"]["files"]
    assert (file["file"], file["format"]) == (name.rpartition("/")[2], format)


@pytest.mark.parametrize(
    ("content", "fields", "param", "message"),
    [
        (b"", {}, "file", "has no rows"),
        (b"{]", {}, "file", "no row is left to train on"),
        (lines([{"colour": 1}]), {}, "file", "rows.jsonl"),
        (lines(ROWS), {"name": "rows.txt"}, "file", "must end in one of .jsonl, .json, .csv, .parquet"),
        (lines(ROWS), {"name": "rows.yaml"}, "file", "must end in"),
        (lines(ROWS), {"rows": "-1"}, "rows", "rows"),
        (lines(ROWS), {"rows": "many"}, "rows", "rows"),
        (lines(ROWS), {"colour": "1"}, "colour", "Unknown field"),
        (lines(ROWS), {"format": "poem"}, "format", "format"),
        (lines(ROWS), {"max_length": "100000"}, "max_length", "the context of this model"),
        (lines(ROWS), {"eval_share": "1"}, "eval_share", "eval_share"),
    ],
)
def test_bad_input(live: Live, content: bytes, fields: dict[str, str], param: str, message: str) -> None:
    response = send(live, content, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert "/tmp" not in error["message"]


def test_a_file_whose_rows_are_all_bad_is_explained_row_by_row(live: Live) -> None:
    response = send(live, b'{"instruction": "x", "output": ""}\n{]\n')
    assert response.status_code == 400, response.text
    head, *rows = response.json()["error"]["message"].splitlines()
    assert head == "no row is left to train on; left out: 2 bad"  # without an option that the sender cannot give
    assert [row.split(": ")[0].strip() for row in rows] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert "`output` is empty" in rows[0]
    assert "invalid JSON" in rows[1]


def test_bodies_that_are_no_form_with_a_file(live: Live) -> None:
    assert live.http.post(PATH, json={"file": "x"}).status_code == 415
    assert live.http.post(PATH, files={"other": ("rows.jsonl", b"x")}).json()["error"]["param"] == "file"
    assert live.http.post(PATH, data={"rows": "1"}, files={"rows": (None, "1")}).status_code == 400
    malformed = live.http.post(PATH, content=b"x", headers={"content-type": "multipart/form-data"})
    assert malformed.status_code == 400


def test_a_file_may_be_larger_than_other_bodies_but_not_too_large(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    assert live.service.settings.max_body_mib == 0.25
    many = lines([question(index) for index in range(8000)])
    assert len(many) > 2**18
    answer = send(live, many, rows="0", max_length="200").json()
    assert (answer["report"]["rows"], answer["rows"]) == (8000, [])
    limit = training_data.MAX_BYTES + 2**21
    sent = live.http.post(
        PATH, content=iter([b"x" * limit]), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert sent.status_code in (400, 413)


def test_the_process_that_examines_is_limited(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_data, "CPU_SECONDS", 1)
    response = send(live, lines([question(index) for index in range(60_000)]))
    assert response.status_code == 400
    assert "needs more than 1 s" in response.json()["error"]["message"]


def test_other_requests_are_answered_meanwhile(live: Live) -> None:
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(send(live, lines(ROWS))))
    thread.start()
    wait_for(lambda: live.service.registration_limits.in_progress or found)
    while thread.is_alive():
        assert live.http.get("/livez", timeout=10).status_code == 200
    assert found[0].status_code == 200


@contextmanager
def slow_upload(live: Live) -> Iterator[None]:
    """Send the beginning of a form, and no more."""
    with socket.create_connection((live.http.base_url.host, live.http.base_url.port or 0), timeout=20) as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        client.sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
        yield


def test_slow_uploads_keep_no_other_file_waiting(tmp_path: Any) -> None:
    with running(tiny_service(tmp_path)) as live, ExitStack() as uploads:
        for _ in range(training_data.MAX_UPLOADS - 1):
            uploads.enter_context(slow_upload(live))
        wait_for(lambda: live.service.registration_limits.in_progress == training_data.MAX_UPLOADS - 1)
        assert send(live, lines(ROWS)).status_code == 200
        uploads.enter_context(slow_upload(live))
        wait_for(lambda: live.service.registration_limits.in_progress == training_data.MAX_UPLOADS)
        response = send(live, lines(ROWS))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_uploads")
        uploads.close()
        wait_for(lambda: live.service.registration_limits.in_progress == 0)
        assert send(live, lines(ROWS)).status_code == 200


def test_too_many_at_once_are_refused(tmp_path: Any) -> None:
    with running(tiny_service(tmp_path)) as live:
        for _ in range(training_data.MAX_RUNNING):
            live.service.data_previews._value -= 1
        response = send(live, lines(ROWS))
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_uploads")


def test_without_the_trainers_packages(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_data.require.__globals__["EXTRAS"], "train", ("no_such_package",))
    assert "training_data" not in live.http.get("/v1/whoami").json()["features"]
    response = send(live, lines(ROWS))
    assert response.status_code == 400
    assert 'pip install "manylora[train]"' in response.json()["error"]["message"]


def test_nothing_is_left_on_disk(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with running(tiny_service(tmp_path)) as live:
        assert send(live, lines(ROWS)).status_code == 200
        assert [path.name[:19] for path in (tmp_path / "tmp").iterdir()] == ["manylora-tokenizer-"]
    assert list((tmp_path / "tmp").iterdir()) == []
