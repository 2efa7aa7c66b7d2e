"""Progress of a training run: a bar on a terminal, otherwise a line every few seconds."""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.cli.upload_bar import LINE_SECONDS, draws_bars
from training.progress_bar import Say

MEAN_STEPS = 10
"""The loss shown is the mean of this many steps: a single step has few rows, and its loss is noisy."""


class ProgressCallback(TrainerCallback):
    """Shows step, mean loss, tokens per second and time left. ``tokens`` returns the tokens trained on so far."""

    def __init__(self, tokens: Callable[[], int], say: Say, console: Console) -> None:
        self._tokens = tokens
        self._say = say
        self._console = console
        self._bar: Progress | None = None
        self._losses: deque[float] = deque(maxlen=MEAN_STEPS)
        self._started = 0.0
        self._last_line = -math.inf
        """Monotonic time of the last line."""
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._started = time.monotonic()
        self._first_step = state.global_step
        if state.is_world_process_zero and draws_bars(self._console):
            columns = ("[progress.description]{task.description}", "{task.fields[figures]}")
            first, last = (TextColumn(column) for column in columns)
            self._bar = Progress(
                first, BarColumn(), MofNCompleteColumn(), last, TimeRemainingColumn(), console=self._console
            )
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, figures="")
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._line(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" in logs:
            self._losses.append(logs["loss"])
            self._show(state)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: TrainerState) -> None:
        seconds = time.monotonic() - self._started
        steps = f"mean of {len(self._losses)} steps" if len(self._losses) > 1 else "1 step"
        figures = (
            f"training loss {mean(self._losses):.4f} ({steps}), {self._tokens() / max(seconds, 1e-9):,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, figures=figures)
        elif state.global_step == state.max_steps or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            done = max(state.global_step - self._first_step, 1)
            left = seconds / done * (state.max_steps - state.global_step)
            self._say(f"step {state.global_step}/{state.max_steps}: {figures}, {left:,.0f} s left")

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)
