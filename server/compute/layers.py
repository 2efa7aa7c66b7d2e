"""LoRA linear layers, which replace those of a base: the same layers, plus the adapters of each row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from adapters.format.spec import BaseLayout
from bases.architecture import SIBLINGS, SharedInputCache
from server.compute.backend import GroupShape

if TYPE_CHECKING:
    from server.compute.pool import AdapterPool


class LinearGroup:
    """Linear layers that share an input (q, k and v, say), and the adapters on the device for them.

    The first member that is called with an input computes the outputs of all members; the others return theirs.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[nn.Module], layout: BaseLayout, pool: "AdapterPool"
    ) -> None:
        self.names = tuple(names)
        self.pool = pool
        self.shape = GroupShape(layout.linears[names[0]][0], tuple(layout.linears[name][1] for name in names))
        self.base = pool.backend.group_linear(layers)
        self.lora = pool.backend.group_lora(self.shape, pool.pages)
        self._outputs = SharedInputCache()

    def __call__(self, x: Tensor, member: int) -> Tensor:
        """Output [..., out] of one member, given by index, for ``x`` [..., in]: base plus adapters."""
        return self._outputs.take(member, x, self._compute)

    def _compute(self, given: Tensor) -> list[Tensor]:
        x = given.reshape(-1, self.shape.inputs)
        outputs = self.base(x)
        mapping = self.pool.mapping
        assert not mapping.targets or x.shape[0] == mapping.rows, "the LoRA mapping is not this step's"
        active = [i for i, name in enumerate(self.names) if name in mapping.targets]
        if active:
            self.lora.add(x, outputs, active, mapping)
        return [output.view(*given.shape[:-1], output.shape[-1]) for output in outputs]


class LoraLinear(nn.Module):
    """Replaces a linear layer of the base: adds the adapters of the pool's current LoRA mapping."""

    def __init__(self, group: LinearGroup, member: int) -> None:
        super().__init__()
        self.group = group
        self.member = member

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of ``x``."""
        return self.group(x, self.member)


def sibling_groups(layout: BaseLayout) -> list[tuple[str, ...]]:
    """The names of the linear layers, grouped by the input that they share. Most are alone in their group."""
    groups: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for name, (features, _) in layout.linears.items():
        if name in seen:
            continue
        parent, _, leaf = name.rpartition(".")
        siblings = next((s for s in SIBLINGS if leaf in s), (leaf,))
        family = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
        group = tuple(n for n in family if layout.linears.get(n, (None,))[0] == features)
        seen.update(group)
        groups.append(group)
    return groups
