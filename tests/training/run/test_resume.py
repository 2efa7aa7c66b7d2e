"""Resuming interrupted runs, and runs of several processes."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bases.errors import ConfigError
from tests.training.rows import question, write_rows
from tests.training.tiny_run import losses, prepared, same, tiny_settings, trained, weights
from training.progress_bar import Say
from training.run import progress
from training.run.plan import make_plan
from training.run.run import TrainResult, train
from training.run.run_folder import STATE, RunFolder, open_run_folder, run_request
from training.settings import TrainSettings

KEEP = "; a resumed run must keep it$"
"""The end of the message, as a pattern."""


@pytest.fixture(autouse=True)
def a_line_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print every step, because runs are killed at a step's line; by default there are ten seconds between lines."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)


def long(root: Path, **more: Any) -> TrainSettings:
    steps = {"max_steps": 12, "save_steps": 3, "eval_steps": 5, "accumulation": 2}
    return tiny_settings(root, **{**steps, **more})


RUN = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(int(sys.argv[2]))  # sums depend on it, and other tests may have changed it in this process
from tests.training.run.test_resume import long
from tests.training.tiny_run import trained
trained(long(Path(sys.argv[1]), out=Path(sys.argv[1], "killed")))
"""


def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = trained(long(tmp_path, out=tmp_path / "whole"))
    run_folder = RunFolder(tmp_path / "killed")
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), str(torch.get_num_threads())])
    while process.poll() is None and not (last := run_folder.last_checkpoint()):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert last is not None
    assert not run_folder.out.exists()
    with pytest.raises(
        ConfigError, match=r"^--out: a run was interrupted here; continue with --resume, or delete .*killed"
    ):
        trained(long(tmp_path, out=run_folder.out))
    said: list[str] = []
    settings = long(tmp_path, out=run_folder.out, resume=True)
    resumed = trained(settings, said.append)
    assert said[0].startswith("resuming from checkpoint-")
    assert resumed.history == whole.history
    assert same(weights(resumed.folder), weights(whole.folder))
    assert not run_folder.folder.exists()


def test_ctrl_c_keeps_the_checkpoint(tmp_path: Path) -> None:
    settings = long(tmp_path)
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line.startswith("step 8/12"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(settings, interrupt)
    assert said[-1] == "stopped; --resume will continue from checkpoint-6"
    assert not settings.folder.exists()
    assert trained(long(tmp_path, resume=True)).steps == 12


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    run_folder = cut_off(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--resume: -r was 4 when the run began and is now 8{KEEP}"):
        trained(long(tmp_path, resume=True, r=8))
    write_rows(tmp_path / "rows.jsonl", map(question, range(30)))
    with pytest.raises(ConfigError, match=r"^--resume: a data file has changed since the run began"):
        trained(long(tmp_path, resume=True))
    write_rows(tmp_path / "rows.jsonl", map(question, reversed(range(24))))
    with pytest.raises(ConfigError, match=r"^--resume: a data file has changed since the run began"):
        trained(long(tmp_path, resume=True))
    assert run_folder.last_checkpoint().name == "checkpoint-3"


def test_only_the_option_that_differs_is_named(tmp_path: Path) -> None:
    """Seed and share select other rows; the quantisation gives another base of the same model."""
    run_folder = cut_off(tmp_path)
    for option, before, now in (
        ("seed", "0", 1),
        ("eval_share", "0.1", 0.2),
        ("max_length", "256", 200),
        ("quantization", "nf4", "none"),
        ("save_steps", "3", 2),
    ):
        name = f"--{option.replace('_', '-')}"
        with pytest.raises(
            ConfigError,
            match=rf"^--resume: {name} was {before} when the run began and is now {now}{KEEP}",
        ):
            trained(long(tmp_path, resume=True, **{option: now}))
    assert run_folder.last_checkpoint().name == "checkpoint-3"


def test_data_files_may_move_before_resuming(tmp_path: Path) -> None:
    cut_off(tmp_path)
    moved = (tmp_path / "rows.jsonl").rename(tmp_path / "moved.jsonl")
    assert trained(long(tmp_path, resume=True, data=(str(moved),))).steps == 12


def test_abandoned_run_leaves_no_curves(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, report_to="tensorboard")
    run_folder = RunFolder(settings.folder)
    run_folder.runs.mkdir(parents=True)
    (run_folder.runs / "abandoned").touch()
    assert [path.name for path in (trained(settings).folder / "runs").iterdir()] != []
    assert not (settings.folder / "runs" / "abandoned").exists()


def test_partial_checkpoint_is_ignored(tmp_path: Path) -> None:
    run_folder = cut_off(tmp_path)
    half = run_folder.checkpoints / "checkpoint-6"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    run = trained(long(tmp_path, resume=True))
    assert (run.steps, len(losses(run.history))) == (12, 12)
    assert all(math.isfinite(loss) for loss in losses(run.history))


def cut_off(root: Path) -> RunFolder:
    """A run that ended after its first checkpoint."""
    settings = long(root)

    def interrupt(line: str) -> None:
        if line.startswith("step 4/12"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(settings, interrupt)
    return RunFolder(settings.folder)


STOPPING = pytest.mark.parametrize("stopping", [{}, {"early_stopping": 1, "eval_steps": 3, "learning_rate": 5e-2}])


def short(root: Path, stopping: dict[str, Any]) -> TrainSettings:
    return tiny_settings(root, **{"max_steps": 12, "save_steps": 3, "eval_share": 0.3, **stopping})


def unpublished(
    settings: TrainSettings, say: Say = lambda _: None, *, resume: bool = False
) -> tuple[TrainResult, dict[str, Tensor], RunFolder]:
    """Run to the last step, without publishing; return the result, weights and run folder."""
    base, dataset = prepared(settings)
    with open_run_folder(settings.folder, run_request(settings, base, dataset), resume=resume) as run_folder:
        run = train(settings, base, make_plan(settings, base, dataset), run_folder, say)
        return run, weights(run.folder), run_folder


@STOPPING
def test_finished_run_is_not_trained_again(tmp_path: Path, stopping: dict[str, Any]) -> None:
    """A run killed after its last step keeps its weights, whatever ended it."""
    settings = short(tmp_path, stopping)
    run, before, run_folder = unpublished(settings)
    assert not settings.folder.exists()
    run_folder.unfinished.mkdir()
    said: list[str] = []
    again, after, run_folder = unpublished(settings, said.append, resume=True)
    assert same(after, before)
    assert said == ["an earlier run finished the training; using its adapter"]
    assert (again.history, again.steps) == (run.history, run.steps)
    assert not run_folder.unfinished.exists()


@STOPPING
def test_run_killed_before_saving_only_saves(tmp_path: Path, stopping: dict[str, Any]) -> None:
    settings = short(tmp_path, stopping)
    run, before, run_folder = unpublished(settings)
    shutil.rmtree(run_folder.adapter)
    again, after, _ = unpublished(settings, resume=True)
    assert same(after, before)
    assert (again.history, again.steps) == (run.history, run.steps)


def test_early_stopping_count_is_resumed(tmp_path: Path) -> None:
    """One of two evaluations without improvement came before the run was killed."""
    stopping = {"eval_steps": 1, "save_steps": 1, "eval_share": 0.3, "early_stopping": 2, "learning_rate": 1e-1}
    whole = trained(long(tmp_path, out=tmp_path / "whole", **stopping))
    assert whole.steps < 12

    def interrupt(line: str) -> None:
        if line.startswith(f"step {whole.steps}/12"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(long(tmp_path, **stopping), interrupt)
    resumed = trained(long(tmp_path, resume=True, **stopping))
    assert (resumed.history, resumed.steps) == (whole.history, whole.steps)
    assert same(weights(resumed.folder), weights(whole.folder))


def test_adapter_of_another_run_is_not_used(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path / "adapter")
    run_folder.adapter.mkdir(parents=True)
    (run_folder.adapter / "adapter_model.safetensors").write_bytes(b"left")
    assert weights(trained(tiny_settings(tmp_path)).folder)


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1.'])
def test_checkpoint_with_truncated_state_is_ignored(state: str | None, tmp_path: Path) -> None:
    """The state is written last: a run killed at that moment resumes from the previous checkpoint."""
    run_folder = RunFolder(tmp_path / "adapter")
    whole, cut_off = (run_folder.checkpoints / f"checkpoint-{step}" for step in (2, 4))
    for folder, text in ((whole, "{}"), (cut_off, state)):
        folder.mkdir(parents=True)
        if text is not None:
            (folder / STATE).write_text(text)
    assert run_folder.last_checkpoint() == whole
    run_folder.delete_incomplete()
    assert list(run_folder.checkpoints.iterdir()) == [whole]


def test_resume_without_a_checkpoint_starts_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    settings = tiny_settings(tmp_path, resume=True)
    trained(settings, said.append)
    assert said[0] == "no checkpoint to resume from: starting from the first step"


# Several processes

SHARED = """
import sys
from pathlib import Path
from tests.training.tiny_run import tiny_settings, trained
root = Path(sys.argv[1])
trained(tiny_settings(root, out=root / "shared", batch_size=2, dropout=0.0, learning_rate=1e-2))
"""


@pytest.mark.slow
def test_two_processes_equal_one_larger_batch(tmp_path: Path) -> None:
    data = (str(write_rows(tmp_path / "rows.jsonl", map(question, range(4)))),)
    alone = tiny_settings(tmp_path, data=data, batch_size=4, dropout=0.0, learning_rate=1e-2, out=tmp_path / "alone")
    expected = weights(trained(alone).folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(tmp_path)],
            env={**os.environ, **shared, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    found = weights(tmp_path / "shared")
    for name in expected:
        # A hundredth of the learning rate: AdamW also makes steps for gradients near 0 that are rounded differently.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
