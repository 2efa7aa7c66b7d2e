"""Log probabilities of answers and prompts are those of Hugging Face and PEFT, whatever else a request asks for."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.sequence import PromptLogprobs, SamplingParams, Token
from tests.numeric.lab import Lab
from tests.numeric.oracle import Mix
from tests.numeric.outputs.compare import ask, check_answer, check_prompt
from tests.tiny import ARCHITECTURES, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")

MIXES: list[Mix] = [(), (("all", 0.7), ("patterns", 0.3)), (("one", 1.0), ("odd", 1.0), ("last", -0.5))]
GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=5)


@pytest.fixture(params=ARCHITECTURES)
def lab(request: pytest.FixtureRequest, labs: Callable[[str], Lab]) -> Lab:
    """Each architecture in turn."""
    return labs(request.param)


def mixes(lab: Lab) -> list[Mix]:
    """Each kind of adapter alone, the base and mixes."""
    return [*MIXES, *(((name, 1.0),) for name in lab.folders)]


def prompt(rng: random.Random, length: int | None = None) -> tuple[int, ...]:
    return tuple(rng.randrange(256) for _ in range(length or rng.randint(2, 40)))


def test_answers_of_every_adapter(lab: Lab, tmp_path: Path) -> None:
    """In one batch with requests that ask for none, and for the sampled token's alone."""
    rng = random.Random(1)
    drive = lab.drive(tmp_path)
    asked = []
    for mix in mixes(lab):
        tokens = prompt(rng)
        asked.append((ask(drive, mix, tokens, GREEDY), mix, tokens, 5))
        asked.append((ask(drive, mix, tokens, replace(GREEDY, logprobs=0)), mix, tokens, 0))
        plain = ask(drive, mix, tokens, replace(GREEDY, logprobs=None))
        drive.step()
    drive.run()
    for id_, mix, tokens, count in asked:
        check_answer(lab, drive, id_, mix, tokens, count)
    assert all(event.logprobs is None for event in drive.events[plain] if isinstance(event, Token))


def test_prompts_of_every_adapter(lab: Lab, tmp_path: Path) -> None:
    """Cut into chunks of odd sizes; the same prompt again, whose blocks are cached by then; and without an answer."""
    rng = random.Random(2)
    drive = lab.drive(tmp_path, max_batch_tokens=13)
    asked = []
    for mix in mixes(lab):
        tokens = prompt(rng)
        for sampling in (replace(GREEDY, logprobs=None), replace(GREEDY, max_tokens=0)):
            asked.append((ask(drive, mix, tokens, sampling, prompt_logprobs=3), mix, tokens, sampling.max_tokens))
            for _ in range(rng.choice((0, 4, 12))):
                drive.step()
    drive.run()
    for id_, mix, tokens, length in asked:
        check_prompt(lab, drive, id_, mix, tokens, 3)
        assert len(drive.tokens[id_]) == length
        assert drive.finish[id_] == "length"
        assert drive.cached[id_] == 0


@pytest.mark.parametrize(
    "params",
    [
        replace(GREEDY, repetition_penalty=1.6, presence_penalty=1.0, frequency_penalty=-0.5),
        replace(GREEDY, logit_bias=((65, 30.0), (66, -100.0))),
        replace(GREEDY, temperature=1.4, top_k=9, seed=3),
        replace(GREEDY, temperature=0.6, top_p=0.8, seed=4),
        replace(GREEDY, stop_token_ids=frozenset(range(200)), min_tokens=4),
    ],
    ids=["penalties", "bias", "top_k", "top_p", "min_tokens"],
)
def test_they_are_the_models_own_whatever_changes_the_sampling(
    llama: Lab, params: SamplingParams, tmp_path: Path
) -> None:
    rng = random.Random(3)
    drive = llama.drive(tmp_path)
    tokens, mix = prompt(rng), MIXES[1]
    mate = ask(drive, mix, tokens, GREEDY)
    ids = [ask(drive, mix, tokens, params) for _ in range(2)]
    drive.run()
    for id_ in (mate, *ids):
        check_answer(llama, drive, id_, mix, tokens, 5)


def test_more_than_the_vocabulary_are_all_of_it(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path)
    id_ = ask(drive, (), (1, 2, 3), replace(GREEDY, logprobs=VOCABULARY + 9, max_tokens=1))
    drive.run()
    check_answer(llama, drive, id_, (), (1, 2, 3), VOCABULARY)


def test_a_prompt_of_one_token_has_none(llama: Lab, tmp_path: Path) -> None:
    drive = llama.drive(tmp_path)
    id_ = ask(drive, (), (7,), replace(GREEDY, max_tokens=0), prompt_logprobs=2)
    drive.run()
    assert drive.events[id_] == [PromptLogprobs(id_, (None,), "length")]


def test_preempted_prompts_go_on_where_they_were(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(5)
    drive = llama.drive(tmp_path, max_batch_tokens=9)
    scheduler, asked = drive.engine.scheduler, []
    for index in range(12):
        tokens, mix = prompt(rng, 40), mixes(llama)[index % 6]
        asked.append((ask(drive, mix, tokens, replace(GREEDY, max_tokens=12), prompt_logprobs=4), mix, tokens))
        drive.step()
        if half_read := [sequence for sequence in scheduler.running if sequence.scores]:
            scheduler.preempt(half_read[-1])
    drive.run()
    for id_, mix, tokens in asked:
        check_prompt(llama, drive, id_, mix, tokens, 4)
        check_answer(llama, drive, id_, mix, tokens, 5)
    assert scheduler.preemptions > 0


def test_aborts_leave_nothing(llama: Lab, tmp_path: Path) -> None:
    rng = random.Random(6)
    drive = llama.drive(tmp_path, max_batch_tokens=11, max_device_adapters=3)
    for index in range(24):
        sampling = replace(GREEDY, max_tokens=index % 3)
        ask(drive, mixes(llama)[index % 6], prompt(rng), sampling, prompt_logprobs=index % 2)
        drive.step()
        if drive.open and index % 3:
            drive.abort(rng.choice(drive.open))
    drive.run()
    assert len(drive.aborted) > 6
    assert len(drive.finish) > 6
