"""Where a run keeps what it needs until its adapter is whole: checkpoints, curves, and what it was asked to do."""

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
from bases.base import Base
from bases.errors import ConfigError
from bases.file_modes import make_ordinary
from training.data.dataset import Dataset
from training.data.rendering import Example
from training.settings import TrainSettings, flag

STATE = "trainer_state.json"
"""The Trainer writes it last, so a checkpoint that has it is whole."""
_SHAPES = frozenset({
    "packing", "method", "r", "alpha", "dropout", "targets", "rslora", "dora", "learning_rate", "schedule",
    "warmup_steps", "epochs", "max_steps", "batch_size", "accumulation", "weight_decay", "max_grad_norm", "optimizer",
    "early_stopping", "seed", "quantization", "dtype", "eval_steps", "save_steps",
})  # fmt: skip
"""Settings that shape the weights, beside base and data; and the steps that a Trainer takes from its checkpoint."""
_CHOOSES = frozenset({
    "data", "format", "eval_file", "eval_share", "mix_general", "mix_share", "skip_bad", "too_long", "chat_template",
})  # fmt: skip
"""Settings that decide which rows there are. They may change where the rows do not: a file may have moved."""

Request = dict[str, Any]
"""What a run was asked to do, as JSON."""


@dataclass(frozen=True)
class RunFolder:
    """The folder beside ``out`` until the adapter is judged. It appears in ``out`` whole, or not at all."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.name}.training")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def runs(self) -> Path:
        """TensorBoard's event files; they move into the adapter's folder."""
        return self.folder / "runs"

    @property
    def unfinished(self) -> Path:
        """Where the adapter is written."""
        return self.folder / "unfinished"

    @property
    def adapter(self) -> Path:
        """The trained adapter, whole where it is there; the judgement lies down beside it."""
        return self.folder / "adapter"

    @property
    def note(self) -> Path:
        """What the run was asked to do."""
        return self.folder / "request.json"

    @property
    def left(self) -> bool:
        """Whether there is a run to go on with."""
        return self.note.is_file() and self.last_checkpoint() is not None

    def last_checkpoint(self) -> Path | None:
        """The newest that is whole."""
        whole = filter(_whole, self.checkpoints.glob("checkpoint-*"))
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def sweep(self) -> None:
        """Delete what a killed run had begun to write."""
        for path in self.checkpoints.glob("checkpoint-*"):
            if not _whole(path):
                shutil.rmtree(path)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def finish(self) -> None:
        """What is in ``unfinished`` is the adapter."""
        _move(self.unfinished, self.adapter)

    def publish(self) -> None:
        """The adapter becomes ``out``, and the rest goes."""
        if self.runs.is_dir():
            self.runs.rename(self.adapter / "runs")
        _move(self.adapter, self.out)
        shutil.rmtree(self.folder)


def _whole(checkpoint: Path) -> bool:
    """Whether its state, which is written last, is there, and was not cut off while it was written."""
    try:
        json.loads((checkpoint / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True


def _move(folder: Path, to: Path) -> None:
    """It is there whole or not at all, even where the power goes."""
    make_ordinary(folder)
    for path in (*folder.rglob("*"), folder):
        sync(path)
    folder.rename(to)
    sync(to.parent)


def check_free(out: Path) -> None:
    """Raises ConfigError where something is where the adapter is to be, or it could not be put there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: {out} is there already; choose another --name or --out, or delete it")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: {out} cannot be made: {parent} is no folder that can be written to")


def check_left(out: Path, *, resume: bool) -> None:
    """Raises ConfigError where a run was cut off that is not to be gone on with."""
    place = RunFolder(out)
    if place.left and not resume:
        raise ConfigError(f"--out: a run was cut off here; go on with --resume, or delete {place.folder}")


@contextmanager
def working(out: Path, request: Request, *, resume: bool) -> Iterator[RunFolder]:
    """The place of the run that writes to ``out``, while it works there; several processes of one run share it.

    Raises ConfigError where something is in the way: an adapter, another run at work, or what is left of another run.
    """
    state = PartialState()
    place = RunFolder(out)
    if not state.is_main_process:
        state.wait_for_everyone()
        yield place
        return
    check_free(place.out)
    place.folder.mkdir(parents=True, exist_ok=True)
    with _locked(place.folder):
        _open(place, resume, request)
        state.wait_for_everyone()
        yield place


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(f"--out: another run is at work in {folder}") from None


def _open(place: RunFolder, resume: bool, request: Request) -> None:
    check_left(place.out, resume=resume)
    if place.left:
        _check_same(json.loads(place.note.read_text()), request)
    else:
        for of_another_run in (place.runs, place.adapter):
            shutil.rmtree(of_another_run, ignore_errors=True)
    place.sweep()
    place.note.write_text(json.dumps(request, indent=2))


def requested(settings: TrainSettings, base: Base, dataset: Dataset) -> Request:
    """What must be the same for a run to go on as if it had not been cut off."""
    shaping = settings.model_dump(mode="json", include=set(_SHAPES))
    return {
        "options": {**shaping, "max_length": dataset.max_length, "model": base.layout.fingerprint},
        "choice": settings.model_dump(mode="json", include=set(_CHOOSES)),
        "rows": [_in_order(dataset.train), _in_order(dataset.evaluation)],
    }


def _in_order(examples: Sequence[Example]) -> str:
    """SHA-256 of rows in their order, by which a resumed run knows which of them it has seen."""
    return hashlib.sha256(b"".join(example.digest for example in examples)).hexdigest()


def _check_same(before: Request, now: Request) -> None:
    """Options before rows: where the rows are others, an option is the likely reason."""
    _check_options(before.get("options", {}), now["options"])
    if before.get("rows") != now["rows"]:
        _check_options(before.get("choice", {}), now["choice"])
        raise ConfigError("--resume: a file was changed since the run began: its rows are others, or in another order")


def _check_options(before: Request, now: Request) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(f"--resume: {flag(name)} was {before.get(name)} when the run began, and is now {value}")
