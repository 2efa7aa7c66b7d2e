"""Runner: a Batch becomes logits and token ids. Owns everything that lives on the device."""

from functools import partial

import torch
from torch import Tensor

from adapters.format.spec import AdapterId
from bases.base import Base
from server.compute import choose_backend
from server.compute.attention import IMPLEMENTATION, LayerRecorder, register_attention
from server.compute.backend import AdapterCopy, Backend, ServedModel
from server.compute.lora_mapping import ResidentAdapters
from server.compute.model_inputs import ModelInputs, call_model, transformers_forward
from server.compute.pool import AdapterPool, PackedAdapter
from server.config import Settings
from server.engine.kv_memory import kv_room
from server.engine.sampler import sample
from server.engine.sequence import Batch
from server.engine.slots import pages_for


class Runner:
    """The base model with LoRA and paged attention built in. One per Base: it changes ``base.model``."""

    def __init__(self, base: Base, settings: Settings, backend: Backend | None = None) -> None:
        """``backend``: how to compute; unless given, the fastest for the base's device."""
        self.base = base
        self.backend = backend or choose_backend(base.device, base.dtype)
        self.pool = AdapterPool(pages_for(settings.rank_columns), self.backend)
        self.pool.install(base.model, base.layout)
        register_attention()
        base.model.set_attn_implementation(IMPLEMENTATION)
        layers = self._record_layers()
        self.room = kv_room(layers.shapes, self.pool.groups, base, settings)
        self.blocks = self.room.blocks
        self.kv = self.backend.kv_cache(layers.shapes, self.blocks, settings.block_size)
        self.model = ServedModel(base, self.pool, self.kv, layers.params, settings.max_batch_sequences)
        self.forward = self.backend.forward(self.model)
        self._copier = self.backend.copier()
        self._under_way: dict[AdapterId, AdapterCopy] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int | None]:
        """One step: a token for each of ``batch.sampled``, None where the logits were not finite."""
        return sample(self.logits(batch), batch.sampled, self.backend.sampling)

    @torch.inference_mode()
    def run_probe(self, batch: Batch) -> tuple[list[int | None], bytes]:
        """A probe's step: as :meth:`run`, and the logits, float32 in native byte order."""
        logits = self.logits(batch)
        return sample(logits, batch.sampled, self.backend.sampling), logits.cpu().numpy().tobytes()

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Logits [len(batch.sampled), vocabulary] float32 after writing the batch's keys and values."""
        if batch.fresh:
            self.kv.clear(batch.fresh)
        self._await_adapters(batch)
        return self.forward(batch)

    @torch.inference_mode()
    def place(self, adapter: AdapterId, pages: tuple[int, ...], packed: PackedAdapter) -> None:
        """Write an adapter into its pages, or have that done while others compute."""
        self.pool.reserve(packed)
        self._under_way[adapter] = self._copier.start(partial(self.pool.write, pages, packed))
        self.pool.place(adapter, pages, packed)

    def close(self) -> None:
        """Finish the copies under way."""
        self._copier.close()

    def evict(self, adapter: AdapterId) -> None:
        """Its pages belong to somebody else from now on; whoever gets them overwrites them."""
        self.pool.evict(adapter)
        self._under_way.pop(adapter, None)

    def failed_copies(self) -> dict[AdapterId, BaseException]:
        """Adapters that were placed and will not arrive. Until they are evicted, no step may use them."""
        found = ((adapter, copy.error) for adapter, copy in self._under_way.items())
        return {adapter: error for adapter, error in found if error is not None}

    def arrived(self, adapter: AdapterId) -> bool:
        """Whether a step that uses an adapter that was placed would not wait for it."""
        return adapter not in self._under_way or self._under_way[adapter].arrived

    def _await_adapters(self, batch: Batch) -> None:
        for chunk in batch.chunks if self._under_way else ():
            for adapted in chunk.sequence.adaptation:
                if adapted.id in self._under_way:
                    self._under_way[adapted.id].wait()  # what fails stays under way: its pages are another's
                    del self._under_way[adapted.id]

    @property
    def resident(self) -> ResidentAdapters:
        """Adapters on the device: pages and targets."""
        return self.pool.resident

    @torch.inference_mode()
    def _record_layers(self) -> LayerRecorder:
        """One token through the model shows what each layer caches and how it attends."""
        recorder = LayerRecorder()
        inputs = ModelInputs([0], [0], [0])
        call_model(transformers_forward(self.base.model), inputs, recorder, self.base.device)
        return recorder
