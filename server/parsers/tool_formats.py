"""ToolFormat: how a family of models writes tool calls. One entry for each convention; the parser reads them all."""

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The text of tool calls."""

    name: str
    start: str
    """The text before a call, or before all of them."""
    end: str
    """The text after; it may be missing where the answer ends."""
    payload: Literal["object", "array", "named", "xml"]
    """One object with a name and arguments; an array of them; the bare name, then the arguments; or XML's tags, as
    :mod:`server.parsers.xml_calls` has them."""
    arguments: str = "arguments"
    """The field with the arguments."""
    bare: bool = False
    """Whether an answer that begins with such an object is a call, too, without ``start``."""
    separator: str = ""
    """Text after a call, behind which another one follows without ``start``."""
    before_arguments: str = ""
    """Payload ``named``: text between name and arguments."""
    one_call: bool = False
    """Whether such models make one call in an answer at most."""
    short_ids: bool = False
    """Whether ids of calls must be 9 letters and digits, as Mistral's templates demand."""
    signs: tuple[str, ...] = ()
    """A template that has one of these in it, and none of ``other_signs``, writes calls this way."""
    other_signs: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens, which an answer must keep for the parser to see."""
        return tuple(text for text in (self.start.strip(), self.end.strip(), self.before_arguments) if text)

    def new_id(self) -> str:
        """Return an id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = ToolFormat(
    "hermes",
    "<tool_call>",
    "</tool_call>",
    "object",
    signs=("<tool_call>",),
    other_signs=("<function=", "<arg_key>"),  # Qwen3-Coder and GLM write XML between the same tags
)
QWEN_XML = ToolFormat(
    "qwen-xml",
    "<tool_call>",
    "</tool_call>",
    "xml",
    signs=("<function=",),
)
MISTRAL_NAMED = ToolFormat(
    "mistral-named",
    "[TOOL_CALLS]",
    "",
    "named",
    before_arguments="[ARGS]",
    short_ids=True,
    signs=("[ARGS]",),
)
MISTRAL = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    "",
    "array",
    short_ids=True,
    signs=("[TOOL_CALLS]",),
    other_signs=("[ARGS]",),
)
PHI = ToolFormat("phi", "<|tool_call|>", "<|/tool_call|>", "array", signs=("<|tool_call|>",))
LLAMA = ToolFormat(
    "llama",
    "<|python_tag|>",
    "",
    "object",
    arguments="parameters",
    bare=True,
    separator=";",
    one_call=True,
    signs=("<|python_tag|>", '"parameters": dictionary'),
)

FORMATS: Mapping[str, ToolFormat] = {form.name: form for form in (HERMES, QWEN_XML, MISTRAL_NAMED, MISTRAL, PHI, LLAMA)}


def format_of(template: str) -> ToolFormat | None:
    """Return the convention of a chat template, from its text; None if it is none of :data:`FORMATS`."""
    for form in FORMATS.values():
        if any(sign in template for sign in form.signs) and not any(sign in template for sign in form.other_signs):
            return form
    return None
