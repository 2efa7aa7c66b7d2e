"""Checks whether an architecture can be served, by a forward pass without weights.

The model is built on torch's ``meta`` device, which has shapes but no data, and run on a few tokens with an attention
function that records its arguments. No weights are read and nothing is computed.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from bases.errors import BaseRejected

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that transformers' models call with the same input, so that they can be computed together.
Callers take the outputs from a :class:`SharedInputCache`: other models are then still computed right, but slower."""
_RECORDING = "manylora_recording"
"""Name under which the recording attention function is registered with transformers."""
_ROWS = 5
_ATTENTION_ARGUMENTS = {"dropout", "scaling", "sliding_window", "softcap", "is_causal", "position_ids", "use_cache"}
"""Arguments that a model may pass to its attention function, besides our own ``record``."""
_ROTARY = {"default", "linear", "llama3", "yarn", "proportional"}
"""Rotary embeddings whose angles depend on a token's position alone."""
_CUSTOM_ATTENTION = (
    "a layer computes its attention with its own code instead of transformers' attention interface, which keeps the "
    "requests of a batch apart"
)
_STATE_SPACE = re.compile(r"mamba|ssm|rwkv|lstm|recurrent|linear_attn", re.IGNORECASE)


class SharedInputCache:
    """Keeps the outputs of several layers for one input, until each has been taken once. Not thread-safe.

    It is correct for any order of calls: a layer that is called with another input, or twice, is computed anew.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def take(self, member: int, x: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """Return the output of one layer for ``x``; ``compute(x)`` returns those of all, in the order of the layers."""
        if self._input is not x or member not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(compute(x)))
        output = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return output


class _CustomAttention(Exception):
    """The model does not pass our keyword arguments on to its attention."""


@dataclass(slots=True)
class _AttentionCall:
    """One call of the attention function."""

    layer: int | None
    causal: bool
    mask: bool
    heads: int
    """Number of query heads."""
    keys: torch.Size
    values: torch.Size
    arguments: Mapping[str, Any]


@dataclass(slots=True)
class _ForwardRecord:
    """The calls of one forward pass."""

    attention: list[_AttentionCall] = field(default_factory=list)
    linear_rows: dict[str, list[int]] = field(default_factory=dict)
    """Linear layer -> the number of input rows of each call."""


def check_architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the model that ``config`` describes, if it is right for batches of packed sequences.

    It must be a causal decoder of text. Every weight matrix must be in a linear layer or an embedding, and every linear
    layer must see each token once. All attention must go through transformers' interface and use nothing that we do not
    compute. The angles of rotary embeddings must not depend on other tokens. Raises
    :class:`~bases.errors.BaseRejected` with the reason otherwise.
    """
    _check_config(config)
    try:
        model = _without_weights(config)
        _check_parameters(model)
        _check_forward_takes(type(model))
        record = _run(model)
        _check_attention(record.attention, config.num_hidden_layers)
        _check_linears(model, record.linear_rows)
    except BaseRejected as error:
        # A mixture of experts can fail any of these checks; the reason to give is the experts.
        if experts := _experts(config):
            raise BaseRejected(f"mixtures of experts are not served (its config has {experts})") from error
        raise
    return type(model)


def _experts(config: PreTrainedConfig) -> str | None:
    """Return the field that says that there are several experts, as ``num_local_experts: 8``; None without one."""
    for place in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for name, value in vars(place).items():
            if name.endswith("_experts") and isinstance(value, int) and value > 1:
                return f"{name}: {value}"
    return None


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the ``meta`` device."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:
        raise BaseRejected(
            f"transformers {transformers.__version__} cannot build the model that its config.json describes "
            f"({_reason(error)})"
        ) from error
    model.eval()
    return model


def check_context(config: PreTrainedConfig, length: int) -> None:
    """Raise BaseRejected if rotary angles at this context length depend on the longest sequence of a batch."""
    for rope in rotary_parameters(config):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") == "longrope" and length > original:
            raise BaseRejected(
                f"its rotary embedding (longrope) changes for all requests once one is longer than {original} tokens; "
                f"serve it with --max-model-len {original} or less"
            )


def _check_parameters(model: PreTrainedModel) -> None:
    """Raise BaseRejected if a weight matrix is not in a linear layer or an embedding."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(owner, nn.Linear | nn.Embedding):
            raise BaseRejected(_not_linear(name, owner, model.config.model_type))


def _not_linear(name: str, owner: nn.Module, model_type: str) -> str:
    """Return why the parameter ``name`` of the layer ``owner`` cannot be served."""
    kind = type(owner).__name__
    if isinstance(owner, Conv1D):
        return (
            f"its weights ({name}, ...) are in GPT-2's transposed layers (Conv1D) instead of linear layers, which is "
            "not served; models built like Llama, Mistral, Qwen, Gemma or Phi are"
        )
    if _STATE_SPACE.search(f"{model_type} {name} {kind}"):
        return f"it has layers that carry a state from token to token, like Mamba's ({name}), which is not served"
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"it has a convolution ({name}), which is not served"
    return f"it has a weight matrix outside of linear layers and embeddings ({name}, in a {kind}), which is not served"


def _check_config(config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise BaseRejected("it is an encoder-decoder model; only causal decoders are served")
    if config.get_text_config() is not config:
        raise BaseRejected("it is multimodal; only text models are served")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise BaseRejected(f"models of its type ({config.model_type}) are not causal language models")
    for rope in rotary_parameters(config):
        kind = rope.get("rope_type", "default")
        if kind not in _ROTARY | {"longrope"}:
            raise BaseRejected(f"its rotary embedding ({kind}) may depend on the other requests of a batch")


def rotary_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary parameters: one set, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _check_forward_takes(model_class: type[PreTrainedModel]) -> None:
    parameters = inspect.signature(model_class.forward).parameters
    if "position_ids" not in parameters:
        raise BaseRejected(
            "it takes no `position_ids`, so requests cannot share a batch; models with ALiBi (BLOOM, MPT) are like that"
        )
    if "logits_to_keep" not in parameters:
        raise BaseRejected("it takes no `logits_to_keep`, so it cannot compute the logits of some tokens only")


def _run(model: PreTrainedModel) -> _ForwardRecord:
    """Run one forward pass of a model on ``meta`` and return its calls."""
    record = _ForwardRecord()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(_count_rows, record.linear_rows.setdefault(name, [])))
    AttentionInterface.register(_RECORDING, _recording_attention)
    try:
        model.set_attn_implementation(_RECORDING)
        with torch.no_grad(), torch.device("meta"):
            positions = torch.arange(_ROWS).unsqueeze(0)
            model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False, record=record)
    except _CustomAttention as error:
        raise BaseRejected(_CUSTOM_ATTENTION) from error
    except Exception as error:
        raise BaseRejected(
            "its forward pass needs more than the shapes of its tensors, so it cannot be checked whether its answers "
            f"would be right ({_reason(error)})"
        ) from error
    return record


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _count_rows(rows: list[int], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Append the number of input rows. A forward pre-hook."""
    rows.append(inputs[0].shape[:-1].numel())


def _recording_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    record: _ForwardRecord | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Record a call and return empty outputs. An attention function of transformers.

    ``query``, ``key`` and ``value`` are [1, heads, tokens, head_dim]; returns [1, tokens, heads, head_dim] and None.
    """
    if record is None:
        raise _CustomAttention
    causal = arguments.get("is_causal")
    record.attention.append(
        _AttentionCall(
            layer=getattr(module, "layer_idx", None),
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            mask=mask is not None,
            heads=query.shape[1],
            keys=key.shape,
            values=value.shape,
            arguments={name: value for name, value in arguments.items() if value is not None},
        )
    )
    return query.new_empty(*query.shape[:1], query.shape[2], query.shape[1], value.shape[-1]), None


def _check_attention(calls: list[_AttentionCall], layers: int) -> None:
    if not layers:
        raise BaseRejected("it has no layers")
    if [call.layer for call in calls] != list(range(layers)):
        raise BaseRejected(_CUSTOM_ATTENTION)
    for call in calls:
        unknown = sorted(call.arguments.keys() - _ATTENTION_ARGUMENTS)
        if unknown:
            sinks = " (attention sinks)" if unknown[0] == "s_aux" else ""
            raise BaseRejected(f"its attention uses `{unknown[0]}`{sinks}, which is not served")
        if not call.causal:
            raise BaseRejected("its tokens attend to later ones, as in BERT; only causal decoders are served")
        if call.mask:
            raise BaseRejected("its attention uses its own mask, which is not served")
        if call.heads % call.keys[1]:
            raise BaseRejected(f"its {call.heads} query heads cannot share {call.keys[1]} key heads evenly")
        if call.keys != call.values or call.keys != calls[0].keys:
            raise BaseRejected("its keys and values differ in shape, from each other or by layer, which is not served")


def _check_linears(model: PreTrainedModel, rows: Mapping[str, list[int]]) -> None:
    output = model.get_output_embeddings()
    for name, counts in rows.items():
        if counts != [_ROWS] and model.get_submodule(name) is not output:
            raise BaseRejected(f"its linear layer {name} does not see every token exactly once, which is not served")
