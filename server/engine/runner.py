"""Runner: computes logits and tokens of a batch. Owns everything on the device."""

from concurrent.futures import wait
from functools import partial
from time import perf_counter

import torch

from adapters.format.spec import AdapterId
from bases.base import Base
from server.compute import choose_backend
from server.compute.attention import IMPLEMENTATION, LayerRecorder, register_attention
from server.compute.backend import AdapterCopy, Backend, ServedModel
from server.compute.lora_mapping import ResidentAdapters
from server.compute.model_inputs import ForwardOutput, ModelInputs, call_model, transformers_forward
from server.compute.pool import AdapterPool, PackedAdapter
from server.config import Settings
from server.engine.kv_memory import kv_cache_size
from server.engine.pooling import pool_prompts
from server.engine.sampling.logprobs import RawLogits, score_prompts
from server.engine.sampling.sampler import sample
from server.engine.sampling.token_masks import MaskWorker
from server.engine.sequence import Batch, StepResult
from server.engine.slots import pages_for


class Runner:
    """The base model with LoRA and paged attention. It changes ``base.model``, so make only one for a base."""

    def __init__(self, base: Base, settings: Settings, backend: Backend | None = None) -> None:
        """``backend``: what computes a step; by default the fastest for the base's device."""
        self.base = base
        self.backend = backend or choose_backend(base.device, base.dtype, settings.cpu)
        self.pool = AdapterPool(pages_for(settings.rank_columns), self.backend)
        self.pool.install(base.model, base.layout)
        register_attention()
        base.model.set_attn_implementation(IMPLEMENTATION)
        layers = self._record_layers()
        in_memory = self.backend.kv_shapes(layers.shapes, settings.block_size)
        self.kv_size = kv_cache_size(in_memory, self.pool.groups, base, settings)
        self.blocks = self.kv_size.blocks
        self.kv = self.backend.kv_cache(layers.shapes, self.blocks, settings.block_size)
        self.model = ServedModel(base, self.pool, self.kv, layers.params, settings.max_batch_sequences)
        self.forward = self.backend.forward(self.model)
        self._copier = self.backend.copier()
        self._copying: dict[AdapterId, AdapterCopy] = {}
        self._masks = MaskWorker()

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """Run a step: the forward pass, sampling, and what is read of prompts.

        If it raises, it can be run again, whole or in parts: it changes nothing but the keys and values at its own
        positions, and numbers that sequences have drawn stay with them.
        """
        masks = self._masks.start(batch)
        try:
            out = self.compute(batch)
        finally:
            if masks is not None:
                wait([masks])  # no thread may still read the sequences of a step that has failed
        forwarded = perf_counter()
        ops, sampled = self.backend.sampling, batch.sampled
        logits, others = out.logits[: len(sampled)], out.logits[len(sampled) :]
        raw = RawLogits(logits, sampled)
        made = masks.result() if masks else None
        tokens = sample(logits, sampled, ops, made)
        return StepResult(
            tokens,
            raw.score(tokens, ops),
            score_prompts(others, batch.scored, ops),
            [] if out.hidden is None else pool_prompts(out.hidden, batch.pooled),
            logits.cpu().numpy().tobytes() if batch.probe else None,
            forwarded,
            made.failures if made else {},
        )

    @torch.inference_mode()
    def compute(self, batch: Batch) -> ForwardOutput:
        """Write the batch's keys and values, and return logits and hidden states of the rows that need them."""
        if batch.new_blocks:
            self.kv.clear(batch.new_blocks)
        self._wait_for_copies(batch)
        return self.forward(batch)

    @torch.inference_mode()
    def place(self, adapter: AdapterId, pages: tuple[int, ...], packed: PackedAdapter) -> None:
        """Write an adapter into its pages. A backend may copy it while steps run."""
        self.pool.reserve(packed)
        self._copying[adapter] = self._copier.start(partial(self.pool.write, pages, packed))
        self.pool.place(adapter, pages, packed)

    def close(self) -> None:
        """Wait for the copies that have begun."""
        self._copier.close()
        self._masks.close()

    def evict(self, adapter: AdapterId) -> None:
        """Remove an adapter. Its pages are not cleared: the next adapter in them overwrites them."""
        self.pool.evict(adapter)
        self._copying.pop(adapter, None)

    def failed_copies(self) -> dict[AdapterId, BaseException]:
        """Adapters whose copy has failed, and the errors. No step may use them; evict them."""
        found = ((adapter, copy.error) for adapter, copy in self._copying.items())
        return {adapter: error for adapter, error in found if error is not None}

    def is_ready(self, adapter: AdapterId) -> bool:
        """Whether a step that uses a placed adapter need not wait for its copy."""
        return adapter not in self._copying or self._copying[adapter].arrived

    def _wait_for_copies(self, batch: Batch) -> None:
        for chunk in batch.chunks if self._copying else ():
            for adapter in chunk.sequence.adaptation:
                if adapter.id in self._copying:
                    self._copying[adapter.id].wait()  # raises if the copy failed: then it stays, for failed_copies()
                    del self._copying[adapter.id]

    @property
    def resident(self) -> ResidentAdapters:
        """The pages and target layers of each adapter on the device."""
        return self.pool.resident

    @torch.inference_mode()
    def _record_layers(self) -> LayerRecorder:
        """Run one token through the model, to record each layer's KV shapes and attention parameters."""
        recorder = LayerRecorder()
        inputs = ModelInputs([0], [0], [0], [])
        call_model(transformers_forward(self.base.model), inputs, recorder, self.base.device)
        return recorder
