"""Trainer callback that evaluates at the last step and warns of overfitting."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RISES = 2
"""Number of consecutive evaluations with a rising held-out and a falling training loss that count as overfitting."""


class OverfittingCallback(TrainerCallback):
    """Calls ``warn`` once when the held-out loss rises while the training loss falls; evaluates at the last step."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._warned and overfits(state.log_history):
            self._warned = True
            self._warn(
                f"step {state.global_step}: the held-out loss has risen {RISES} times while the training loss fell: "
                "the adapter overfits (fewer --epochs, --early-stopping or more data would help)"
            )


def overfits(history: Sequence[dict[str, float]]) -> bool:
    """Return whether the held-out loss rose and the training loss fell in each of the last RISES evaluations."""
    curve = _between_evaluations(history)[-RISES - 1 :]
    if len(curve) <= RISES:
        return False
    return all(new[0] < old[0] and new[1] > old[1] for old, new in pairwise(curve))


def _between_evaluations(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """Return (mean training loss since the previous evaluation, held-out loss) of each evaluation."""
    curve, losses = [], []
    for entry in history:
        if "loss" in entry:
            losses.append(entry["loss"])
        elif "eval_loss" in entry and losses:
            curve.append((mean(losses), entry["eval_loss"]))
            losses = []
    return curve
