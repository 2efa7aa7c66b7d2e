"""transformers' Trainer with our own loss and batches, which raises an error when a loss or gradient is not finite."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from training.data.batches import LengthGroupedSampler, sorted_batches
from training.data.packing import PackedRow, collate
from training.errors import Diverged
from training.model.loss import Method, summed_loss

ROWS = "rows"
"""Key of a batch's rows, which error messages name if the run diverges."""
PAD = 0
"""Padding token. Any id will do: padding is neither trained on nor attended to."""
MAX_NAMED_ROWS = 8
"""Maximum number of rows that a message names."""


class AdapterTrainer(Trainer):
    """Trains the adapter of ``model`` on ``rows``.

    The loss is the mean over all trained tokens of an optimizer step, whatever batches and processes they are in.
    """

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        rows: list[PackedRow],
        held_out: list[PackedRow],
        method: Method,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=rows, eval_dataset=held_out or None, data_collator=self._collate
        )
        self.model_accepts_loss_kwargs = True  # so that num_items_in_batch counts the trained tokens of the whole step
        self.loss_is_scaled_for_ga = True  # our loss is divided by that number already
        self.tokens_seen = 0
        self._rows = rows
        self._held_out = held_out
        self._method = method
        self._adapted = model
        self._output: nn.Module = cast(PreTrainedModel, model.get_base_model()).get_output_embeddings()
        self._step_rows: list[PackedRow] = []

    def _collate(self, rows: Sequence[PackedRow]) -> dict[str, Any]:
        return {**collate(rows, PAD), ROWS: list(rows)}

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [len(row.input_ids) for row in self._rows]
        return LengthGroupedSampler(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the forward and backward pass of one batch. Raises Diverged."""
        self._step_rows += inputs[ROWS]
        self.tokens_seen += sum(len(row.input_ids) for row in inputs[ROWS])
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {float(loss)}", inputs[ROWS])
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this batch's share of the step's mean loss, times the processes, which average their gradients."""
        batch = {name: value for name, value in inputs.items() if name != ROWS}
        share = self.accelerator.num_processes / num_items_in_batch
        loss: Tensor = self._method(model, self._output, batch) * share
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(norm):
            raise self._diverged(f"the gradients' norm is {float(norm)}", self._step_rows)
        self._step_rows = []
        return norm

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the mean loss per trained token of the held-out rows. Raises Diverged."""
        batches = sorted_batches(self._held_out, self.args.per_device_train_batch_size)
        mine = batches[self.args.process_index :: self.args.world_size]
        prepared = (self._prepare_inputs(collate(rows, PAD)) for rows in mine)
        sums = torch.tensor(summed_loss(self._method, self._adapted, self._output, prepared), dtype=torch.float64)
        total, tokens = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        if not math.isfinite(total):
            raise self._diverged(f"the held-out loss is {total}", [])
        metrics = {"eval_loss": total / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def load(self, checkpoint: Path) -> None:
        """Load the adapter's weights from a checkpoint."""
        self._load_from_checkpoint(str(checkpoint))

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: counting would visit all parameters at each step."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        # By default PEFT would ask a model hub whether the vocabulary has changed.
        self._adapted.save_pretrained(str(folder), save_embedding_layers=False)

    def _diverged(self, what: str, rows: Sequence[PackedRow]) -> Diverged:
        sources = list(dict.fromkeys(example.source for row in rows for example in row.examples))
        more = f" and {len(sources) - MAX_NAMED_ROWS} more" if len(sources) > MAX_NAMED_ROWS else ""
        of = f" in a batch of {', '.join(sources[:MAX_NAMED_ROWS])}{more}" if sources else ""
        step = self.state.global_step + 1
        return Diverged(f"step {step}: {what}{of}. No adapter was written; try a lower --learning-rate")
