"""Padded decode steps: padding rows change nothing, whatever the step before had in their place. What is captured."""

import pytest
import torch
from torch import Tensor

from adapters.format.spec import AdapterId
from server.compute.attention import AttentionParams, PagedAttention
from server.compute.lora_mapping import ResidentAdapter, ResidentAdapters
from server.compute.model_inputs import ForwardOutput
from server.compute.pool import AdapterPool
from server.engine.sequence import Batch, Chunk, SamplingParams, Sequence, WeightedAdapter
from tests.numeric.interpreter import DEVICE, need_triton

need_triton()

from server.compute.cuda.backend import CudaBackend  # noqa: E402 (not where Triton is missing)
from server.compute.cuda.decode import Capture, DecodeBuffers, PaddedDecode, Step  # noqa: E402
from server.compute.cuda.lora import add_lora  # noqa: E402

RESIDENT: ResidentAdapters = {AdapterId("a"): ResidentAdapter((0, 2), frozenset({"q"}))}
BLOCK = 4


def batch(rows: int) -> Batch:
    """Rows with an adapter, each after five tokens in two blocks of its own."""
    sequences = [Sequence(str(i), list(range(i, i + 6)), SamplingParams(), adapted()) for i in range(rows)]
    for i, sequence in enumerate(sequences):
        sequence.blocks = [2 * i, 2 * i + 1]
    return Batch(tuple(Chunk(sequence, 5, 1) for sequence in sequences))


def adapted() -> tuple[WeightedAdapter, ...]:
    return (WeightedAdapter(AdapterId("a"), 0.5, 16),)


def test_padding_after_a_full_step() -> None:
    torch.manual_seed(0)
    buffers = DecodeBuffers(4, 2, DEVICE)
    buffers.fill(batch(4), RESIDENT)
    assert buffers.tokens.tolist() == [[5, 6, 7, 8]]
    buffers.fill(batch(2), RESIDENT)
    assert buffers.tokens.tolist() == [[5, 6, 0, 0]]
    assert buffers.positions.tolist() == [[5, 5, 0, 0]]
    cache = torch.zeros(2, 8, BLOCK, 1, 16, device=DEVICE)
    q, k, v = torch.randn(3, 4, 1, 16, device=DEVICE)
    buffers.attend(q, k, v, (cache[0], cache[1]), AttentionParams(0.25))
    written = cache.ne(0).any(dim=(0, 3, 4)).nonzero().tolist()
    assert written == [[1, 1], [3, 1]], "only the new tokens of the two rows"
    x, y = torch.randn(2, 4, 16, device=DEVICE)
    before = y.clone()
    a, b = torch.randn(3, 1, 8, 16, device=DEVICE), torch.randn(3, 8, 16, device=DEVICE)
    add_lora(x, a, [b], [y], buffers.lora_tiles)
    expected = 0.5 * sum((x[:2] @ a[page, 0].T) @ b[page] for page in (0, 2))
    torch.testing.assert_close(y[:2] - before[:2], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[2:], before[2:])


def padded(capture: Capture) -> PaddedDecode:
    """Steps of up to 16 rows, of a model whose logits are the token it was given."""

    def forward(
        ids: Tensor, positions: Tensor, paged: PagedAttention, keep: Tensor | int, hidden_rows: Tensor | None
    ) -> ForwardOutput:
        return ForwardOutput(ids[0].unsqueeze(1).float())

    backend = CudaBackend(DEVICE, torch.float32, capture)
    return PaddedDecode(
        forward, AdapterPool(4, backend), backend.kv_cache({0: (1, 16)}, 8, BLOCK), 2 * BLOCK, 16, capture
    )


def is_decoded(decode: PaddedDecode, rows: int) -> bool:
    """Whether a batch of so many rows is supported, and gets its logits."""
    if not decode.supports(batch(rows), RESIDENT):
        return False
    return decode.logits(batch(rows), RESIDENT).tolist() == [[5.0 + i] for i in range(rows)]


def test_without_memory_to_capture_more_what_is_captured_stays(caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    def lacking(step: Step) -> Step:
        attempts.append(step().shape[0])
        if attempts[-1] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step

    decode = padded(lacking)
    assert all(is_decoded(decode, rows) for rows in (8, 2, 4))
    assert [rows for rows in range(1, 17) if is_decoded(decode, rows)] == [1, 2, 5, 6, 7, 8]
    assert attempts == [8, 2, 4, 1], "smaller ones may find memory; those that cannot are not tried again"
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "decode steps of 4 rows" in record.message
    assert "Captured so far: [2, 8]" in record.message
    assert record.message.endswith("Tried to allocate 2.00 GiB.")


def test_a_model_that_cannot_be_captured_is_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    decode = padded(refuse)
    assert is_decoded(decode, 8), "by the uncaptured step"
    assert not any(is_decoded(decode, rows) for rows in range(1, 17))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
