"""A fault fails the requests that it concerns, and no others."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from server.compute.reference.lora import TorchLora
from server.engine.resilience.step_runner import MAX_FAILED_STEPS
from server.engine.sequence import Batch, SamplingParams, Sequence
from tests.numeric.drive import Drive, settings
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix, draw_requests
from tests.tiny import save_adapter, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

BAD: Mix = (("bad", 1.0),)
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(params=["lora_A", "lora_B"])
def poisoned(llama: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> Drive:
    """A drive with one more adapter: finite and well formed, but one factor is so large that products overflow."""
    lora = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    folder = save_adapter(tiny_model("llama"), tmp_path / "bad", seed=1, **lora)
    tensors = load_file(folder / "adapter_model.safetensors")
    huge = {key: tensor.sign() * 1e38 if request.param in key else tensor for key, tensor in tensors.items()}
    save_file(huge, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = settings(tmp_path, max_batch_tokens=24, max_device_adapters=3)
    return Drive(tiny_model("llama"), {**llama.folders, "bad": folder}, config)


def test_an_adapter_that_overflows_fails_only_its_requests(llama: Lab, poisoned: Drive) -> None:
    """Its rows share batches, pages next door and, later, recycled blocks with healthy ones.

    Prompts of one token run among the rows that decode, in the same products.
    """
    rng = random.Random(1)
    mixes: list[Mix] = [(), (("all", 1.0),), (("odd", 1.0),), (("all", 0.5), ("odd", 0.5))] * 4
    bad = []
    for index, request in enumerate(draw_requests(llama.oracle, mixes, rng)):
        bad.append(poisoned.submit(BAD, request.prompt[: 1 if index % 2 else None], GREEDY))
        poisoned.serve([request], rng)
        healthy = poisoned.ask(request)
        poisoned.step()
        bad.append(poisoned.submit(BAD, request.prompt[:1], GREEDY))
        poisoned.run()
        assert tuple(poisoned.tokens[healthy]) == request.answer
    assert all("not finite" in poisoned.failed[id_] for id_ in bad)
    assert not any(poisoned.tokens[id_] for id_ in bad)


def test_an_adapter_that_overflows_fails_its_log_probabilities_and_vectors(llama: Lab, poisoned: Drive) -> None:
    asks: list[dict[str, object]] = [{"prompt_logprobs": 2}, {"pooling": "mean"}, {"pooling": "last"}, {}]
    bad, good = [], []
    for index in range(24):
        mix, ids = ((("all", 1.0),), good) if index % 3 else (BAD, bad)
        sampling = SamplingParams(max_tokens=index % 2, logprobs=3) if index % 4 == 0 else replace(GREEDY, logprobs=3)
        tokens, id_ = [index, *range(60, 62 + index)], f"s{len(poisoned.tokens)}"
        sequence = Sequence(id_, tokens, sampling, poisoned.adaptation(mix), **asks[index % 4])
        ids.append(poisoned.submit_sequence(sequence))
        poisoned.step()
    poisoned.run()
    assert poisoned.failed.keys() == set(bad)
    assert all(poisoned.events[id_] for id_ in good)
    assert not any(poisoned.events[id_] for id_ in bad)


def test_a_deleted_adapter_fails_only_its_requests(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(2)
    drive = llama.drive(tmp_path)
    shutil.rmtree(drive.store.path(drive.specs["all"].id))
    lost = drive.submit((("all", 1.0),), (1, 2, 3), GREEDY)
    drive.serve(draw_requests(llama.oracle, [(), (("odd", 1.0),)], rng), rng)
    assert drive.failed.keys() == {lost}
    assert "could not be loaded" in drive.failed[lost]


def test_a_failed_step_fails_only_its_requests(llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ones are served. Three failed steps in a row make the engine unhealthy, and one good step healthy."""
    drive = llama.drive(tmp_path, max_batch_sequences=2)
    prompts = [tuple(range(40 + number, 50 + number)) for number in range(9)]
    asked = [drive.submit((), prompt, GREEDY) for prompt in prompts]

    def broken(batch: Batch) -> list[int | None]:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as fault:
        fault.setattr(drive.engine.runner, "run", broken)
        for healthy in (True, True, False, False):
            drive.step()
            assert drive.engine.stats().healthy == healthy
        assert len(drive.engine._steps._failing) == MAX_FAILED_STEPS, "more would only take memory"
    while drive.open:
        drive.step()
    assert list(drive.failed) == asked[:8]
    assert tuple(drive.tokens[asked[8]]) == llama.oracle.solo((), prompts[8], GREEDY.max_tokens).tokens
    stats = drive.engine.stats()
    assert stats.healthy
    assert (stats.failed_steps, stats.running, stats.blocks_used) == (4, 0, 0)


def test_an_adapter_without_device_memory_fails_only_its_requests(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = llama.drive(tmp_path)
    running = drive.submit((), (5, 6, 7), GREEDY)
    drive.step()

    def full(_: object, *shape: int) -> None:
        raise MemoryError(f"no room for {shape}")

    with monkeypatch.context() as patched:
        patched.setattr(TorchLora, "_zeros", full)
        refused = drive.submit((("all", 1.0),), (1, 2, 3), GREEDY)
        drive.run()
    assert drive.failed.keys() == {refused}
    assert tuple(drive.tokens[running]) == llama.oracle.solo((), (5, 6, 7), 12).tokens
    served = drive.submit((("all", 1.0),), (1, 2, 3), GREEDY)
    drive.run()
    assert tuple(drive.tokens[served]) == llama.oracle.solo((("all", 1.0),), (1, 2, 3), 12).tokens


def test_a_forward_that_breaks_halfway_leaves_nothing_in_the_layers(
    llama: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that share an input remember it within a step; a broken step must not answer for the next."""
    drive = llama.drive(tmp_path)
    up = drive.engine.runner.base.model.get_submodule("model.layers.0.mlp.up_proj")

    def breaks(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(up, "forward", breaks)
        lost = drive.submit((), (1, 2, 3), GREEDY)
        while drive.open:
            drive.step()
    assert drive.failed.keys() == {lost}
    again = drive.submit((("all", 1.0),), (9, 2, 3), GREEDY)
    while drive.open:
        drive.step()
    assert tuple(drive.tokens[again]) == llama.oracle.solo((("all", 1.0),), (9, 2, 3), 12).tokens
