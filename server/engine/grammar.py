"""Grammars: which tokens may come next in an answer that has a prescribed form. No torch here.

A :class:`Grammar` is compiled once, by :mod:`server.structured`, and shared; each sequence follows it with a
:class:`Matcher` of its own. The work is llguidance's.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from llguidance import LLMatcher

NOT_ALLOWED = "doesn't satisfy the grammar"
"""What llguidance says of a token that its mask leaves out. All else that it says here is that a limit is met: its
``stop_reason`` is ``InternalError`` for both."""


SHARED = "lexer error"
"""How it begins what it says of a limit that all copies of a grammar share: what its lexer has found."""


class GrammarFailure(NamedTuple):
    """Why an answer cannot follow its grammar any further."""

    message: str
    too_complex: bool
    """Whether it meets one of llguidance's limits; anything else is a fault of the server or of the library."""


class Grammar:
    """A compiled grammar, which any number of sequences may follow at the same time. For any thread."""

    def __init__(self, compile_: Callable[[], LLMatcher], vocabulary: int) -> None:
        """``compile_`` returns a new matcher at the start of the grammar. It takes up to a quarter of a second."""
        self.compile = compile_
        self._matcher = compile_()
        self.vocabulary = vocabulary
        """Token ids in a mask: those of the model, or more."""
        self.exhausted = False
        """Whether an answer has met one of llguidance's limits. Copies share what they have learnt of the grammar, and
        some limits count that, so all others may soon meet it, too: compile the grammar again for new ones."""

    def start(self) -> "Matcher":
        """A matcher for an answer that begins."""
        return Matcher(self, self._matcher.deep_copy())


class Matcher:
    """Follows one answer through its grammar. For one thread at a time."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar = grammar
        self._matcher = matcher
        self._accepted: list[int] = []
        self._alone = False
        """Whether the grammar was compiled again for this answer."""

    def write_masks(self, drafts: Seq[int], address: int, size: int) -> tuple[int, GrammarFailure] | None:
        """Write a mask of the tokens that may come next, and one for the place after each of ``drafts``.

        A mask has ``size`` bytes, a bit for each token id, and they follow each other from ``address``. After a draft
        that the grammar does not allow, or that ends the answer, nothing is written. Once the grammar is complete, only
        end tokens may come. Releases the GIL.

        Where a limit is met, returns the first place that has no mask, and why: 0 if the answer itself meets it, else
        no token may be taken for that place, for only the drafts before it may be at fault.
        """
        failure = self._write_mask(address, size)
        if failure is not None:
            self.grammar.exhausted = True
            # Instead of an error, llguidance writes a mask of the end tokens: the answer would end anywhere.
            failure = self._restart(failure) or self._write_mask(address, size)
        if failure is not None:
            return 0, failure
        taken = 0
        try:
            for place, draft in enumerate(drafts, 1):
                if self._matcher.is_stopped():
                    break
                took = self._matcher.try_consume_tokens([draft])
                failure = _error(self._matcher) if not took else self._write_mask(address + place * size, size)
                if failure is not None:
                    return place, failure
                if not took:
                    break
                taken += 1
        finally:  # a step that fails runs again
            if failure is not None:  # a matcher that has met a limit cannot be rolled back
                self._follow_again(self.grammar.start()._matcher)
            elif taken:
                self._matcher.rollback(taken)
        return None

    def accept(self, token: int, *, last: bool) -> GrammarFailure | None:
        """Take in the token that was sampled, unless it ends the answer. Returns why the grammar failed, or None."""
        if not last:
            self._accepted.append(token)
        failure = _follow(self._matcher, [] if last else [token])
        if failure is None:
            return None
        self.grammar.exhausted = True
        return self._restart(failure)

    def _write_mask(self, address: int, size: int) -> GrammarFailure | None:
        self._matcher.unsafe_compute_mask_ptr(address, size)
        return _error(self._matcher)

    def _restart(self, failure: GrammarFailure) -> GrammarFailure | None:
        """Follow the answer again from its start if that may help. Returns why it cannot be followed, or None.

        An answer that meets a limit of what all copies share is followed by a grammar of its own, for the answers
        before it may have used that up: but once, since a limit that it then meets is its own. Other limits it would
        meet again, and compiling takes time from all that run.
        """
        if self._alone or not failure.message.startswith(SHARED):
            return failure
        self._alone = True
        try:
            matcher = self.grammar.compile()
        except ValueError as error:
            return GrammarFailure(str(error), too_complex=True)
        return self._follow_again(matcher)

    def _follow_again(self, matcher: LLMatcher) -> GrammarFailure | None:
        """Follow the answer with another matcher, which is at the start of the grammar."""
        self._matcher = matcher
        return _follow(matcher, self._accepted)


def _follow(matcher: LLMatcher, tokens: Seq[int]) -> GrammarFailure | None:
    """Let a matcher take in tokens. Returns why it cannot, or None."""
    try:
        for token in tokens:
            if matcher.is_error() or not matcher.consume_token(token):
                break
        return _error(matcher)
    except BaseException as error:  # a panic of a Rust library is no Exception, and is about this answer alone
        return GrammarFailure(repr(error), too_complex=False)


def _error(matcher: LLMatcher) -> GrammarFailure | None:
    if not matcher.is_error():
        return None
    message = matcher.get_error().partition("\n")[0]
    return GrammarFailure(message, too_complex=NOT_ALLOWED not in message)
