"""The engine on Triton's kernels, with decode steps padded and captured, answers as transformers and PEFT do.

On a CPU the kernels are interpreted, and capturing a step returns the step itself.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.sequence import Pooling, SamplingParams
from tests.numeric.interpreter import DEVICE, need_triton
from tests.numeric.lab import Lab, make_lab
from tests.numeric.oracle import Mix, draw_requests
from tests.numeric.outputs.compare import ask, check_answer, check_prompt, expected_vector, vector
from tests.tiny import ARCHITECTURES

need_triton()

from server.compute.cuda.backend import CudaBackend  # noqa: E402 (not where Triton is missing)
from server.compute.cuda.decode import Capture, CudaGraphs, Step  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # numpy's, under the interpreter: padding rows hold uninitialised memory
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]

MIXES: list[Mix] = [(), (("all", 0.7), ("odd", 0.3)), (("rslora", 1.0),), (("patterns", 1.0),)]
USUAL = ("llama", "gemma2")
"""Without and with windows and softcap. The others are slow tests: an interpreted step takes most of a second."""


class Captures:
    """Captures steps as on a GPU, and counts captures and replays."""

    def __init__(self) -> None:
        self.capture: Capture = CudaGraphs() if DEVICE.type == "cuda" else lambda step: step
        self.made = 0
        self.replays = 0

    def __call__(self, step: Step) -> Step:
        self.made += 1
        replay = self.capture(step)

        def counted() -> Tensor:
            self.replays += 1
            return replay()

        return counted


def triton(capture: Capture) -> CudaBackend:
    """The CUDA backend in float32, under the interpreter where there is no GPU."""
    return CudaBackend(DEVICE, torch.float32, capture)


@pytest.fixture(
    scope="module",
    params=[name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """TF32 would round inputs to 10 bits, in the oracle and in the engine alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield make_lab(request.param, tmp_path_factory.mktemp(request.param), DEVICE.type)
    torch.set_float32_matmul_precision(before)


def test_mixed_batches(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(1)
    captures = Captures()
    drive = lab.drive(tmp_path, triton(captures), max_batch_sequences=4)
    drive.serve(draw_requests(lab.oracle, MIXES, rng, longest=20, answer=5), rng)
    assert 1 <= captures.made <= 6
    assert captures.replays > captures.made


def test_log_probabilities_and_vectors(lab: Lab, tmp_path: Path) -> None:
    drive = lab.drive(tmp_path, triton(Captures()), max_batch_sequences=4)
    sampling, prompt = SamplingParams(temperature=0, max_tokens=2, logprobs=4), range(60, 65)
    scored = ask(drive, MIXES[1], prompt, sampling, prompt_logprobs=2)
    asks: list[tuple[Mix, Pooling]] = [(MIXES[1], "mean"), (MIXES[2], "last")]
    pooled = [(ask(drive, mix, prompt, sampling, pooling=how), mix, how) for mix, how in asks]
    drive.run()
    check_prompt(lab, drive, scored, MIXES[1], prompt, 2)
    check_answer(lab, drive, scored, MIXES[1], prompt, 4)
    for id_, mix, how in pooled:
        torch.testing.assert_close(vector(drive, id_), expected_vector(lab, mix, prompt, how), rtol=1e-3, atol=1e-3)


def test_chunks_and_evictions(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lab, rng, captures = make_lab("llama", tmp_path_factory.mktemp("llama"), DEVICE.type), random.Random(2), Captures()
    tight = lab.drive(tmp_path / "measured").memory_for(26)
    few = {"max_device_adapters": 2, "max_batch_tokens": 9, "max_batch_sequences": 4, "kv_memory_gib": tight}
    drive = lab.drive(tmp_path, triton(captures), **few)
    drive.serve(draw_requests(lab.oracle, MIXES, rng, longest=30, answer=6), rng)
    stats = drive.engine.stats()
    assert stats.adapter_evictions > 0
    assert captures.replays > 0


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_so(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    lab, rng = make_lab("llama", tmp_path_factory.mktemp("llama"), DEVICE.type), random.Random(3)
    drive = lab.drive(tmp_path, triton(refuse))
    drive.serve(draw_requests(lab.oracle, MIXES[:3], rng, longest=8, answer=4), rng)
    assert [record.message for record in caplog.records] == [
        "Decode steps that are not captured yet run without CUDA graphs, slower"
    ]
