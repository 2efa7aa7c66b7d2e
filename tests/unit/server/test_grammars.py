"""Grammars: what each kind allows, what is refused and how fast, and that each is compiled once."""

import asyncio
import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from threading import Timer
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer, models, processors

from server.engine.grammar import Grammar, Matcher
from server.errors import EngineError, InvalidRequest, QueueFull
from server.structured import compiler
from server.structured.compiler import MAX_CACHED, MAX_SOURCE, GrammarCompiler
from server.structured.spec import GrammarSpec, with_whitespace
from server.structured.special_tokens import renamed
from tests.tiny import VOCABULARY, tiny_tokenizer

END, OTHER_END = 258, 256
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tiny_tokenizer().backend_tokenizer, VOCABULARY, {END, OTHER_END})
    yield made
    made.close()


def compile_(grammars: GrammarCompiler, kind: Any, source: object = "") -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return asyncio.run(grammars.compile(GrammarSpec(kind, text), "field"))


def tokens(text: str) -> list[int]:
    """Token ids of a text; the text of special tokens is text like all other."""
    backend = tiny_tokenizer().backend_tokenizer
    backend.encode_special_tokens = True
    return backend.encode(text).ids


def allowed(matcher: Matcher) -> set[int]:
    """Token ids that may come next."""
    bits = np.zeros(-(-VOCABULARY // 32), np.int32)
    assert matcher.write_masks((), bits.ctypes.data, bits.nbytes) is None
    return set(np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist())


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether ``text`` is a whole answer: each token is allowed in its place, and an end token after the last."""
    matcher = grammar.start()
    for token in tokens(text):
        if token not in allowed(matcher):
            return False
        assert matcher.accept(token, last=False) is None
    assert matcher.accept(END, last=True) is None
    return END in allowed(matcher)


CASES: dict[str, tuple[str, object, list[str], list[str]]] = {
    "json object": ("json_object", "", ["{}", '{"a": [1, null]}', '{"ü": "😀"}'], ["[]", "1", "", '{"a":}', "{} "]),
    "schema": (
        "json_schema",
        PERSON,
        ['{"name": "Zoë", "age": 3}', '{"name":"","age":-7}', '{\n  "name": "x",\n  "age": 1\n}'],
        ['{"name": "x"}', '{"age": 3, "name": "x"}', '{"name": "x", "age": 1.5}', '{"name": "x", "age": 1, "b": 1}'],
    ),
    "enum": ("json_schema", {"enum": ["red", "grün", 3, None]}, ['"red"', '"grün"', "3", "null"], ['"blue"', "4"]),
    "const": ("json_schema", {"const": {"a": [1]}}, ['{"a":[1]}', '{"a": [1]}'], ['{"a":[2]}']),
    "anyOf": (
        "json_schema",
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
        ["5", "[]", "[true,false]"],
        ["true", "[1]", "[true,true,true]"],
    ),
    "recursive": (
        "json_schema",
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False},
        ["{}", '{"next":{"next":{}}}'],
        ['{"next":1}'],
    ),
    "discriminated": (
        "json_schema",
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": k}}, "required": ["k"], "additionalProperties": False}
                for k in "ab"
            ],
            "discriminator": {"propertyName": "k"},
        },
        ['{"k":"a"}', '{"k":"b"}'],
        ['{"k":"c"}', "{}"],
    ),
    "bounds": (
        "json_schema",
        {"type": "array", "items": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 3}, "minItems": 1},
        ['["abc"]', '["a", "b"]'],
        ["[]", '["abca"]', '["d"]'],
    ),
    "false is no keyword": ("json_schema", {"type": "array", "uniqueItems": False}, ["[1,1]"], ["1"]),
    "annotations": ("json_schema", {"type": "null", "title": "x", "x-mine": 1, "deprecated": True}, ["null"], ["1"]),
    "a property may have any name": (
        "json_schema",
        {"type": "object", "properties": {"not": {"const": 1}}, "required": ["not"]},
        ['{"not": 1}'],
        ['{"not": 2}'],
    ),
    "regex": ("regex", r"\d{3}-(\p{L}+|😀)", ["123-äb", "123-😀"], ["12-a", "123-", "123-a1"]),
    "choice": ("choice", ["yes", "yes!", 'q"\\\n', "日本"], ["yes", "yes!", 'q"\\\n', "日本"], ["ye", "no", '"yes"']),
    "lark": ("lark", 'start: item ("," item)*\nitem: /[a-z]+/', ["a", "ab,c"], ["", "a,", "A"]),
    "gbnf": ("lark", 'root ::= item ("," item)*\nitem ::= [a-z]+', ["a", "ab,c"], ["", "a,", "A"]),
    "special tokens as text": ("choice", ["<|im_end|>", "a<|im_start|>b"], ["<|im_end|>", "a<|im_start|>b"], ["", "a"]),
    "special tokens in a schema": ("json_schema", {"enum": ["<|im_start|>"]}, ['"<|im_start|>"'], ['"', '""']),
    "json in lark": (
        "lark",
        "start: c\nc: %json " + json.dumps(with_whitespace(PERSON)),
        ['{"name":"a","age":1}'],
        ["{}"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_grammar_allows(grammars: GrammarCompiler, case: str) -> None:
    kind, source, good, bad = CASES[case]
    grammar = compile_(grammars, kind, source)
    for text in good:
        assert accepts(grammar, text), text
        if kind == "json_schema":
            jsonschema.validate(json.loads(text), source)
    for text in bad:
        assert not accepts(grammar, text), text


def test_a_grammar_may_name_special_tokens(grammars: GrammarCompiler) -> None:
    matcher = compile_(grammars, "lark", 'start: <|im_start|> "<|im_start|>" /<|x>/ // <|im_start|>').start()
    for token in [tiny_tokenizer().convert_tokens_to_ids("<|im_start|>"), *tokens("<|im_start|>x>")]:
        assert token in allowed(matcher)
        assert matcher.accept(token, last=False) is None
    assert allowed(matcher) == {END, OTHER_END}


def test_special_tokens_are_renamed_in_each_kind_of_vocabulary() -> None:
    special = [("<unk>", 0), ("<s>", 2)]
    for model in (
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("<s>", 0.0), ("b", -2.0)], 0),
        models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2, "b": 3}, "<unk>"),
        models.WordPiece({"<unk>": 0, "a": 1, "<s>": 2, "b": 3}, unk_token="<unk>"),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens([text for text, _ in special])
        tokenizer.add_special_tokens(["<end>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 2)])
        description, ids = renamed(tokenizer.to_str())
        assert ids == {**dict(special), "<end>": 4}
        made = Tokenizer.from_str(description)
        assert {made.id_to_token(id_) for id_ in ids.values()}.isdisjoint(ids)
        assert made.get_vocab_size() == tokenizer.get_vocab_size()
        assert made.token_to_id("b") == 3


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_whitespace_is_bounded(grammars: GrammarCompiler, kind: str) -> None:
    grammar = compile_(grammars, kind, {"type": "object", "x-guidance": {"whitespace_flexible": True}})
    assert accepts(grammar, '{\n\t"a": 1}')
    assert accepts(grammar, "{\n" + " " * 32 + '"a": 1}')
    for endless in ('{  "a": 1}', '{\n\n"a": 1}', "{\n" + " " * 33 + '"a": 1}', '{\r"a": 1}', ' {"a": 1}'):
        assert not accepts(grammar, endless)


def test_end_tokens_come_where_the_answer_may_end_and_alone_where_it_must(grammars: GrammarCompiler) -> None:
    matcher = compile_(grammars, "regex", "ab?").start()
    a, b = tokens("ab")
    assert allowed(matcher) == {a}
    assert matcher.accept(a, last=False) is None
    assert allowed(matcher) == {b, END, OTHER_END}
    assert matcher.accept(b, last=False) is None
    assert allowed(matcher) == {END, OTHER_END}


def test_masks_after_drafts_are_those_that_come_without_drafts(grammars: GrammarCompiler) -> None:
    text = '{"name": "x", "age": 12}'
    plain = compile_(grammars, "json_schema", PERSON).start()
    drafted = compile_(grammars, "json_schema", PERSON).start()
    words = -(-VOCABULARY // 32)
    drafts = tokens(text)
    masks = np.full((len(drafts) + 2, words), -1, np.int32)
    for wrong in (None, 5):
        ahead = drafts if wrong is None else [*drafts[:wrong], tokens("?")[0], *drafts[wrong + 1 :]]
        masks[:] = -1
        assert drafted.write_masks(ahead, masks.ctypes.data, masks[0].nbytes) is None
        follow = compile_(grammars, "json_schema", PERSON).start()
        for place in range(len(drafts) + 1 if wrong is None else wrong + 1):
            bits = np.unpackbits(masks[place].view(np.uint8), bitorder="little")
            assert set(np.flatnonzero(bits)) == allowed(follow), place
            if place < len(drafts):
                assert follow.accept(drafts[place], last=False) is None
        assert wrong is None or (masks[wrong + 1 :] == -1).all()
    assert allowed(drafted) == allowed(plain), "drafts leave it where it was"


def test_a_token_that_is_not_allowed_is_an_error_that_stays(grammars: GrammarCompiler) -> None:
    grammar = compile_(grammars, "regex", "ab")
    matcher, other = grammar.start(), grammar.start()
    failure = matcher.accept(tokens("b")[0], last=False)
    assert failure is not None
    assert not failure.too_complex, "a mask would have left it out, so this is the server's fault"
    assert matcher.accept(END, last=True) is not None
    assert other.accept(tokens("a")[0], last=False) is None
    assert grammar.exhausted
    assert compile_(grammars, "regex", "ab") is not grammar, "the next request gets a fresh one"


def test_an_answer_goes_on_where_those_before_it_have_used_up_a_limit(grammars: GrammarCompiler) -> None:
    """Copies of a grammar share the states that they have found, which are limited."""
    grammar = compile_(grammars, "regex", "([a-z]*(a|b)[a-z]{14})|([a-z]*c[a-z]{14}d)")
    rng = random.Random(0)
    answers = 0
    while not grammar.exhausted and answers < 1000:
        matcher, answers = grammar.start(), answers + 1
        for token in tokens("".join(rng.choices("abcdefg", k=40))):
            assert matcher.accept(token, last=False) is None
    assert 1 < answers < 1000
    for token in tokens("abc" * 5):
        assert matcher.accept(token, last=False) is None, "the answer that met the limit goes on, too"


def test_a_mask_goes_on_where_the_answers_before_it_have_used_up_a_limit(grammars: GrammarCompiler) -> None:
    """Llguidance's own mask would let only end tokens come then, and half an answer would look complete."""
    compile_(grammars, "regex", "a")  # makes the environment
    assert isinstance(grammars._environment, tuple)
    regex = LLMatcher.grammar_from_regex("([a-z]*(a|b)[a-z]{14})|([a-z]*c[a-z]{14}d)")
    limits = LLParserLimits(max_lexer_states=2000)
    grammar = Grammar(partial(LLMatcher, grammars._environment[0], regex, limits=limits), VOCABULARY)
    letters, rng, answers = set(tokens("abcdefghijklmnopqrstuvwxyz")), random.Random(0), 0
    while not grammar.exhausted and answers < 100:
        matcher, answers = grammar.start(), answers + 1
        for token in tokens("".join(rng.choices("abcdefg", k=40))):
            assert allowed(matcher) - {END, OTHER_END} == letters
            assert matcher.accept(token, last=False) is None
    assert 1 < answers < 100


def test_a_grammar_is_compiled_again_once_for_an_answer(grammars: GrammarCompiler) -> None:
    """Otherwise each of its tokens could cost all that run the time of another compilation."""
    compile_(grammars, "regex", "a")  # makes the environment
    assert isinstance(grammars._environment, tuple)
    regex = LLMatcher.grammar_from_regex("([a-z]*(a|b)[a-z]{14})|([a-z]*c[a-z]{14}d)")
    limits = LLParserLimits(max_lexer_states=200)
    compiled: list[None] = []

    def compile_again() -> LLMatcher:
        compiled.append(None)
        return LLMatcher(grammars._environment[0], regex, limits=limits)  # type: ignore[index]

    matcher, bits = Grammar(compile_again, VOCABULARY).start(), np.zeros(-(-VOCABULARY // 32), np.int32)
    rng, failed = random.Random(0), None
    while failed is None:
        failed = matcher.write_masks((), bits.ctypes.data, bits.nbytes)
        if failed is None:
            assert matcher.accept(tokens(rng.choice("abcdefg"))[0], last=False) is None
    assert len(compiled) == 2
    assert (failed[0], failed[1].too_complex) == (0, True)


def test_drafts_that_meet_a_limit_leave_the_answer_where_it_was(grammars: GrammarCompiler) -> None:
    """Only a draft takes the brace, after which too much may come; the answer takes another way."""
    several = [named(390, prefix) for prefix in "abcde"]
    grammar = compile_(grammars, "json_schema", {"type": "array", "items": {"anyOf": [*several, {"type": "null"}]}})
    matcher = grammar.start()
    assert matcher.accept(tokens("[")[0], last=False) is None
    before, drafts = allowed(matcher), tokens('{"a1":')
    masks = np.zeros((len(drafts) + 1, -(-VOCABULARY // 32)), np.int32)
    failed = matcher.write_masks(drafts, masks.ctypes.data, masks[0].nbytes)
    assert failed is not None
    place, failure = failed
    assert 0 < place <= 2
    assert failure.too_complex
    assert allowed(matcher) == before
    for token in tokens("null]"):
        assert token in allowed(matcher)
        assert matcher.accept(token, last=False) is None
    assert allowed(matcher) == {END, OTHER_END}


def named(count: int, prefix: str = "p") -> dict[str, Any]:
    return {"type": "object", "properties": {f"{prefix}{number}": {} for number in range(count)}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE: dict[str, tuple[str, object, str]] = {
    "not JSON": ("json_schema", "{", "delimiter|Expecting"),
    "no object": ("json_schema", "true", "must be an object"),
    "no schema": ("json_schema", {"type": "objekt"}, "objekt"),
    "joined objects": (
        "json_schema",
        {"allOf": [named(300), named(300, "q")]},
        "items; max is",
    ),
    "keyword": ("json_schema", {"type": "object", "not": {}}, "keyword `not` is not supported"),
    "inner keyword": (
        "json_schema",
        {"properties": {"a": {"items": {"if": {}}}}},
        "keyword `if` at `properties.a.items` is not supported",
    ),
    "misspelt": ("json_schema", {"requred": ["a"]}, "keyword `requred` is not supported"),
    "nullable": ("json_schema", {"type": "string", "nullable": True}, "keyword `nullable` is not supported"),
    "unique": ("json_schema", {"type": "array", "uniqueItems": True}, "`uniqueItems`"),
    "lenient": ("json_schema", {"x-guidance": {"lenient": True}, "contains": {}}, "keyword `contains`"),
    "format": ("json_schema", {"type": "string", "format": "colour"}, "colour"),
    "remote": ("json_schema", {"$ref": "http://localhost/x"}, "localhost"),
    "no answer": ("json_schema", {"$ref": "#"}, "no answer can satisfy it"),
    "deep": ("json_schema", nested(300), "64 levels"),
    "very deep": ("json_schema", '{"a":' * 40_000 + "1" + "}" * 40_000, "64 levels"),
    "wide": (
        "json_schema",
        {"type": "object", "properties": {f"p{i}": {} for i in range(5000)}},
        "2000 properties",
    ),
    "explosion": (
        "json_schema",
        {"allOf": [{"anyOf": [{"properties": {f"k{i}_{j}": {}}} for j in range(10)]} for i in range(10)]},
        "",
    ),
    "huge": ("json_schema", {"enum": [f"value {i}" for i in range(1_000_000)]}, f"{MAX_SOURCE} are supported"),
    "modulus": ("json_schema", {"type": "integer", "multipleOf": 99999989}, "processor time|memory"),
    "lookahead": ("regex", "a(?!b)", "look-around"),
    "unclosed": ("regex", "(a", "unclosed"),
    "repeats": ("regex", "(((((x{100}){100}){100}){100}){100})", "processor time|memory"),
    "parentheses": ("regex", "(" * 50_000 + "a" + ")" * 50_000, ""),
    "undefined": ("lark", "start: foo", "foo"),
    "intersections": ("lark", "start: A\nA: /(.*a){20}/ & /(.*b){20}/ & ~/(.*c){20}/", ""),
    "deep lark": ("lark", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000, ""),
    "deep gbnf": ("lark", "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000, ""),
    "no rule": ("lark", "hello", ""),
    "surrogate": ("json_schema", '{"const": "\\ud800"}', ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_grammar_that_cannot_be_used_is_refused_soon(grammars: GrammarCompiler, case: str) -> None:
    kind, source, reason = HOSTILE[case]
    compile_(grammars, "regex", "warm")  # the tokenizer and the sandbox are ready
    text = source if isinstance(source, str) else json.dumps(source)
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=reason or "cannot be used") as raised:
        compile_(grammars, kind, text)
    assert time.monotonic() - started < 3, "about 0.3 s on a quiet machine"
    assert raised.value.param == "field"
    assert len(str(raised.value)) < 500
    assert accepts(compile_(grammars, "regex", f"after {case}"), f"after {case}"), "the next one is compiled"


def sandbox(grammars: GrammarCompiler) -> "subprocess.Popen[bytes]":
    """The running sandbox."""
    compile_(grammars, "regex", "warm")
    assert isinstance(grammars._environment, tuple)
    return grammars._environment[1].start()


def test_a_sandbox_that_is_killed_is_the_servers_fault_and_is_not_remembered(grammars: GrammarCompiler) -> None:
    process = sandbox(grammars)
    process.send_signal(signal.SIGSTOP)
    Timer(0.2, process.kill).start()
    with pytest.raises(EngineError, match="has ended"):
        compile_(grammars, "regex", "killed")
    assert accepts(compile_(grammars, "regex", "killed"), "killed")


def test_a_sandbox_that_was_killed_while_idle_is_started_again(grammars: GrammarCompiler) -> None:
    process = sandbox(grammars)
    process.kill()
    process.wait()
    assert accepts(compile_(grammars, "regex", "idle"), "idle")


LARGE: dict[str, tuple[str, object, str]] = {
    "required properties": (
        "json_schema",
        named(2000) | {"required": list(named(2000)["properties"])},
        '{"p0": 1, "p1":',
    ),
    "optional properties": ("json_schema", named(400), '{"p1": {"x": [1, 2]}, "p399": "y"}'),
    "a large enum": ("json_schema", {"enum": [f"value {i}" for i in range(5000)]}, '"value 4'),
    "many choices": ("choice", [f"choice {i}" for i in range(5000)], "choice 49"),
    "nested": ("json_schema", nested(50), '{"a":' * 50),
    "long strings": ("json_schema", {"type": "string", "minLength": 10, "maxLength": 100_000}, '"' + "x" * 100),
}
"""Case -> what is compiled, and how an answer may begin."""


@pytest.mark.parametrize("case", LARGE)
def test_large_grammars_are_compiled_and_followed(grammars: GrammarCompiler, case: str) -> None:
    kind, source, text = LARGE[case]
    matcher = compile_(grammars, kind, source).start()
    for token in tokens(text):
        assert token in allowed(matcher)
        assert matcher.accept(token, last=False) is None


def test_equal_grammars_are_compiled_once_and_the_least_used_are_dropped() -> None:
    made = GrammarCompiler(tiny_tokenizer().backend_tokenizer, VOCABULARY, {END})
    compiled: list[GrammarSpec] = []
    original = made._compile
    made._compile = lambda spec: (compiled.append(spec), original(spec))[1]  # type: ignore[method-assign]

    async def run() -> None:
        specs = [GrammarSpec("regex", "abc")] * 5 + [GrammarSpec("regex", "(")] * 5
        found = await asyncio.gather(
            *(made.compile(spec, f"f{i}") for i, spec in enumerate(specs)), return_exceptions=True
        )
        assert len({id(grammar) for grammar in found[:5]}) == 1
        assert [error.param for error in found[5:] if isinstance(error, InvalidRequest)] == [
            f"f{i}" for i in range(5, 10)
        ]
        assert len(compiled) == 2
        first = await made.compile(specs[0], "f")
        with pytest.raises(InvalidRequest):
            await made.compile(specs[-1], "f")
        assert len(compiled) == 2, "refusals are remembered, too"
        for i in range(MAX_CACHED):
            await made.compile(GrammarSpec("regex", f"a{i}"), "f")
        assert await made.compile(specs[0], "f") is not first
        assert len(made._cache) == MAX_CACHED

    asyncio.run(run())
    made.close()


def test_a_client_that_leaves_takes_no_grammar_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = GrammarCompiler(tiny_tokenizer().backend_tokenizer, VOCABULARY, {END})
    monkeypatch.setattr(compiler, "MAX_PENDING", 2)

    async def run() -> None:
        spec = GrammarSpec("regex", "abc")
        leaving, staying = (asyncio.create_task(made.compile(spec, "f")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        other = asyncio.create_task(made.compile(GrammarSpec("regex", "x"), "f"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await made.compile(GrammarSpec("regex", "y"), "f")
        assert isinstance(await staying, Grammar)
        await other
        assert leaving.cancelled()
        assert not made._pending

    asyncio.run(run())
    made.close()


def test_a_tokenizer_or_model_that_cannot_follow_grammars_is_named() -> None:
    made = GrammarCompiler(tiny_tokenizer().backend_tokenizer, VOCABULARY, ())
    with pytest.raises(InvalidRequest, match="no end token"):
        compile_(made, "json_object")
    made.close()
