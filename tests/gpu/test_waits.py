"""In one step the host waits for the device once: to read the sampled tokens."""

import warnings
from collections.abc import Callable

import pytest
import torch

from loadtests.micro.gpu import StepBenchmark
from loadtests.micro.random_base import TINY, random_base
from server.engine.sequence import SamplingParams

pytestmark = pytest.mark.gpu

PARAMS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=0.5, logit_bias=((3, 1.0),)),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40),
)


@pytest.fixture(scope="module")
def bench() -> StepBenchmark:
    return StepBenchmark(random_base(TINY, torch.device("cuda")), 64, 64, 1)


def waits(run: Callable[[], object]) -> list[str]:
    """torch's warning for each time that the host waited."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]


def test_waits_are_counted() -> None:
    numbers = torch.ones(3, device="cuda")
    assert len(waits(lambda: (numbers.tolist(), torch.tensor([1, 2], device="cuda")))) == 2


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.parametrize("new", [1, 9], ids=["decode", "prefill"])
def test_a_step_waits_once(bench: StepBenchmark, new: int, adapters: int) -> None:
    from server.compute.cuda.backend import CudaForward

    batch = bench.batch(len(PARAMS), adapters, 30, new)
    for chunk, params in zip(batch.chunks, PARAMS, strict=True):
        chunk.sequence.sampling = params
    for _ in range(2):
        bench.runner.run(batch)  # compiles, captures
    assert len(waits(lambda: bench.runner.run(batch))) == 1
    forward = bench.runner.forward
    assert isinstance(forward, CudaForward)
    assert forward.padded.supports(batch, bench.runner.resident) == (new == 1)
