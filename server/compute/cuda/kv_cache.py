"""The KV cache of the CUDA backend: the reference's memory, with attention by a Triton kernel."""

from torch import Tensor

from server.compute.attention import AttentionParams, PagedAttention, paged_chunks
from server.compute.cuda.attention import AttentionTiles, attend, attention_tiles
from server.compute.reference.attention import TorchKvCache
from server.engine.sequence import Batch


class TritonKvCache(TorchKvCache):
    """See :class:`server.compute.backend.KvCache`."""

    def attention(self, batch: Batch) -> PagedAttention:
        """Attention by the kernel."""
        return TritonAttention(batch, self)


class TritonAttention:
    """Attention of one step. See :class:`server.compute.attention.PagedAttention`."""

    def __init__(self, batch: Batch, cache: TorchKvCache) -> None:
        self.batch = batch
        self.cache = cache
        self._tiles: dict[int, AttentionTiles] = {}
        """Query heads that share a key -> the tiles of the batch for that many."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Write keys and values, then attend: q [T, H, D], k and v [T, KVH, D] -> [T, H, D]."""
        group = q.shape[1] // k.shape[1]
        if group not in self._tiles:
            chunks = paged_chunks(self.batch, self.cache.size)
            self._tiles[group] = attention_tiles(chunks, group, self.cache.device)
        return attend(q, k, v, self.cache.layers[layer], self._tiles[group], params)
