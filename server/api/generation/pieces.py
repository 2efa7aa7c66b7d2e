"""Piece: what one engine step, or several, add to a choice."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import chain
from typing import NamedTuple

from server.engine.sequence import FinishReason, TokenLogprobs


class Finish(NamedTuple):
    """Why a choice ended."""

    reason: FinishReason
    stop: str | int | None = None
    """The request's stop string or stop token that ended it; None for the model's own end tokens and for length."""


class Piece(NamedTuple):
    """Text that is certain now and was not before, and its tokens."""

    text: str = ""
    tokens: Seq[int] = ()
    """Token ids. Those of text that is held back, as it may begin a stop string, come with that text."""
    logprobs: Seq[TokenLogprobs] = ()
    """One for each of ``tokens``; empty if the request did not ask for them."""
    hidden: int = 0
    """How many of the last tokens have no text in the answer: the stop token, or those of a stop string."""
    finish: Finish | None = None
    """Only in the last piece of a choice."""


def join(pieces: Iterable[Piece]) -> Piece:
    """Return all pieces of a choice as one."""
    pieces = list(pieces)
    return Piece(
        "".join([piece.text for piece in pieces]),
        list(chain.from_iterable(piece.tokens for piece in pieces)),
        list(chain.from_iterable(piece.logprobs for piece in pieces)),
        pieces[-1].hidden if pieces else 0,
        pieces[-1].finish if pieces else None,
    )
