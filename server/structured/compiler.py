"""GrammarCompiler: compiles the grammars of requests, once each, on a thread."""

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from llguidance import LLTokenizer
from tokenizers import Tokenizer

from server.engine.grammar import Grammar
from server.errors import InvalidRequest, QueueFull
from server.structured.sandbox import compiled
from server.structured.sandbox_process import SandboxProcess
from server.structured.spec import GrammarSpec
from server.structured.special_tokens import renamed

MAX_SOURCE = 256 * 1024
"""Characters of a grammar."""
MAX_CACHED = 64
"""Grammars that are kept, or why they were refused; the least recently used are dropped first."""
MAX_PENDING = 64
"""Grammars that wait to be compiled."""
TEXT_SLICES = ["[a-z]{1,30}", "[ a-z]{1,30}", "[ a-zA-Z]{1,30}"]
"""Regular expressions of plain text. Where a grammar allows all tokens that match one, llguidance takes them as a whole
instead of trying each: a mask inside ``[a-zA-Z ,.]{1,300}`` takes 18 us instead of 414. Its own slices are for JSON."""


class GrammarCompiler:
    """Compiles grammars for a base's tokenizer. For the event loop, but for its own thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_tokens: Collection[int]) -> None:
        """``vocabulary``: the number of the model's token ids, which may be more than the tokenizer has.

        Cheap: llguidance's form of the tokenizer, and the sandbox, are made for the first grammar.
        """
        self._tokenizer = tokenizer
        self._vocabulary = max(vocabulary, tokenizer.get_vocab_size())
        self._end_tokens = sorted(end_tokens)
        self._cache: OrderedDict[GrammarSpec, Grammar | str] = OrderedDict()
        """Grammars, and reasons why others were refused."""
        self._pending: dict[GrammarSpec, asyncio.Task[Grammar | str]] = {}
        self._worker = ThreadPoolExecutor(1, "grammar-compiler")
        self._environment: tuple[LLTokenizer, SandboxProcess] | str | None = None
        """Of the worker: None until the first grammar, a reason if the tokenizer cannot be used."""

    async def compile(self, spec: GrammarSpec, param: str) -> Grammar:
        """Compile a grammar, or find it in the cache. ``param``: the request's field that it came from.

        Raises InvalidRequest, which names ``param`` and the reason, if the grammar is too large, not supported, or not
        compiled within the sandbox's limits; QueueFull if too many others wait; EngineError if the sandbox was killed.
        """
        if len(spec.source) > MAX_SOURCE:
            raise _refusal(param, f"it has {len(spec.source)} characters, and at most {MAX_SOURCE} are supported")
        found = self._find(spec) or await self._compile_once(spec)
        if isinstance(found, str):
            raise _refusal(param, found)
        return found

    def close(self) -> None:
        """End the thread, after the grammar that it compiles, and the sandbox."""
        self._worker.shutdown(cancel_futures=True)
        if isinstance(self._environment, tuple):
            self._environment[1].close()

    def _find(self, spec: GrammarSpec) -> Grammar | str | None:
        found = self._cache.get(spec)
        if isinstance(found, Grammar) and found.exhausted:
            return None  # compiled again, it can be followed again
        if found is not None:
            self._cache.move_to_end(spec)
        return found

    async def _compile_once(self, spec: GrammarSpec) -> Grammar | str:
        task = self._pending.get(spec)
        if task is None:
            if len(self._pending) >= MAX_PENDING:
                raise QueueFull("Too many grammars wait to be compiled; try again later.", code="queue_full")
            task = self._pending[spec] = asyncio.create_task(self._run(spec))
        # shielded: a client that disconnects must not take the grammar from others that wait for it
        return await asyncio.shield(task)

    async def _run(self, spec: GrammarSpec) -> Grammar | str:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._worker, self._compile, spec)
        finally:
            del self._pending[spec]
        self._worker.submit(self._restart)
        self._cache[spec] = found
        self._cache.move_to_end(spec)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return found

    # On the thread

    def _compile(self, spec: GrammarSpec) -> Grammar | str:
        if self._environment is None:
            self._environment = self._open()
        if isinstance(self._environment, str):
            return self._environment
        tokenizer, sandbox = self._environment
        try:
            return Grammar(partial(compiled, tokenizer, sandbox.translate(spec)), tokenizer.vocab_size)
        except ValueError as error:
            return str(error)

    def _restart(self) -> None:
        """Start the sandbox if the last grammar has ended it, so that the next one need not wait for the tokenizer."""
        if isinstance(self._environment, tuple):
            self._environment[1].start()

    def _open(self) -> tuple[LLTokenizer, SandboxProcess] | str:
        if not self._end_tokens:
            return "this model has no end token, so no answer could end"
        text, special = renamed(self._tokenizer.to_str())
        try:
            slices = TEXT_SLICES + LLTokenizer.general_slices()
            tokenizer = LLTokenizer(text, n_vocab=self._vocabulary, eos_token=self._end_tokens, slices=slices)
        except ValueError as error:
            return f"this model's tokenizer cannot follow grammars ({error})"
        setup = {"tokenizer": text, "vocabulary": self._vocabulary, "end": self._end_tokens, "special": special}
        return tokenizer, SandboxProcess(setup)


def _refusal(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"`{param}` cannot be used: {reason}.", param=param)
