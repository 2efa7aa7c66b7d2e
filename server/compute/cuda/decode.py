"""Decode steps padded to fixed sizes, over buffers with fixed addresses, so that CUDA graphs can replay them.

A decode step launches some thousand kernels; from Python that takes longer than they run. A captured graph launches
them at once, but always the same ones, with the same addresses and grids. So a batch of decode rows is padded to one of
:data:`CAPTURE_SIZES`, and all that differs between steps (tokens, positions, blocks, and which row takes which pages of
which adapter) is written to one buffer, which is copied to the device in one piece before the replay. Padding rows have
empty tiles: they attend to nothing, write no keys and values, take no adapter, and their logits are dropped.

What is captured is the forward pass that would run otherwise.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from server.compute.attention import AttentionParams
from server.compute.backend import KvCache
from server.compute.cuda import attention, lora
from server.compute.lora_mapping import LoraMapping, ResidentAdapters, WeightedPage
from server.compute.model_inputs import ModelForward
from server.compute.pool import AdapterPool
from server.engine.sequence import Batch

log = logging.getLogger(__name__)

CAPTURE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a captured step."""
PAGES_PER_ROW = 16
"""Adapter pages that a buffer holds for each row, on average: rank 128. A batch with more runs eagerly."""

Step = Callable[[], Tensor]
"""Runs a decode step over its buffers: logits [size, vocabulary] float32."""
Capture = Callable[[Step], Step]
"""Makes a faster function that does the same. It may call the given one any number of times."""


class DecodeBuffers:
    """The inputs of steps of ``size`` rows: one int32 buffer on the host, and one on the device."""

    def __init__(self, size: int, blocks: int, device: torch.device) -> None:
        """``blocks``: KV blocks of the longest sequence."""
        self.size = size
        self.blocks = blocks
        self.max_pages = pages = PAGES_PER_ROW * size
        lengths = [size, size, size * attention.TILE_FIELDS, size * lora.TILE_FIELDS, pages, pages, size * blocks]
        self._host = torch.zeros(sum(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
        ends = list(accumulate(lengths))
        parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._host_parts: list[np.ndarray] = [self._host.numpy()[part] for part in parts]
        tokens, positions, tiles, lora_tiles, page, weight, block = (self._device[part] for part in parts)
        self.tokens = tokens.view(1, size)
        self.positions = positions.view(1, size)
        self._attention_tiles = tiles.view(size, attention.TILE_FIELDS)
        self._blocks = block
        self.lora_tiles = lora.LoraTiles(
            decode=lora_tiles.view(size, lora.TILE_FIELDS),
            prefill=lora_tiles[:0].view(0, lora.TILE_FIELDS),
            pages=page,
            weights=weight.view(torch.float32),
            pairs=self.max_pages,
        )

    def fill(self, batch: Batch, resident: ResidentAdapters) -> None:
        """Write a batch of decode rows, and start its copy to the device."""
        tokens, positions, tiles, lora_tiles, page, weight, block = self._host_parts
        count = len(batch.chunks)
        starts = [chunk.start for chunk in batch.chunks]
        tokens[:count] = [chunk.sequence.tokens[chunk.start] for chunk in batch.chunks]
        tokens[count:] = 0
        positions[:count] = starts
        positions[count:] = 0
        tiles[:] = 0
        tiles.reshape(self.size, -1)[:count] = [(i, 1, start, i * self.blocks) for i, start in enumerate(starts)]
        for i, chunk in enumerate(batch.chunks):
            blocks = chunk.sequence.blocks
            block[i * self.blocks : i * self.blocks + len(blocks)] = blocks
        at = 0
        lora_tiles[:] = 0
        for i, pages in enumerate(_pages_of_rows(batch, resident)):
            lora_tiles.reshape(self.size, -1)[i] = (i, 1, at, len(pages), at)
            for number, factor in pages:
                page[at], weight.view(np.float32)[at] = number, factor
                at += 1
        self._device.copy_(self._host, non_blocking=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], params: AttentionParams) -> Tensor:
        """As :func:`server.compute.cuda.attention.attend`, for the rows in the buffer."""
        none, rows = self._attention_tiles[:0], attention.rows_per_tile(q.shape[1] // k.shape[1])
        tiles = attention.AttentionTiles(self._attention_tiles, none, self._blocks, rows)
        return attention.attend(q, k, v, cache, tiles, params)


def _pages_of_rows(batch: Batch, resident: ResidentAdapters) -> Iterable[list[WeightedPage]]:
    for chunk in batch.chunks:
        yield [(page, adapted.weight) for adapted in chunk.sequence.adaptation for page in resident[adapted.id].pages]


class BufferedAttention:
    """Attention of the rows in ``buffers``. See :class:`server.compute.attention.PagedAttention`."""

    def __init__(self, buffers: DecodeBuffers, cache: KvCache) -> None:
        self.buffers = buffers
        self.cache = cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Write keys and values, then attend: q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        return self.buffers.attend(q, k, v, self.cache.layers[layer], params)


class PaddedDecode:
    """Decode steps of a model, each size captured when it first occurs."""

    def __init__(
        self,
        forward: ModelForward,
        pool: AdapterPool,
        cache: KvCache,
        max_length: int,
        max_sequences: int,
        capture: Capture,
    ) -> None:
        """``max_length``: tokens of a sequence. ``max_sequences``: rows of a batch."""
        self._forward = forward
        self._pool = pool
        self._cache = cache
        self._capture = capture
        blocks = -(-max_length // cache.size)
        self._buffers = {size: DecodeBuffers(size, blocks, pool.backend.device) for size in _sizes(max_sequences)}
        self._captured: dict[int, dict[frozenset[str], Step]] = {size: {} for size in self._buffers}
        """Size -> layers with LoRA -> the captured step."""
        self._capture_below = max(self._buffers) + 1
        """Steps of this size or larger are not captured; those that already are, stay."""

    def supports(self, batch: Batch, resident: ResidentAdapters) -> bool:
        """Whether all chunks are one token that samples, fit a buffer, and the step is captured or may be."""
        size = self._size(batch)
        if size is None or not all(chunk.length == 1 and chunk.samples for chunk in batch.chunks):
            return False
        if size >= self._capture_below and self._targets(batch) not in self._captured[size]:
            return False
        return sum(map(len, _pages_of_rows(batch, resident))) <= self._buffers[size].max_pages

    def logits(self, batch: Batch, resident: ResidentAdapters) -> Tensor:
        """Logits [rows, vocabulary] float32 of a batch that it :meth:`supports`, valid until the next call."""
        size = self._size(batch)
        assert size is not None, "supports() was not asked"
        buffers = self._buffers[size]
        buffers.fill(batch, resident)
        targets = self._targets(batch)
        self._pool.mapping = LoraMapping(size, targets=targets, derived={lora.LoraTiles: buffers.lora_tiles})
        step = self._captured[size].get(targets)
        if step is None:
            step = self._capture_step(size, buffers, targets)
        return step()[: len(batch.chunks)]

    def _capture_step(self, size: int, buffers: DecodeBuffers, targets: frozenset[str]) -> Step:
        """Capture a step; if that fails, return it uncaptured.

        Steps captured for other ``targets`` are dropped, unless one of the two is without LoRA: layers with memory for
        adapters only become more, so the old ones will not be asked for again.
        """
        paged = BufferedAttention(buffers, self._cache)

        def step() -> Tensor:
            return self._forward(buffers.tokens, buffers.positions, paged, 0, None).logits

        kept = {key: old for key, old in self._captured[size].items() if not key or not targets}
        self._captured[size] = kept
        try:
            kept[targets] = self._capture(step)
        except RuntimeError as error:
            self._stop_capturing(size, error)
        else:
            return kept[targets]
        torch.cuda.empty_cache()  # the error is gone by now; its traceback kept the attempt's tensors alive
        return step

    def _stop_capturing(self, size: int, error: RuntimeError) -> None:
        if "out of memory" in str(error):
            self._capture_below = size
            kept = [n for n, steps in self._captured.items() if steps]
            log.warning(
                "No memory to capture decode steps of %d rows as a CUDA graph. Steps of this and larger sizes that are "
                "not captured yet run without, which is slower. Captured so far: %s. %s",
                *(size, kept or "none", error),
            )
        else:
            self._capture_below = 0
            log.error("Decode steps that are not captured yet run without CUDA graphs, slower", exc_info=error)

    def _targets(self, batch: Batch) -> frozenset[str]:
        """Layers that the step for ``batch`` adds LoRA to: all that have memory for it, or none for the base alone."""
        adapted = any(chunk.sequence.adaptation for chunk in batch.chunks)
        return self._pool.targets if adapted else frozenset()

    def _size(self, batch: Batch) -> int | None:
        return next((size for size in self._buffers if size >= len(batch.chunks)), None)


def _sizes(largest: int) -> Sequence[int]:
    """CAPTURE_SIZES up to the first that holds ``largest`` rows."""
    smaller = [size for size in CAPTURE_SIZES if size < largest]
    return [*smaller, next((size for size in CAPTURE_SIZES if size >= largest), largest)]


class CudaGraphs:
    """A :data:`Capture` by CUDA graphs that share one memory pool: a step's result is overwritten by the next step."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run it once uncaptured, so that kernels are compiled and libraries initialised; then capture it."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            step()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may pin memory meanwhile (the loader does): only calls of this thread must not break it.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                out = step()
        finally:
            torch.cuda.set_stream(main)  # a capture that fails to end leaves its own stream current

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
