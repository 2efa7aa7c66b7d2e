"""Whether an adapter can be served correctly by the base at hand."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import AdapterRejected
from adapters.format.base_mismatch import other_base
from adapters.format.files import (
    CONFIG,
    HASHED,
    ORIGIN,
    WEIGHTS,
    chunks,
    content_id,
    open_file,
    present,
    read_json,
    size_of,
)
from adapters.format.keys import LoraKey, lora_key
from adapters.format.peft_config import check_fields, read_config
from adapters.format.safetensors_header import StoredTensor, read_header
from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget

_DTYPES = ("F32", "F16", "BF16")


def verify(
    folder: Path, layout: BaseLayout, max_rank: int, *, any_base: bool = False, any_fields: bool = False
) -> AdapterSpec:
    """Check a PEFT folder against the base and describe it. Reads all of it, changes nothing.

    ``any_base``: take it although it says that it was trained on another base. ``any_fields``: take it although its
    config has fields that are not known, which the spec names. Raises :class:`AdapterRejected` with file, tensor and
    reason for anything that could not be served as PEFT would.
    """
    spec = read_spec(folder, layout, max_rank, content_id(folder))
    check_fields(spec.unknown_fields, any_fields)
    if not any_base and spec.base_fingerprint not in (None, layout.fingerprint, *layout.equivalents):
        raise other_base(read_json(folder, ORIGIN), layout)
    _check_unchanged(folder)
    _check_values(folder, spec)
    return spec


def read_spec(folder: Path, layout: BaseLayout, max_rank: int, adapter_id: AdapterId) -> AdapterSpec:
    """The adapter without its weights.

    Everything :func:`verify` checks, but for its base, the fields that are not known, the identity of the content and
    the values of the weights.
    """
    origin = _origin(folder)
    config = read_config(folder)
    declared = config.targets(layout)
    with open_file(folder, WEIGHTS) as file:
        header = read_header(file)
        size = size_of(file)
    return AdapterSpec(adapter_id, _targets(header, declared, layout, max_rank), size, origin, config.unknown)


def _origin(folder: Path) -> str | None:
    return _said(folder, "base_fingerprint")


def _said(folder: Path, field: str) -> str | None:
    """A text that the adapter's trainer left with it; None where it left none."""
    if ORIGIN not in present(folder):
        return None
    value = read_json(folder, ORIGIN).get(field)
    if value is not None and not isinstance(value, str):
        raise AdapterRejected(f"{field} is not a string", file=ORIGIN)
    return value


def _check_unchanged(folder: Path) -> None:
    """Config and weights must be those that were judged, where it is said which those were."""
    for name, field in HASHED.items():
        expected = _said(folder, field)
        if expected is not None and (found := _sha256(folder, name)) != expected:
            reason = f"was changed after training: its SHA-256 is {found}, not {expected[:80]} as {ORIGIN} says"
            raise AdapterRejected(f"{reason} ({field})", file=name)


def _sha256(folder: Path, name: str) -> str:
    digest = hashlib.sha256()
    with open_file(folder, name) as file:
        for chunk in chunks(file, name):
            digest.update(chunk)
    return digest.hexdigest()


def _targets(
    header: Mapping[str, StoredTensor], declared: Mapping[str, LoraTarget], layout: BaseLayout, max_rank: int
) -> dict[str, LoraTarget]:
    """The layers the tensors are for: exactly those that the config declares."""
    halves = _halves(header, layout)
    for layer, (key_a, key_b) in halves.items():
        rank = _rank(layer, key_a, key_b, header, layout)
        if layer not in declared:
            raise AdapterRejected("target_modules does not name this layer", file=WEIGHTS, tensor=key_a)
        if not 1 <= rank <= max_rank:
            raise AdapterRejected(f"has rank {rank}; 1 to {max_rank} are served", file=WEIGHTS, tensor=key_a)
        if rank != declared[layer].rank:
            expected = f"{declared[layer].rank} in {CONFIG} (r, rank_pattern)"
            raise AdapterRejected(f"has rank {rank}, but {expected}", file=WEIGHTS, tensor=key_a)
    for layer in declared:
        if layer not in halves:
            raise AdapterRejected(f"target_modules names {layer}, but {WEIGHTS} has no weights for it", file=CONFIG)
    if not halves:
        raise AdapterRejected("target_modules names no layer of this base", file=CONFIG)
    return {layer: declared[layer] for layer in layout.linears if layer in halves}


def _halves(header: Mapping[str, StoredTensor], layout: BaseLayout) -> dict[str, tuple[str, str]]:
    """Layer -> keys of its A and its B."""
    keys: dict[str, dict[str, str]] = {}
    for key in header:
        found = _served_key(key, layout)
        sides = keys.setdefault(found.layer, {})
        if found.side in sides:
            raise AdapterRejected(f"is the same matrix as {sides[found.side]}", file=WEIGHTS, tensor=key)
        sides[found.side] = key
    for sides in keys.values():
        for side, other in (("A", "B"), ("B", "A")):
            if other not in sides:
                raise AdapterRejected(f"lora_{side} comes without lora_{other}", file=WEIGHTS, tensor=sides[side])
    return {layer: (sides["A"], sides["B"]) for layer, sides in keys.items()}


def _served_key(key: str, layout: BaseLayout) -> LoraKey:
    found = lora_key(key)
    if found.layer not in layout.linears:
        reason = layout.unserved.get(found.layer, f"the base has no linear layer {found.layer}")
        raise AdapterRejected(reason, file=WEIGHTS, tensor=key)
    return found


def _rank(layer: str, key_a: str, key_b: str, header: Mapping[str, StoredTensor], layout: BaseLayout) -> int:
    """Rank of a layer whose two tensors have shapes that fit the layer and each other, and a dtype we read."""
    inputs, outputs = layout.linears[layer]
    for key in (key_a, key_b):
        if header[key].dtype not in _DTYPES:
            raise AdapterRejected(f"has dtype {header[key].dtype}, not F32, F16 or BF16", file=WEIGHTS, tensor=key)
    shape_a, shape_b = header[key_a].shape, header[key_b].shape
    if len(shape_a) != 2 or shape_a[1] != inputs:
        raise AdapterRejected(f"has shape {list(shape_a)}, not [rank, {inputs}]", file=WEIGHTS, tensor=key_a)
    if shape_b != (outputs, shape_a[0]):
        reason = f"has shape {list(shape_b)}, not [{outputs}, {shape_a[0]}] as the layer and lora_A say"
        raise AdapterRejected(reason, file=WEIGHTS, tensor=key_b)
    return shape_a[0]


def _check_values(folder: Path, spec: AdapterSpec) -> None:
    """No NaN, no infinity, neither as stored nor scaled in the device's bfloat16; and some layer that is changed."""
    nonzero: set[LoraKey] = set()
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is not iterable)
                found = lora_key(key)
                tensor = file.get_tensor(key)
                _check_finite(key, tensor, 1.0 if found.side == "A" else spec.targets[found.layer].scaling)
                if tensor.any():
                    nonzero.add(found)
    except (OSError, SafetensorError) as error:
        raise AdapterRejected(f"cannot be read: {error}", file=WEIGHTS) from error
    if not any({LoraKey(layer, "A"), LoraKey(layer, "B")} <= nonzero for layer in spec.targets):
        raise AdapterRejected("changes nothing: every layer's lora_A or lora_B is all zero", file=WEIGHTS)


def _check_finite(key: str, tensor: Tensor, scaling: float) -> None:
    if not torch.isfinite(tensor).all():
        kind = "NaN" if torch.isnan(tensor).any() else "infinity"
        raise AdapterRejected(f"has {kind} in it", file=WEIGHTS, tensor=key)
    if not torch.isfinite((tensor.float() * scaling).bfloat16()).all():
        raise AdapterRejected(f"overflows once it is scaled by {scaling:g}", file=WEIGHTS, tensor=key)
