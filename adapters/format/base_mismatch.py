"""Explain in which parts the base that an adapter was trained on differs from this base."""

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


def base_mismatch_error(origin: Mapping[str, Any], layout: BaseLayout) -> AdapterRejected:
    """Return the error for an adapter of another base: which parts differ, and how to accept it anyway.

    ``origin``: the adapter's ``manylora.json``, which its trainer wrote.
    """
    trained_on = str(origin["base_fingerprint"])[:80]
    return AdapterRejected(
        f"the adapter was trained on the base {trained_on}{_name(origin)}, this base is {layout.fingerprint}: "
        f"{_differences(origin, layout)}. Serve the base it was trained on, or accept the adapter anyway with "
        '`"allow_base_mismatch": true` in the request or `--allow-base-mismatch` on the command line',
        file=ORIGIN,
        code="base_mismatch",
    )


def _name(origin: Mapping[str, Any]) -> str:
    base = origin.get("base")
    name = base.get("name") if isinstance(base, dict) else None
    return f" ({name[:80]})" if isinstance(name, str) else ""


def _differences(origin: Mapping[str, Any], layout: BaseLayout) -> str:
    """Return the differences as the end of a sentence."""
    theirs = origin.get("base_parts")
    if theirs is None:
        return f"{ORIGIN} does not say in which part they differ"
    if not isinstance(theirs, dict) or not all(isinstance(value, str) for value in theirs.values()):
        raise AdapterRejected("base_parts is not an object of strings", file=ORIGIN)
    different = [part for part in _PARTS if part in theirs and theirs[part] != layout.parts.get(part)]
    if not different:
        return f"all parts that {ORIGIN} records are the same, so they differ in something else"
    if "quantization" in different:
        # Weights of another format differ in every byte, even for the same model, so naming them adds nothing.
        different = [part for part in different if part != "weights"]
    words = _PARTS | {"quantization": _quantization(theirs, layout)}
    *others, last = [words[part] for part in different]
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"they differ in {listed}"


def _quantization(theirs: Mapping[str, str], layout: BaseLayout) -> str:
    there, here = theirs.get("quantization", "")[:80], layout.parts.get("quantization")
    return f"how the weights are quantised ({there} there, {here} here)"
