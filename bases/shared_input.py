"""SharedInputCache: compute layers that share an input together, at the call of the first one."""

from collections.abc import Callable, Sequence

from torch import Tensor


class SharedInputCache:
    """Keeps the outputs of several layers for one input, until each has been taken once. Not thread-safe.

    It is correct for any order of calls: a layer that is called with another input, or twice, is computed anew.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def take(self, member: int, x: Tensor, compute: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
        """Return the output of one layer for ``x``; ``compute(x)`` returns those of all, in the order of the layers."""
        if self._input is not x or member not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(compute(x)))
        output = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return output
