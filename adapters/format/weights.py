"""An adapter's low-rank matrices in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapters.errors import AdapterError, AdapterRejected
from adapters.format.content import ContentReader, read_tensors
from adapters.format.files import WEIGHTS
from adapters.format.keys import LoraKey, lora_key
from adapters.format.safetensors_header import read_header
from adapters.format.spec import AdapterSpec


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A verified adapter with its matrices on the CPU."""

    spec: AdapterSpec
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Layer name -> (A ``[rank, in_features]``, B ``[out_features, rank]``), as stored: float32, float16 or bfloat16,
    scaling not applied."""


def read_weights(folder: Path, spec: AdapterSpec) -> AdapterWeights:
    """Read the matrices of an adapter that :func:`adapters.format.verify.verify` has accepted.

    Reads each file once. The tensors own their memory: nothing is read from disk afterwards. Raises
    :class:`AdapterError` if the files cannot be read, or are not those that were verified: their digest is compared
    with ``spec.id``.
    """
    halves: dict[LoraKey, Tensor] = {}
    content = ContentReader(folder)
    try:
        with content.weights() as file:
            if file.size != spec.size_bytes:
                raise AdapterRejected(f"has {file.size} bytes instead of {spec.size_bytes}", file=WEIGHTS)
            for key, tensor in read_tensors(file, read_header(file)):
                halves[lora_key(key)] = tensor
        found = content.content_id()
        if found != spec.id:
            raise AdapterError(f"the files of adapter {spec.id} were changed: their content is now {found}")
        tensors = {layer: (halves[LoraKey(layer, "A")], halves[LoraKey(layer, "B")]) for layer in spec.targets}
    except (AdapterRejected, KeyError) as error:
        raise AdapterError(f"adapter {spec.id} cannot be read: {error}") from error
    return AdapterWeights(spec, tensors)
