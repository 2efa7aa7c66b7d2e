"""Computing on CUDA: Triton's kernels, and decode steps that are captured once and replayed."""

from collections.abc import Mapping

import torch
from torch import Tensor

from server.compute.backend import AdapterCopier, Forward, GroupLora, GroupShape, KvCache, ServedModel
from server.compute.cuda.copies import StreamCopier
from server.compute.cuda.decode import Capture, PaddedDecode
from server.compute.cuda.decoder import TritonDecoder
from server.compute.cuda.kv_cache import TritonKvCache
from server.compute.cuda.lora import TritonLora
from server.compute.model_inputs import ModelForward, transformers_forward
from server.compute.reference.backend import EagerForward, ReferenceBackend
from server.engine.sequence import Batch


class CudaBackend(ReferenceBackend):
    """See :class:`server.compute.backend.Backend`.

    On CUDA a 4-bit layer is bitsandbytes' ``gemm_4bit``: its fused kernel for few rows, dequantise and multiply for
    many, by a table of its own over rows, shapes and architectures (0.50; for an 8B model on an H100 the border is 5
    rows, 32 for gate and up). We have measured neither.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, capture: Capture) -> None:
        """``capture`` makes a decode step fast to repeat: :class:`~server.compute.cuda.decode.CudaGraphs`."""
        super().__init__(device, dtype)
        self._capture = capture

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """Triton's kernels."""
        return TritonLora(shape, pages, self.device, self.dtype)

    def copier(self) -> AdapterCopier:
        """On a stream of their own; Triton's interpreter has none."""
        return StreamCopier(self.device) if self.device.type == "cuda" else super().copier()

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """Attended by Triton's kernel."""
        return TritonKvCache(shapes, blocks, size, self.device, self.dtype)

    def forward(self, model: ServedModel) -> Forward:
        """Decode steps padded and captured, all others as they come."""
        call = TritonDecoder.of(model.base.model, model.attention) or transformers_forward(model.base.model)
        return CudaForward(model, call, self._capture)


class CudaForward:
    """Decode steps by a :class:`PaddedDecode` where it serves them, all others one by one."""

    def __init__(self, model: ServedModel, call: ModelForward, capture: Capture) -> None:
        self._resident = model.pool.resident
        longest = model.base.max_model_len
        self._padded = PaddedDecode(call, model.pool, model.kv, longest, model.max_sequences, capture)
        self._single = EagerForward(model, call)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [len(batch.sampled), vocabulary] float32; they may change with the next call."""
        if self._padded.serves(batch, self._resident):
            return self._padded.logits(batch, self._resident)
        return self._single(batch)
