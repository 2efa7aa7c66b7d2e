"""Sequences that make a step raise, in different places of it: they fail, and the others' bits are those of solo runs.

The faults are real: a bias on a token that is far outside of the vocabulary raises in the sampler, after the forward
pass; a weight that is no number raises before it; a grammar without its matcher raises on the thread of the masks.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.format.spec import AdapterId
from server.engine.engine import Engine
from server.engine.sequence import Event, Failed, SamplingParams, Sequence, Token, WeightedAdapter, is_last
from server.structured.compiler import GrammarCompiler
from server.structured.spec import GrammarSpec
from tests.numeric.drive import recorded_logits
from tests.numeric.engine.test_grammars import grammar, sequences
from tests.numeric.exact import OVERFLOWING, engine, run_mixed
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

TOKENS = 14
"""Of each answer."""


class NoNumber(str):
    """A weight that the prefix cache can name and no kernel can take."""

    def hex(self) -> str:
        return str(self)


@pytest.fixture(scope="module")
def served(demo_root: Path) -> Engine:
    require_compiler()
    return engine(demo_root, max_batch_tokens=64, max_batch_sequences=16)


@pytest.fixture(scope="module")
def compiler(served: Engine) -> Iterator[GrammarCompiler]:
    base = served.runner.base
    made = GrammarCompiler(base.tokenizer.backend_tokenizer, base.model.config.vocab_size, base.eos_token_ids)
    yield made
    made.close()


def healthy(served: Engine, compiler: GrammarCompiler) -> list[Sequence]:
    """Ten that differ in adapters, grammars and sampling; two more that ask about their prompts."""
    made = sequences(served, compiler)[:10]
    for sequence in made:
        object.__setattr__(sequence.sampling, "max_tokens", TOKENS)
    made.append(Sequence("scored", list(range(300, 340)), SamplingParams(max_tokens=0), prompt_logprobs=2))
    made.append(Sequence("pooled", list(range(400, 450)), SamplingParams(), pooling="mean"))
    return made


def poisoned(compiler: GrammarCompiler, name: str) -> Sequence:
    """One of each kind of fault, by the first letter of ``name``."""
    prompt = [500 + len(name), 600, 700]
    match name[0]:
        case "b":
            return Sequence(name, prompt, SamplingParams(temperature=0, logit_bias=((10**9, 1.0),)))
        case "w":
            return Sequence(name, prompt, SamplingParams(), (WeightedAdapter("a", NoNumber("heavy"), 4),))  # type: ignore[arg-type]
    made = Sequence(name, prompt, SamplingParams(), grammar=grammar(compiler, GrammarSpec("json_object")))
    assert made.matcher
    made.matcher._matcher = None  # type: ignore[assignment]
    return made


@pytest.fixture(scope="module")
def alone(served: Engine, compiler: GrammarCompiler) -> tuple[dict[str, list[Event]], dict[str, list[Tensor]]]:
    """Each healthy sequence's events and logits, run alone."""
    events: dict[str, list[Event]] = {}
    with recorded_logits(served) as logits:
        for sequence in healthy(served, compiler):
            events |= run_mixed(served, [sequence], None)
    return events, logits


def run(served: Engine, good: list[Sequence], bad: list[Sequence], rng: random.Random) -> dict[str, list[Event]]:
    """Submit all at random moments, and run until they have ended."""
    waiting = [*good, *bad]
    rng.shuffle(waiting)
    events: dict[str, list[Event]] = {sequence.id: [] for sequence in waiting}
    live = len(waiting)
    while live:
        for _ in range(rng.choice([0, 1, 2, 6])):
            if waiting:
                served.submit(waiting.pop())
        for event in served.step():
            events[event.sequence_id].append(event)
            live -= is_last(event)
        served.check()
    return events


def check_neighbours(
    found: dict[str, list[Event]],
    recorded: dict[str, list[Tensor]],
    alone: tuple[dict[str, list[Event]], dict[str, list[Tensor]]],
) -> None:
    """Assert that the healthy ones have the events and bits of their solo runs."""
    events, logits = alone
    for id_, wanted in events.items():
        assert [replace(event, cached=0) for event in found[id_]] == [replace(event, cached=0) for event in wanted], id_
        tokens = sum(isinstance(event, Token) for event in wanted)  # behind them are rows after drafts
        rows = zip(recorded.get(id_, [])[:tokens], logits.get(id_, [])[:tokens], strict=True)
        assert all(torch.equal(*pair) for pair in rows)


@pytest.mark.parametrize("names", [["b1"], ["w1"], ["g1"], ["b1", "w1", "g1", "b1 again", "b2"]])
def test_neighbours_have_the_bits_of_solo_runs(
    served: Engine,
    compiler: GrammarCompiler,
    alone: tuple[dict[str, list[Event]], dict[str, list[Tensor]]],
    names: list[str],
) -> None:
    before = served.stats()
    bad = [poisoned(compiler, name) for name in names]
    with recorded_logits(served) as recorded:
        found = run(served, healthy(served, compiler), bad, random.Random(len(names)))
    for sequence in bad:
        (failed,) = found[sequence.id]
        assert isinstance(failed, Failed)
        assert failed.cause == "request"
        assert sequence.id in failed.message
    check_neighbours(found, recorded, alone)
    after = served.stats()
    assert 1 <= after.failed_steps - before.failed_steps <= len(bad)
    assert (after.running, after.waiting, after.blocks_used, after.healthy) == (0, 0, 0, True)


def test_an_adapter_that_overflows_fails_each_of_its_requests_once(
    served: Engine,
    compiler: GrammarCompiler,
    alone: tuple[dict[str, list[Event]], dict[str, list[Tensor]]],
) -> None:
    """No step fails for it: its rows are not finite. Its prompts are cut into chunks, and begin alike."""
    huge = WeightedAdapter(OVERFLOWING, 1.0, 8)
    mixed = (huge, WeightedAdapter(AdapterId("a"), 0.5, 4))
    greedy, drawn = SamplingParams(temperature=0, max_tokens=TOKENS), SamplingParams(max_tokens=TOKENS, logprobs=3)
    bad = [
        Sequence("greedy", [500], greedy, (huge,)),
        Sequence("drawn", list(range(500, 600)), drawn, (huge,)),
        Sequence("again", list(range(500, 600)), greedy, (huge,)),
        Sequence("mixed", list(range(600, 620)), drawn, mixed),
        Sequence(
            "follows a grammar", [500, 600], drawn, (huge,), grammar=grammar(compiler, GrammarSpec("json_object"))
        ),
        Sequence("has scores", list(range(700, 790)), greedy, (huge,), prompt_logprobs=2),
        Sequence("has a mean", list(range(800, 890)), greedy, (huge,), pooling="mean"),
        Sequence("has a last", [800], greedy, mixed, pooling="last"),
    ]
    before = served.stats()
    with recorded_logits(served) as recorded:
        found = run(served, healthy(served, compiler), bad, random.Random(5))
    for sequence in bad:
        (failed,) = found[sequence.id]
        assert isinstance(failed, Failed), sequence.id
        assert failed.cause == "adapter"
        assert "not finite: this adapter or mix cannot be used" in failed.message
    check_neighbours(found, recorded, alone)
    after = served.stats()
    assert after.failed_steps == before.failed_steps
    assert (after.running, after.waiting, after.blocks_used, after.healthy) == (0, 0, 0, True)


@pytest.mark.parametrize(
    ("spec", "met"),
    [
        (GrammarSpec("lark", 'start: s "@@@"\ns: /[a-z]/ s | /[a-z ]/ s | ""'), "Too many items"),
        (GrammarSpec("regex", "[a-z ]*((a|e|i|o|u)[a-z ]{29}|(n|r|s|t|l)[a-z ]{32})[.]"), "too many"),
    ],
)
def test_a_mask_that_meets_a_limit_fails_its_own_request(
    served: Engine,
    compiler: GrammarCompiler,
    alone: tuple[dict[str, list[Event]], dict[str, list[Tensor]]],
    spec: GrammarSpec,
    met: str,
) -> None:
    """Its answer may end nowhere yet, though llguidance lets end tokens come after an error."""
    before = served.stats()
    params = SamplingParams(temperature=0, max_tokens=200, stop_token_ids=served.runner.base.eos_token_ids)
    bad = Sequence("bad", [500, 600, 700], params, grammar=grammar(compiler, spec))
    with recorded_logits(served) as recorded:
        found = run(served, healthy(served, compiler), [bad], random.Random(3))
    *answer, failed = found["bad"]
    assert isinstance(failed, Failed)
    assert failed.cause == "grammar"
    assert met in failed.message
    assert all(isinstance(event, Token) and not event.finish for event in answer)
    check_neighbours(found, recorded, alone)
    after = served.stats()
    assert after.failed_steps == before.failed_steps
    assert (after.running, after.waiting, after.blocks_used, after.healthy) == (0, 0, 0, True)


def test_three_different_contents_in_a_row_with_nothing_else_make_the_engine_unhealthy(
    served: Engine, compiler: GrammarCompiler
) -> None:
    """One that is tried again and again does not: a client may retry on an idle server."""

    def fail(name: str) -> bool:
        run(served, [], [poisoned(compiler, name)], random.Random(1))
        return served.stats().healthy

    assert [fail("b1") for _ in range(5)] == [True] * 5
    assert [fail(name) for name in ("b22", "b333", "w4444")] == [True, False, False]
    run_mixed(served, [Sequence("fine", [1, 2, 3], SamplingParams(max_tokens=1))], None)
    assert served.stats().healthy
