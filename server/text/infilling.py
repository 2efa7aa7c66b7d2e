"""Infilling: prompts of models that were trained to fill in the middle between a prefix and a suffix."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Encode = Callable[[str], list[int]]
"""Text -> its token ids, without those with which a text begins or ends."""


@dataclass(frozen=True, slots=True)
class InfillingFormat:
    """The tokens of a family of models, by their text. They follow each other as prefix, suffix, middle."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    """Tokens that end an answer, besides these three and the model's own end tokens."""
    spaced: bool = False
    """Whether the tokenizer puts a space before each text, which a suffix must not get."""


FORMATS = (
    InfillingFormat(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
    ),
    InfillingFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<fim_pad>", "<file_sep>")),
    InfillingFormat("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",), spaced=True),
)
"""Qwen-Coder and CodeGemma; StarCoder; CodeLlama."""
_ANCHOR = "☺"
"""A text that no letter joins, behind which a text gets no space."""


class Infilling:
    """Writes such prompts with a model's tokens. Any thread may use it."""

    def __init__(self, form: InfillingFormat, tokens: Mapping[str, int]) -> None:
        """``tokens``: the ids of the tokenizer's added tokens, by their text."""
        self._form = form
        self._prefix, self._suffix, self._middle = (tokens[text] for text in (form.prefix, form.suffix, form.middle))
        own = (form.prefix, form.suffix, form.middle, *form.ends)
        self.ends = frozenset(tokens[text] for text in own if text in tokens)
        """Tokens that end an answer, besides the model's own end tokens."""

    def join(self, prefix: Sequence[int], suffix: str, encode: Encode) -> list[int]:
        """Return the prompt for the text between ``prefix``, as token ids, and ``suffix``."""
        return [self._prefix, *prefix, self._suffix, *self._encode_suffix(suffix, encode), self._middle]

    def _encode_suffix(self, text: str, encode: Encode) -> list[int]:
        if not self._form.spaced:
            return encode(text)
        anchor, both = encode(_ANCHOR), encode(_ANCHOR + text)
        return both[len(anchor) :]


def find_infilling(tokens: Mapping[str, int]) -> Infilling | None:
    """Return how a tokenizer's model fills in the middle, by its added tokens; None if it has none for that."""
    for form in FORMATS:
        if {form.prefix, form.suffix, form.middle} <= tokens.keys():
            return Infilling(form, tokens)
    return None
