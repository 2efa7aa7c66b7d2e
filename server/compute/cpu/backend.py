"""Computing on a CPU: the kernels where they fit, the reference for the rest."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bases import machine
from bases.nf4 import Linear4bit
from server.compute.backend import Forward, GroupLinear, GroupLora, GroupShape, KvCache, ServedModel
from server.compute.cpu.attention import KernelKvCache, padded_width
from server.compute.cpu.decoder import Decoder
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.linear import FusedNf4, detach_from_checkpoint
from server.compute.cpu.lora import KernelLora
from server.compute.cpu.memory import trim_memory
from server.compute.pool import page_runs
from server.compute.reference.backend import ReferenceBackend

log = logging.getLogger(__name__)


class CpuBackend(ReferenceBackend):
    """See :class:`server.compute.backend.Backend`."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kernels: Kernels | None) -> None:
        """``kernels``: None where there are none for this machine."""
        super().__init__(device, dtype)
        self.kernels = kernels
        if kernels:
            self.name = kernels.variant.name
            self.sampling = kernels

    def bind_threads(self) -> None:
        """One thread a CPU, where there are as many threads as CPUs.

        A thread that waits at a barrier soon sleeps, and is woken hundreds of times a step. If another process uses a
        CPU, Linux wakes it on the CPU of its team mate, and the two take turns there: with one busy process beside
        the server a step took two to four times as long. With fewer threads than CPUs two servers would be bound to
        the same ones.
        """
        cpus = sorted(machine.cpu_affinity())
        if self.kernels and len(cpus) == torch.get_num_threads() > 1 and machine.cpu_quota() is None:
            bound = self.kernels.bind_threads(cpus)
            log.info("Threads are bound to CPUs %s", cpus) if bound else log.warning("Threads cannot be bound to CPUs")

    def release_memory(self) -> None:
        """What glibc keeps."""
        trim_memory()

    def group_linear(self, layers: Sequence[nn.Module]) -> GroupLinear:
        """4-bit layers as one matrix for a fused kernel, ours or bitsandbytes'; they lose their own weights."""
        for ours in (self.kernels if self.dtype == torch.bfloat16 else None, None):
            if all(isinstance(layer, Linear4bit) and FusedNf4.takes(layer, ours=bool(ours)) for layer in layers):
                return FusedNf4(layers, ours)
        return super().group_linear(layers)

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """A kernel that reads only the pages that rows use, and gives a row the same bits whatever shares the batch."""
        if self.kernels and KernelLora.takes(shape, self.dtype):
            return KernelLora(shape, pages, self.kernels)
        return super().group_lora(shape, pages)

    def write_pages(self, pages: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """All copies in one call: as many by torch take longer to ask for than to do."""
        if self.kernels is None:
            super().write_pages(pages, tensors)
            return
        to = np.array([mine.data_ptr() for mine, _ in tensors])
        source = np.array([0 if theirs is None else theirs.data_ptr() for _, theirs in tensors])
        page = np.array([mine.nbytes // len(mine) for mine, _ in tensors])
        for first, offset, count in page_runs(pages):
            self.kernels.write_pieces(to + first * page, np.where(source, source + offset * page, 0), count * page)

    def kv_shapes(self, shapes: Mapping[int, tuple[int, int]], size: int) -> Mapping[int, tuple[int, int]]:
        """Heads are padded to what the kernel takes."""
        if not (self.kernels and KernelKvCache.takes(shapes, size, self.dtype)):
            return super().kv_shapes(shapes, size)
        return {layer: (heads, padded_width(width)) for layer, (heads, width) in shapes.items()}

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """One kernel takes all rows and gives each the same bits whatever shares the batch."""
        if self.kernels and KernelKvCache.takes(shapes, size, self.dtype):
            return KernelKvCache(shapes, blocks, size, self.kernels)
        return super().kv_cache(shapes, blocks, size)

    def forward(self, model: ServedModel) -> Forward:
        """All layers in one native call, for the models whose layers the kernels compute."""
        if all(isinstance(group.base, FusedNf4) for group in model.pool.groups):
            detach_from_checkpoint(model.base.model)
        return Decoder.of(model, self.kernels) or super().forward(model)
