"""Work: what the engine did for a request, as its log line and its trace tell it."""

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Protocol

from server.engine.sequence import SamplingParams, Timing
from server.metrics.requests import RequestOutcome

if TYPE_CHECKING:  # it imports the Service, which has what sends traces
    from server.api.generation.adapters import LeasedAdapters


class Work(Protocol):
    """A request that has ended: a :class:`~server.api.generation.generation.Generation` or a
    :class:`~server.api.generation.prompt_run.PromptRun`.
    """

    @property
    def id(self) -> str:
        """The answer's id."""

    @property
    def adapters(self) -> "LeasedAdapters":
        """Those that it used. The leases are released."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""

    @property
    def cached_tokens(self) -> int:
        """Of those, the ones that were taken from the prefix cache."""

    @property
    def output_tokens(self) -> int:
        """Tokens of all choices."""

    @property
    def first_token(self) -> float | None:
        """Seconds from submission to the first token, if one came."""

    @property
    def spent(self) -> tuple[float, Timing] | None:
        """When a sequence of it was submitted, by ``time.monotonic()``, and where its time went."""

    @property
    def sampling(self) -> SamplingParams | None:
        """Sampling parameters, if it has answers."""

    @property
    def finishes(self) -> Seq[str]:
        """Why each choice that has ended did so."""

    @property
    def outcome(self) -> RequestOutcome:
        """How it ended."""

    @property
    def prompts(self) -> Seq[list[int]]:
        """The token ids of each prompt."""

    @property
    def answers(self) -> Seq[list[int]]:
        """The token ids of each answer."""


def phases(timing: Timing) -> dict[str, float]:
    """Return the phases of a sequence in their order, in seconds. Each begins where the one before it ends."""
    return {"load": timing.load, "queue": timing.queue, "prefill": timing.prefill, "decode": timing.decode}
