"""What a way of computing offers: linear layers, adapters, keys and values, sampling, and the forward pass of a batch.

:class:`~server.compute.reference.backend.ReferenceBackend` is the plain one and what all others are tested against. A
new one is a folder with these parts, most of them the reference's at first, and an entry in
:data:`server.compute.BACKENDS`; ``tests/numeric/compute/test_backends.py`` then runs over it. ``docs/design.md``
shows it step by step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bases.base import Base
from server.compute.attention import AttentionParams, PagedAttention
from server.compute.lora_mapping import LoraMapping
from server.engine.sequence import Batch

if TYPE_CHECKING:
    from server.compute.pool import AdapterPool

GroupLinear = Callable[[Tensor], list[Tensor]]
"""Several linear layers over one input: [rows, in] -> each layer's [rows, out]."""
Forward = Callable[[Batch], Tensor]
"""A step: logits [len(batch.sampled), vocabulary] float32, after the batch's keys and values were written."""
PackedGroup = tuple[Tensor, tuple[Tensor | None, ...]]
"""What an adapter has for a group of layers, in a backend's layout: A, and per layer B scaled, or None."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """Linear layers that share an input."""

    inputs: int
    outs: tuple[int, ...]


class GroupLora(Protocol):
    """The memory of one group of layers for adapters, page by page, and what it adds to the layers' outputs."""

    @property
    def reserved(self) -> frozenset[int]:
        """The layers, by their place in the group, that have memory: those that some adapter had weights for."""

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """Bring A [pages, layers, PAGE, in] and B [pages, PAGE, out] of each layer, or None, into this layout.

        On the host, on any thread.
        """

    def reserve(self, packed: PackedGroup) -> bool:
        """Take memory, zeros, for what ``packed`` has and no adapter had before; whether there was such a thing."""

    def tensors(self, packed: PackedGroup | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor that has memory, [pages, ...], with what ``packed`` has for it."""

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """Add to the ``active`` layers' ``outputs`` [rows, out] what adapters make of ``x`` [rows, in]."""


class KvCache(Protocol):
    """Keys and values of every layer, in blocks of ``size`` tokens."""

    size: int
    layers: Mapping[int, tuple[Tensor, Tensor]]
    """Layer -> keys and values, each [blocks, size, KVH, D], wherever in memory the backend wants them."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero ``blocks`` in all layers."""

    def attention(self, batch: Batch) -> PagedAttention:
        """Attention of one step."""


class SamplingOps(Protocol):
    """What takes time in proportion to the vocabulary when tokens are drawn."""

    def row_peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's largest logit, NaN if it has one, and a token that has it: [rows] float32, [rows] int64."""

    def draw_rows(self, logits: Tensor, temperatures: Tensor, u: Tensor) -> Tensor:
        """Tokens [rows] int64: softmax(logits / temperatures [rows], float32) inverted at u [rows] float64."""

    def top_rows(self, logits: Tensor, temperatures: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of each row in that distribution: probabilities [rows, width] float32, and tokens."""


class AdapterCopy(Protocol):
    """An adapter on its way to the device."""

    @property
    def arrived(self) -> bool:
        """Whether all of it is there, or will never be: then :meth:`wait` says why."""

    @property
    def error(self) -> BaseException | None:
        """What went wrong with it, once that is known."""

    def wait(self) -> None:
        """Let what computes from now on find it there. Raises what went wrong with it."""


class AdapterCopier(Protocol):
    """Brings adapters to the device."""

    def start(self, write: Callable[[], None]) -> AdapterCopy:
        """Run ``write``, at once or beside what computes."""

    def close(self) -> None:
        """Finish what is under way."""


@dataclass(frozen=True)
class ServedModel:
    """A base with LoRA in its linear layers and paged attention: what a forward pass is made over."""

    base: Base
    pool: "AdapterPool"
    kv: KvCache
    attention: Mapping[int, AttentionParams]
    """How each layer attends, as its module said when it was called."""
    max_sequences: int
    """Of one batch."""


class Backend(Protocol):
    """One way of computing. Made once, when the runner is."""

    device: torch.device
    dtype: torch.dtype
    """Of activations, keys and values, and adapters on the device."""
    sampling: SamplingOps

    def group_linear(self, layers: Sequence[nn.Module]) -> GroupLinear:
        """A function for ``layers``, which share an input and may lose their own weights to it."""

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """Memory of ``pages`` pages for a group of layers; none is taken yet."""

    def write_pages(self, pages: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Copy ``[len(pages), ...]`` into the ``pages`` of ``[pages, ...]``, zeros for None; pair by pair."""

    def copier(self) -> AdapterCopier:
        """What adapters are brought to the device by."""

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """Zeros for ``blocks`` blocks of ``size`` tokens. ``shapes``: layer -> (KV heads, head size)."""

    def forward(self, model: ServedModel) -> Forward:
        """The fastest forward pass for ``model``."""
