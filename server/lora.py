"""Many LoRA adapters over one base: SlottedLinear, and the pool its adapters live in.

Every adapter on the device owns pages of rank columns in one pool per group of layers (:mod:`server.slots`). A batch is
a few segments (:mod:`server.plan`): rows, the spans of pages their adapters occupy, and a weight per row and page. For
each span two matrix products serve all rows at once::

    h = x @ A[span].T          every row against every column in the span
    h = h * weight             a row keeps its own adapters' columns, times the mix's weights; all others become 0
    y = y + h @ B[span]        B carries alpha / r already

For rows with different adapters this computes columns it throws away. That is cheap where it happens (decode: few
rows, the time goes into reading A and B, and each is read once, without a gather and without a loop over adapters); a
chunk of prefill is a segment of its own and computes only its own columns. Mixed ranks and mixes of adapters need no
second path. On CPUs with AMX a kernel of our own takes all rows at once, reads only the pages they use, and computes a
row in the same way whatever is beside it; on CUDA Triton's kernels do (:mod:`server.cuda.lora`).
:func:`delta_reference` is the plain loop both are tested against.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.spec import BaseLayout
from adapters.weights import AdapterWeights
from server import cuda, native
from server.linear import fuse
from server.native.memory import huge_pages
from server.native.structures import Lora
from server.plan import Plan, Span
from server.sequence import Adaptation
from server.slots import PAGE, pages_for

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are fed the same tensor. Checked by identity at every call, so a wrong guess costs time
only."""

MAX_IN = 16384
"""Inputs of a layer that the kernel can take."""


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the pool's layout and dtype, ready to be copied page by page."""

    rank: int
    groups: Mapping[str, tuple[Tensor, tuple[Tensor | None, ...]]]
    """Group name -> A [pages, members, PAGE, in] and, per member, B [pages, PAGE, out] scaled, or None.

    Where the kernel serves a group, in its layout: [pages, members, in / 2, PAGE, 2] and [pages, out / 16, PAGE / 2,
    16, 2], so that it reads every tile in one piece.
    """
    targets: frozenset[str]
    nbytes: int


class LoraGroup:
    """Layers that share an input, and the columns of all resident adapters for them.

    The first member called with an input computes all members; the others hand out what is there.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module], layout: BaseLayout, pool: "LoraPool") -> None:
        self.names = tuple(names)
        self.pool = pool
        self.in_features = layout.linears[names[0]][0]
        self.outs = [layout.linears[name][1] for name in names]
        self.base: Callable[[Tensor], list[Tensor]] = fuse(layers)
        self.a: Tensor | None = None
        self.b: list[Tensor | None] = [None] * len(names)
        self.kernels = pool.kernels if self._fits_kernel() else None
        self.native = Lora()
        self.native.fill(None, self.b, self.outs)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def _fits_kernel(self) -> bool:
        shapes = self.in_features % 32 == 0 and self.in_features <= MAX_IN and all(out % 16 == 0 for out in self.outs)
        return shapes and self.pool.device.type == "cpu" and self.pool.dtype == torch.bfloat16

    def __call__(self, x: Tensor, member: int) -> Tensor:
        """The member's output for ``x`` [..., in]: base plus adapters."""
        if x is not self._input or member not in self._outputs:
            outputs = self._compute(x.reshape(-1, self.in_features))
            self._outputs = {i: y.view(*x.shape[:-1], y.shape[-1]) for i, y in enumerate(outputs)}
            self._input = x
        out = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return out

    def _compute(self, x: Tensor) -> list[Tensor]:
        outputs = self.base(x)
        plan = self.pool.plan
        assert not plan.targets or x.shape[0] == plan.rows, "the plan is another step's"
        active = [i for i, name in enumerate(self.names) if name in plan.targets]
        if active and self.kernels:
            self.kernels.lora_rows(x, self.native, plan.lora_rows, active, outputs)
        elif active and self.pool.triton:
            self._add_tiles(x, outputs, active, plan)
        elif active:
            for segment in plan.segments:
                rows = slice(segment.start, segment.stop)
                for span in segment.spans:
                    self._add_span(x[rows], [y[rows] for y in outputs], active, span)
        return outputs

    def _add_tiles(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], plan: Plan) -> None:
        from server.cuda.lora import add_lora  # needs Triton

        assert self.a is not None
        add_lora(x, self.a, [b if i in active else None for i, b in enumerate(self.b)], outputs, plan.tiles)

    def _add_span(self, x: Tensor, outputs: Sequence[Tensor], active: Sequence[int], span: Span) -> None:
        assert self.a is not None
        pages, rows = span.stop - span.start, x.shape[0]
        h = F.linear(x, self.a[span.start : span.stop].view(-1, self.in_features)).view(rows, pages, -1)
        if span.weight is not None and span.absent is not None:
            h.mul_(span.weight.unsqueeze(-1)).masked_fill_(span.absent.unsqueeze(-1), 0)
        h = h.view(rows, pages, len(self.names), PAGE)
        for i in active:
            b = self.b[i]
            if b is not None:
                outputs[i].addmm_(h[:, :, i].reshape(rows, -1), b[span.start : span.stop].view(-1, self.outs[i]))

    def reserve(self, packed: tuple[Tensor, tuple[Tensor | None, ...]]) -> None:
        """Take memory for what an adapter has, where none had it before."""
        a, bs = packed
        if self.a is None:
            self.a = self.pool.empty(*a.shape[1:])
        for i, b in enumerate(bs):
            if b is not None and self.b[i] is None:
                self.b[i] = self.pool.empty(*b.shape[1:])
        self.native.fill(self.a, self.b, self.outs)

    def tensors(self, packed: PackedAdapter) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A and every B that has memory, each with what an adapter has for it."""
        a, bs = packed.groups.get(self.names[0]) or (None, (None,) * len(self.names))
        for mine, theirs in zip((self.a, *self.b), (a, *bs), strict=True):
            if mine is not None:
                yield mine, theirs

    def tiled_a(self, a: Tensor) -> Tensor:
        """A [pages, members, PAGE, in] in the layout of what serves this group."""
        if not self.kernels:
            return a.contiguous()
        pages, members, columns, inputs = a.shape
        return a.reshape(pages, members, columns, inputs // 2, 2).transpose(2, 3).contiguous()

    def tiled_b(self, b: Tensor) -> Tensor:
        """B [pages, PAGE, out] in the layout of what serves this group."""
        if not self.kernels:
            return b.contiguous()
        pages, columns, outs = b.shape
        return b.reshape(pages, columns // 2, 2, outs // 16, 16).permute(0, 3, 1, 4, 2).contiguous()


class SlottedLinear(nn.Module):
    """Stands in for a linear layer of the base; adds what the current plan says."""

    def __init__(self, group: LoraGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        return self.group(x, self.member)


@dataclass(eq=False)
class LoraPool:
    """Device memory for adapters: ``pages`` pages of rank columns in every group of layers.

    Memory is taken when the first adapter that needs it arrives: layers no adapter touches cost nothing.
    """

    pages: int
    device: torch.device
    dtype: torch.dtype
    kernels: native.Kernels | None = None
    """Those for CPUs."""
    groups: list[LoraGroup] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    triton: bool = field(init=False)
    """Whether Triton's kernels serve groups that no native kernel serves."""

    def __post_init__(self) -> None:
        self.triton = cuda.available(self.device)

    @property
    def targets(self) -> frozenset[str]:
        """Layers with memory for adapters. Only ever more."""
        named = (pair for group in self.groups for pair in zip(group.names, group.b, strict=True))
        return frozenset(name for name, b in named if b is not None)

    def empty(self, *shape: int) -> Tensor:
        """Zeros of [pages, *shape]: a page is finite from the start."""
        if self.kernels:
            return huge_pages().zeros(self.pages, *shape, dtype=self.dtype)
        return torch.zeros(self.pages, *shape, device=self.device, dtype=self.dtype)

    def install(self, model: nn.Module, layout: BaseLayout) -> None:
        """Replace every layer of ``layout.linears`` in ``model`` by a SlottedLinear over it."""
        for names in sibling_groups(layout):
            group = LoraGroup(names, [model.get_submodule(name) for name in names], layout, self)
            self.groups.append(group)
            for member, name in enumerate(names):
                model.set_submodule(name, SlottedLinear(group, member))

    def reserve(self, packed: PackedAdapter) -> None:
        """Take memory for layers that no adapter has touched before."""
        for group in self.groups:
            if group.names[0] in packed.groups:
                group.reserve(packed.groups[group.names[0]])

    def write(self, pages: Sequence[int], packed: PackedAdapter) -> None:
        """Put an adapter into ``pages``, zeros where it has nothing: what they held is overwritten in every group."""
        self.reserve(packed)
        tensors = [pair for group in self.groups for pair in group.tensors(packed)]
        if self.kernels:
            self._write_pieces(self.kernels, pages, tensors)
        else:
            for mine, theirs in tensors:
                _write_pages(mine, pages, theirs)

    def _write_pieces(
        self, kernels: native.Kernels, pages: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor | None]]
    ) -> None:
        """All copies in one call: as many by torch take longer to ask for than to do."""
        to = np.array([mine.data_ptr() for mine, _ in tensors])
        source = np.array([0 if theirs is None else theirs.data_ptr() for _, theirs in tensors])
        page = np.array([mine.nbytes // self.pages for mine, _ in tensors])
        for first, offset, count in _page_runs(pages):
            kernels.write_pieces(to + first * page, np.where(source, source + offset * page, 0), count * page)

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Bring an adapter into the pool's layout and dtype, on the host. Safe on any thread."""
        pages = pages_for(weights.spec.rank)
        groups = {}
        for group in self.groups:
            if any(name in weights.tensors for name in group.names):
                groups[group.names[0]] = self._pack_group(group, weights, pages)
        tensors = [t for a, bs in groups.values() for t in (a, *bs) if t is not None]
        return PackedAdapter(weights.spec.rank, groups, frozenset(weights.tensors), sum(t.nbytes for t in tensors))

    def _pack_group(
        self, group: LoraGroup, weights: AdapterWeights, pages: int
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        a = torch.zeros(pages, PAGE, len(group.names), group.in_features, dtype=self.dtype)
        bs: list[Tensor | None] = []
        for i, name in enumerate(group.names):
            if name not in weights.tensors:
                bs.append(None)
                continue
            down, up = weights.tensors[name]
            rank = down.shape[0]
            a.view(pages * PAGE, len(group.names), -1)[:rank, i] = down.to(self.dtype)
            b = torch.zeros(pages * PAGE, group.outs[i], dtype=self.dtype)
            b[:rank] = (up.float() * weights.spec.targets[name].scaling).T
            bs.append(self._pinned(group.tiled_b(b.view(pages, PAGE, -1))))
        return self._pinned(group.tiled_a(a.transpose(1, 2))), tuple(bs)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _write_pages(mine: Tensor, pages: Sequence[int], theirs: Tensor | None) -> None:
    """Copy page by page, in as few copies as possible: from pinned memory they run beside what computes."""
    for first, offset, count in _page_runs(pages):
        run = mine[first : first + count]
        if theirs is None:
            run.zero_()
        else:
            run.copy_(theirs[offset : offset + count], non_blocking=True)


def _page_runs(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pages that follow each other in the pool: the first, its place in ``pages``, and how many."""
    offset = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield pages[offset], offset, end - offset
            offset = end


def sibling_groups(layout: BaseLayout) -> list[tuple[str, ...]]:
    """The layers of ``layout`` in groups that share an input; most are alone."""
    groups: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for name, (features, _) in layout.linears.items():
        if name in seen:
            continue
        parent, _, leaf = name.rpartition(".")
        siblings = next((s for s in SIBLINGS if leaf in s), (leaf,))
        family = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
        group = tuple(n for n in family if layout.linears.get(n, (None,))[0] == features)
        seen.update(group)
        groups.append(group)
    return groups


def delta_reference(x: Tensor, adaptation: Adaptation, name: str, weights: Mapping[str, AdapterWeights]) -> Tensor:
    """What ``adaptation`` adds to layer ``name`` for rows ``x`` [rows, in], in float32: the definition, in a loop."""
    parts = [
        adapted.weight * weights[adapted.id].spec.targets[name].scaling * (x.float() @ a.float().T @ b.float().T)
        for adapted in adaptation
        if name in weights[adapted.id].tensors
        for a, b in [weights[adapted.id].tensors[name]]
    ]
    return torch.stack(parts).sum(0) if parts else torch.zeros(())
