"""Whether an architecture can be served, found out by trying it.

The model is built once more on torch's ``meta`` device, which has shapes but no numbers, and run on a few rows with an
attention function that records what reaches it. No weights are read and nothing is computed.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from bases.errors import BaseRejected

_PROBE = "manylora_probe"
_ROWS = 5
_ATTENTION_ARGUMENTS = {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "use_cache"}
"""What a model may pass to its attention function, besides what we pass through it."""
_ROTARY = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotary embeddings whose angles depend on the position alone."""


@dataclass(slots=True)
class _Attention:
    """One call of the attention function."""

    layer: int | None
    causal: bool
    mask: bool
    keys: torch.Size
    values: torch.Size
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class _Probe:
    """What one forward did."""

    attention: list[_Attention] = field(default_factory=list)
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Linear layer -> rows of each call."""


def check_architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of model that ``config`` describes, if packed rows through it give right answers.

    That takes: a causal decoder of text; every weight matrix in a linear layer that sees each row once; attention of
    every layer through transformers' interface, with nothing in it that we do not compute; position angles that do not
    depend on the other rows. Raises :class:`~server.errors.BaseRejected`, saying why, otherwise.
    """
    _check_config(config)
    model = _without_weights(config)
    _check_forward_takes(type(model))
    _check_parameters(model)
    probe = _run(model)
    _check_attention(probe.attention, config.num_hidden_layers)
    _check_linears(model, probe.rows)
    return type(model)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the ``meta`` device."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise BaseRejected(f"transformers makes no causal language model of it ({_reason(error)})") from error
    model.eval()
    return model


def check_context(config: PreTrainedConfig, length: int) -> None:
    """Raise BaseRejected if angles at this context length would depend on the longest row of a batch."""
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") == "longrope" and length > original:
            raise BaseRejected(
                f"its rotary embedding (longrope) changes for every row once one row is longer than {original} tokens; "
                f"serve it with --max-model-len {original} or less"
            )


def _check_parameters(model: PreTrainedModel) -> None:
    """Raise BaseRejected if a weight matrix is not in a linear layer or an embedding."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(owner, nn.Linear | nn.Embedding):
            raise BaseRejected(f"{name} is a weight matrix in a {type(owner).__name__}, not in a linear layer")


def _check_config(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise BaseRejected("it is an encoder-decoder model")
    if config.get_text_config() is not config:
        raise BaseRejected("it is multimodal; only text models are served")
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in _ROTARY | {"longrope"}:
            raise BaseRejected(f"its rotary embedding ({kind}) may depend on the other rows of a batch")


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary parameters: one set, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _check_forward_takes(model_class: type[PreTrainedModel]) -> None:
    parameters = inspect.signature(model_class.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in parameters:
            raise BaseRejected(f"its forward takes no `{name}`")


def _run(model: PreTrainedModel) -> _Probe:
    """One forward of a model on ``meta``."""
    probe = _Probe()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(_count, probe.rows.setdefault(name, [])))
    AttentionInterface.register(_PROBE, _record)
    try:
        model.set_attn_implementation(_PROBE)
        with torch.no_grad(), torch.device("meta"):
            positions = torch.arange(_ROWS).unsqueeze(0)
            model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False, probe=probe)
    except Exception as error:
        raise BaseRejected(f"its forward cannot be followed ({_reason(error)})") from error
    return probe


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _count(rows: list[int], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Forward pre-hook: note how many rows come in."""
    rows.append(inputs[0].shape[:-1].numel())


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    probe: _Probe | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention function: [1, heads, rows, width] each -> [1, rows, heads, width]."""
    if probe is None:
        raise TypeError("keyword arguments do not reach its attention")
    causal = arguments.get("is_causal")
    probe.attention.append(
        _Attention(
            layer=getattr(module, "layer_idx", None),
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            mask=mask is not None,
            keys=key.shape,
            values=value.shape,
            arguments={name: value for name, value in arguments.items() if value is not None},
        )
    )
    return query.new_empty(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None


def _check_attention(calls: list[_Attention], layers: int) -> None:
    if [call.layer for call in calls] != list(range(layers)):
        raise BaseRejected("not every layer has one attention that goes through transformers' attention interface")
    for call in calls:
        unknown = sorted(call.arguments.keys() - _ATTENTION_ARGUMENTS)
        if unknown:
            raise BaseRejected(f"its attention uses `{unknown[0]}`, which is not served")
        if call.mask or not call.causal:
            raise BaseRejected("its attention is not plainly causal")
        if call.keys != call.values or call.keys != calls[0].keys:
            raise BaseRejected("its keys and values differ in shape, by layer or from each other")


def _check_linears(model: PreTrainedModel, rows: Mapping[str, list[int]]) -> None:
    output = model.get_output_embeddings()
    for name, counts in rows.items():
        if counts != [_ROWS] and model.get_submodule(name) is not output:
            raise BaseRejected(f"the linear layer {name} does not see each row once")
