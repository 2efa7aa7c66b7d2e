"""Paged attention by ``attention.c``: one call for all rows, each in the same way whatever shares the batch."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from server.compute.attention import AttentionParams, PagedAttention, cache_indices, paged_chunks
from server.compute.cpu.batches import PagedChunks
from server.compute.cpu.kernels import Kernels
from server.compute.cpu.memory import HugePages
from server.compute.cpu.structures import ATTENTION_MAX_WIDTH, ATTENTION_WIDTH_STEP
from server.compute.reference.attention import TorchKvCache
from server.engine.sequence import Batch


def padded_width(width: int) -> int:
    """What a head of this width takes in memory."""
    return -(-width // ATTENTION_WIDTH_STEP) * ATTENTION_WIDTH_STEP


class KernelKvCache(TorchKvCache):
    """Keys and values, bf16, in memory [blocks, KVH, size, D]: a head's keys of a block in one piece.

    That is read a third faster than [blocks, size, KVH, D]. Heads are padded with zeros, which change no sum.
    """

    def __init__(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int, kernels: Kernels) -> None:
        super().__init__(shapes, blocks, size, torch.device("cpu"), torch.bfloat16)
        self.kernels = kernels
        self.padded = self.layers
        """Layer -> keys and values, each [blocks, size, KVH, padded width]."""
        self.layers = {
            layer: (keys[..., : shapes[layer][1]], values[..., : shapes[layer][1]])
            for layer, (keys, values) in self.padded.items()
        }

    @staticmethod
    def takes(shapes: Mapping[int, tuple[int, int]], size: int, dtype: torch.dtype) -> bool:
        """Whether the kernel attends over blocks of ``size`` tokens and heads of these widths."""
        widths = all(width <= ATTENTION_MAX_WIDTH for _, width in shapes.values())
        return size % 16 == 0 and widths and dtype == torch.bfloat16

    def _zeros(self, layers: int, blocks: int, heads: int, width: int) -> Tensor:
        storage = HugePages().zeros(layers, 2, blocks, heads, self.size, padded_width(width), dtype=self.dtype)
        return storage.zero_().transpose(3, 4)  # taken now: a machine without room for it should say so at start

    def attention(self, batch: Batch) -> PagedAttention:
        """By the kernel."""
        return KernelAttention(batch, self)


class KernelAttention:
    """One step's attention, as the kernel takes it."""

    def __init__(self, batch: Batch, cache: KernelKvCache) -> None:
        self.batch = batch
        self.cache = cache

    @cached_property
    def slots(self) -> Tensor:
        """[T] place of each row's token in the cache, in tokens."""
        return torch.tensor(cache_indices(self.batch, self.cache.size))

    @cached_property
    def chunks(self) -> PagedChunks:
        """All chunks and their blocks."""
        return PagedChunks(list(paged_chunks(self.batch, self.cache.size)), self.cache.size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        keys, values = self.cache.layers[layer]
        place = (self.slots // self.cache.size, self.slots % self.cache.size)
        keys[place], values[place] = k, v
        keys, values = self.cache.padded[layer]
        width = q.shape[-1]
        q = F.pad(q, (0, keys.shape[-1] - width))
        attend = self.cache.kernels.attend
        return attend(q, keys, values, self.chunks, params.window, params.scale, params.softcap)[..., :width]
