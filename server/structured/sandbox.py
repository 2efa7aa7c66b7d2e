"""The sandbox: a process that compiles every grammar first, under limits of time and memory.

llguidance limits its own work, but not in all places: some numbers and repetitions take minutes or all memory, and a
thread that computes cannot be stopped. A process can. What it has compiled, the server compiles again, for that is
known to be quick then.

Its setup is the tokenizer, a request is ``[kind, source]``. The answer is ``{"grammar": text}`` with llguidance's form
of it, or ``{"error": reason}``.
"""

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from server.structured.json_schemas import MAX_DEPTH, check
from server.structured.spec import with_whitespace
from server.structured.special_tokens import by_id
from server.workers.worker import Answer, limit, serve

CPU_SECONDS = 0.25
"""For one grammar. A schema of a thousand properties takes 0.1."""
MEMORY = 512 * 2**20
"""Bytes of address space for grammars, besides what the tokenizer takes."""
MAX_MESSAGE = 300
"""Characters of llguidance's message that are passed on."""


def compiled(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile llguidance's form of a grammar, up to its first mask. Raises ValueError with the reason if it cannot."""
    # More states than a long answer meets; a state takes 1 to 2 kB, which live as long as the grammar.
    limits = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(_message(matcher))
    return matcher


def translated(kind: str, source: str, special: Mapping[str, int]) -> str:
    """Llguidance's form of a grammar. Raises ValueError with the reason if it is not supported.

    ``special``: the ids of special tokens, by their text.
    """
    match kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema(with_whitespace({"type": "object"}))
        case "json_schema":
            schema = json.loads(source)
            if reason := check(schema):
                raise ValueError(reason)
            return LLMatcher.grammar_from_json_schema(with_whitespace(schema))
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return _lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, json.loads(source))))
        case _:
            return _lark(by_id(any_to_lark(source), special))


def _lark(source: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def _message(matcher: LLMatcher) -> str:
    message = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if message.startswith("NoExtension"):
        return "no answer can satisfy it"
    return message[:MAX_MESSAGE]


def _begin(matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
    """Follow the beginning of a JSON object, where an answer may have one. Raises ValueError if that takes too much.

    Objects that ``allOf`` or ``anyOf`` join may have many more properties than a row of llguidance's parser takes.
    """
    matcher.try_consume_tokens(tokenizer.tokenize_str('{"'))
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(_message(matcher))


def _answer(tokenizer: LLTokenizer, special: Mapping[str, int], kind: str, source: str) -> dict[str, str]:
    try:
        grammar = translated(kind, source, special)
        _begin(compiled(tokenizer, grammar), tokenizer)
    except RecursionError:
        return {"error": f"it is nested more than {MAX_DEPTH} levels deep"}
    except BaseException as error:  # the library raises exceptions of many types, and Rust's panics are no Exception
        return {"error": " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__}
    return {"grammar": grammar}


def main() -> None:
    """Answer requests, ``[kind, source]``."""
    serve(_prepare, CPU_SECONDS)


def _prepare(setup: dict[str, Any]) -> Answer:
    tokenizer = LLTokenizer(setup["tokenizer"], n_vocab=setup["vocabulary"], eos_token=setup["end"])
    limit(MEMORY)
    return lambda request: _answer(tokenizer, setup["special"], *request)
