"""The keys under which PEFT saves an adapter's matrices."""

import re
from typing import Literal, NamedTuple, cast

from adapters.errors import AdapterRejected
from adapters.format.files import WEIGHTS

# PEFT saves without the adapter's name; other tools leave ".default" in, and PEFT loads that too.
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

_FOREIGN = {
    "lora_magnitude_vector": "DoRA is not served",
    "lora_embedding_": "LoRA on embeddings is not served",
    "lora_A.bias": "trained biases are not served; train with lora_bias: false",
    "lora_B.bias": "trained biases are not served; train with lora_bias: false",
    "trainable_tokens": "trained tokens are not served",
    "lora_": "is not a key of plain LoRA, base_model.model.<layer>.lora_A.weight or lora_B",
    ".bias": "trained biases are not served; train with bias: none",
    "": "is a full weight (modules_to_save, or a resized embedding), which is not served",
}
"""Part of a key -> why such a tensor is refused. The first that occurs in the key counts."""


class LoraKey(NamedTuple):
    """Which matrix of which layer a tensor is."""

    layer: str
    side: Literal["A", "B"]


def lora_key(key: str) -> LoraKey:
    """Take apart ``base_model.model.<layer>.lora_A.weight``. Raises :class:`AdapterRejected` for any other key."""
    match = _KEY.fullmatch(key)
    if match is None:
        reason = next(reason for part, reason in _FOREIGN.items() if part in key)
        raise AdapterRejected(reason, file=WEIGHTS, tensor=key)
    return LoraKey(match["layer"], cast(Literal["A", "B"], match["side"]))
