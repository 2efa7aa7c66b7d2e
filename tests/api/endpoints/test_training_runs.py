"""``/v1/training/runs``: runs of the trainer itself, in every state that the disk can have."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from server.training_runs import TrainingRuns
from tests.api.live import Live, running, tiny_service
from tests.training.tiny_run import tiny_settings
from training.errors import Diverged
from training.run.job import Job
from training.run.run_folder import RunFolder

RUNS = "/v1/training/runs"


def train(root: Path, name: str, **more: Any) -> RunFolder:
    """Run the trainer, where a server with its data in ``root`` looks for it."""
    out = root / "data" / "trained" / name
    given = {
        **{"name": name, "out": out, "quantization": "none", "eval_share": 0.25, "eval_steps": 4, "judge_rows": 2},
        **{"judge_tokens": 24, "max_loss_ratio": "off", **more},
    }
    Job(tiny_settings(root, **given), Console(file=io.StringIO())).run()
    return RunFolder(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server beside whose data the trainer has worked: ``team/legal`` is finished, and failed the judgement."""
    root = tmp_path_factory.mktemp("trained")
    train(root, "team/legal", min_exact_match=1.0)
    with pytest.raises(Diverged):
        train(root, "failing", learning_rate=1e30, warmup_steps=0)
    with running(tiny_service(root)) as live:
        yield live


@pytest.fixture
def root(trained: Live) -> Path:
    return trained.service.settings.data_dir / "trained"


def listed(live: Live) -> dict[str, Any]:
    return {run["id"]: run for run in live.http.get(RUNS).json()["data"]}


def test_a_finished_run(trained: Live, root: Path) -> None:
    run = trained.http.get(f"{RUNS}/team/legal").json()
    manifest = json.loads((root / "team" / "legal" / "manylora.json").read_text())
    assert (run["state"], run["step"], run["steps"], run["judging"]) == ("finished", 8, 8, False)
    assert (run["base"], run["base_fingerprint"]) == (manifest["base"]["name"], manifest["base_fingerprint"])
    assert (run["manifest"], run["evaluation"], run["settings"]) == (
        manifest,
        manifest["evaluation"],
        manifest["settings"],
    )
    assert run["passed"] is False
    assert "exact match" in run["evaluation"]["failures"][0]
    assert run["data"]["train"] == 18
    assert [step for step, _ in run["curves"]["loss"]] == list(range(1, 9))
    assert [step for step, _ in run["curves"]["evaluation"]] == [4, 8]
    assert run["loss"] == run["curves"]["loss"][-1][1]
    assert run["best_evaluation"]["loss"] == min(loss for _, loss in run["curves"]["evaluation"])
    assert run["started"] <= run["ended"] == run["updated"]
    assert len(run["samples"]) == 2
    assert run["samples"][0]["wanted"].startswith("It is ")
    assert run["published"] == []
    summary = listed(trained)["team/legal"]
    assert summary == {name: run[name] for name in summary}


def test_a_failed_run_says_why(trained: Live) -> None:
    run = listed(trained)["failing"]
    assert run["state"] == "failed"
    assert "the loss is nan" in run["reason"]
    assert run["ended"] == run["updated"]


def test_a_run_goes_on_while_its_lock_is_held(trained: Live, root: Path) -> None:
    working = root / "going.training"
    shutil.copytree(root / "failing.training", working)
    log = (working / "training.jsonl").read_text().splitlines()[0]
    (working / "training.jsonl").write_text(f'{log}\n{{"time": 1, "step": 1, "loss": 2.5}}\n{{"time": 2, "st')
    try:
        with FileLock(working / "lock"):
            run = listed(trained)["going"]
            assert (run["state"], run["step"], run["loss"], run["ended"]) == ("running", 1, 2.5, None)
        assert listed(trained)["going"]["state"] == "interrupted"
        FileLock(working / "lock", timeout=0).acquire()
    finally:
        shutil.rmtree(working)
    assert "going" not in listed(trained)


def test_versions_with_this_content_are_named(trained: Live, root: Path) -> None:
    folder = root / "team" / "legal"
    files = [("file", (path.name, path.read_bytes())) for path in folder.iterdir() if path.is_file()]
    for name in ("one", "other"):
        response = trained.http.post("/v1/adapters", data={"name": name}, files=files)
        assert response.status_code == 201, response.text
    assert trained.http.get(f"{RUNS}/team/legal").json()["published"] == ["one@1", "other@1"]
    for name in ("one", "other"):
        assert trained.http.delete(f"/v1/adapters/{name}").status_code == 200
    assert trained.http.get(f"{RUNS}/team/legal").json()["published"] == []


def test_pages(trained: Live) -> None:
    first = trained.http.get(RUNS, params={"limit": 1}).json()
    assert first["has_more"]
    second = trained.http.get(RUNS, params={"limit": 1, "after": first["data"][0]["id"]}).json()
    assert not second["has_more"]
    assert {first["data"][0]["id"], second["data"][0]["id"]} == {"team/legal", "failing"}
    response = trained.http.get(RUNS, params={"after": "nobody"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "after")


def test_links_lead_nowhere(trained: Live, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "team" / "legal", tmp_path / "outside" / "run")
    links = {root / "linked": tmp_path / "outside" / "run", root / "folder": tmp_path / "outside"}
    for link, target in links.items():
        link.symlink_to(target)
    try:
        assert listed(trained).keys() == {"team/legal", "failing"}
        for name in ("linked", "folder/run"):
            assert trained.http.get(f"{RUNS}/{name}").status_code == 404
    finally:
        for link in links:
            link.unlink()


@pytest.mark.parametrize(
    "name", ["nobody", "team", "..%2F..%2Fx", "team/..%2Fteam/legal", "team%2F%2Flegal", "%00", "-x"]
)
def test_other_names_are_no_runs(trained: Live, name: str) -> None:
    response = trained.http.get(f"{RUNS}/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "run_not_found"


def test_files_that_are_damaged_hide_nothing_else(trained: Live, root: Path) -> None:
    shutil.copytree(root / "team" / "legal", root / "damaged")
    try:
        for name, text in (("manylora.json", '{"a": NaN}'), ("training.jsonl", "x\n"), ("samples.json", "{")):
            (root / "damaged" / name).write_text(text)
        run = trained.http.get(f"{RUNS}/damaged").json()
        assert (run["state"], run["samples"], run["curves"]["loss"], run["step"]) == ("finished", [], [], 0)
    finally:
        shutil.rmtree(root / "damaged")


@pytest.fixture
def copied(root: Path) -> Iterator[Path]:
    """A copy of the finished run, to be changed."""
    folder = root / "copied"
    shutil.copytree(root / "team" / "legal", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "9" * 400, '"1e999"', "null", "-1", "true", "[" * 2000])
@pytest.mark.parametrize("field", ["time", "step", "loss"])
def test_a_line_with_an_odd_value_breaks_no_answer(trained: Live, copied: Path, field: str, value: str) -> None:
    line = json.dumps({"time": 1e9, "step": 9, "loss": 2.5, field: "?"}).replace('"?"', value)
    with (copied / "training.jsonl").open("a") as file:
        file.write(line + "\n")
    (copied / "samples.json").write_text(f"[{value}]")
    skipped = 0 if (field, value) == ("loss", "-1") else 1
    assert listed(trained)["copied"]["skipped_lines"] == skipped
    run = trained.http.get(f"{RUNS}/copied")
    assert run.status_code == 200
    assert len(run.json()["curves"]["loss"]) == 9 - skipped


def test_of_a_long_log_beginning_and_end_are_read(trained: Live, copied: Path) -> None:
    lines = (copied / "training.jsonl").read_text().splitlines(keepends=True)
    many = [f'{{"time": 1600000000, "step": {step}, "loss": 2.5}}\n' for step in range(10, 250_010)]
    last = '{"time": 1700000000, "event": "finished"}\n'
    text = "".join([*lines, *many, last])
    (copied / "training.jsonl").write_text(text)
    run = trained.http.get(f"{RUNS}/copied").json()
    assert (run["step"], run["steps"], run["updated"]) == (250_009, 8, 1_700_000_000)
    assert run["skipped_lines"] == 0
    assert 0 < len(text) - (8 << 20) <= run["skipped_bytes"] < len(text) - (8 << 20) + 200
    steps = [step for step, _ in run["curves"]["loss"]]
    assert (steps[0], steps[-1]) == (1, 250_009)


def test_a_run_that_failed_with_a_long_log_has_failed(trained: Live, root: Path) -> None:
    working = root / "long.training"
    shutil.copytree(root / "failing.training", working)
    lines = (working / "training.jsonl").read_text().splitlines(keepends=True)
    (working / "training.jsonl").write_text("".join([*lines[:-1], "damaged\n" * (1 << 20), "[]\n", lines[-1]]))
    try:
        run = listed(trained)["long"]
        assert (run["state"], run["skipped_lines"] > 1000) == ("failed", True)
        assert "the loss is nan" in run["reason"]
    finally:
        shutil.rmtree(working)


def test_a_log_is_read_again_only_after_a_change(trained: Live, copied: Path) -> None:
    log = copied / "training.jsonl"
    log.write_text('{"time": 1, "step": 1, "loss": 2.5}\n')
    assert listed(trained)["copied"]["loss"] == 2.5
    before = log.stat()
    with log.open("r+") as file:
        file.write('{"time": 1, "step": 1, "loss": 3.5}\n')
    os.utime(log, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listed(trained)["copied"]["loss"] == 2.5, "nothing says that it has changed"
    with log.open("a") as file:
        file.write('{"time": 2, "step": 2, "loss": 4.5}\n')
    assert listed(trained)["copied"]["loss"] == 4.5


def test_only_the_page_that_is_asked_for_is_read(trained: Live, copied: Path) -> None:
    runs = TrainingRuns(copied.parent)
    places, complete = runs.places()
    assert (len(places), complete) == (3, True)
    assert runs._summaries == {}
    assert runs.summary(places[0]) is not None
    assert runs._summaries.keys() == {places[0].name}
    shutil.rmtree(copied)
    (gone,) = [place for place in places if place.name == "copied"]
    assert TrainingRuns(copied.parent).summary(gone) is None


def test_a_list_says_whether_every_folder_was_searched(
    trained: Live, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained.http.get(RUNS).json()["complete"] is True
    monkeypatch.setattr("server.training_runs.MAX_FOLDERS", 1)
    answer = trained.http.get(RUNS).json()
    assert (answer["complete"], len(answer["data"]) <= 1) == (False, True)
    monkeypatch.undo()
    monkeypatch.setattr("server.training_runs.MAX_DEPTH", 1)
    answer = trained.http.get(RUNS).json()
    assert (answer["complete"], {run["id"] for run in answer["data"]}) == (False, {"copied", "failing"})


def test_a_folder_without_weights_is_no_finished_run(trained: Live, copied: Path) -> None:
    (copied / "adapter_model.safetensors").unlink()
    assert trained.http.get(f"{RUNS}/copied").status_code == 404
    assert "copied" not in listed(trained)


def test_links_in_a_runs_folder_lead_nowhere(trained: Live, root: Path, copied: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "failing.training", root / "inner.training")
    try:
        shutil.rmtree(root / "inner.training" / "adapter", ignore_errors=True)
        (root / "inner.training" / "adapter").symlink_to(root / "team" / "legal")
        run = trained.http.get(f"{RUNS}/inner").json()
        assert (run["manifest"], run["samples"]) == (None, [])
    finally:
        shutil.rmtree(root / "inner.training")
    (copied / "manylora.json").unlink()
    (copied / "manylora.json").symlink_to(root / "team" / "legal" / "manylora.json")
    assert trained.http.get(f"{RUNS}/copied").json()["manifest"] is None
    (copied / "adapter_model.safetensors").unlink()
    (copied / "adapter_model.safetensors").symlink_to(root / "team" / "legal" / "adapter_model.safetensors")
    assert trained.http.get(f"{RUNS}/copied").status_code == 404


def test_a_server_without_runs_has_an_empty_list(live: Live) -> None:
    assert live.http.get(RUNS).json() == {"object": "list", "data": [], "has_more": False, "complete": True}
