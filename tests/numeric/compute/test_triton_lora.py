"""Triton's LoRA against a plain loop: compiled on a GPU, else interpreted on the CPU."""

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from server.compute.lora_mapping import AdaptedRows
from tests.numeric.interpreter import DEVICE, need_triton

need_triton()

from server.compute.cuda.lora import SPLIT_FEATURES, TILE_ROWS, add_lora, lora_tiles  # noqa: E402 (not where Triton is missing)
from server.engine.slots import PAGE  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
PAGES = 24
MIXES: list[list[tuple[int, float]]] = [
    [(3, 1.0)],
    [],
    [(20, 1.0), (1, 1.0), (9, 1.0)],
    [(3, 0.5), (4, -2.0)],
    [(3, 1.0)],
    [(p, 0.3) for p in range(10, 19)],
]
"""Pages and weights: one page, none, scattered pages, a mix of two adapters, the first again, many pages."""


@dataclass
class Group:
    """Layers over one input, with random weights of adapters in all pages."""

    a: Tensor
    bs: list[Tensor | None]
    outs: tuple[int, ...]

    @classmethod
    def draw(cls, features: int, outs: tuple[int, ...], dtype: torch.dtype, missing: tuple[int, ...] = ()) -> "Group":
        a = torch.randn(PAGES, len(outs), PAGE, features) / features**0.5
        bs = [None if i in missing else torch.randn(PAGES, PAGE, out).to(DEVICE, dtype) for i, out in enumerate(outs)]
        return cls(a.to(DEVICE, dtype), bs, outs)

    def reference(self, x: Tensor, outputs: list[Tensor], adapted: list[AdaptedRows]) -> list[Tensor]:
        """``outputs`` with LoRA, in float32, row by row and page by page."""
        expected = [y.float().clone() for y in outputs]
        for start, rows, pages in adapted:
            for row in range(start, start + rows):
                for page, weight in pages:
                    for i, b in enumerate(self.bs):
                        if b is not None:
                            expected[i][row] += weight * (self.a[page, i].float() @ x[row].float()) @ b[page].float()
        return expected

    def run(self, x: Tensor, outputs: list[Tensor], adapted: list[AdaptedRows]) -> list[Tensor]:
        ys = [y.clone() for y in outputs]
        add_lora(x, self.a, self.bs, ys, lora_tiles(adapted, DEVICE))
        return ys


def adapted_rows(lengths: list[int]) -> list[AdaptedRows]:
    """Chunks of these lengths, with the MIXES in turn."""
    starts = accumulate(lengths, initial=0)
    return [(start, n, MIXES[i % len(MIXES)]) for i, (start, n) in enumerate(zip(starts, lengths, strict=False))]


def inputs(rows: int, group: Group) -> tuple[Tensor, list[Tensor]]:
    """x, and outputs of the base: views of one tensor, as a fused layer returns them."""
    dtype, features = group.a.dtype, group.a.shape[-1]
    x = torch.randn(rows, features).to(DEVICE, dtype)
    return x, list(torch.randn(rows, sum(group.outs)).to(DEVICE, dtype).split(group.outs, dim=1))


LENGTHS = {
    "decode": [1] * 6,
    "prefill": [2, 5, TILE_ROWS, TILE_ROWS + 1, 3, 40],
    "both": [1, 1, 1, 7, 2 * TILE_ROWS, 1],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_get_their_own_adapters(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    group, adapted = Group.draw(72, (48, 24, 300), dtype), adapted_rows(lengths)
    x, outputs = inputs(sum(lengths), group)
    for y, expected, base in zip(
        group.run(x, outputs, adapted), group.reference(x, outputs, adapted), outputs, strict=True
    ):
        assert (y.float() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()
        for start, rows, pages in adapted:
            same = torch.equal(y[start : start + rows], base[start : start + rows])
            assert same == (not pages), "rows without adapters, and only they, must equal the base to the bit"


@pytest.mark.parametrize("lengths", [[1, 1], [4, 4]], ids=["decode", "prefill"])
def test_inputs_of_more_than_one_split(lengths: list[int]) -> None:
    torch.manual_seed(0)
    group, adapted = Group.draw(SPLIT_FEATURES + 200, (32,), torch.float32), adapted_rows(lengths)
    x, outputs = inputs(sum(lengths), group)
    torch.testing.assert_close(
        group.run(x, outputs, adapted), group.reference(x, outputs, adapted), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_outputs_of_layers_without_adapters_stay_as_they_are(missing: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    group, adapted = Group.draw(32, (48, 16, 16), torch.float32, missing), adapted_rows([1, 1, 1, 5])
    x, outputs = inputs(8, group)
    ys = group.run(x, outputs, adapted)
    torch.testing.assert_close(ys, group.reference(x, outputs, adapted), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(ys[i], outputs[i]) for i in missing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 5], ids=["decode", "prefill"])
def test_a_row_does_not_depend_on_the_rest_of_the_batch(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    group, adapted = Group.draw(72, (48, 24), dtype), adapted_rows([length] * 6)
    x, outputs = inputs(6 * length, group)
    together = group.run(x, outputs, adapted)
    for start, rows, pages in adapted:
        mine = slice(start, start + rows)
        alone = group.run(x[mine], [y[mine].contiguous() for y in outputs], [(0, rows, pages)])
        for y, own in zip(together, alone, strict=True):
            assert torch.equal(y[mine], own)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, under the interpreter
@pytest.mark.parametrize("length", [1, 3], ids=["decode", "prefill"])
def test_another_rows_overflow_does_not_leak(length: int) -> None:
    torch.manual_seed(0)
    group = Group.draw(32, (32, 16), torch.float16)
    group.a[5] = torch.inf
    x, outputs = inputs(2 * length, group)
    ys = group.run(x, outputs, [(0, length, [(4, 1.0)]), (length, length, [(5, 1.0), (6, 1.0)])])
    for y in ys:
        assert y[:length].isfinite().all()
        assert not y[length:].isfinite().any()
