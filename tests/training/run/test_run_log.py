"""The log of a run, and the samples: what a server shows of it, read as the server reads it."""

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from adapters.format.training_record import LOG, MAX_POINTS, TrainingLog, read_card, read_log, read_samples
from tests.training.tiny_run import tiny_settings, trained
from training.errors import Diverged
from training.run.job import Job
from training.run.run_folder import RunFolder


def run(root: Path, **more: object) -> int:
    given = {"eval_share": 0.25, "judge_tokens": 24, "judge_rows": 2, "eval_steps": 4, "max_loss_ratio": "off", **more}
    return Job(tiny_settings(root, **given), Console(file=io.StringIO())).run()


def test_a_finished_run_keeps_its_log_and_samples(tmp_path: Path) -> None:
    run(tmp_path, min_exact_match=1.0)
    folder = tmp_path / "adapter"
    log = read_log(folder)
    assert log is not None
    assert (log.event, log.reason, log.step) == ("finished", None, 8)
    assert [step for step, _ in log.loss] == [step for step, _ in log.learning_rate] == list(range(1, 9))
    assert [step for step, _ in log.evaluation] == [4, 8]
    started, manifest = log.started, json.loads((folder / "manylora.json").read_text())
    assert (started["name"], started["steps"], started["step"]) == ("tiny", 8, 0)
    assert (started["settings"], started["base"]) == (manifest["settings"], manifest["base"]["name"])
    assert manifest["data"] == {"sha256": manifest["data"]["sha256"], **started["data"]}
    assert started["base_fingerprint"] == manifest["base_fingerprint"]
    samples = read_samples(folder)
    assert samples is not None
    assert len(samples) == manifest["evaluation"]["answered"] > 0
    assert samples[0]["source"].startswith("rows.jsonl:")
    assert samples[0]["messages"][0]["content"].startswith("What is ")
    assert samples[0]["wanted"].startswith("It is ")
    assert {"base", "adapter"} <= samples[0].keys()
    assert (read_card(folder) or "").startswith("---\n")


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(Diverged) as raised:
        run(tmp_path, learning_rate=1e30, warmup_steps=0)
    log = read_log(RunFolder(tmp_path / "adapter").folder)
    assert log is not None
    assert (log.event, log.reason) == ("failed", str(raised.value))


def test_a_new_run_begins_a_new_log(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "adapter").folder
    folder.mkdir()
    (folder / LOG).write_text('{"time": 1, "step": 77, "loss": 1}\n')
    trained(tiny_settings(tmp_path))
    log = read_log(tmp_path / "adapter")
    assert log is not None
    assert log.step == 8


def test_a_resumed_run_repeats_what_followed_its_checkpoint() -> None:
    log = TrainingLog()
    log.add({"time": 1, "event": "started", "step": 0})
    for step in range(1, 8):
        log.add({"time": 2, "step": step, "loss": step, "learning_rate": 0.1})
    log.add({"time": 2, "step": 6, "eval_loss": 3})
    log.add({"time": 3, "event": "started", "step": 5})
    assert (log.step, log.evaluation) == (5, [])
    log.add({"time": 4, "step": 6, "loss": 60})
    assert log.loss[-2:] == [(5, 5.0), (6, 60.0)]
    assert (log.first_time, log.last_time) == (1, 4)


def test_long_curves_are_thinned_out() -> None:
    log = TrainingLog(loss=[(step, float(step)) for step in range(1, 12_346)])
    kept = log.curves()["loss"]
    assert (len(kept), kept[0], kept[-1]) == (MAX_POINTS, (1, 1.0), (12_345, 12_345.0))
    assert all(one < other for one, other in pairwise(kept))


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"time": 1, "step": 1, "loss": 2}\n{"time": 2, "st')
    log = read_log(tmp_path)
    assert log is not None
    assert log.loss == [(1, 2.0)]


def test_links_and_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"time": 1, "step": 1, "loss": 2}\n')
    (tmp_path / LOG).symlink_to(tmp_path / "elsewhere")
    assert read_log(tmp_path) is None
    (tmp_path / "README.md").write_text("x" * 300_000)
    assert read_card(tmp_path) is None
