"""RunLog: the log of a run as a file, which servers show while the run goes on."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FIGURES = ("loss", "eval_loss", "learning_rate", "grad_norm")
"""What is kept of transformers' log."""


class RunLog:
    """Appends lines to a file that :mod:`adapters.format.training_record` reads. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **values: Any) -> None:
        """Write one line, with the time."""
        if not PartialState().is_main_process:
            return
        line = json.dumps({"time": round(time.time(), 3), **values}, allow_nan=False, separators=(",", ":"))
        with self._path.open("a") as file:
            file.write(f"{line}\n")

    @contextmanager
    def recording(self, **started: Any) -> Iterator[None]:
        """Write the event ``started``, and ``failed`` with the reason if the block raises an error.

        A run that is interrupted writes nothing more.
        """
        self.write(event="started", **started)
        try:
            yield
        except Exception as error:
            self.write(event="failed", reason=str(error) or type(error).__name__)
            raise


class RunLogCallback(TrainerCallback):
    """Writes the figures of each step, and each evaluation."""

    def __init__(self, log: RunLog) -> None:
        self._log = log

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        figures = {name: float(value) for name, value in (logs or {}).items() if name in FIGURES}
        if "loss" in figures or "eval_loss" in figures:
            self._log.write(step=state.global_step, **figures)
