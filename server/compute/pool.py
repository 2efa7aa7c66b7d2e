"""Adapters on the device: a pool of rank columns, divided into pages. An adapter has as many as its rank needs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adapters.format.spec import AdapterId, BaseLayout
from adapters.format.weights import AdapterWeights
from server.compute.backend import Backend, PackedGroup
from server.compute.layers import LinearGroup, LoraLinear, sibling_groups
from server.compute.lora_mapping import LoraMapping, ResidentAdapter, ResidentAdapters
from server.engine.slots import PAGE, pages_for


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter in the backend's layout and dtype, in host memory, ready to be copied to the device."""

    rank: int
    groups: Mapping[str, PackedGroup]
    """Name of a group's first layer -> the adapter's weights for the group."""
    targets: frozenset[str]
    """Names of the linear layers that it changes."""
    nbytes: int


class AdapterPool:
    """Device memory for adapters: ``pages`` pages of PAGE rank columns in every group of layers.

    A layer's memory is allocated when the first adapter with weights for it arrives, so layers that no adapter changes
    cost nothing.
    """

    def __init__(self, pages: int, backend: Backend) -> None:
        self.pages = pages
        self.backend = backend
        self.groups: list[LinearGroup] = []
        self.mapping = LoraMapping()
        """Of the current step. Set before the model is called."""
        self.generation = 0
        """Counts allocations. When it changes, addresses of the pool's tensors must be read again."""
        self._resident: dict[AdapterId, ResidentAdapter] = {}

    @property
    def resident(self) -> ResidentAdapters:
        """Adapters on the device, or on their way there."""
        return self._resident

    @property
    def targets(self) -> frozenset[str]:
        """Names of the layers that have memory for adapters. Memory is never freed, so it only grows."""
        return frozenset(group.names[i] for group in self.groups for i in group.lora.reserved)

    def install(self, model: nn.Module, layout: BaseLayout) -> None:
        """Replace every layer of ``layout.linears`` in ``model`` with a LoraLinear."""
        for names in sibling_groups(layout):
            group = LinearGroup(names, [model.get_submodule(name) for name in names], layout, self)
            self.groups.append(group)
            for member, name in enumerate(names):
                model.set_submodule(name, LoraLinear(group, member))

    def reserve(self, packed: PackedAdapter) -> None:
        """Allocate memory for layers that no adapter has had weights for before."""
        for group in self.groups:
            if group.names[0] in packed.groups and group.lora.reserve(packed.groups[group.names[0]]):
                self.generation += 1

    def write(self, pages: Sequence[int], packed: PackedAdapter) -> None:
        """Write an adapter to ``pages`` of every group, with zeros where it has no weights: nothing older remains."""
        pairs = [pair for group in self.groups for pair in group.lora.copy_pairs(packed.groups.get(group.names[0]))]
        self.backend.write_pages(pages, pairs)

    def place(self, adapter: AdapterId, pages: tuple[int, ...], packed: PackedAdapter) -> None:
        """Record that ``adapter`` is in ``pages``, or on its way there."""
        self._resident[adapter] = ResidentAdapter(pages, packed.targets)

    def evict(self, adapter: AdapterId) -> None:
        """Forget where ``adapter`` is. Its pages keep their contents until the next adapter overwrites them."""
        del self._resident[adapter]

    def pack(self, weights: AdapterWeights) -> PackedAdapter:
        """Convert an adapter to the backend's layout and dtype, in host memory. Safe on any thread."""
        pages = pages_for(weights.spec.rank)
        groups = {
            group.names[0]: self._pack_group(group, weights, pages)
            for group in self.groups
            if any(name in weights.tensors for name in group.names)
        }
        nbytes = sum(t.nbytes for a, bs in groups.values() for t in (a, *bs) if t is not None)
        return PackedAdapter(weights.spec.rank, groups, frozenset(weights.tensors), nbytes)

    def _pack_group(self, group: LinearGroup, weights: AdapterWeights, pages: int) -> PackedGroup:
        dtype = self.backend.dtype
        a = torch.zeros(pages, PAGE, len(group.names), group.shape.inputs, dtype=dtype)
        bs: list[torch.Tensor | None] = []
        for i, name in enumerate(group.names):
            if name not in weights.tensors:
                bs.append(None)
                continue
            down, up = weights.tensors[name]
            rank = down.shape[0]
            a.view(pages * PAGE, len(group.names), -1)[:rank, i] = down.to(dtype)
            b = torch.zeros(pages * PAGE, group.shape.outs[i], dtype=dtype)
            b[:rank] = (up.float() * weights.spec.targets[name].scaling).T
            bs.append(b.view(pages, PAGE, -1))
        return group.lora.pack(a.transpose(1, 2), bs)


def page_runs(pages: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive pages in ``pages``: the first page, its index in ``pages``, and how many."""
    offset = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[end - 1] + 1:
            yield pages[offset], offset, end - offset
            offset = end
