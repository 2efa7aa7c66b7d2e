"""A tiny base on disk, rows for it, and settings that train it in a second or two."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from bases.base import Base
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.rows import question, write_rows
from training.data.dataset import Dataset, build_dataset
from training.model.base import open_base
from training.progress_bar import Say
from training.run.plan import make_plan
from training.run.run import TrainResult, train
from training.run.run_folder import open_run_folder, run_request
from training.settings import TrainSettings

ROWS = 24


def tiny_settings(root: Path, **more: Any) -> TrainSettings:
    """Return settings for a run in ``root``, with the base and 24 rows written there; ``more`` overrides them."""
    folder, rows = root / "base", root / "rows.jsonl"
    if not folder.exists():
        tiny_model().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    if not rows.exists():
        write_rows(rows, map(question, range(ROWS)))
    given = {
        "data": (str(rows),), "name": "tiny", "model": str(folder), "data_dir": root / "data", "out": root / "adapter",
        "device": "cpu", "dtype": "fp32", "r": 4, "max_steps": 8, "batch_size": 2, "report_to": "none",
    }  # fmt: skip
    return TrainSettings(**{**given, **more})


def prepared(settings: TrainSettings) -> tuple[Base, Dataset]:
    """Return the base and the dataset."""
    base = open_base(settings)
    return base, build_dataset(settings, base.tokenizer, base.max_model_len)


def trained(settings: TrainSettings, say: Say = lambda _: None) -> TrainResult:
    """Run a training without the judgement."""
    return train_on(settings, *prepared(settings), say)


def train_on(settings: TrainSettings, base: Base, dataset: Dataset, say: Say = lambda _: None) -> TrainResult:
    """Run a training, without the judgement, of a loaded base and dataset."""
    plan = make_plan(settings, base, dataset)
    with open_run_folder(settings.folder, run_request(settings, base, dataset), resume=settings.resume) as run_folder:
        run = train(settings, base, plan, run_folder, say)
        if PartialState().is_main_process:
            run_folder.move_to_out()
    return replace(run, folder=run_folder.out)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two sets of weights are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def losses(history: list[dict[str, float]], name: str = "loss") -> list[float]:
    """Return one curve of a run's log."""
    return [entry[name] for entry in history if name in entry]
