"""What is watched while a run lasts: its last step is evaluated, and overfitting is told."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RISES = 2
"""Evaluations in a row in which validation rises while training falls, before it is told."""


class OverfittingCallback(TrainerCallback):
    """Tells once, in ``warnings``, that validation diverges from training."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._told and overfits(state.log_history):
            self._told = True
            self._tell(
                f"step {state.global_step}: the held-out loss has risen {RISES} times while the training loss fell: "
                "the adapter learns its rows by heart (fewer --epochs, --early-stopping or more data would help)"
            )


def overfits(history: Sequence[dict[str, float]]) -> bool:
    """Whether validation rose and training fell in each of the last RISES evaluations of a Trainer's log."""
    curve = _between_evaluations(history)[-RISES - 1 :]
    if len(curve) <= RISES:
        return False
    return all(new[0] < old[0] and new[1] > old[1] for old, new in pairwise(curve))


def _between_evaluations(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """(mean training loss since the evaluation before, held-out loss) of each evaluation."""
    curve, losses = [], []
    for entry in history:
        if "loss" in entry:
            losses.append(entry["loss"])
        elif "eval_loss" in entry and losses:
            curve.append((mean(losses), entry["eval_loss"]))
            losses = []
    return curve
