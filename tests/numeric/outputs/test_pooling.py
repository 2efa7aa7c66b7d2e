"""Vectors of prompts are the hidden states of Hugging Face and PEFT, whatever shares the batch."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.sequence import SamplingParams
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix
from tests.numeric.outputs.compare import ask, expected_vector, vector
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES: list[Mix] = [(), (("all", 0.7), ("patterns", 0.3)), (("one", 1.0), ("odd", 1.0), ("last", -0.5))]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
NONE = SamplingParams(max_tokens=0)


@pytest.fixture(params=ARCHITECTURES)
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    """Each architecture in turn."""
    return labs(request.param)


def test_vectors_of_every_adapter(lab: Lab, tmp_path: Path) -> None:
    """Prompts are cut into chunks, and share steps with requests that decode."""
    rng = random.Random(1)
    drive = lab.drive(tmp_path, max_batch_tokens=23)
    asked = []
    for index, mix in enumerate([*MIXES, *(((name, 1.0),) for name in lab.folders)]):
        drive.submit(mix, [rng.randrange(256) for _ in range(5)], GREEDY)
        tokens = [rng.randrange(256) for _ in range(rng.choice((1, 9, 44)))]
        for pooling in ("last", "mean") if index % 2 else ("mean", "last"):
            asked.append((ask(drive, mix, tokens, NONE, pooling=pooling), mix, tokens, pooling))
            drive.step()
    drive.run()
    for id_, mix, tokens, pooling in asked:
        torch.testing.assert_close(vector(drive, id_), expected_vector(lab, mix, tokens, pooling), rtol=1e-3, atol=1e-3)


def test_the_last_tokens_vector_takes_prefix_hits_and_the_mean_does_not(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path)
    tokens = list(range(50, 73))
    first = ask(drive, (), tokens, NONE, pooling="last")
    drive.run()
    last, mean = ask(drive, (), tokens, NONE, pooling="last"), ask(drive, (), tokens, NONE, pooling="mean")
    drive.run()
    assert (drive.cached[first], drive.cached[last], drive.cached[mean]) == (0, 20, 0)
    torch.testing.assert_close(vector(drive, last), vector(drive, first), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vector(drive, mean), expected_vector(llama, (), tokens, "mean"), rtol=1e-3, atol=1e-3)


def test_preempted_prompts_go_on_where_they_were(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(2)
    drive = llama.drive(tmp_path, max_batch_tokens=9)
    scheduler, asked = drive.engine.scheduler, []
    for index in range(12):
        drive.submit((), [rng.randrange(256) for _ in range(30)], GREEDY)
        tokens, mix = [rng.randrange(256) for _ in range(44)], MIXES[index % 3]
        asked.append((ask(drive, mix, tokens, NONE, pooling="mean"), mix, tokens))
        drive.step()
        if half_read := [sequence for sequence in scheduler.running if sequence.hidden]:
            scheduler.preempt(half_read[-1])
    drive.run()
    for id_, mix, tokens in asked:
        found, expected = vector(drive, id_), expected_vector(llama, mix, tokens, "mean")
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert scheduler.preemptions > 0


def test_aborts_leave_nothing(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(3)
    drive = llama.drive(tmp_path, max_batch_tokens=11, max_device_adapters=3)
    for index in range(24):
        tokens = [rng.randrange(256) for _ in range(40)]
        ask(drive, MIXES[index % 3], tokens, NONE, pooling="mean" if index % 2 else "last")
        drive.step()
        if drive.open and index % 3:
            drive.abort(rng.choice(drive.open))
    drive.run()
    assert len(drive.aborted) > 6
