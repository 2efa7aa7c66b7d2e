"""An adapter's low-rank matrices in host memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import AdapterError
from adapters.format.files import WEIGHTS
from adapters.format.keys import LoraKey, lora_key
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

    The tensors own their memory: nothing is read from disk afterwards. Raises :class:`AdapterError`.
    """
    halves: dict[LoraKey, Tensor] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not iterable)
                halves[lora_key(key)] = file.get_tensor(key).clone()
        tensors = {layer: (halves[LoraKey(layer, "A")], halves[LoraKey(layer, "B")]) for layer in spec.targets}
    except (OSError, SafetensorError, KeyError) as error:
        raise AdapterError(f"{WEIGHTS} of adapter {spec.id} cannot be read: {error}") from error
    return AdapterWeights(spec, tensors)
