"""Grammars: which tokens may come next in an answer that has a prescribed form. No torch here.

A :class:`Grammar` is compiled once, by :mod:`server.structured`, and shared; each sequence follows it with a
:class:`Matcher` of its own. The work is llguidance's.
"""

from collections.abc import Sequence as Seq

from llguidance import LLMatcher


class Grammar:
    """A compiled grammar, which any number of sequences may follow at the same time. For any thread."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        """``matcher`` is at the start of the grammar, and is only copied from now on."""
        self._matcher = matcher
        self.vocabulary = vocabulary
        """Token ids in a mask: those of the model, or more."""
        self.exhausted = False
        """Whether an answer has met one of llguidance's limits. Copies share what they have learnt of the grammar, so
        all others may soon meet it, too: compile the grammar again for new ones."""

    def start(self) -> "Matcher":
        """A matcher for an answer that begins."""
        return Matcher(self, self._matcher.deep_copy())


class Matcher:
    """Follows one answer through its grammar. For one thread at a time."""

    def __init__(self, grammar: Grammar, matcher: LLMatcher) -> None:
        self.grammar = grammar
        self._matcher = matcher

    def write_masks(self, drafts: Seq[int], address: int, size: int) -> None:
        """Write a mask of the tokens that may come next, and one for the place after each of ``drafts``.

        A mask has ``size`` bytes, a bit for each token id, and they follow each other from ``address``. After a draft
        that the grammar does not allow, or that ends the answer, nothing is written. Once the grammar is complete, only
        end tokens may come. Releases the GIL.
        """
        taken = 0
        try:
            for place in range(len(drafts) + 1):
                self._matcher.unsafe_compute_mask_ptr(address + place * size, size)
                if place == len(drafts) or self._matcher.is_stopped():
                    break
                if not self._matcher.try_consume_tokens([drafts[place]]):
                    break
                taken += 1
        finally:  # a step that fails runs again
            if taken:
                self._matcher.rollback(taken)

    def accept(self, token: int, *, last: bool) -> str | None:
        """Take in the token that was sampled, unless it ends the answer. Returns why the grammar failed, or None."""
        try:
            if not last and not self._matcher.is_error():
                self._matcher.consume_token(token)
            if not self._matcher.is_error():
                return None
            self.grammar.exhausted = True
            return self._matcher.get_error().partition("\n")[0]
        except BaseException as error:  # a panic of a Rust library is no Exception, and is about this answer alone
            self.grammar.exhausted = True
            return repr(error)
