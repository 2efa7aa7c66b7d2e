"""The plan of a training run: its rows, steps and memory, computed and checked once before training."""

import importlib.util
import math
from dataclasses import dataclass

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]

from bases.base import Base
from bases.errors import ConfigError
from training.data.batches import make_rows
from training.data.dataset import Dataset
from training.data.packing import PackedRow, check_no_leak
from training.model.memory import MemoryEstimate, estimate_memory
from training.run.run_folder import check_free
from training.settings import TrainSettings

SMALL_BASE = 1_000_000_000
"""Bases with fewer parameters than this get the higher default learning rate."""
EVALUATIONS = 4
"""Default number of evaluations in a run."""


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that a run needs to know before its first step."""

    rows: list[PackedRow]
    """Training rows, packed if ``--packing`` is set."""
    held_out: list[PackedRow]
    """Held-out rows, for the evaluations during training."""
    steps: int
    eval_steps: int
    save_steps: int
    warmup_steps: int
    memory: MemoryEstimate


def make_plan(settings: TrainSettings, base: Base, dataset: Dataset) -> TrainingPlan:
    """Make the rows of all batches and return the plan of the run. Writes nothing.

    Raises ConfigError if the run could not start, or if an option needs held-out rows and there are none. Memory is
    checked by :func:`training.model.memory.check_memory`, not here.
    """
    check_before_base(settings)
    if settings.packing:
        check_no_leak(base.model)
    rows = make_rows(dataset.train, dataset.max_length, settings.packing, settings.seed)
    held_out = make_rows(dataset.evaluation, dataset.max_length, settings.packing, settings.seed)
    if settings.early_stopping is not None and not held_out:
        raise ConfigError("--early-stopping: needs held-out rows, and no row is held out")
    batches = math.ceil(len(rows) / (settings.batch_size * PartialState().num_processes))
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))
    eval_steps = settings.eval_steps or math.ceil(steps / EVALUATIONS)
    save_steps = settings.save_steps or eval_steps
    if settings.early_stopping is not None and save_steps != eval_steps:
        # Early stopping keeps the weights of the best evaluation, so that step must have a checkpoint.
        raise ConfigError(f"--save-steps: must equal --eval-steps ({eval_steps}) with --early-stopping")
    warmup = max(5, round(0.03 * steps)) if settings.warmup_steps is None else settings.warmup_steps
    memory = estimate_memory(settings, base, [*rows, *held_out])
    return TrainingPlan(rows, held_out, steps, eval_steps, save_steps, min(warmup, steps), memory)


def check_before_base(settings: TrainSettings) -> None:
    """Check what needs neither the base nor the data. Raises ConfigError; writes nothing."""
    check_free(settings.folder)
    _check_reporting(settings)


def learning_rate(settings: TrainSettings, base: Base) -> float:
    """Return the peak learning rate: as set, or a default by the base's size (small bases need a higher one)."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 1e-3 if base.model.num_parameters() < SMALL_BASE else 2e-4


def _check_reporting(settings: TrainSettings) -> None:
    package = {"tensorboard": "tensorboard", "wandb": "wandb", "none": "sys"}[settings.report_to]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--report-to {settings.report_to}: the package {package} is not installed")
