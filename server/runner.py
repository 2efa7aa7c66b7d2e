"""Runner: a Batch becomes tensors, logits, token ids. Owns everything that lives on the device."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.spec import AdapterId
from bases.base import Base
from server import cuda, native
from server.attention import IMPLEMENTATION, Attend, KvCache, PagedBatch, Probe, register
from server.config import Settings
from server.cuda.copies import Copies, Copy
from server.decoder import Decoder
from server.kv_memory import kv_room
from server.linear import FusedNf4, leave_checkpoint
from server.lora import LoraPool, PackedAdapter
from server.plan import make_plan
from server.sampler import RowWork, TorchRows, sample
from server.sequence import Batch
from server.slots import pages_for

if TYPE_CHECKING:
    from server.cuda.decode import Capture, PaddedDecode
    from server.cuda.decoder import TritonDecoder


class Runner:
    """The base model with LoRA and paged attention built in. One per Base: it changes ``base.model``."""

    def __init__(self, base: Base, settings: Settings) -> None:
        self.base = base
        self.device = base.device
        kernels = native.load() if self.device.type == "cpu" else None
        self.pool = LoraPool(pages_for(settings.rank_columns), base.device, base.dtype, kernels)
        self.pool.install(base.model, base.layout)
        if all(isinstance(group.base, FusedNf4) for group in self.pool.groups):
            leave_checkpoint(base.model)
        register()
        base.model.set_attn_implementation(IMPLEMENTATION)
        self.triton: TritonDecoder | None = None
        """Takes the place of the model's forward on CUDA where it can."""
        probe = self._probe()
        self._ways = probe.ways
        shapes = probe.shapes
        self.room = kv_room(shapes, self.pool.groups, base, settings)
        self.blocks = self.room.blocks
        self.kv = KvCache(shapes, self.blocks, settings.block_size, base.device, base.dtype)
        self.decoder = Decoder.of(base, self.pool, self.kv, probe.ways)
        """Takes the place of the model's own layers where it can."""
        self.padded: PaddedDecode | None = None
        """Takes decode steps, where it can."""
        if cuda.available(self.device):
            from server.cuda.decode import CudaGraphs  # needs Triton

            self.pad(settings, CudaGraphs())
        self._copies = Copies(self.device) if self.device.type == "cuda" else None
        self._under_way: dict[AdapterId, Copy] = {}
        self._rows: RowWork = kernels or TorchRows()
        self._like = torch.empty(0, device=base.device, dtype=base.dtype)
        self._placed: dict[AdapterId, tuple[tuple[int, ...], frozenset[str]]] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[int | None]:
        """One step: a token for each of ``batch.sampled``, None where the logits were not finite."""
        return sample(self.logits(batch), batch.sampled, self._rows)

    @torch.inference_mode()
    def run_probe(self, batch: Batch) -> tuple[list[int | None], bytes]:
        """A probe's step: as :meth:`run`, and the logits, float32 in native byte order."""
        logits = self.logits(batch)
        return sample(logits, batch.sampled, self._rows), logits.cpu().numpy().tobytes()

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Logits [len(batch.sampled), vocabulary] float32 after writing the batch's keys and values."""
        if batch.fresh:
            self.kv.clear(batch.fresh)
        self._await_adapters(batch)
        if self.padded and self.padded.serves(batch, self._placed):
            return self.padded.logits(batch, self._placed)
        self.pool.plan = make_plan(batch, self._placed, self._like)
        tokens = [token for c in batch.chunks for token in c.sequence.tokens[c.start : c.end]]
        positions = [position for c in batch.chunks for position in range(c.start, c.end)]
        forward = self.decoder.logits if self.decoder else self._forward
        return forward(tokens, positions, _last_rows(batch), PagedBatch(batch, self.kv, self.device, self.base.dtype))

    def _forward(self, tokens: list[int], positions: list[int], keep: list[int], paged: PagedBatch | Probe) -> Tensor:
        sent = cuda.send([*tokens, *positions, *keep], self.device, torch.long)
        ids, places, rows = sent.split([len(tokens), len(positions), len(keep)])
        return self._model(ids.unsqueeze(0), places.unsqueeze(0), paged, rows)

    def _model(self, ids: Tensor, positions: Tensor, paged: Attend, keep: Tensor | int = 0) -> Tensor:
        """Token ids [1, rows], positions [1, rows] -> logits float32 of the rows to keep, 0 for all."""
        if self.triton:
            return self.triton(ids, positions, paged, keep)
        logits: Tensor = self.base.model(
            input_ids=ids, position_ids=positions, logits_to_keep=keep, use_cache=False, paged=paged
        ).logits[0]
        return logits.float()

    def pad(self, settings: Settings, capture: "Capture") -> None:
        """From now on run decode steps at padded sizes on Triton's kernels, captured by ``capture``."""
        from server.cuda.decode import PaddedDecode  # needs Triton
        from server.cuda.decoder import TritonDecoder

        self.pool.triton = self.kv.triton = True
        self.triton = TritonDecoder.of(self.base.model, self._ways)
        longest, largest = self.base.max_model_len, settings.max_batch_sequences
        self.padded = PaddedDecode(self._model, self.pool, self.kv, longest, largest, capture)

    def place(self, adapter: AdapterId, pages: tuple[int, ...], packed: PackedAdapter) -> None:
        """Write an adapter into its pages; on CUDA, have that done while others compute."""
        with torch.inference_mode():
            if self._copies:
                self.pool.reserve(packed)
                self._under_way[adapter] = self._copies.start(partial(self.pool.write, pages, packed))
            else:
                self.pool.write(pages, packed)
        if self.decoder:
            self.decoder.refresh()
        self._placed[adapter] = (pages, packed.targets)

    def close(self) -> None:
        """Finish the copies under way."""
        if self._copies:
            self._copies.close()

    def evict(self, adapter: AdapterId) -> None:
        """Its pages belong to somebody else from now on; whoever gets them overwrites them."""
        del self._placed[adapter]
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
    def placed(self) -> Mapping[AdapterId, tuple[tuple[int, ...], frozenset[str]]]:
        """Adapters on the device: pages and targets."""
        return self._placed

    @torch.inference_mode()
    def _probe(self) -> Probe:
        """One token through the model shows what each layer caches and how it attends."""
        probe = Probe()
        self._forward([0], [0], [0], probe)
        return probe


def _last_rows(batch: Batch) -> list[int]:
    rows, end = [], 0
    for chunk in batch.chunks:
        end += chunk.length
        if chunk.samples:
            rows.append(end - 1)
    return rows
