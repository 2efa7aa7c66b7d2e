"""The dry load: whether an adapter loads, what it computes is finite, and it changes anything."""

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
from server.engine.sequence import Adaptation, Event, Failed, SamplingParams, Sequence, WeightedAdapter
from server.errors import Draining, EngineError
from server.text import Codec

PROMPT = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep until the sun is up again."
LENGTH = 16
"""Tokens of it that are used."""
TIMEOUT = 120.0
"""Seconds a dry load may take, with the wait for a place on a busy device."""
GREEDY = SamplingParams(temperature=0, max_tokens=1)

Logits = NDArray[np.float32]


class DryLoad:
    """One prompt through the engine, with and without an adapter. For any thread but the engine's and the event loop's.

    Each probe has a step of its own, without the prefix cache, so the shapes of what it computes are always the same.
    On a device that computes the same shapes alike every time, an adapter whose products all vanish in rounding then
    leaves every logit as the base's to the bit, whatever traffic there is, and any other changes some. Not caught: an
    adapter that changes last bits and no more, one that is useless, and, on a device that is not so exact, any.
    """

    def __init__(self, base: Base, codec: Codec, engine: Engine, event_router: EventRouter) -> None:
        length = min(LENGTH, base.max_model_len, engine.longest_probe)
        self._prompt: list[int] = codec.backend.encode(PROMPT).ids[:length]
        self._engine = engine
        self._event_router = event_router
        self._lock = Lock()
        self._base: Logits | None = None

    def measure(self, spec: AdapterSpec, *, keep: bool = False) -> dict[str, Any]:
        """Load a stored adapter as a request would, and compare the logits after the prompt with the base's.

        Returns ``prompt_tokens``, ``max_logit_change``, ``kl`` (of the adapter's distribution from the base's, nats),
        ``top_token_changed`` and ``seconds``. ``keep`` leaves the adapter on the device as if it had been used;
        otherwise it is the first to go. Raises AdapterRejected where its content is at fault, InvalidRequest where it
        can never fit beside the pinned ones, Draining, and EngineError for all else.
        """
        started = time.monotonic()
        base = self._of_base()
        logits = self._ask((WeightedAdapter(spec.id, 1.0, spec.rank),), keep)
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

    def _of_base(self) -> Logits:
        """Measured at the first need, and once."""
        with self._lock:
            if self._base is None:
                logits = self._ask((), keep=False)
                if not np.isfinite(logits).all():
                    raise EngineError("The base's own logits are not finite.")
                self._base = logits
            return self._base

    def _ask(self, adaptation: Adaptation, keep: bool) -> Logits:
        """[vocabulary]."""
        event = self._run(Sequence(f"probe-{uuid4().hex}", list(self._prompt), GREEDY, adaptation, True, keep))
        if isinstance(event, Failed):
            if event.cause == "adapter":
                raise AdapterRejected(f"the dry load failed: {event.message}")
            if self._event_router.draining:
                raise Draining(event.message, code="draining")
            raise EngineError(f"The dry load failed: {event.message}")
        assert event.logits is not None, "a probe without logits"
        return np.frombuffer(event.logits, np.float32)

    def _run(self, sequence: Sequence) -> Event:
        answer = self._event_router.expect(sequence.id)
        try:
            self._submit(sequence)
            return answer.result(TIMEOUT)
        except TimeoutError as error:
            self._engine.abort(sequence.id)
            raise EngineError(f"The dry load found no place on the device within {TIMEOUT:.0f} s.") from error
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
