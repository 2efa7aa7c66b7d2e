"""The protocol of a backend: linear layers, LoRA, the KV cache, sampling, and the forward pass of a batch.

:class:`~server.compute.reference.backend.ReferenceBackend` is the plain one, and what all others are tested against. A
new backend is a folder with these parts, most of them inherited from the reference at first, and an entry in
:data:`server.compute.BACKENDS`; ``tests/numeric/compute/test_backends.py`` then covers it. ``docs/design.md`` shows it
step by step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bases.base import Base
from server.compute.attention import AttentionParams, PagedAttention
from server.compute.lora_mapping import LoraMapping
from server.compute.model_inputs import ForwardOutput
from server.engine.sequence import Batch

if TYPE_CHECKING:
    from server.compute.pool import AdapterPool

GroupLinear = Callable[[Tensor], list[Tensor]]
"""Several linear layers over one input: [rows, in] -> each layer's [rows, out]."""
PackedGroup = tuple[Tensor, tuple[Tensor | None, ...]]
"""An adapter's weights for a group of layers, in a backend's layout: A, and for each layer B, scaled, or None."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """The sizes of linear layers that share an input."""

    inputs: int
    """Input features."""
    outs: tuple[int, ...]
    """Output features of each layer."""


class Forward(Protocol):
    """Runs one step: writes the batch's keys and values, returns logits and hidden states of the rows that need them.

    Which rows do: :func:`server.compute.model_inputs.make_inputs`.
    """

    batch_invariant: bool
    """Whether a row's logits have the same bits whatever else is in the batch, and at any number of rows."""

    def __call__(self, batch: Batch) -> ForwardOutput: ...


class GroupLora(Protocol):
    """The adapters' weights for one group of layers, in pages, and LoRA over them."""

    @property
    def reserved(self) -> frozenset[int]:
        """Indices in the group of the layers that have memory: those that some adapter had weights for."""

    def pack(self, a: Tensor, bs: Sequence[Tensor | None]) -> PackedGroup:
        """Convert A [pages, layers, PAGE, in] and, for each layer, B [pages, PAGE, out] or None to this layout.

        The result is in host memory. Safe on any thread.
        """

    def reserve(self, packed: PackedGroup) -> bool:
        """Allocate zeros for the layers of ``packed`` that have no memory yet. False if all have it."""

    def copy_pairs(self, packed: PackedGroup | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each tensor of the pool [all pages, ...], and what ``packed`` has for it, [pages, ...] or None."""

    def add(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], mapping: LoraMapping) -> None:
        """Add LoRA of ``x`` [rows, in] in place to the ``outputs`` [rows, out] of the layers at indices ``active``."""


class KvCache(Protocol):
    """Keys and values of every layer, in blocks of ``size`` tokens."""

    size: int
    layers: Mapping[int, tuple[Tensor, Tensor]]
    """Layer -> keys and values, each [blocks, size, KVH, D]; strides are up to the backend."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero ``blocks`` in all layers."""

    def attention(self, batch: Batch) -> PagedAttention:
        """Attention of one step over the blocks of ``batch``."""


class RowScores(NamedTuple):
    """Log probabilities in rows of logits."""

    logprobs: Tensor
    """[rows] float32: of one token in each row, NaN if the row is not finite."""
    ranks: Tensor
    """[rows] int64: 1 + the number of tokens that are more likely."""
    top: Tensor
    """[rows, width] float32: of the most likely tokens."""
    likely: Tensor
    """[rows, width] int64: the most likely tokens; of equally likely ones the smaller id first."""


class SamplingOps(Protocol):
    """The parts of sampling that read whole rows of logits, so that their time grows with the vocabulary."""

    def row_peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's largest logit [rows] float32, NaN if the row has one, and a token that has it [rows] int64."""

    def draw_rows(self, logits: Tensor, temperatures: Tensor, u: Tensor) -> Tensor:
        """Sample a token for each row [rows] int64 from softmax(logits / temperatures [rows], float32).

        By inverse transform sampling at ``u`` [rows] float64, in [0, 1).
        """

    def top_rows(self, logits: Tensor, temperatures: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The ``width`` likeliest tokens of each row in that distribution: probabilities float32, tokens int64."""

    def score_rows(self, logits: Tensor, tokens: Tensor, width: int) -> RowScores:
        """Log probabilities of ``tokens`` [rows] int64 and of the ``width`` likeliest, by softmax(logits)."""


class AdapterCopy(Protocol):
    """An adapter that is being copied to the device."""

    @property
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return or raise at once: the copy is complete, or has failed."""

    @property
    def error(self) -> BaseException | None:
        """Why the copy failed, once that is known."""

    def wait(self) -> None:
        """Make work that is queued from now on run after the copy. Raises :attr:`error` if it failed."""


class AdapterCopier(Protocol):
    """Copies adapters to the device."""

    def start(self, write: Callable[[], None]) -> AdapterCopy:
        """Run ``write``, which copies one adapter: before this returns, or in the background."""

    def close(self) -> None:
        """Finish the copies that were started."""


@dataclass(frozen=True)
class ServedModel:
    """A base with LoRA in its linear layers and paged attention."""

    base: Base
    pool: "AdapterPool"
    kv: KvCache
    attention: Mapping[int, AttentionParams]
    """Layer -> scale, window and softcap of its attention, as LayerRecorder found them."""
    max_sequences: int
    """In one batch."""


class Backend(Protocol):
    """One way of computing a step. Made once, by the runner."""

    name: str
    """For people: the CPU kernels in use, ``torch`` without any, or ``cuda``."""
    device: torch.device
    dtype: torch.dtype
    """Of activations, keys and values, and adapters on the device."""
    sampling: SamplingOps

    def bind_threads(self) -> None:
        """Bind the calling thread, which will run all steps, and those that it computes with to CPUs, if that pays."""

    def group_linear(self, layers: Sequence[nn.Module]) -> GroupLinear:
        """A function that computes ``layers``, which share an input. Their own weights may be freed."""

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """LoRA for a group of layers, with up to ``pages`` pages of adapters. Allocates nothing yet."""

    def write_pages(self, pages: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Write ``pages`` of the pool. ``tensors``: pairs as :meth:`GroupLora.copy_pairs` gives them.

        For each pair, ``source[i]`` is copied to ``pool[pages[i]]``; without a source, zeros are written.
        """

    def copier(self) -> AdapterCopier:
        """What copies adapters to the device."""

    def release_memory(self) -> None:
        """Return to the system what was freed and kept for later, because memory is short."""

    def kv_shapes(self, shapes: Mapping[int, tuple[int, int]], size: int) -> Mapping[int, tuple[int, int]]:
        """``shapes`` as they lie in the memory of :meth:`kv_cache`: heads may be padded."""

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """A cache of ``blocks`` blocks of ``size`` tokens, all zeros. ``shapes``: layer -> (KV heads, head size)."""

    def forward(self, model: ServedModel) -> Forward:
        """The fastest forward pass that this backend has for ``model``."""
