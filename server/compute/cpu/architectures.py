"""The decoder layers of transformers' models, described as ``decoder.c`` takes them.

The models that are computed in one native call all have norms over rows, rotary positions and an MLP. What differs is
said here by data: a :class:`Family` for each class of model, made an :class:`Architecture` by a model's config.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from bases.architecture import rotary_parameters
from server.compute.cpu.structures import GELU, GELU_TANH, IN_TURN, RELU_SQUARED, SEQUENTIAL, SILU, SUMMED

ACTIVATIONS = {
    **{"silu": SILU, "relu2": RELU_SQUARED, "gelu": GELU},
    **{"gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH, "gelu_fast": GELU_TANH},
}
"""By their names in configs."""
ROTARY = ("default", "linear", "llama3", "yarn", "longrope")
"""Kinds of rotary positions whose angles depend on nothing but the position. Those of ``longrope`` do below the length
that :func:`bases.architecture.check_context` allows."""
ONE_KIND = ""
"""Of rotary positions, where all layers have the same."""


@dataclass(frozen=True)
class Norms:
    """Names of a layer's norms around attention and the MLP; None where there is none."""

    attention: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp: str | None = "post_attention_layernorm"
    mlp_out: str | None = None

    def __iter__(self) -> Iterator[str | None]:
        """In the order of the C structure."""
        return iter((self.attention, self.attention_out, self.mlp, self.mlp_out))


@dataclass(frozen=True)
class Multipliers:
    """Constants by which a model multiplies on its way."""

    embedding: float = 1.0
    residual: float = 1.0
    """What attention and the MLP add."""
    logits_divisor: float = 1.0


NormWeights = tuple[Tensor | None, Tensor | None]
"""Weight and bias. No weight: there is no norm."""
Rotary = Callable[[Any, int], str | None]
"""A config and the index of a layer -> the kind of rotary positions of that layer, None for none."""


@dataclass(frozen=True)
class Family:
    """What the models of one class have in common. The default is Llama."""

    attention: str = "self_attn"
    norms: Norms = Norms()
    final_norm: str = "norm"
    head_norms: tuple[str, str] = ("q_norm", "k_norm")
    """In the attention module. A model may have none."""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    heads_in_turn: bool = False
    """The outputs for queries, keys and values are a head's of each, then the next head's."""
    activation: str = "hidden_act"
    """The name of the config's field."""
    eps: str = "rms_norm_eps"
    """The name of the config's field; 1e-5 where it has none."""
    norm_centers: bool = False
    """Norms are LayerNorms: they subtract the mean, and may have a bias."""
    norm_rounds: bool = True
    """What was divided by its RMS is rounded to bf16 before it is multiplied by the weight."""
    norm_offset: float = 0.0
    """Added to the weight of every norm."""
    norms_all_heads: bool = False
    """Norms of queries and keys are over all heads together, not over each."""
    rotary_rounds: bool = True
    """Angles and products are rounded to bf16 before they are added."""
    rotary_pairs: bool = False
    """Neighbouring components are rotated together, not those half a width apart."""
    angles_in_pairs: bool = False
    """The model's module returns every angle twice in a row, not all of them twice."""
    rotary: Rotary = lambda config, layer: ONE_KIND
    gated: bool = True
    """The MLP has a gate, and not only ``up`` with an activation."""
    residual: Callable[[Any], int] = lambda config: SEQUENTIAL
    """How the MLP follows attention, by the config."""
    multipliers: Callable[[Any], Multipliers] = lambda config: Multipliers()
    plain_length: Callable[[Any], int | None] = lambda config: None
    """The context length up to which it is as described here, from the config; None for any."""
    differs: Callable[[Any], str | None] = lambda config: None
    """What a model with this config has that is not described here; None for nothing."""
    final_softcap: bool = False
    """The config may have a soft cap for logits."""


def _by_layer_type(config: Any, layer: int) -> str | None:
    kind: str = config.layer_types[layer]
    return kind


def _unless_left_out(config: Any, layer: int) -> str | None:
    """In spite of its name, ``no_rope_layers`` is 1 for the layers that have rotary positions."""
    return ONE_KIND if config.no_rope_layers[layer] else None


def _only_with_window(config: Any, layer: int) -> str | None:
    """Where layers have sliding windows, those without one have no positions."""
    return ONE_KIND if config.sliding_window is None or config.layer_types[layer] == "sliding_attention" else None


def _only_in_sliding(config: Any, layer: int) -> str | None:
    return ONE_KIND if config.layer_types[layer] == "sliding_attention" else None


def _granite(config: Any) -> Multipliers:
    return Multipliers(config.embedding_multiplier, config.residual_multiplier, config.logits_scaling)


def _hyperclovax(config: Any) -> Multipliers:
    return Multipliers(config.embedding_multiplier, config.residual_multiplier, 1 / config.logits_scaling)


def _cohere(config: Any) -> Multipliers:
    return Multipliers(logits_divisor=1 / config.logit_scale)


def _before_queries_are_scaled(config: Any) -> int | None:
    """Queries of later positions are multiplied by a number that grows with the position."""
    length: int = config.rope_parameters["original_max_position_embeddings"]
    return length


def _clips(config: Any) -> str | None:
    return None if config.clip_qkv is None else "its queries, keys and values are clipped (clip_qkv)"


AROUND = Norms(
    attention_out="post_attention_layernorm", mlp="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)
AFTER = Norms(attention=None, attention_out="post_attention_layernorm", mlp=None, mlp_out="post_feedforward_layernorm")
FUSED_GATE_UP = ("mlp.gate_up_proj",)
GEMMA = Family(norm_rounds=False, norm_offset=1.0)
GEMMA_2 = replace(GEMMA, norms=AROUND, activation="hidden_activation", final_softcap=True)
OLMO_2 = Family(norms=AFTER, norm_rounds=False, norms_all_heads=True, rotary_rounds=False)
LAYER_NORM = Family(norm_centers=True, norm_rounds=False, eps="layer_norm_eps")
COHERE = replace(
    LAYER_NORM,
    norms=Norms(mlp=None),
    residual=lambda config: IN_TURN,
    multipliers=_cohere,
    rotary_rounds=False,
    rotary_pairs=True,
    angles_in_pairs=True,
)
NEOX = replace(
    LAYER_NORM,
    attention="attention",
    final_norm="final_layer_norm",
    qkv=("attention.query_key_value",),
    heads_in_turn=True,
    o="attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    gated=False,
)
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "MinistralForCausalLM": Family(),
    "Ministral3ForCausalLM": Family(plain_length=_before_queries_are_scaled),
    "CwmForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "SeedOssForCausalLM": Family(),
    "Phi3ForCausalLM": Family(qkv=("self_attn.qkv_proj",), gate_up=FUSED_GATE_UP),
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA_2,
    "Gemma3ForCausalLM": replace(GEMMA_2, rotary=_by_layer_type),
    "VaultGemmaForCausalLM": replace(GEMMA_2, norms=Norms(mlp="pre_feedforward_layernorm")),
    "GraniteForCausalLM": Family(multipliers=_granite),
    "HyperCLOVAXForCausalLM": Family(
        norms=Norms(attention_out="post_norm1", mlp_out="post_norm2"), multipliers=_hyperclovax
    ),
    "GlmForCausalLM": Family(gate_up=FUSED_GATE_UP, rotary_pairs=True),
    "Glm4ForCausalLM": Family(
        norms=Norms(attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
        gate_up=FUSED_GATE_UP,
        rotary_pairs=True,
    ),
    "Ernie4_5ForCausalLM": Family(rotary_pairs=True, rotary_rounds=False),
    "HeliumForCausalLM": Family(norm_rounds=False, rotary_pairs=True),
    "ArceeForCausalLM": Family(gate_up=("mlp.up_proj",), gated=False),
    "SmolLM3ForCausalLM": Family(rotary=_unless_left_out),
    "Olmo2ForCausalLM": OLMO_2,
    "Olmo3ForCausalLM": replace(OLMO_2, rotary=_by_layer_type),
    "Exaone4ForCausalLM": Family(norms=AFTER, rotary=_only_with_window),
    "OlmoForCausalLM": replace(LAYER_NORM, eps="", rotary_rounds=False, differs=_clips),
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": replace(COHERE, rotary=_only_in_sliding),
    "Starcoder2ForCausalLM": replace(
        LAYER_NORM, eps="norm_epsilon", gate_up=("mlp.c_fc",), down="mlp.c_proj", gated=False
    ),
    "Jais2ForCausalLM": replace(LAYER_NORM, gate_up=("mlp.up_proj",), gated=False),
    "PhiForCausalLM": replace(
        LAYER_NORM,
        norms=Norms(mlp=None),
        final_norm="final_layernorm",
        head_norms=("q_layernorm", "k_layernorm"),
        o="self_attn.dense",
        gate_up=("mlp.fc1",),
        down="mlp.fc2",
        gated=False,
        residual=lambda config: SUMMED,
    ),
    "PersimmonForCausalLM": replace(
        NEOX,
        attention="self_attn",
        final_norm="final_layernorm",
        head_norms=("q_layernorm", "k_layernorm"),
        qkv=("self_attn.query_key_value",),
        o="self_attn.dense",
    ),
    "GPTNeoXForCausalLM": replace(
        NEOX,
        residual=lambda config: SUMMED if config.use_parallel_residual else SEQUENTIAL,
    ),
}
"""By the class of the model."""


@dataclass(frozen=True)
class Architecture:
    """One model's layers."""

    family: Family
    prefix: str
    """Of the names of its modules."""
    activation: int
    eps: float
    residual: int
    hidden: int
    rotary: tuple[str | None, ...]
    """The kind of each layer's rotary positions, None for none."""
    multipliers: Multipliers
    final_softcap: float
    """Of the logits, 0 for none."""

    @classmethod
    def of(cls, causal: Any) -> Self:
        """Of a model for which there is no :func:`unsupported_reason`."""
        family, config = FAMILIES[type(causal).__name__], causal.config
        return cls(
            family,
            prefix=causal.base_model_prefix,
            activation=ACTIVATIONS[getattr(config, family.activation)],
            eps=getattr(config, family.eps, 1e-5),
            residual=family.residual(config),
            hidden=config.hidden_size,
            rotary=tuple(family.rotary(config, layer) for layer in range(config.num_hidden_layers)),
            multipliers=family.multipliers(config),
            final_softcap=(family.final_softcap and config.final_logit_softcapping) or 0.0,
        )

    @property
    def rotary_kinds(self) -> list[str]:
        """All kinds of rotary positions, each once."""
        return sorted({kind for kind in self.rotary if kind is not None})

    @property
    def groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Linear layers that share an input, by their field of the C structure."""
        family = self.family
        return (("qkv", family.qkv), ("o", (family.o,)), ("gate_up", family.gate_up), ("down", (family.down,)))

    def group_names(self, layer: int) -> list[tuple[str, ...]]:
        """The full names of each group's linear layers."""
        return [tuple(f"{self.prefix}.layers.{layer}.{leaf}" for leaf in leaves) for _, leaves in self.groups]

    def norms(self, layer: Any) -> list[NormWeights]:
        """A layer's norms in the order of the C structure: around attention and MLP, of queries, of keys."""
        around = [None if name is None else getattr(layer, name) for name in self.family.norms]
        heads = (getattr(getattr(layer, self.family.attention), name, None) for name in self.family.head_norms)
        return [self._weights(norm) for norm in (*around, *heads)]

    def final_norm(self, model: Any) -> NormWeights:
        """That of the last layer's output."""
        return self._weights(getattr(model, self.family.final_norm))

    def _weights(self, norm: nn.Module | None) -> NormWeights:
        if norm is None or isinstance(norm, nn.Identity):
            return None, None
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        return torch.ones(self.hidden, dtype=torch.bfloat16) if weight is None else weight, bias


def unsupported_reason(causal: Any, length: int) -> str | None:
    """Why a model's architecture is not one of these at this context length; None if it is."""
    name, config = type(causal).__name__, causal.config
    if name not in FAMILIES:
        return f"there is no native decoder for {name}"
    family = FAMILIES[name]
    plain_length = family.plain_length(config)
    if plain_length is not None and length > plain_length:
        return (
            f"beyond {plain_length} tokens it computes what the native decoder does not; "
            f"--max-model-len {plain_length} or less avoids that"
        )
    if reason := family.differs(config):
        return reason
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        return f"its activation is {activation}, and the kernels compute {', '.join(ACTIVATIONS)}"
    for rope in rotary_parameters(config):
        if rope["rope_type"] not in ROTARY:
            return f"its rotary positions are of the kind {rope['rope_type']}, and the kernels take {', '.join(ROTARY)}"
    return None
