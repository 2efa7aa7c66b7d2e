"""What the C kernels are given: the structures of ``kernels.h`` and ``decoder.c``, field by field.

A structure holds addresses only. Whoever fills one in keeps the tensors alive.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from server.engine.slots import PAGE

MEMBERS = 3
"""Layers that share an input, at most."""
NF4_BLOCK = 64
"""Inputs of an NF4 layer that share a scale."""
NF4_OUTPUTS = 32
"""Outputs of an NF4 layer that are packed together."""
NF4_SCRATCH = 32
"""Floats of scratch for each packed input and thread of an NF4 product."""
NF4_BORDER = 64
"""Zeros before the first row of an NF4 layer's input, where its rows are padded."""
LORA_MAX_INPUTS = 49152
TILE_ROWS = 16
TILE_INPUTS = 32
KEY_STEP = 32
"""Keys that are multiplied with their values together."""
ATTENTION_WIDTH_STEP = 32
ATTENTION_MAX_WIDTH = 256
ATTENTION_SCRATCH = 24
"""Floats of scratch for each key and thread of attention."""
HEAD_MIN_TOKENS = 64
"""Of a vocabulary."""
SILU, GELU_TANH, RELU_SQUARED, GELU = 0, 1, 2, 3
"""Activations."""
SEQUENTIAL, IN_TURN, SUMMED = 0, 1, 2
"""How the MLP follows attention: see ``kernels.h``."""
VECTOR = 16
"""Numbers that the kernels take together."""
CONSTANTS = {
    "MEMBERS": MEMBERS,
    "NF4_BLOCK": NF4_BLOCK,
    "NF4_OUTPUTS": NF4_OUTPUTS,
    "NF4_SCRATCH": NF4_SCRATCH,
    "NF4_BORDER": NF4_BORDER,
    "LORA_PAGE": PAGE,
    "LORA_MAX_INPUTS": LORA_MAX_INPUTS,
    "TILE_ROWS": TILE_ROWS,
    "TILE_INPUTS": TILE_INPUTS,
    "KEY_STEP": KEY_STEP,
    "ATTENTION_WIDTH_STEP": ATTENTION_WIDTH_STEP,
    "ATTENTION_MAX_WIDTH": ATTENTION_MAX_WIDTH,
    "ATTENTION_SCRATCH": ATTENTION_SCRATCH,
    "HEAD_MIN_TOKENS": HEAD_MIN_TOKENS,
    "SILU": SILU,
    "GELU_TANH": GELU_TANH,
    "RELU_SQUARED": RELU_SQUARED,
    "GELU": GELU,
    "SEQUENTIAL": SEQUENTIAL,
    "IN_TURN": IN_TURN,
    "SUMMED": SUMMED,
}
"""Those of ``kernels.h``, in the order of ``layout.c``."""


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's data begins; None for none."""
    return None if tensor is None else tensor.data_ptr()


class Nf4(ctypes.Structure):
    """A quantised layer, or several side by side."""

    _fields_ = (
        *((name, c_int64) for name in ("out", "inputs", "groups", "blocks", "stride")),
        *((name, c_void_p) for name in ("weight", "scale", "bias", "place", "shift")),
    )


class Chunk(ctypes.Structure):
    """A row of :attr:`server.compute.cpu.batches.PagedChunks.table`."""

    _fields_ = tuple((name, c_int64) for name in ("row", "rows", "start", "table"))


class Attention(ctypes.Structure):
    """One layer's attention in one step."""

    _fields_ = (
        *((name, c_int64) for name in ("heads", "kv_heads", "width", "size", "window")),
        *((name, c_float) for name in ("scale", "softcap")),
        *((name, c_void_p) for name in ("q", "keys", "values", "tables", "out")),
    )


class Lora(ctypes.Structure):
    """The pool of one group of layers."""

    _fields_ = (("members", c_int64), ("a", c_void_p), ("b", c_void_p * MEMBERS), ("out", c_int64 * MEMBERS))

    def fill(self, a: Tensor | None, bs: Sequence[Tensor | None], outs: Sequence[int]) -> None:
        """Point it at ``a`` and each member's ``b``; they are None until an adapter needs them."""
        self.members, self.a = len(bs), address(a)
        self.b[: len(bs)] = [address(b) for b in bs]
        self.out[: len(bs)] = list(outs)


class LoraGroup(ctypes.Structure):
    """A row of the first table of :class:`server.compute.cpu.batches.LoraRows`."""

    _fields_ = tuple((name, c_int32) for name in ("first", "rows", "page", "pages"))


class LoraBatch(ctypes.Structure):
    """Which rows take which pages in one step."""

    _fields_ = (
        *((name, c_int64) for name in ("groups", "pages")),
        *((name, c_void_p) for name in ("group", "row", "page", "weight")),
    )


class Linear(ctypes.Structure):
    """Layers over one input: the base's, and the adapters'."""

    _fields_ = (("base", Nf4), ("lora", Lora))


class Norm(ctypes.Structure):
    """A norm's parameters. No weight: there is no norm."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        *((name, Norm) for name in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")),
        *((name, Norm) for name in ("q_norm", "k_norm")),
        *((name, Linear) for name in ("qkv", "o", "gate_up", "down")),
        *(("keys", c_void_p), ("values", c_void_p), ("window", c_int64), ("rotary", c_int64)),
        *(("scale", c_float), ("softcap", c_float)),
    )


class Model(ctypes.Structure):
    """All of a model that does not change from step to step."""

    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "width")),
        *(
            (name, c_int64)
            for name in ("cached_width", "size", "vocabulary", "stride", "head_stride", "keys", "values")
        ),
        *((name, c_int64) for name in ("rotary_width", "activation", "gated", "norm_rounds", "rotary_pairs")),
        *((name, c_int64) for name in ("rotary_rounds", "norms_all_heads", "norm_centers", "residual")),
        *((name, c_float) for name in ("eps", "norm_offset", "residual_multiplier", "logits_divisor", "final_softcap")),
        *(("layer", c_void_p), ("final_norm", Norm), ("head", c_void_p), ("head_bias", c_void_p)),
    )


class Step(ctypes.Structure):
    """What one step runs."""

    _fields_ = (
        *((name, c_int64) for name in ("rows", "chunks", "sampled", "context")),
        *(
            (name, c_void_p)
            for name in (
                *("chunk", "tables", "slots", "cosine", "sine", "lora", "active", "sampled_rows", "logits", "seconds"),
            )
        ),
        *(("read", c_int64), ("hidden_rows", c_void_p), ("hidden", c_void_p)),
    )


PHASES = ("norms", "NF4 products", "LoRA", "rotary", "attention", "gate", "output layer")
"""What ``Step.seconds`` counts."""


class Workspace(ctypes.Structure):
    """Room for what is between the phases of a step."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("x", "normed", "wide", "q", "mixed", "act", "added", "attended", "h", "packed", "totals", "scores"),
        )
    )


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    *(Nf4, Chunk, Attention, Lora, LoraGroup, LoraBatch),
    *(Linear, Norm, Layer, Model, Step, Workspace),
)
"""All of them, in the order of ``layout.c``."""


def check_layout(library: ctypes.CDLL) -> None:
    """Raises RuntimeError where C puts a field elsewhere than it is written to here, or has another constant."""
    for (name, here), there in zip(CONSTANTS.items(), _array(library, "constants", len(CONSTANTS)), strict=True):
        if here != there:
            raise RuntimeError(f"{name} is {here} in structures.py and {there} in kernels.h: {_BOTH}")
    mine = [
        (f"{kind.__name__}.{field}" if field else f"the size of {kind.__name__}", at)
        for kind in STRUCTURES
        for field, at in _layout(kind)
    ]
    for (what, here), there in zip(mine, _array(library, "layout", len(mine)), strict=True):
        if here != there:
            raise RuntimeError(f"{what} is {here} in structures.py and {there} in kernels.h, in bytes: {_BOTH}")


_BOTH = "it was changed in one place only, and the kernels would read and write at wrong addresses"


def _array(library: ctypes.CDLL, name: str, count: int) -> Sequence[int]:
    length = c_int64.in_dll(library, f"{name}_length").value
    if length != count:
        raise RuntimeError(f"layout.c has {length} {name}, structures.py {count}: {_BOTH}")
    return list((c_int64 * length).in_dll(library, name))


def _layout(kind: type[ctypes.Structure]) -> list[tuple[str, int]]:
    fields = [field[0] for field in kind._fields_]
    return [("", ctypes.sizeof(kind)), *((name, getattr(kind, name).offset) for name in fields)]
