"""Answer: the fields that all objects of one answer share, and its token counts."""

from dataclasses import dataclass, field
from time import time
from typing import Any

from server.api.generation.generation import Generation
from server.engine.sequence import Timing


def spans_of(timing: Timing) -> dict[str, float]:
    """Return the parts of a sequence's time, in milliseconds."""
    parts = {"queue": timing.queue, "load": timing.load, "prefill": timing.prefill, "decode": timing.decode}
    return {name: round(seconds * 1000, 3) for name, seconds in parts.items()}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one request, without its text."""

    generation: Generation
    model: str
    """Name of the model as in the request."""
    system_fingerprint: str
    explain: bool = False
    """Whether the request asks where its time went."""
    created: int = field(default_factory=lambda: int(time()))
    """Unix time in seconds."""

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields that every object begins with; ``kind`` is its ``object``."""
        return {
            "id": self.generation.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "adapter": self.generation.adapters.to_json(),
        }

    def explanation(self) -> dict[str, Any]:
        """Return the field ``explain``, in milliseconds, if the request asks for it. Call it when the answer ended."""
        timing = self.generation.timing
        if not self.explain or timing is None:
            return {}
        spans = {f"{name}_ms": milliseconds for name, milliseconds in spans_of(timing).items()}
        load = None if not self.generation.adapters.applied else "cold" if timing.cold else "warm"
        more = {"batch_adapters": timing.batch_adapters, "preemptions": timing.preemptions}
        return {"explain": {**spans, "adapter_load": load, **more}}

    def usage(self) -> dict[str, Any]:
        """Return token counts as OpenAI reports them. A stop token counts as part of the completion."""
        generation = self.generation
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.output_tokens,
            "total_tokens": generation.prompt_tokens + generation.output_tokens,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        }
