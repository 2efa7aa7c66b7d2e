"""Keys and values that Triton's kernel attends over."""

from torch import Tensor

from server.compute.attention import AttentionParams, PagedAttention, paged_chunks
from server.compute.cuda.attention import AttentionTiles, attend, attention_tiles
from server.compute.reference.attention import TorchKvCache
from server.engine.sequence import Batch


class TritonKvCache(TorchKvCache):
    """See :class:`server.compute.backend.KvCache`."""

    def attention(self, batch: Batch) -> PagedAttention:
        """By the kernel."""
        return TritonAttention(batch, self)


class TritonAttention:
    """One step's attention in the kernel's tiles."""

    def __init__(self, batch: Batch, cache: TorchKvCache) -> None:
        self.batch = batch
        self.cache = cache
        self._tiles: dict[int, AttentionTiles] = {}
        """Query heads that share a key -> tiles for that many."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        group = q.shape[1] // k.shape[1]
        if group not in self._tiles:
            runs = paged_chunks(self.batch, self.cache.size)
            self._tiles[group] = attention_tiles(runs, group, self.cache.device)
        cache, tiles = self.cache.layers[layer], self._tiles[group]
        return attend(q, k, v, cache, tiles, params.scale, params.window, params.softcap)
