"""Grammars in the engine: each answer follows its own, and has the same bits alone and in a mixed batch."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from server.engine.engine import Engine
from server.engine.grammar import Grammar
from server.engine.sequence import Adaptation, Failed, SamplingParams, Sequence, Token, WeightedAdapter
from server.engine.speculation import StepCosts
from server.structured.compiler import GrammarCompiler
from server.structured.spec import GrammarSpec
from server.structured.special_tokens import renamed
from tests.numeric.drive import recorded_logits
from tests.numeric.exact import RANKS, engine, run_mixed, tight_engine
from tests.numeric.kernels import require_compiler

pytestmark = pytest.mark.demo

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "size": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "null"}]},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}
SPECS = (
    GrammarSpec("json_schema", json.dumps(SCHEMA)),
    None,
    GrammarSpec("choice", '["yes", "no", "maybe"]'),
    GrammarSpec("regex", r"[a-z]{3,8}( [a-z]{3,8}){2}"),
    None,
    GrammarSpec("lark", 'start: "<" word ">"\nword: /[A-Z]{2,4}/'),
    GrammarSpec("json_object"),
)
SAMPLINGS = (
    {"temperature": 1.0, "seed": 5, "logprobs": 2},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.1, "presence_penalty": 0.3},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "seed": -3},
    {"temperature": 0.7, "min_p": 0.1, "logit_bias": ((28, 4.0), (30, -100.0)), "seed": 8},
)
Answer = tuple[list[int], list[Tensor]]


@pytest.fixture(scope="module")
def root(demo_root: Path) -> Path:
    require_compiler()
    return demo_root


@pytest.fixture(scope="module")
def plain(root: Path) -> Engine:
    return engine(root, speculation="off")


@pytest.fixture(scope="module")
def compiler(plain: Engine) -> Iterator[GrammarCompiler]:
    base = plain.runner.base
    made = GrammarCompiler(base.tokenizer.backend_tokenizer, base.model.config.vocab_size, base.eos_token_ids)
    yield made
    made.close()


def grammar(compiler: GrammarCompiler, spec: GrammarSpec | None) -> Grammar | None:
    """Compiled for this one use: what a matcher has learnt of its grammar must not matter either."""
    return None if spec is None else compiler._compile(spec)  # type: ignore[return-value]


def sequences(engine: Engine, compiler: GrammarCompiler) -> list[Sequence]:
    """Requests with each grammar and none, each way of sampling, the base and adapters; prompts repeat themselves."""
    rng = random.Random(6)
    made: list[Sequence] = []
    end = engine.runner.base.eos_token_ids
    for i in range(14):
        names = rng.sample(sorted(RANKS), rng.choice([0, 1, 1, 2]))
        adaptation: Adaptation = tuple(WeightedAdapter(name, 0.3, RANKS[name]) for name in names)
        text = '{"name": "Ann", "tags": ["red", "green"], "size": 12} yes no <AB> abc def ghi ' * 2
        prompt = engine.runner.base.tokenizer.encode(text)[: rng.choice([20, 45, 70])]
        sampling = SamplingParams(**SAMPLINGS[i % len(SAMPLINGS)], max_tokens=30, stop_token_ids=end)
        made.append(Sequence(f"{i}", prompt, sampling, adaptation, grammar=grammar(compiler, SPECS[i % len(SPECS)])))
    return made


def answers(served: Engine, asked: list[Sequence], rng: random.Random | None) -> list[Answer]:
    """One request after the other, or all mixed at random moments."""
    with recorded_logits(served) as recorded:
        for together in [asked] if rng else [[sequence] for sequence in asked]:
            run_mixed(served, together, rng)
    return [(list(s.output), recorded[s.id][: s.output_length]) for s in asked]


def check_form(served: Engine, index: int, tokens: list[int]) -> None:
    """A complete answer has the form of its grammar."""
    spec, ids = SPECS[index % len(SPECS)], served.runner.base.eos_token_ids
    if spec is None or tokens[-1] not in ids:
        return
    text = served.runner.base.tokenizer.decode(tokens[:-1])
    match spec.kind:
        case "json_schema":
            jsonschema.validate(json.loads(text), SCHEMA)
        case "json_object":
            assert isinstance(json.loads(text), dict)
        case "choice":
            assert text in ("yes", "no", "maybe")
        case "regex":
            assert len(text.split()) == 3
        case _:
            assert text[0] + text[-1] == "<>"
            assert text[1:-1].isupper()


@pytest.fixture
def all_drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whenever there is a match, whatever was measured."""
    monkeypatch.setattr(StepCosts, "row", 0.0)
    monkeypatch.setattr(StepCosts, "comparable", True)


@pytest.mark.usefixtures("all_drafts_pay")
def test_answers_follow_their_grammars_and_are_the_same_alone_and_under_pressure(
    root: Path, plain: Engine, compiler: GrammarCompiler
) -> None:
    alone = answers(plain, sequences(plain, compiler), None)
    ended = 0
    for index, (tokens, _) in enumerate(alone):
        check_form(plain, index, tokens)
        ended += SPECS[index % len(SPECS)] is not None and tokens[-1] in plain.runner.base.eos_token_ids
    assert ended >= 5, "enough answers are complete"
    tight = tight_engine(root)
    mixed = answers(tight, sequences(tight, compiler), random.Random(1))
    for i, ((tokens, logits), (wanted, expected)) in enumerate(zip(mixed, alone, strict=True)):
        assert tokens == wanted, f"request {i}"
        assert all(torch.equal(row, other) for row, other in zip(logits, expected, strict=True)), f"request {i}"
    stats = tight.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    tight.check()


def test_a_grammar_that_fails_fails_its_own_request(plain: Engine, compiler: GrammarCompiler) -> None:
    end = plain.runner.base.eos_token_ids
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=end)
    good = Sequence("good", [5, 6, 7], params, grammar=grammar(compiler, GrammarSpec("regex", "[a-z]{40}")))
    bad = Sequence("bad", [5, 6, 7], params, grammar=grammar(compiler, GrammarSpec("regex", "[a-z]{40}")))
    free = Sequence("free", [5, 6, 7], params)
    assert bad.matcher is not None
    bad.matcher.accept(0, last=False)  # an error from now on, as when a limit of llguidance is met
    for sequence in (good, bad, free):
        plain.submit(sequence)
    events = [event for _ in range(12) for event in plain.step()]
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.sequence_id for event in failed] == ["bad"]
    assert "grammar" in failed[0].message
    ended = {e.sequence_id: e.finish for e in events if isinstance(e, Token) and e.finish}
    assert set(ended) == {"good", "free"}
    assert len(good.output) == len(free.output) == 8 or ended["free"] == "stop"
    plain.check()


@pytest.mark.parametrize(
    ("regex", "text"),
    [
        ("[a-z ]{20,90}", "the cat sat on a mat and went home"),
        ("[a-zA-Z ,.]{1,30}", "The cat, a Bengal, sat there."),
        ("[A-Z][a-z]+( [a-z]{1,5}){2,6}[.]", "The cat sat on a mat."),
        ("(\\w+ ?){9}", "The cat sat 12 on a mat"),
    ],
)
def test_the_slices_of_plain_text_change_no_mask(
    plain: Engine, compiler: GrammarCompiler, regex: str, text: str
) -> None:
    base = plain.runner.base
    description = renamed(base.tokenizer.backend_tokenizer.to_str())[0]
    tokenizer = LLTokenizer(description, n_vocab=49152, eos_token=sorted(base.eos_token_ids), slices=[])
    reference = LLMatcher(tokenizer, LLMatcher.grammar_from_regex(regex))
    started = grammar(compiler, GrammarSpec("regex", regex))
    assert started is not None
    matcher = started.start()
    ours, theirs = np.zeros(49152 // 32, np.int32), np.zeros(49152 // 32, np.int32)
    allowed = []
    for token in base.tokenizer.encode(text, add_special_tokens=False):
        matcher.write_masks((), ours.ctypes.data, ours.nbytes)
        reference.unsafe_compute_mask_ptr(theirs.ctypes.data, theirs.nbytes)
        assert (ours == theirs).all()
        allowed.append(int(np.unpackbits(ours.view(np.uint8)).sum()))
        assert matcher.accept(token, last=False) is None
        assert reference.consume_token(token)
    assert max(allowed) > 3000, "the slices were used"
