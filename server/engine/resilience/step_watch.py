"""StepWatch: since when the engine's thread has been at one step, for a thread that watches it."""

from dataclasses import dataclass
from time import monotonic

FIRST_SECONDS = 600.0
"""How long the first step of a kind may take before it counts as stuck: kernels may be compiled for it."""
TIMES_LONGEST = 3
"""A step is not stuck before it takes this many times as long as the longest of its kind lately: on a slow processor
steps of many rows may need minutes."""
FORGETTING = 0.9
"""By how much the longest time counts less with each further step of the kind."""

Kind = tuple[int, bool]
"""Bits of the number of rows, and whether there are adapters: steps of one kind take about as long."""


@dataclass(frozen=True, slots=True)
class RunningStep:
    """What the engine's thread is doing."""

    number: int
    began: float
    """By ``time.monotonic()``."""
    patience: float = 0.0
    """Seconds that it may take whatever the limits are."""
    kind: Kind | None = None
    """None for all but forward passes."""


class StepWatch:
    """The engine's thread says when it begins and ends; any thread may read :attr:`current`."""

    def __init__(self) -> None:
        self.current: RunningStep | None = None
        """None while the engine waits for work. Replaced, never changed."""
        self._longest: dict[Kind, float] = {}
        self._steps = 0

    def begin(self) -> None:
        """Begin what needs no forward pass: to schedule, to place adapters, to deliver."""
        self._steps += 1
        self.current = RunningStep(self._steps, monotonic())

    def begin_forward(self, rows: int, *, adapted: bool) -> None:
        """Begin a forward pass of this many rows. ``adapted``: whether any has an adapter."""
        kind = (rows.bit_length(), adapted)
        longest = self._longest.get(kind)
        patience = FIRST_SECONDS if longest is None else TIMES_LONGEST * longest
        self._steps += 1
        self.current = RunningStep(self._steps, monotonic(), patience, kind)

    def end_forward(self) -> None:
        """End a forward pass that has succeeded; what follows is again no forward pass."""
        step = self.current
        assert step is not None, "begin_forward() was not called"
        assert step.kind is not None, "begin_forward() was not called"
        took = monotonic() - step.began
        self._longest[step.kind] = max(took, FORGETTING * self._longest.get(step.kind, 0.0))
        self.begin()

    def rest(self) -> None:
        """Wait for work."""
        self.current = None
