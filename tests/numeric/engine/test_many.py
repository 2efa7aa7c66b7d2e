"""Two thousand registered adapters, eight slots, Zipf traffic: no request fails or starves, memory does not grow."""

import gc
import itertools
import random
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.sequence import Failed, SamplingParams
from tests.numeric.drive import Drive, settings
from tests.numeric.oracle import CLEAR, Oracle
from tests.tiny import save_adapter, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

REGISTERED = 2000
SLOTS = 8
CLIENTS = 24
REQUESTS = 2400
WARM_UP = 800
PATIENCE = 10.0
"""Seconds within which every request must end; alone it takes some milliseconds."""
ADAPTER_BYTES = 28 << 10
"""What one of these adapters takes in host memory."""
GROWTH = 12 << 20
"""Bytes by which the process may grow after the warm-up. Seen: 1.3 MiB; a leak of what is loaded would make 30."""
HOST_GIB = 50 * ADAPTER_BYTES / 2**30
PROMPT = tuple(range(30, 50))
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def write_adapters(root: Path, count: int) -> dict[str, Path]:
    """``count`` adapters in the shape of one that PEFT wrote, each with weights of its own."""
    pattern = save_adapter(tiny_model("llama"), root / "pattern", seed=0, **LORA)
    config = (pattern / "adapter_config.json").read_text()
    tensors = load_file(pattern / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    folders = {f"a{index}": root / f"a{index}" for index in range(count)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config)
        drawn = {key: torch.randn(tensor.shape, generator=generator) * 0.2 for key, tensor in tensors.items()}
        save_file(drawn, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders


def resident_bytes() -> int:
    """Physical memory of this process."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def zipf(rng: random.Random, count: int) -> list[str]:
    """Adapter names, the n-th most popular with weight 1/n: the head stays on the device, the tail is always cold."""
    names = [f"a{index}" for index in range(REGISTERED)]
    return rng.choices(names, weights=[1 / (rank + 1) for rank in range(REGISTERED)], k=count)


def serve(drive: Drive, names: list[str]) -> dict[str, str]:
    """A closed loop of CLIENTS over ``names``. Returns sequence -> name; every request ends within PATIENCE."""
    owner: dict[str, str] = {}
    deadline: dict[str, float] = {}
    waiting = iter(names)
    while True:
        for name in itertools.islice(waiting, CLIENTS - len(deadline)):
            params = SamplingParams(temperature=0, max_tokens=3)
            id_ = drive.submit(((name, 1.0),), PROMPT, params)
            owner[id_] = name
            deadline[id_] = time.monotonic() + PATIENCE
        if not deadline:
            return owner
        for event in drive.step():
            if isinstance(event, Failed) or event.finish:
                deadline.pop(event.sequence_id)
        assert all(time.monotonic() < end for end in deadline.values()), drive.engine.stats()


def test_zipf_over_two_thousand(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    folders = write_adapters(tmp_path / "source", REGISTERED)
    changes = {"max_device_adapters": SLOTS, "max_rank": 16, "host_cache_gib": HOST_GIB, "max_batch_sequences": 16}
    drive = Drive(tiny_model("llama"), folders, settings(tmp_path, **changes))
    names = zipf(random.Random(2), REQUESTS)

    owner = serve(drive, names[:WARM_UP])
    before = resident_bytes()
    owner |= serve(drive, names[WARM_UP:])
    grown = resident_bytes() - before

    drive.check_empty()
    stats = drive.engine.stats()
    assert not drive.failed
    assert grown < GROWTH, f"grew by {grown >> 20} MiB"
    assert len(stats.device_adapters) <= SLOTS
    assert len(stats.host_adapters) <= 50
    assert stats.adapter_evictions > REQUESTS / 10
    assert len(set(owner.values())) > REGISTERED / 5
    _check_answers(drive, folders, owner)


def _check_answers(drive: Drive, folders: dict[str, Path], owner: dict[str, str]) -> None:
    """The most popular adapters and some that were asked once, against the oracle."""
    counts = Counter(owner.values())
    chosen = [name for name, _ in (*counts.most_common(5), *counts.most_common()[-15:])]
    oracle = Oracle(tiny_model("llama"), {name: folders[name] for name in chosen})
    solos = {name: oracle.solo(((name, 1.0),), PROMPT, 3) for name in chosen}
    assert len({solo.tokens for solo in solos.values()}) > len(chosen) / 2
    for id_, name in owner.items():
        if name in solos and solos[name].gap > CLEAR:
            assert tuple(drive.tokens[id_]) == solos[name].tokens
