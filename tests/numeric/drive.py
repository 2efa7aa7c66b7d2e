"""An engine over a tiny model, driven one step at a time, without its thread."""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from adapters.format.spec import AdapterId, AdapterSpec
from adapters.store.store import AdapterStore
from bases.base import make_base
from server.compute.backend import Backend
from server.compute.model_inputs import ForwardOutput
from server.config import Settings
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.sequence import (
    Adaptation,
    Batch,
    Event,
    Failed,
    Pooled,
    PromptLogprobs,
    SamplingParams,
    Token,
    WeightedAdapter,
)
from server.engine.sequence import Sequence as EngineSequence
from tests.adapter_folders import add
from tests.numeric.oracle import Mix, Request
from tests.tiny import tiny_tokenizer

LONGEST = 96
"""Maximum tokens of a sequence in these tests: prompt and answer."""
DEADLINE = 60.0
"""Seconds without any event after which requests that have not ended count as stuck."""
BLOCK = 4
"""Tokens in a KV block: small, so that short prompts fill several."""


def settings(root: Path, **changes: object) -> Settings:
    """fp32 on the CPU with small blocks; ``changes`` are fields of Settings."""
    plain = {"quantization": "none", "dtype": "fp32", "device": "cpu", "block_size": BLOCK, "max_wait_seconds": 0.05}
    return Settings(**{"data_dir": root, **plain, "kv_memory_gib": 0.001, "max_batch_sequences": 8, **changes})


class Drive:
    """An engine, its adapters by name, and every token it has given, by sequence."""

    def __init__(
        self,
        model: PreTrainedModel,
        folders: Mapping[str, Path],
        config: Settings,
        deliver: Callable[[list[Event]], None] = lambda events: None,
        backend: Backend | None = None,
    ) -> None:
        base = make_base(model, tiny_tokenizer(), "tiny", config.device, max_model_len=LONGEST)
        self.config = config
        self.store = AdapterStore(config.data_dir / "adapters", base.layout, config.max_rank)
        self.specs: dict[str, AdapterSpec] = {name: add(self.store, folder) for name, folder in folders.items()}
        self.engine = Engine(Runner(base, config, backend), config, self.store.read, deliver)
        self.tokens: dict[str, list[int]] = {}
        self.events: dict[str, list[Token | PromptLogprobs | Pooled]] = {}
        self.finish: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.aborted: set[str] = set()
        self._open: dict[str, None] = {}

    def adaptation(self, mix: Mix) -> Adaptation:
        """Return a mix as the API resolves the names of a request."""
        return tuple(WeightedAdapter(self.specs[name].id, weight, self.specs[name].rank) for name, weight in mix)

    def submit(self, mix: Mix, prompt: Sequence[int], sampling: SamplingParams) -> str:
        """Submit a request for a mix of adapters by name; return its id."""
        return self.submit_adapted(self.adaptation(mix), prompt, sampling)

    def submit_adapted(self, adaptation: Adaptation, prompt: Sequence[int], sampling: SamplingParams) -> str:
        """Submit a request for resolved adapters; return its id."""
        return self.submit_sequence(EngineSequence(f"s{len(self.tokens)}", list(prompt), sampling, adaptation))

    def submit_sequence(self, sequence: EngineSequence) -> str:
        """Submit a sequence; return its id."""
        self.engine.submit(sequence)
        self.tokens[sequence.id] = []
        self.events[sequence.id] = []
        self._open[sequence.id] = None
        return sequence.id

    def ask(self, request: Request) -> str:
        """Submit a request for as many greedy tokens as its answer has."""
        return self.submit(request.mix, request.prompt, SamplingParams(temperature=0, max_tokens=len(request.answer)))

    def abort(self, sequence_id: str) -> None:
        """Abort a sequence; :meth:`step` then fails the test on any event of it."""
        self.engine.abort(sequence_id)
        self.aborted.add(sequence_id)
        del self._open[sequence_id]

    @property
    def open(self) -> list[str]:
        """Sequences that have neither finished nor failed nor been aborted, in order of submission."""
        return list(self._open)

    def step(self) -> list[Event]:
        """Run one step of the engine, check its invariants, and record its events."""
        events = self.engine.step()
        self.engine.check()
        for event in events:
            self._take(event)
        if not events:
            time.sleep(0.0005)  # an adapter is being read on the loader's thread
        return events

    def _take(self, event: Event) -> None:
        assert event.sequence_id in self._open, f"{event} after the end of its sequence"
        if isinstance(event, Failed):
            self.failed[event.sequence_id] = event.message
            del self._open[event.sequence_id]
            return
        self.events[event.sequence_id].append(event)
        self.cached[event.sequence_id] = event.cached
        if isinstance(event, Token):
            self.tokens[event.sequence_id].append(event.token)
        if isinstance(event, Pooled):
            del self._open[event.sequence_id]
        elif event.finish:
            self.finish[event.sequence_id] = event.finish
            del self._open[event.sequence_id]

    def run(self) -> None:
        """Step until every sequence has ended, then check that nothing is left behind."""
        latest = time.monotonic()
        while self._open:
            if self.step():
                latest = time.monotonic()
            assert time.monotonic() - latest < DEADLINE, f"stuck: {list(self._open)}, {self.engine.stats()}"
        self.step()
        self.check_empty()

    def check_empty(self) -> None:
        """Assert that no block, queue place or adapter is in use, and no step has failed."""
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        assert not stats.running_adapters
        assert not stats.waiting_adapters
        assert stats.healthy
        assert stats.failed_steps == 0
        assert not len(self.engine.backlog), "ended sequences still count against the queue"

    def serve(self, requests: Iterable[Request], rng: random.Random, *, abort: float = 0.0) -> None:
        """Submit ``requests`` at random moments; assert that each gets the oracle's answer.

        ``abort`` is the chance, at each step, that one open request is aborted; what an aborted one got by then must be
        the beginning of its answer.
        """
        expected: dict[str, Request] = {}
        for request in requests:
            expected[self.ask(request)] = request
            for _ in range(rng.choice((0, 0, 1, 2, 5))):
                self.step()
                if self.open and rng.random() < abort:
                    self.abort(rng.choice(self.open))
        self.run()
        for id_, request in expected.items():
            self._compare(id_, request)

    def _compare(self, id_: str, request: Request) -> None:
        assert id_ not in self.failed, self.failed[id_]
        got = tuple(self.tokens[id_])
        answer = request.answer[: len(got)] if id_ in self.aborted else request.answer
        assert got == answer, f"{request.mix} after {len(request.prompt)} tokens: got {got}, alone it gives {answer}"
        assert id_ in self.aborted or self.finish[id_] == "length"

    def memory_for(self, blocks: int) -> float:
        """Return the GiB of KV cache that give another engine of the same model this many blocks."""
        return self.config.kv_memory_gib * (blocks + 0.5) / self.engine.stats().blocks_total

    def resident(self) -> frozenset[AdapterId]:
        """Adapter contents on the device."""
        return self.engine.stats().device_adapters


@contextmanager
def recorded_logits(engine: Engine) -> Iterator[dict[str, list[Tensor]]]:
    """Sequence -> the logits [vocabulary] of each token it samples, as the sampler gets them."""
    recorded: dict[str, list[Tensor]] = {}
    original = engine.runner.compute

    def compute(batch: Batch) -> ForwardOutput:
        out = original(batch)
        for sampled, row in zip(batch.sampled, out.logits.clone().cpu(), strict=False):
            at = sampled.sequence.output_length + len(sampled.drafts)
            recorded.setdefault(sampled.sequence.id, [])[at:] = [row]  # instead of those after rejected drafts
        return out

    engine.runner.compute = compute
    try:
        yield recorded
    finally:
        del engine.runner.compute
