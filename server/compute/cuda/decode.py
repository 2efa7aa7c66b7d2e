"""Decode steps at padded sizes, over buffers that stay where they are, so that CUDA graphs can replay them.

A decode step launches some thousand kernels; from Python that takes longer than they run. A captured graph launches
them at once, but always the same ones, with the same addresses and grids. So a batch of single rows is padded to one of
:data:`SIZES`, and all that differs between steps (tokens, positions, blocks, and which row takes which pages of which
adapter) is written into one buffer, copied to the device in one piece before the replay. Rows of padding have no tile:
they attend to nothing, write no keys and values, take no adapter, and their logits are dropped.

What is captured is the same forward that would run otherwise: capturing is a function that takes a function.
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
from server.compute.lora_mapping import LoraMapping, ResidentAdapters
from server.compute.model_inputs import ModelForward
from server.compute.pool import AdapterPool
from server.engine.sequence import Batch

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a captured step."""
USES = 16
"""Pages of adapters for each row there is room for: rank 128. A batch with more runs uncaptured."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""Makes a function that does the same again, faster. The first may be called any number of times on the way."""


class DecodeBuffers:
    """What steps of ``size`` rows read, on the host and on the device: int32 all, in one buffer."""

    def __init__(self, size: int, blocks: int, device: torch.device) -> None:
        """``blocks``: those of the longest sequence."""
        self.size = size
        self.blocks = blocks
        self.room = USES * size
        lengths = [size, size, size * attention.FIELDS, size * lora.FIELDS, self.room, self.room, size * blocks]
        self._host = torch.zeros(sum(lengths), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(sum(lengths), dtype=torch.int32, device=device)
        ends = list(accumulate(lengths))
        spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._parts: list[np.ndarray] = [self._host.numpy()[span] for span in spans]
        tokens, positions, rows, uses, pages, weights, table = (self._device[span] for span in spans)
        self.tokens = tokens.view(1, size)
        self.positions = positions.view(1, size)
        self._rows = rows.view(size, attention.FIELDS)
        self._table = table
        none = uses[:0].view(0, lora.FIELDS)
        self.tiles = lora.LoraTiles(uses.view(size, -1), none, pages, weights.view(torch.float32), self.room)

    def fill(self, batch: Batch, resident: ResidentAdapters) -> None:
        """Write a batch of single rows and send it on its way to the device."""
        tokens, positions, rows, uses, pages, weights, table = self._parts
        count = len(batch.chunks)
        starts = [chunk.start for chunk in batch.chunks]
        tokens[:count] = [chunk.sequence.tokens[chunk.start] for chunk in batch.chunks]
        tokens[count:] = 0
        positions[:count] = starts
        positions[count:] = 0
        rows[:] = 0
        rows.reshape(self.size, -1)[:count] = [(i, 1, start, i * self.blocks) for i, start in enumerate(starts)]
        for i, chunk in enumerate(batch.chunks):
            theirs = chunk.sequence.blocks
            table[i * self.blocks : i * self.blocks + len(theirs)] = theirs
        at = 0
        uses[:] = 0
        for i, pairs in enumerate(_pages(batch, resident)):
            uses.reshape(self.size, -1)[i] = (i, 1, at, len(pairs), at)
            for page, weight in pairs:
                pages[at], weights.view(np.float32)[at] = page, weight
                at += 1
        self._device.copy_(self._host, non_blocking=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], params: AttentionParams) -> Tensor:
        """As :func:`server.compute.cuda.attention.attend`, for the rows in the buffer."""
        height = attention.tile_height(q.shape[1] // k.shape[1])
        tiles = attention.AttentionTiles(self._rows, self._rows[:0], self._table, height)
        return attention.attend(q, k, v, cache, tiles, params.scale, params.window, params.softcap)


def _pages(batch: Batch, resident: ResidentAdapters) -> Iterable[list[tuple[int, float]]]:
    """Each row's pages and weights."""
    for chunk in batch.chunks:
        yield [(page, adapted.weight) for adapted in chunk.sequence.adaptation for page in resident[adapted.id].pages]


class BufferedAttention:
    """The rows in buffers over a cache. See :class:`server.compute.attention.PagedAttention`."""

    def __init__(self, buffers: DecodeBuffers, cache: KvCache) -> None:
        self.buffers = buffers
        self.cache = cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Queries [T, H, D], keys and values [T, KVH, D] -> [T, H, D]."""
        return self.buffers.attend(q, k, v, self.cache.layers[layer], params)


class PaddedDecode:
    """Decode steps of a model, captured at each size when it first occurs."""

    def __init__(
        self, call: ModelForward, pool: AdapterPool, cache: KvCache, longest: int, largest: int, capture: Capture
    ) -> None:
        """``longest``: tokens of a sequence; ``largest``: rows of a batch."""
        self._call = call
        self._pool = pool
        self._cache = cache
        self._capture = capture
        blocks = -(-longest // cache.size)
        self._buffers = {size: DecodeBuffers(size, blocks, pool.backend.device) for size in _sizes(largest)}
        self._runs: dict[int, dict[frozenset[str], Run]] = {size: {} for size in self._buffers}
        self._limit = max(self._buffers) + 1
        """Sizes from here on are not captured; those that were, stay."""

    def serves(self, batch: Batch, resident: ResidentAdapters) -> bool:
        """Whether a batch is single rows that fit into a buffer, each of which samples, and can be captured or is."""
        size = self._size(batch)
        if size is None or not all(chunk.length == 1 and chunk.samples for chunk in batch.chunks):
            return False
        if size >= self._limit and self._targets(batch) not in self._runs[size]:
            return False
        return sum(map(len, _pages(batch, resident))) <= self._buffers[size].room

    def logits(self, batch: Batch, resident: ResidentAdapters) -> Tensor:
        """Logits [rows, vocabulary] of a batch it serves; they change with the next call."""
        size = self._size(batch)
        assert size is not None, "serves() was not asked"
        buffers = self._buffers[size]
        buffers.fill(batch, resident)
        targets = self._targets(batch)
        self._pool.mapping = LoraMapping(size, targets=targets, derived={lora.LoraTiles: buffers.tiles})
        run = self._runs[size].get(targets)
        if run is None:
            run = self._captured(size, buffers, targets)
        return run()[: len(batch.chunks)]

    def _captured(self, size: int, buffers: DecodeBuffers, targets: frozenset[str]) -> Run:
        """A new run; those for fewer layers go, since layers with memory for adapters only ever become more.

        Where it cannot be captured, it is given as it is, for this step.
        """
        paged = BufferedAttention(buffers, self._cache)

        def run() -> Tensor:
            return self._call(buffers.tokens, buffers.positions, paged, 0)

        kept = {key: run for key, run in self._runs[size].items() if not key or not targets}
        self._runs[size] = kept
        try:
            kept[targets] = self._capture(run)
        except RuntimeError as error:
            self._refuse(size, error)
        else:
            return kept[targets]
        torch.cuda.empty_cache()  # now that the error is gone, whose frames hold what the attempt has computed
        return run

    def _refuse(self, size: int, error: RuntimeError) -> None:
        if "out of memory" in str(error):
            self._limit = size
            kept = [n for n, runs in self._runs.items() if runs]
            log.warning(
                "No memory to capture decode steps of %d rows as a CUDA graph; of this and larger sizes those that are "
                "not captured yet run without, slower. Captured so far: %s. %s",
                *(size, kept or "none", error),
            )
        else:
            self._limit = 0
            log.error("Decode steps that are not captured yet run without CUDA graphs, slower", exc_info=error)

    def _targets(self, batch: Batch) -> frozenset[str]:
        """Layers that a batch's run adds adapters to."""
        adapted = any(chunk.sequence.adaptation for chunk in batch.chunks)
        return self._pool.targets if adapted else frozenset()

    def _size(self, batch: Batch) -> int | None:
        return next((size for size in self._buffers if size >= len(batch.chunks)), None)


def _sizes(largest: int) -> Sequence[int]:
    """SIZES up to the first that holds ``largest`` rows."""
    smaller = [size for size in SIZES if size < largest]
    return [*smaller, next((size for size in SIZES if size >= largest), largest)]


class CudaGraphs:
    """Captures functions as CUDA graphs that share their memory: what one returns is lost when the next runs."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Run it once as it is, so that kernels are compiled and libraries have what they need; then capture it."""
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            run()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may pin memory meanwhile (the loader does): only this one's calls count.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                out = run()
        finally:
            torch.cuda.set_stream(main)  # a capture that cannot be ended leaves its own

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
