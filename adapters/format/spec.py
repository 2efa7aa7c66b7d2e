"""AdapterSpec describes an adapter, BaseLayout the base that it must fit."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NewType

AdapterId = NewType("AdapterId", str)
"""sha256 (hex) over an adapter's content. Two adapters with one id are the same adapter."""


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One linear layer's low-rank update, ``y += scaling * (x @ A.T) @ B.T``."""

    rank: int
    """Rows of A, columns of B."""
    scaling: float
    """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA (Kalajdzievski 2023)."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A verified adapter: everything about it but the weights."""

    id: AdapterId
    targets: Mapping[str, LoraTarget]
    """By the layer's name in the base model, e.g. ``model.layers.0.self_attn.q_proj``."""
    size_bytes: int
    """Bytes of its weights file."""
    base_fingerprint: str | None = None
    """Fingerprint of the base it was trained on, from ``manylora.json``; None if it does not say."""
    unknown_fields: tuple[str, ...] = ()
    """Unknown fields of its config that are set, sorted; they are ignored."""
    rank: int = field(init=False)
    """The largest rank of its targets, which a device slot must hold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", max((t.rank for t in self.targets.values()), default=0))


@dataclass(frozen=True, slots=True)
class BaseLayout:
    """What an adapter must fit: the base's fingerprint and its linear layers."""

    fingerprint: str
    linears: Mapping[str, tuple[int, int]]
    """Layer name -> (in_features, out_features), for every linear layer that can carry LoRA."""
    unserved: Mapping[str, str] = field(default_factory=dict)
    """Layer name -> why LoRA on it is not served (embeddings, ``lm_head``)."""
    equivalents: frozenset[str] = frozenset()
    """Other fingerprints that mean this base."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Part of the base (``weights``, ``tokenizer``, ...) -> a digest or description of it."""
