"""A training run: from settings, a base and data to an adapter's folder.

QLoRA (Dettmers et al. 2023): the base stays in NF4, its products are computed in the base's dtype, and the adapter's
weights, gradients and optimizer state are float32.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from bases.base import Base
from bases.errors import ConfigError
from training.data.batches import make_rows
from training.data.dataset import Dataset
from training.data.packing import Packed, check_borders
from training.model.lora import adapted, check_findings, lint
from training.model.lora_patch import own_products
from training.model.loss import answer_loss
from training.model.memory import check_memory, estimate
from training.run.callbacks import OverfittingCallback
from training.run.library_logging import quiet
from training.run.progress import ShowProgress
from training.run.run_folder import STATE, RunFolder, check_free
from training.run.trainer import AdapterTrainer
from training.settings import TrainSettings

Say = Callable[[str], None]

SMALL_BASE = 1_000_000_000
"""Parameters below which a base wants the higher learning rate."""
EVALUATIONS = 4
"""In a run, unless told otherwise."""
KEPT = 2
"""Checkpoints."""
SHORT_ROWS = 256
"""Tokens of the longest row up to which plain attention is the faster one on CPUs."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    folder: Path
    """The adapter, as PEFT saves it."""
    history: list[dict[str, float]]
    """The log, in order: entries with ``step`` and ``loss``, ``grad_norm``, ``learning_rate``, or ``eval_loss``."""
    steps: int
    seconds: float
    """Of this process; not what a run that was resumed had taken before."""
    tokens: int
    """Through the model in this process, in training."""
    warnings: list[str]


@dataclass(frozen=True)
class Plan:
    """What a run will do, counted beforehand."""

    rows: list[Packed]
    held_out: list[Packed]
    steps: int
    eval_steps: int
    save_steps: int
    warmup_steps: int


def train(
    settings: TrainSettings, base: Base, dataset: Dataset, place: RunFolder, say: Say = lambda _: None
) -> Trained:
    """Train and write the adapter to ``place.adapter``, after which the base is as it was; or find it there.

    Raises ConfigError, or TrainingError where the run cannot reach its end; then no adapter is written, and its
    checkpoints stay for ``--resume``.
    """
    if place.adapter.is_dir():
        say("it is trained already")
        return _found(place)
    check_findings(settings, lint(settings, base))
    plan = checked_plan(settings, base, dataset)
    need = estimate(settings, base, dataset)
    check_memory(need, base.device)
    started = time.monotonic()
    with (
        quiet(),
        _fit_attention(base, plan),
        adapted(settings, base) as model,
        own_products(model, unpack=need.unpacked > 0) as left,
    ):
        if left:
            say(f"{len(left)} adapted layers, such as {left[0]}, are computed by PEFT itself: that is slower")
        arguments = _arguments(settings, base, plan, place, need.checkpointing)
        trainer = AdapterTrainer(model, arguments, plan.rows, plan.held_out, answer_loss)
        warnings = _run(settings, trainer, place, say)
        _write(model, trainer, place)
    seconds = time.monotonic() - started
    return Trained(
        place.adapter, _history(trainer.state), trainer.state.global_step, seconds, trainer.tokens_seen, warnings
    )


def _found(place: RunFolder) -> Trained:
    """What a run had trained that was cut off later. It ended with a checkpoint, as every run does."""
    last = place.last_checkpoint()
    assert last is not None
    state = TrainerState.load_from_json(str(last / STATE))
    return Trained(place.adapter, _history(state), state.global_step, seconds=0.0, tokens=0, warnings=[])


def _history(state: TrainerState) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]


def checked_plan(settings: TrainSettings, base: Base, dataset: Dataset) -> Plan:
    """The plan of a run that can begin. Raises ConfigError; nothing is written."""
    check_beginning(settings)
    if settings.packing:
        check_borders(base.model)
    return make_plan(settings, dataset)


def check_beginning(settings: TrainSettings) -> None:
    """What can be told of a run without its base and its data. Raises ConfigError; nothing is written."""
    check_free(settings.folder)
    _check_reporting(settings)


def learning_rate(settings: TrainSettings, base: Base) -> float:
    """At its highest: as set, or by the size of the base; a small one wants more."""
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 1e-3 if base.model.num_parameters() < SMALL_BASE else 2e-4


def make_plan(settings: TrainSettings, dataset: Dataset) -> Plan:
    """Rows and steps of the run. Raises ConfigError where an option asks for held-out rows, and there are none."""
    rows = make_rows(dataset.train, dataset.max_length, settings.packing, settings.seed)
    held_out = make_rows(dataset.evaluation, dataset.max_length, settings.packing, settings.seed)
    if settings.early_stopping is not None and not held_out:
        raise ConfigError("--early-stopping: no row is held out to tell by")
    batches = math.ceil(len(rows) / (settings.batch_size * PartialState().num_processes))
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(batches / settings.accumulation))
    eval_steps = settings.eval_steps or math.ceil(steps / EVALUATIONS)
    save_steps = settings.save_steps or eval_steps
    if settings.early_stopping is not None and save_steps != eval_steps:
        # The best evaluation's weights are what is kept; without a checkpoint of theirs others would be, silently.
        raise ConfigError(f"--save-steps: with --early-stopping it must be that of --eval-steps, {eval_steps}")
    warmup = max(5, round(0.03 * steps)) if settings.warmup_steps is None else settings.warmup_steps
    return Plan(rows, held_out, steps, eval_steps, save_steps, min(warmup, steps))


def _check_reporting(settings: TrainSettings) -> None:
    package = {"tensorboard": "tensorboard", "wandb": "wandb", "none": "sys"}[settings.report_to]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--report-to {settings.report_to}: the package {package} is not installed")


def _arguments(
    settings: TrainSettings, base: Base, plan: Plan, place: RunFolder, checkpointing: bool
) -> TrainingArguments:
    on_cuda = base.device.type == "cuda"
    optimizer = settings.optimizer if settings.optimizer != "auto" else "paged_adamw_8bit" if on_cuda else "adamw"
    arguments = TrainingArguments(
        output_dir=str(place.checkpoints),
        use_cpu=not on_cuda,
        seed=settings.seed,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=plan.steps,
        learning_rate=learning_rate(settings, base),
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        warmup_steps=plan.warmup_steps,
        optim="adamw_torch_fused" if optimizer == "adamw" else optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        eval_strategy="steps" if plan.held_out else "no",
        eval_steps=plan.eval_steps,
        save_steps=plan.save_steps,
        save_total_limit=KEPT,
        load_best_model_at_end=settings.early_stopping is not None,
        metric_for_best_model="eval_loss" if settings.early_stopping is not None else None,
        restore_callback_states_from_checkpoint=True,  # early stopping goes on counting
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="wandb" if settings.report_to == "wandb" else "none",
        run_name=settings.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        ddp_find_unused_parameters=False,
    )
    # Several devices without `accelerate launch` are not used: DataParallel cannot copy a 4-bit model.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _run(settings: TrainSettings, trainer: AdapterTrainer, place: RunFolder, say: Say) -> list[str]:
    """To the last step, or to where early stopping ends it; gives what was warned of."""
    warnings: list[str] = []
    main = trainer.is_world_process_zero()
    progress = ShowProgress(lambda: trainer.tokens_seen, say, Console(stderr=True))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OverfittingCallback(warnings.append))
    trainer.add_callback(progress)
    if settings.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping))
    if settings.report_to == "tensorboard" and main:
        trainer.add_callback(_tensorboard(place.runs))
    checkpoint = place.last_checkpoint()
    if settings.resume:
        say(f"going on from {checkpoint.name}" if checkpoint else "there is no checkpoint yet: from the beginning")
    try:
        _go_on(trainer, checkpoint)
    except KeyboardInterrupt:
        kept = place.last_checkpoint()
        say(f"stopped; --resume goes on from {kept.name}" if kept else "stopped before the first checkpoint")
        raise
    finally:
        progress.close()
    for warning in warnings:
        say(f"warning: {warning}")
    return warnings


def _go_on(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or from the beginning. After the run's last step a Trainer would make one more."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / STATE))
    if not state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer.state = state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    trainer.load(checkpoint.with_name(f"checkpoint-{step}"))


@contextmanager
def _fit_attention(base: Base, plan: Plan) -> Iterator[None]:
    """Plain products instead of torch's fused attention, whose backward pass on CPUs is slow over short rows.

    It took 16% of a step of 68-token rows; at 512 tokens the two are even.
    """
    before = base.model.config._attn_implementation
    if base.device.type == "cpu" and max(len(row.input_ids) for row in plan.rows) <= SHORT_ROWS:
        base.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.model.set_attn_implementation(before)


def _tensorboard(folder: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(folder)))


def _write(model: PeftModel, trainer: AdapterTrainer, place: RunFolder) -> None:
    if trainer.is_world_process_zero():
        model.save_pretrained(str(place.unfinished), save_embedding_layers=False)
        (place.unfinished / "README.md").unlink()  # PEFT's has nothing in it; the model card is written later
        place.finish()
    trainer.accelerator.wait_for_everyone()
