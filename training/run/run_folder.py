"""The working folder of a training run: its checkpoints, curves, settings, and the adapter until it is judged."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from filelock import FileLock, Timeout

from adapters.format.files import sync
from adapters.format.training_record import ADAPTER, LOCK, LOG, REQUEST, WORKING
from bases.base import Base
from bases.errors import ConfigError
from bases.file_modes import apply_umask
from training.data.dataset import Dataset
from training.data.rendering import Example
from training.run.run_log import RunLog
from training.settings import TrainSettings, flag

LOCK_SECONDS = 1
"""Time to wait for the lock: a server that looks whether a run goes on holds it for an instant."""
STATE = "trainer_state.json"
"""The Trainer writes this file last, so a checkpoint that has it is complete."""
_WEIGHT_SETTINGS = frozenset({
    "packing", "method", "r", "alpha", "dropout", "targets", "rslora", "dora", "learning_rate", "schedule",
    "warmup_steps", "epochs", "max_steps", "batch_size", "accumulation", "weight_decay", "max_grad_norm", "optimizer",
    "early_stopping", "seed", "quantization", "dtype", "eval_steps", "save_steps",
})  # fmt: skip
"""Settings that affect the weights (besides base and data) or that a Trainer restores from its checkpoint. A resumed
run must have the same."""
_ROW_SETTINGS = frozenset({
    "data", "format", "eval_file", "eval_share", "mix_general", "mix_share", "skip_bad", "too_long", "chat_template",
})  # fmt: skip
"""Settings that select the rows. A resumed run may change them if the rows stay the same: a file may have moved."""

RunRequest = dict[str, Any]
"""The settings and rows of a run, as JSON."""


@dataclass(frozen=True)
class RunFolder:
    """The folder ``<out>.training``, in which a run works. The judged adapter is moved to ``out`` in one rename."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}{WORKING}")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def runs(self) -> Path:
        """TensorBoard's event files, which are moved into the adapter's folder at the end."""
        return self.folder / "runs"

    @property
    def log(self) -> RunLog:
        """The log, which is moved into the adapter's folder, too."""
        return RunLog(self.folder / LOG)

    @property
    def last_step(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        last = self.last_checkpoint()
        return 0 if last is None else _step(last)

    @property
    def unfinished(self) -> Path:
        """The folder that the adapter is written to before it is renamed to ``adapter``."""
        return self.folder / "unfinished"

    @property
    def adapter(self) -> Path:
        """The trained adapter; complete if it exists. The judgement is added to it."""
        return self.folder / ADAPTER

    @property
    def request_file(self) -> Path:
        """The file that holds the run's settings (:data:`RunRequest`)."""
        return self.folder / REQUEST

    @property
    def resumable(self) -> bool:
        """Whether an interrupted run can be resumed."""
        return self.request_file.is_file() and self.last_checkpoint() is not None

    def last_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        whole = filter(_is_complete, self.checkpoints.glob("checkpoint-*"))
        return max(whole, key=_step, default=None)

    def delete_incomplete(self) -> None:
        """Delete what a killed run left incomplete."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not _is_complete(path):
                shutil.rmtree(path)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def commit_adapter(self) -> None:
        """Rename ``unfinished`` to ``adapter``."""
        _move(self.unfinished, self.adapter)

    def move_to_out(self) -> None:
        """Move the adapter to ``out`` and delete the working folder."""
        for kept in (self.runs, self.folder / LOG):
            if kept.exists():
                kept.rename(self.adapter / kept.name)
        _move(self.adapter, self.out)
        shutil.rmtree(self.folder)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """Return whether the checkpoint's state file, which is written last, exists and is valid JSON."""
    try:
        json.loads((checkpoint / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _move(folder: Path, to: Path) -> None:
    """Rename ``folder`` durably: after a power cut ``to`` is complete or does not exist."""
    apply_umask(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)
    folder.rename(to)
    sync(to.parent)


def check_free(out: Path) -> None:
    """Raise ConfigError if ``out`` is not empty, or its parent is not writable."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} exists already; choose another --name or --out, or delete it")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: cannot create {out}: {parent} is not a writable folder")


def check_no_unfinished_run(out: Path, *, resume: bool) -> None:
    """Raise ConfigError if ``out`` has an interrupted run and ``resume`` is not set."""
    run_folder = RunFolder(out)
    if run_folder.resumable and not resume:
        raise ConfigError(f"--out: a run was interrupted here; continue with --resume, or delete {run_folder.folder}")


@contextmanager
def open_run_folder(out: Path, request: RunRequest, *, resume: bool) -> Iterator[RunFolder]:
    """Lock and prepare the working folder of the run that writes to ``out``; the processes of one run share it.

    Raises ConfigError if ``out`` is taken, another run is using the folder, or an interrupted run with other settings
    or rows is in it.
    """
    state = PartialState()
    run_folder = RunFolder(out)
    if not state.is_main_process:
        state.wait_for_everyone()
        yield run_folder
        return
    check_free(run_folder.out)
    run_folder.folder.mkdir(parents=True, exist_ok=True)
    with _locked(run_folder.folder):
        _open(run_folder, resume, request)
        state.wait_for_everyone()
        yield run_folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / LOCK, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise ConfigError(f"--out: another run is using {folder}; wait for it, or choose another --out") from None


def _open(run_folder: RunFolder, resume: bool, request: RunRequest) -> None:
    check_no_unfinished_run(run_folder.out, resume=resume)
    if run_folder.resumable:
        _check_same(json.loads(run_folder.request_file.read_text()), request)
    else:
        for of_another_run in (run_folder.runs, run_folder.adapter):
            shutil.rmtree(of_another_run, ignore_errors=True)
        (run_folder.folder / LOG).unlink(missing_ok=True)
    run_folder.delete_incomplete()
    run_folder.request_file.write_text(json.dumps(request, indent=2))


def run_request(settings: TrainSettings, base: Base, dataset: Dataset) -> RunRequest:
    """Return the settings and rows that must be the same when an interrupted run is resumed."""
    weight_settings = settings.model_dump(mode="json", include=set(_WEIGHT_SETTINGS))
    return {
        "options": {**weight_settings, "max_length": dataset.max_length, "model": base.layout.fingerprint},
        "choice": settings.model_dump(mode="json", include=set(_ROW_SETTINGS)),
        "rows": [_rows_sha256(dataset.train), _rows_sha256(dataset.evaluation)],
    }


def _rows_sha256(examples: Sequence[Example]) -> str:
    """Return the SHA-256 of the rows in their order: a resumed run skips those that it has trained on."""
    return hashlib.sha256(b"".join(example.digest for example in examples)).hexdigest()


def _check_same(before: RunRequest, now: RunRequest) -> None:
    """Raise ConfigError if a resumed run differs. Compares options first: they are the likely reason for other rows."""
    _check_options(before.get("options", {}), now["options"])
    if before.get("rows") != now["rows"]:
        _check_options(before.get("choice", {}), now["choice"])
        raise ConfigError("--resume: a data file has changed since the run began: it has other rows, or another order")


def _check_options(before: RunRequest, now: RunRequest) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            change = f"was {before.get(name)} when the run began and is now {value}"
            raise ConfigError(f"--resume: {flag(name)} {change}; a resumed run must keep it")
