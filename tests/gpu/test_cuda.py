"""The same parity on a GPU: greedy tokens in float32 on a tiny model, logits in NF4 on the demo model."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.numeric.demo import check_close, serve_demo
from tests.numeric.lab import Lab, make_lab
from tests.numeric.oracle import Mix, draw_requests, kl

pytestmark = pytest.mark.gpu

MIX: Mix = (("all", 0.7), ("odd", 0.3))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Llama on the GPU. TF32 would round inputs to 10 bits, in the oracle and in the engine alike."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield make_lab("llama", tmp_path_factory.mktemp("llama"), device="cuda")
    torch.set_float32_matmul_precision(before)


def mixes(lab: Lab, count: int, rng: random.Random) -> list[Mix]:
    return rng.choices([(), MIX, *(((name, 1.0),) for name in lab.folders)], k=count)


def test_mixed_batches(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(1)
    drive = lab.drive(tmp_path)
    drive.serve(draw_requests(lab.oracle, mixes(lab, 20, rng), rng), rng)


def test_small_chunks_few_slots_and_aborts(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(2)
    drive = lab.drive(tmp_path, max_device_adapters=2, max_batch_tokens=7, host_cache_gib=0)
    drive.serve(draw_requests(lab.oracle, mixes(lab, 24, rng), rng), rng, abort=0.05)
    assert drive.engine.stats().adapter_evictions > 0


@pytest.mark.demo
def test_nf4_logits_are_those_of_peft(tmp_path: Path) -> None:
    for mix, answers in serve_demo(tmp_path, "cuda").items():
        check_close(answers)
        assert not mix or kl(answers.base, answers.oracle) > 0.1
