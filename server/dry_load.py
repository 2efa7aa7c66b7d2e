"""Dry load: check that an adapter loads, that its logits are finite, and that they differ from the base's."""

import time
from threading import Lock
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterRejected
from adapters.format.spec import AdapterSpec
from bases.base import Base
from server.engine.engine import Engine
from server.engine.event_router import EventRouter
from server.engine.sequence import Adaptation, Event, Failed, SamplingParams, Sequence, Token, WeightedAdapter
from server.errors import Draining, EngineError, OutOfMemory
from server.text.codec import Codec

PROMPT = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep until the sun is up again."
LENGTH = 16
"""Tokens of the prompt that are used."""
TIMEOUT = 120.0
"""Seconds that a dry load may take, including the wait for a slot on a busy device."""
GREEDY = SamplingParams(temperature=0, max_tokens=1)

Logits = NDArray[np.float32]


class DryLoad:
    """Runs one prompt through the engine, with and without an adapter, and compares the logits.

    For any thread but the engine's and the event loop's: the calls block. Each probe runs in a step of its own and
    without the prefix cache, so all compute with the same shapes, whatever else is running. If the device is
    deterministic, an adapter whose changes are all rounded away gives exactly the base's logits, and is rejected.

    Not detected: an adapter that only changes the last bits, one that changes the answers for the worse, and, on a
    device that is not deterministic, one that changes nothing.
    """

    def __init__(self, base: Base, codec: Codec, engine: Engine, event_router: EventRouter) -> None:
        length = min(LENGTH, base.max_model_len, engine.max_probe_tokens)
        self._prompt: list[int] = codec.backend.encode(PROMPT).ids[:length]
        self._engine = engine
        self._event_router = event_router
        self._lock = Lock()
        self._base_cache: Logits | None = None

    def measure(self, spec: AdapterSpec, *, keep: bool = False) -> dict[str, Any]:
        """Load a stored adapter as a request would, and compare the logits after the prompt with the base's.

        Returns ``prompt_tokens``, ``max_logit_change``, ``kl`` (KL(adapter || base) of the next token, in nats),
        ``top_token_changed`` and ``seconds``. With ``keep``, the dry load counts as use of the adapter; otherwise the
        adapter is evicted before all others. Raises AdapterRejected if its content is at fault, InvalidRequest if it
        can never fit beside the pinned ones, Draining, and EngineError for any other cause.
        """
        started = time.monotonic()
        base = self._base_logits()
        logits = self._probe((WeightedAdapter(spec.id, 1.0, spec.rank),), keep)
        if not np.isfinite(logits).all():
            raise AdapterRejected("the logits of a probe prompt are not finite")
        if np.array_equal(logits, base):
            raise AdapterRejected("changes nothing: the logits of a probe prompt are the base's")
        return {
            "prompt_tokens": len(self._prompt),
            "max_logit_change": float(np.abs(logits.astype(np.float64) - base).max()),
            "kl": _kl(logits, base),
            "top_token_changed": bool(logits.argmax() != base.argmax()),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _base_logits(self) -> Logits:
        """Return the base's logits, [vocabulary]; computed by the first call only."""
        with self._lock:
            if self._base_cache is None:
                logits = self._probe((), keep=False)
                if not np.isfinite(logits).all():
                    raise EngineError("The base's own logits are not finite.")
                self._base_cache = logits
            return self._base_cache

    def _probe(self, adaptation: Adaptation, keep: bool) -> Logits:
        """Run one probe. Returns logits [vocabulary]."""
        id_ = f"probe-{uuid4().hex}"
        event = self._run(Sequence(id_, list(self._prompt), GREEDY, adaptation, probe=True, keep=keep))
        if isinstance(event, Failed):
            if event.cause == "adapter":
                raise AdapterRejected(f"the dry load failed: {event.message}")
            if event.cause == "memory":
                raise OutOfMemory(f"The dry load failed: {event.message}")
            if self._event_router.draining:
                raise Draining(event.message, code="draining")
            raise EngineError(f"The dry load failed: {event.message}")
        logits = event.logits if isinstance(event, Token) else None
        assert logits is not None, "the engine gave no logits for a probe"
        return np.frombuffer(logits, np.float32)

    def _run(self, sequence: Sequence) -> Event:
        answer = self._event_router.expect(sequence.id)
        try:
            self._submit(sequence)
            return answer.result(TIMEOUT)
        except TimeoutError as error:
            self._engine.abort(sequence.id)
            raise EngineError(f"The dry load got no slot on the device within {TIMEOUT:.0f} s.") from error
        finally:
            self._event_router.close(sequence.id)

    def _submit(self, sequence: Sequence) -> None:
        try:
            self._engine.submit(sequence)
        except EngineError as error:
            if self._event_router.draining:
                raise Draining("The server has shut down.", code="draining") from error
            raise


def _kl(logits: Logits, base: Logits) -> float:
    """Return KL(adapter || base) in nats, of the next token's distributions."""
    # By numpy: torch would open an OpenMP team on this thread, and that slows down the engine's.
    log_p, log_q = _log_softmax(logits), _log_softmax(base)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return normalised
