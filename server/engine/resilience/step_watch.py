"""StepWatch: since when the engine's thread has been at one step, for a thread that watches it."""

from dataclasses import dataclass
from time import monotonic

FIRST_SECONDS = 600.0
"""How long the first step of a kind may take before it counts as hung: it may be slow, or compile kernels."""
TIMES_LONGEST = 3
"""A step is not stuck before it takes this many times as long as the longest of its kind lately, or of all kinds if it
is the first of its own: on a slow processor steps of many rows may need minutes."""
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
    """Seconds that it may take before it counts as hung, whatever the limit is."""
    calm: float = 0.0
    """Seconds, at most ``patience``, that it may take before it counts as stuck, whatever the limit is."""
    kind: Kind | None = None
    """None for all but forward passes."""


class StepWatch:
    """The engine's thread says when it begins and ends; any thread may read :attr:`current`."""

    def __init__(self, *, compiles: bool) -> None:
        """``compiles``: whether the first step of a kind may compile kernels. Then it is not stuck meanwhile."""
        self._compiles = compiles
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
        if longest is not None:
            patience = calm = TIMES_LONGEST * longest
        else:
            calm = FIRST_SECONDS if self._compiles else TIMES_LONGEST * max(self._longest.values(), default=0.0)
            patience = max(FIRST_SECONDS, calm)
        self._steps += 1
        self.current = RunningStep(self._steps, monotonic(), patience, calm, kind)

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
