"""All layers of a Llama-shaped model in one native call, where the CPU kernels allow it.

transformers' model stays what it is and is the reference: :meth:`Decoder.of` takes a model only if every part is one
that ``decoder.c`` computes, and the same tensors serve both (their addresses are taken once: no parameter may be
replaced afterwards). A step through the model's own modules is some 2,000 calls
from Python; at a few rows they take longer than the arithmetic.
"""

import ctypes
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from bases.base import Base
from server import native
from server.attention import How, KvCache, PagedBatch
from server.linear import FusedNf4
from server.lora import LoraGroup, LoraPool
from server.native.structures import Layer, Linear, Model, Step, Work, address

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models of transformers whose layers are those of ``decoder.c``: norm before, rotary positions, a gated SiLU."""
STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles depend on nothing but the position."""
HEAD_BLOCK = 64
"""Tokens that the output layer's kernel takes at once; a vocabulary has at least as many."""
GROUPS = (
    ("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("o", ("self_attn.o_proj",)),
    ("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
    ("down", ("mlp.down_proj",)),
)

Ways = Mapping[int, How]
"""How each layer attends."""


log = logging.getLogger(__name__)


class Decoder:
    """A model's layers as ``decoder.c`` takes them."""

    def __init__(self, base: Base, groups: Mapping[str, LoraGroup], pool: LoraPool, kv: KvCache, ways: Ways) -> None:
        """``groups``: by the name of their first layer. The caller has checked that all of it fits (:meth:`of`)."""
        assert pool.kernels is not None
        self.kernels, self.pool, self.kv = pool.kernels, pool, kv
        model: Any = base.model
        self.model = model.model
        self.groups = [[groups[name] for name, _ in _named_groups(i)] for i in range(len(self.model.layers))]
        self.ways = ways
        self.seconds: Tensor | None = None
        """[len(PHASES)] float64, where set: steps add what their phases took."""
        self.layers = (Layer * len(self.groups))(*(self._layer(i) for i in range(len(self.groups))))
        config, attention = model.config, self.model.layers[0].self_attn
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.hidden, self.intermediate, self.width = config.hidden_size, config.intermediate_size, attention.head_dim
        self.vocabulary = model.lm_head.weight.shape[0]
        self.native = Model(
            *(len(self.groups), self.hidden, self.intermediate, self.heads, self.kv_heads, self.width, kv.size),
            *(self.vocabulary, config.rms_norm_eps),
            *(ctypes.addressof(self.layers), address(self.model.norm.weight), address(model.lm_head.weight)),
        )
        self.cosine, self.sine = self._angles(base.max_model_len)
        self.active = lru_cache(maxsize=64)(self._active)

    @classmethod
    def of(cls, base: Base, pool: LoraPool, kv: KvCache, ways: Ways) -> Self | None:
        """The model's decoder, or None where its layers, their shapes or this machine are not what the kernels take.

        ways: how each layer attends, as its module said when it was called.
        """
        groups = {group.names[0]: group for group in pool.groups}
        misfit = _misfit(base.model, groups, kv, ways) if pool.kernels else native.absence()
        if misfit is None:
            return cls(base, groups, pool, kv, ways)
        log.info("Layers are computed one by one: %s", misfit)
        return None

    def _layer(self, index: int) -> Layer:
        module = self.model.layers[index]
        attention = module.self_attn
        keys, values = self.kv.layers[index]
        how = self.ways[index]
        linears = {}
        for (name, _), group in zip(GROUPS, self.groups[index], strict=True):
            assert isinstance(group.base, FusedNf4)
            linears[name] = Linear(group.base.native, group.native)
        return Layer(
            input_norm=address(module.input_layernorm.weight),
            post_norm=address(module.post_attention_layernorm.weight),
            q_norm=address(_weight(attention, "q_norm")),
            k_norm=address(_weight(attention, "k_norm")),
            keys=address(keys),
            values=address(values),
            window=how.window or 0,
            scale=how.scale,
            **linears,
        )

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, [positions, width] bf16 each, as the model's own module makes them."""
        like = self.model.embed_tokens.weight
        cosine, sine = self.model.rotary_emb(like, torch.arange(positions).unsqueeze(0))
        return cosine[0].contiguous(), sine[0].contiguous()

    def refresh(self) -> None:
        """Take over where the pool's tensors are, after an adapter was placed."""
        for layer, groups in zip(self.layers, self.groups, strict=True):
            for (name, _), group in zip(GROUPS, groups, strict=True):
                getattr(layer, name).lora = group.native

    def logits(self, tokens: Sequence[int], positions: Sequence[int], keep: Sequence[int], paged: PagedBatch) -> Tensor:
        """Logits [len(keep), vocabulary] float32 after writing the keys and values of all rows."""
        x = self.model.embed_tokens(torch.tensor(tokens))
        where = torch.tensor(positions)
        cosine, sine = self.cosine[where], self.sine[where]
        logits = torch.empty(len(keep), self.vocabulary)
        plan, runs, kept = self.pool.plan, paged.paged_runs, torch.tensor(keep)
        lora = plan.lora_rows if plan.segments else None
        step = Step(
            *(len(tokens), len(runs.table), len(keep), runs.context),
            *(address(t) for t in (runs.table, runs.blocks, paged.where, cosine, sine)),
            *(
                lora.address if lora else None,
                self.active(plan.targets).ctypes.data,
                address(kept),
                address(logits),
                address(self.seconds),
            ),
        )
        threads = torch.get_num_threads()
        work, room = self._work(x, 0 if lora is None else lora.pages, runs.context, threads)
        self.kernels.decode_step(self.native, step, work, threads)
        del room  # until here the kernels wrote to it
        return logits

    def _active(self, targets: frozenset[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """[layers, 4]: bit j where the group's j-th layer is among ``targets``."""
        return np.array(
            [
                [sum(1 << j for j, name in enumerate(g.names) if name in targets) for g in groups]
                for groups in self.groups
            ],
            dtype=np.uint8,
        )

    def _work(self, x: Tensor, pages: int, context: int, threads: int) -> tuple[Work, list[Tensor]]:
        """Room for a step, and what must stay alive for it: ``x`` [rows, hidden], padded, comes first."""
        padded = native.pad_rows(len(x))
        queries = self.heads * self.width
        wide = max(queries + 2 * self.kv_heads * self.width, 2 * self.intermediate)
        widths = (self.hidden, self.hidden, wide, queries, queries, self.intermediate, self.hidden)
        room = [torch.empty(padded, width, dtype=torch.bfloat16) for width in widths]
        room[0][: len(x)] = x
        room.append(torch.empty(pages * 3 * native.TILE_ROWS * 8, dtype=torch.bfloat16))
        room.append(torch.empty(padded, self.hidden, dtype=torch.bfloat16))
        room.append(torch.empty(threads * max(self.hidden, self.intermediate, queries) * 16))
        room.append(torch.empty(threads * context * 24))
        return Work(*(address(tensor) for tensor in room)), room


def _named_groups(layer: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The first name and all names of each group of a layer."""
    for _, leaves in GROUPS:
        names = tuple(f"model.layers.{layer}.{leaf}" for leaf in leaves)
        yield names[0], names


def is_llama_shaped(model: Any) -> bool:
    """Whether a model's layers are those of CLASSES, the activation included."""
    return type(model).__name__ in CLASSES and model.config.hidden_act == "silu"


def _misfit(model: Any, groups: Mapping[str, LoraGroup], kv: KvCache, ways: Ways) -> str | None:
    """Why the kernels cannot compute this model's layers; None if they can."""
    if not is_llama_shaped(model):
        return f"not the layers of {type(model).__name__}"
    if model.config.rope_parameters["rope_type"] not in STATIC or any(how.softcap for how in ways.values()):
        return "its positions or its attention are of an unusual kind"
    if kv.kernels is None:
        return "its attention takes --block-size a multiple of 16, heads a multiple of 32 wide, and bf16"
    if not _plain(model.lm_head) or any(weight.dtype != torch.bfloat16 for weight in _norms(model.model)):
        return "its output layer or its norms are not plain bf16"
    wanted = (names for i in range(len(model.model.layers)) for names in _named_groups(i))
    if not all(first in groups and groups[first].names == names and _fused(groups[first]) for first, names in wanted):
        return "its linear layers are not NF4 in blocks of 64, or of a shape that the kernels do not take"
    return None


def _plain(head: nn.Module) -> bool:
    if type(head) is not nn.Linear or _bias(head) is not None:
        return False
    return head.weight.is_contiguous() and head.weight.dtype == torch.bfloat16 and head.weight.shape[0] >= HEAD_BLOCK


def _norms(model: Any) -> Iterator[Tensor]:
    yield model.norm.weight
    for layer in model.layers:
        yield from (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
        found = (_weight(layer.self_attn, name) for name in ("q_norm", "k_norm"))
        yield from (weight for weight in found if weight is not None)


def _fused(group: LoraGroup) -> bool:
    base: object = group.base
    return group.kernels is not None and isinstance(base, FusedNf4) and base.kernels is not None


def _bias(layer: nn.Linear) -> Tensor | None:
    return layer.bias


def _weight(module: nn.Module, name: str) -> Tensor | None:
    return getattr(getattr(module, name, None), "weight", None)
