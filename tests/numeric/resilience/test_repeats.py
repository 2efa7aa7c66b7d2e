"""A step can be run again: whatever fails, and however late, the answers are those of steps that did not."""

import random
from pathlib import Path
from typing import Any

import pytest

from server.engine.sequence import Batch, SamplingParams, StepResult
from tests.numeric.drive import Drive
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, draw_requests

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES: list[Mix] = [(), (("all", 1.0),), (("odd", 1.0),), (("all", 0.5), ("odd", 0.5))]
SAMPLED = SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.2, presence_penalty=0.5, max_tokens=12)


class Flaky:
    """Makes a runner's steps fail: every part of a batch of several sequences with some chance, after all its work."""

    def __init__(self, drive: Drive, rng: random.Random, chance: float) -> None:
        self._run = drive.engine.runner.run
        self._rng = rng
        self._chance = chance
        self.failures = 0

    def run(self, batch: Batch) -> StepResult:
        result = self._run(batch)
        if len(batch.chunks) > 1 and self._rng.random() < self._chance:
            self.failures += 1
            raise RuntimeError("broken on purpose")
        return result


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 9}, {"kv_memory_gib": 0.0001}], ids=str)
def test_greedy_answers_are_the_oracles(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    rng = random.Random(5)
    drive = llama.drive(tmp_path, **settings)
    flaky = Flaky(drive, rng, 0.5)
    monkeypatch.setattr(drive.engine.runner, "run", flaky.run)
    drive.serve(draw_requests(llama.oracle, MIXES * 5, rng), rng, abort=0.02)
    assert flaky.failures > 20


def test_sampled_answers_are_those_of_steps_that_did_not_fail(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(6)
    prompts = [tuple(rng.randrange(256) for _ in range(rng.randint(1, 30))) for _ in range(12)]

    def answers(root: Path, chance: float) -> tuple[list[list[int]], int]:
        drive = llama.drive(root)
        flaky = Flaky(drive, random.Random(7), chance)
        monkeypatch.setattr(drive.engine.runner, "run", flaky.run)
        ids = [drive.submit(MIXES[i % 4], prompt, SAMPLED) for i, prompt in enumerate(prompts)]
        drive.run()
        return [drive.tokens[id_] for id_ in ids], flaky.failures

    steady, none = answers(tmp_path / "steady", 0.0)
    flaky, failures = answers(tmp_path / "flaky", 0.6)
    assert (steady, none) == (flaky, 0)
    assert failures > 10
