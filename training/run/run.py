"""A training run: trains an adapter by a plan and saves it as a PEFT folder.

QLoRA (Dettmers et al. 2023): the base stays in NF4, its products are computed in the base's dtype, and the adapter's
weights, gradients and optimizer state are float32.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from bases.base import Base
from training.model.lora import new_peft_model
from training.model.lora_patch import patch_lora_layers
from training.model.loss import answer_loss
from training.progress_bar import Say
from training.run.callbacks import OverfittingCallback
from training.run.library_logging import quiet_libraries
from training.run.plan import TrainingPlan, learning_rate
from training.run.progress import ProgressCallback
from training.run.run_folder import STATE, RunFolder
from training.run.run_log import RunLogCallback
from training.run.trainer import AdapterTrainer
from training.settings import TrainSettings

MAX_CHECKPOINTS = 2
"""Number of checkpoints kept; older ones are deleted."""
SHORT_ROWS = 256
"""On CPUs, eager attention is used if no row is longer than this many tokens: it is faster there."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a finished run."""

    folder: Path
    """The adapter's folder, as PEFT saves it."""
    history: list[dict[str, float]]
    """The log in order: entries with ``step``, and ``loss``, ``grad_norm``, ``learning_rate``, or ``eval_loss``."""
    steps: int
    seconds: float
    """Duration in this process; excludes the time before an interruption."""
    tokens: int
    """Number of tokens trained on in this process."""
    warnings: list[str]


def train(
    settings: TrainSettings, base: Base, plan: TrainingPlan, run_folder: RunFolder, say: Say = lambda _: None
) -> TrainResult:
    """Train an adapter by ``plan`` and write it to ``run_folder.adapter``; if it is there already, return it.

    The base is left as it was before. Raises TrainingError if the run cannot finish; then no adapter is written, and
    the checkpoints stay for ``--resume``.
    """
    if run_folder.adapter.is_dir():
        say("an earlier run finished the training; using its adapter")
        return _finished_result(run_folder)
    started = time.monotonic()
    with (
        quiet_libraries(),
        _fit_attention(base, plan),
        new_peft_model(settings, base) as model,
        patch_lora_layers(model, unpack=plan.memory.unpacked > 0) as unpatched,
    ):
        if unpatched:
            say(f"{len(unpatched)} adapted layers, such as {unpatched[0]}, run PEFT's own forward, which is slower")
        arguments = _arguments(settings, base, plan, run_folder)
        trainer = AdapterTrainer(model, arguments, plan.rows, plan.held_out, answer_loss)
        warnings = _run(settings, trainer, run_folder, say)
        _write(model, trainer, run_folder)
    seconds = time.monotonic() - started
    return TrainResult(
        run_folder.adapter, _history(trainer.state), trainer.state.global_step, seconds, trainer.tokens_seen, warnings
    )


def _finished_result(run_folder: RunFolder) -> TrainResult:
    """Return the result of a run that was interrupted after training. Every run ends with a checkpoint."""
    last = run_folder.last_checkpoint()
    assert last is not None
    state = TrainerState.load_from_json(str(last / STATE))
    return TrainResult(run_folder.adapter, _history(state), state.global_step, seconds=0.0, tokens=0, warnings=[])


def _history(state: TrainerState) -> list[dict[str, float]]:
    return [entry for entry in state.log_history if "loss" in entry or "eval_loss" in entry]


def _arguments(settings: TrainSettings, base: Base, plan: TrainingPlan, run_folder: RunFolder) -> TrainingArguments:
    on_cuda = base.device.type == "cuda"
    optimizer = settings.optimizer if settings.optimizer != "auto" else "paged_adamw_8bit" if on_cuda else "adamw"
    checkpointing = plan.memory.checkpointing
    arguments = TrainingArguments(
        output_dir=str(run_folder.checkpoints),
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
        save_total_limit=MAX_CHECKPOINTS,
        load_best_model_at_end=settings.early_stopping is not None,
        metric_for_best_model="eval_loss" if settings.early_stopping is not None else None,
        restore_callback_states_from_checkpoint=True,  # so that early stopping keeps its count
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


def _run(settings: TrainSettings, trainer: AdapterTrainer, run_folder: RunFolder, say: Say) -> list[str]:
    """Train to the last step or until early stopping; return the warnings."""
    warnings: list[str] = []
    main = trainer.is_world_process_zero()
    progress = ProgressCallback(lambda: trainer.tokens_seen, say, Console(stderr=True))
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(OverfittingCallback(warnings.append))
    trainer.add_callback(progress)
    trainer.add_callback(RunLogCallback(run_folder.log))
    if settings.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping))
    if settings.report_to == "tensorboard" and main:
        trainer.add_callback(_tensorboard(run_folder.runs))
    checkpoint = run_folder.last_checkpoint()
    if settings.resume:
        say(
            f"resuming from {checkpoint.name}"
            if checkpoint
            else "no checkpoint to resume from: starting from the first step"
        )
    try:
        _train_or_resume(trainer, checkpoint)
    except KeyboardInterrupt:
        kept = run_folder.last_checkpoint()
        say(f"stopped; --resume will continue from {kept.name}" if kept else "stopped before the first checkpoint")
        raise
    finally:
        progress.close()
    for warning in warnings:
        say(f"warning: {warning}")
    return warnings


def _train_or_resume(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train from the checkpoint, or from the start if it is None.

    A Trainer that resumes after its last step would do one more, so then only the weights are loaded.
    """
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
def _fit_attention(base: Base, plan: TrainingPlan) -> Iterator[None]:
    """Use eager attention for short rows on CPUs, where the backward pass of torch's fused attention is slow.

    The fused pass took 16% of a step with rows of 68 tokens; with 512 tokens both are equally fast.
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


def _write(model: PeftModel, trainer: AdapterTrainer, run_folder: RunFolder) -> None:
    if trainer.is_world_process_zero():
        model.save_pretrained(str(run_folder.unfinished), save_embedding_layers=False)
        (run_folder.unfinished / "README.md").unlink()  # an empty template of PEFT's; the model card is written later
        run_folder.commit_adapter()
    trainer.accelerator.wait_for_everyone()
