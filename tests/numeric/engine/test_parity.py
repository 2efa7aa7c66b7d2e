"""The engine's greedy answers equal Hugging Face + PEFT run alone, whatever the batch and the chunks.

Everything is fp32 on tiny random models. Tokens are compared exactly. No prompts are drawn whose answers
depend on a near tie (see :mod:`tests.numeric.oracle`).
"""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine.sequence import SamplingParams
from tests.numeric.lab import Lab
from tests.numeric.oracle import CLEAR, Mix, Request, draw_requests
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES: list[Mix] = [
    (("all", 0.7), ("patterns", 0.3)),
    (("one", 1.0), ("odd", 1.0), ("last", -0.5)),
    (("rslora", 0.25), ("one", 2.0)),
]
PROMPT = tuple(range(40, 57))


@pytest.fixture(params=ARCHITECTURES)
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    """Each architecture in turn."""
    return labs(request.param)


def plain(lab: Lab) -> list[Mix]:
    """The base, then each adapter alone at full weight."""
    return [(), *(((name, 1.0),) for name in lab.folders)]


def pick(lab: Lab, spread: str, count: int, rng: random.Random) -> list[Mix]:
    """``count`` adaptations: punica's four ways of spreading rows over adapters."""
    pool = plain(lab) + MIXES
    match spread:
        case "distinct":
            return list(itertools.islice(itertools.cycle(pool), count))
        case "uniform":
            return rng.choices(pool, k=count)
        case "zipf":
            return rng.choices(pool, weights=[1 / (rank + 1) for rank in range(len(pool))], k=count)
        case _:
            return [pool[1]] * count


def few_blocks(lab: Lab, root: Path) -> float:
    """GiB for 26 KV blocks: room for one sequence of the longest kind and little more."""
    return lab.drive(root / "measured").memory_for(26)


def test_base_and_adapters_differ(lab: Lab) -> None:
    """Without this, an engine that ignored adapters could pass all that follows."""
    answers = {lab.oracle.solo(mix, PROMPT, 16).tokens for mix in plain(lab) + MIXES}
    assert len(answers) == len(plain(lab)) + len(MIXES)
    assert all(len(set(answer)) >= 6 for answer in answers), "answers that hardly move prove little"


def test_each_alone(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(1)
    drive = lab.drive(tmp_path)
    for request in draw_requests(lab.oracle, plain(lab) + MIXES, rng):
        drive.serve([request], rng)


@pytest.mark.parametrize("spread", ["distinct", "uniform", "zipf", "identical"])
def test_mixed_batches(lab: Lab, spread: str, tmp_path: Path) -> None:
    rng = random.Random(f"{spread} 2")
    drive = lab.drive(tmp_path)
    drive.serve(draw_requests(lab.oracle, pick(lab, spread, 20, rng), rng), rng)


@pytest.mark.parametrize("tokens", [1, 7, 13])
def test_chunks_of_odd_size(lab: Lab, tokens: int, tmp_path: Path) -> None:
    rng = random.Random(tokens)
    drive = lab.drive(tmp_path, max_batch_tokens=tokens)
    requests = draw_requests(lab.oracle, pick(lab, "uniform", 12, rng), rng)
    assert max(len(request.prompt) for request in requests) > 2 * tokens
    drive.serve(requests, rng)


def test_preemption(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(3)
    requests = draw_requests(lab.oracle, pick(lab, "uniform", 16, rng), rng)
    drive = lab.drive(tmp_path, kv_memory_gib=few_blocks(lab, tmp_path))
    drive.serve(requests, rng)
    assert drive.engine.stats().preemptions > 0


def test_eviction(lab: Lab, tmp_path: Path) -> None:
    """Two slots for six adapters and mixes of two."""
    rng = random.Random(4)
    mixes = [mix for mix in pick(lab, "distinct", 24, rng) if len(mix) < 3]
    rng.shuffle(mixes)
    drive = lab.drive(tmp_path, max_device_adapters=2, host_cache_gib=0)
    drive.serve(draw_requests(lab.oracle, mixes, rng, answer=8), rng)
    assert drive.engine.stats().adapter_evictions > 0


def test_eviction_for_lack_of_rank_columns(lab: Lab, tmp_path: Path) -> None:
    """Slots enough, but the largest adapter fills the device's columns alone."""
    rng = random.Random(5)
    drive = lab.drive(tmp_path, max_rank=24, device_ranks=24)
    drive.serve(draw_requests(lab.oracle, rng.sample(plain(lab) * 3, k=18), rng, answer=8), rng)
    assert drive.engine.stats().adapter_evictions > 0


def test_prefix_hits(lab: Lab, tmp_path: Path) -> None:
    """Requests that repeat or extend what was served before start from its blocks, and answer as if alone."""
    rng = random.Random(6)
    drive = lab.drive(tmp_path)
    first = draw_requests(lab.oracle, plain(lab), rng, longest=24)
    drive.serve(first, rng)
    again = [extend(lab, request, rng) for request in first] + first
    drive.serve(again, rng)
    assert drive.engine.stats().cached_tokens > 0
    assert any(drive.cached.values())


def test_prefix_is_not_shared_between_adaptations(lab: Lab, tmp_path: Path) -> None:
    """One prompt for all, so that a key that forgot the adapter or its weight would hit the wrong blocks."""
    rng = random.Random(7)
    drive = lab.drive(tmp_path)
    reweighted: list[Mix] = [(("all", 0.3), ("patterns", 0.7)), (("all", 0.5),)]
    for mix in plain(lab) + MIXES + reweighted:
        solo = lab.oracle.solo(mix, PROMPT, 8)
        drive.serve([Request(mix, PROMPT, solo.tokens)], rng)
    assert drive.engine.stats().cached_tokens == 0


def test_aborts(lab: Lab, tmp_path: Path) -> None:
    rng = random.Random(8)
    drive = lab.drive(tmp_path, max_device_adapters=3, max_batch_tokens=11)
    drive.serve(draw_requests(lab.oracle, pick(lab, "uniform", 24, rng), rng), rng, abort=0.3)
    assert len(drive.aborted) > 3
    assert len(drive.finish) > 3


def test_everything_at_once(lab: Lab, tmp_path: Path) -> None:
    """Few slots, few blocks, small chunks, repeated prompts and aborts together."""
    rng = random.Random(9)
    requests = draw_requests(lab.oracle, pick(lab, "zipf", 16, rng), rng)
    config = {"max_device_adapters": 3, "max_batch_tokens": 9, "host_cache_gib": 0, "max_wait_seconds": 0.01}
    drive = lab.drive(tmp_path, kv_memory_gib=few_blocks(lab, tmp_path), **config)
    for _ in range(2):
        drive.serve(rng.choices(requests, k=24), rng, abort=0.05)
    stats = drive.engine.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.cached_tokens > 0


def test_stop_token_ends_the_answer(lab: Lab, tmp_path: Path) -> None:
    """The stop token is the last one given, and only there is the reason "stop"."""
    drive = lab.drive(tmp_path)
    answer = lab.oracle.solo((("all", 1.0),), PROMPT, 12).tokens
    stop = answer[5]
    sampling = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=frozenset({stop}))
    id_ = drive.submit((("all", 1.0),), PROMPT, sampling)
    drive.run()
    assert tuple(drive.tokens[id_]) == answer[: answer.index(stop) + 1]
    assert drive.finish[id_] == "stop"


def extend(lab: Lab, request: Request, rng: random.Random) -> Request:
    """A later turn: prompt and answer of ``request`` with a random tail, and what follows."""
    while True:
        prompt = (*request.prompt, *request.answer, *(rng.randrange(256) for _ in range(rng.randint(1, 9))))
        solo = lab.oracle.solo(request.mix, prompt, 8)
        if solo.gap > CLEAR:
            return Request(request.mix, prompt, solo.tokens)
