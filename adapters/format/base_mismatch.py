"""What is told of an adapter that was trained on another base."""

from collections.abc import Mapping
from typing import Any

from adapters.errors import AdapterRejected
from adapters.format.files import ORIGIN
from adapters.format.spec import BaseLayout

_PARTS = {
    "weights": "the weights",
    "quantization": "how the weights are quantised",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
}


def other_base(origin: Mapping[str, Any], layout: BaseLayout) -> AdapterRejected:
    """The refusal: in what the two differ, by what its trainer left (``manylora.json``), and how to take it anyway."""
    trained_on = str(origin["base_fingerprint"])[:80]
    return AdapterRejected(
        f"the adapter was trained on the base {trained_on}{_name(origin)}, this base is {layout.fingerprint}: "
        f"{_differences(origin, layout)}. Serve the base it was trained on, or take it all the same with "
        '`"allow_base_mismatch": true` in the request or `--allow-base-mismatch` on the command line',
        file=ORIGIN,
        code="base_mismatch",
    )


def _name(origin: Mapping[str, Any]) -> str:
    base = origin.get("base")
    name = base.get("name") if isinstance(base, dict) else None
    return f" ({name[:80]})" if isinstance(name, str) else ""


def _differences(origin: Mapping[str, Any], layout: BaseLayout) -> str:
    """In words, as the end of a sentence."""
    theirs = origin.get("base_parts")
    if theirs is None:
        return f"{ORIGIN} does not say in which part they differ"
    if not isinstance(theirs, dict) or not all(isinstance(value, str) for value in theirs.values()):
        raise AdapterRejected("base_parts is not an object of strings", file=ORIGIN)
    different = [part for part in _PARTS if part in theirs and theirs[part] != layout.parts.get(part)]
    if not different:
        return f"by what {ORIGIN} says of its parts they do not differ, so it is something that it does not tell"
    if "quantization" in different:
        # Weights that are stored otherwise differ in every byte, whether or not the model is the same.
        different = [part for part in different if part != "weights"]
    words = _PARTS | {"quantization": _quantised(theirs, layout)}
    *others, last = [words[part] for part in different]
    told = f"{', '.join(others)} and {last}" if others else last
    return f"they differ in {told}"


def _quantised(theirs: Mapping[str, str], layout: BaseLayout) -> str:
    there, here = theirs.get("quantization", "")[:80], layout.parts.get("quantization")
    return f"how the weights are quantised ({there} there, {here} here)"
