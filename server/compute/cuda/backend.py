"""The CUDA backend: Triton kernels, and decode steps as CUDA graphs."""

from collections.abc import Mapping

import torch

from server.compute.backend import AdapterCopier, Forward, GroupLora, GroupShape, KvCache, ServedModel
from server.compute.cuda.copies import StreamCopier
from server.compute.cuda.decode import Capture, PaddedDecode
from server.compute.cuda.decoder import TritonDecoder
from server.compute.cuda.kv_cache import TritonKvCache
from server.compute.cuda.lora import TritonLora
from server.compute.model_inputs import ForwardOutput, ModelForward, transformers_forward
from server.compute.reference.backend import EagerForward, ReferenceBackend
from server.engine.sequence import Batch


class CudaBackend(ReferenceBackend):
    """See :class:`server.compute.backend.Backend`.

    4-bit layers run as bitsandbytes' ``gemm_4bit``: its fused kernel for few rows; dequantise, then multiply, for many.
    bitsandbytes (0.50) chooses by a table of rows, shapes and architectures: for an 8B model on an H100 the fused
    kernel runs up to 5 rows, 32 for gate and up. We have not measured either.
    """

    name = "cuda"

    def __init__(self, device: torch.device, dtype: torch.dtype, capture: Capture) -> None:
        """``capture``: makes a decode step fast to repeat, as :class:`~server.compute.cuda.decode.CudaGraphs` does."""
        super().__init__(device, dtype)
        self._capture = capture

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """By Triton kernels."""
        return TritonLora(shape, pages, self.device, self.dtype)

    def copier(self) -> AdapterCopier:
        """One with a stream of its own; under Triton's interpreter, which has no streams, the reference's."""
        return StreamCopier(self.device) if self.device.type == "cuda" else super().copier()

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """With attention by a Triton kernel."""
        return TritonKvCache(shapes, blocks, size, self.device, self.dtype)

    def forward(self, model: ServedModel) -> Forward:
        """Decode steps are padded and captured; all others run eagerly."""
        decoder = TritonDecoder.if_supported(model.base.model, model.attention)
        return CudaForward(model, decoder or transformers_forward(model.base.model), self._capture)


class CudaForward:
    """Steps by a :class:`PaddedDecode` where it supports them, all others eagerly."""

    batch_invariant = False

    def __init__(self, model: ServedModel, forward: ModelForward, capture: Capture) -> None:
        self._resident = model.pool.resident
        longest = model.base.max_model_len
        self.padded = PaddedDecode(forward, model.pool, model.kv, longest, model.max_sequences, capture)
        self._eager = EagerForward(model, forward)

    def __call__(self, batch: Batch) -> ForwardOutput:
        """Run a step. Its outputs are valid until the next call."""
        if self.padded.supports(batch, self._resident):
            return ForwardOutput(self.padded.logits(batch, self._resident))
        return self._eager(batch)
