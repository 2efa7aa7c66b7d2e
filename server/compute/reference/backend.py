"""The reference backend: every part in plain torch. Other backends replace the parts that they compute faster."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bases.nf4 import Linear4bit
from server.compute.backend import (
    AdapterCopier,
    AdapterCopy,
    Forward,
    GroupLinear,
    GroupLora,
    GroupShape,
    KvCache,
    SamplingOps,
    ServedModel,
)
from server.compute.lora_mapping import make_mapping
from server.compute.model_inputs import ForwardOutput, ModelForward, call_model, make_inputs, transformers_forward
from server.compute.pool import page_runs
from server.compute.reference.attention import TorchKvCache
from server.compute.reference.lora import TorchLora
from server.compute.reference.sampling import TorchSampling
from server.engine.sequence import Batch


class ReferenceBackend:
    """See :class:`server.compute.backend.Backend`."""

    name = "torch"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.sampling: SamplingOps = TorchSampling()

    def bind_threads(self) -> None:
        """Leave them to the operating system."""

    def group_linear(self, layers: Sequence[nn.Module]) -> GroupLinear:
        """The layers, one after the other."""
        for layer in layers:
            if isinstance(layer, Linear4bit):
                layer.support_avx512bf16_for_cpu = (
                    False  # bitsandbytes' kernel repacks weights in place and asserts on shapes
                )
        return lambda x: [layer(x) for layer in layers]

    def group_lora(self, shape: GroupShape, pages: int) -> GroupLora:
        """By torch's matrix products."""
        return TorchLora(shape, pages, self.device, self.dtype)

    def write_pages(self, pages: Sequence[int], tensors: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """One copy for each run of consecutive pages. From pinned memory the host does not wait for them."""
        for pool, source in tensors:
            for first, offset, count in page_runs(pages):
                destination = pool[first : first + count]
                if source is None:
                    destination.zero_()
                else:
                    destination.copy_(source[offset : offset + count], non_blocking=True)

    def release_memory(self) -> None:
        """On a GPU what torch's allocator keeps."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def copier(self) -> AdapterCopier:
        """One that copies before it returns."""
        return ImmediateCopier()

    def kv_shapes(self, shapes: Mapping[int, tuple[int, int]], size: int) -> Mapping[int, tuple[int, int]]:
        """Nothing is padded."""
        del size
        return shapes

    def kv_cache(self, shapes: Mapping[int, tuple[int, int]], blocks: int, size: int) -> KvCache:
        """With attention by torch."""
        return TorchKvCache(shapes, blocks, size, self.device, self.dtype)

    def forward(self, model: ServedModel) -> Forward:
        """Through the model's own modules."""
        return EagerForward(model, transformers_forward(model.base.model))


class EagerForward:
    """One call of a model for each step, without CUDA graphs ("eager", as vLLM and torch say)."""

    batch_invariant = False

    def __init__(self, model: ServedModel, forward: ModelForward) -> None:
        self.model = model
        self.forward = forward

    def __call__(self, batch: Batch) -> ForwardOutput:
        """Run a step."""
        pool, kv = self.model.pool, self.model.kv
        pool.mapping = make_mapping(batch, pool.resident)
        return call_model(self.forward, make_inputs(batch), kv.attention(batch), self.model.base.device)


class ImmediateCopier:
    """Copies before :meth:`start` returns."""

    def start(self, write: Callable[[], None]) -> AdapterCopy:
        """Run ``write`` now."""
        write()
        return FinishedCopy()

    def close(self) -> None:
        """Nothing to finish."""


class FinishedCopy:
    """A copy that has arrived."""

    arrived = True
    error: BaseException | None = None

    def wait(self) -> None:
        """Nothing to wait for."""
