"""Verify that the base at hand can serve an adapter correctly."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.errors import AdapterRejected
from adapters.format.base_mismatch import base_mismatch_error
from adapters.format.chat_template import read_chat_template
from adapters.format.content import TORCH_DTYPES, ContentReader, HashingFile, read_tensors
from adapters.format.files import CONFIG, HASHED, ORIGIN, WEIGHTS, open_file, present, read_json
from adapters.format.keys import LoraKey, lora_key
from adapters.format.peft_config import check_fields, read_config
from adapters.format.safetensors_header import StoredTensor, read_header
from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout, LoraTarget


def verify(
    folder: Path, layout: BaseLayout, max_rank: int, *, any_base: bool = False, any_fields: bool = False
) -> AdapterSpec:
    """Check a PEFT folder against the base and describe it. Changes nothing, and reads the weights once.

    ``any_base``: accept it although it says that it was trained on another base. ``any_fields``: accept it although
    its config has unknown fields, which the spec names. Raises :class:`AdapterRejected` with file, tensor and reason
    for anything that could not be served as PEFT would.
    """
    expected = _expected_sha256(folder)
    content = ContentReader(folder, hashed=expected)
    with content.weights() as file:
        spec, header = _describe(folder, file, layout, max_rank)
        check_fields(spec.unknown_fields, any_fields)
        if not any_base and spec.base_fingerprint not in (None, layout.fingerprint, *layout.equivalents):
            raise base_mismatch_error(read_json(folder, ORIGIN), layout)
        _check_library_opens(folder)
        read_chat_template(folder)
        bad_value = _find_bad_value(file, header, spec)
    adapter_id = content.content_id()
    _check_unchanged(content, expected)
    if bad_value is not None:
        raise bad_value
    return replace(spec, id=adapter_id)


def read_spec(folder: Path, layout: BaseLayout, max_rank: int, adapter_id: AdapterId) -> AdapterSpec:
    """Describe the adapter from its config and the header of its weights.

    Everything that :func:`verify` checks, except its base, unknown fields, the identity of the content and the values
    of the weights.
    """
    with open_file(folder, WEIGHTS) as file:
        spec, _ = _describe(folder, HashingFile(file, WEIGHTS), layout, max_rank)
    return replace(spec, id=adapter_id)


def _describe(
    folder: Path, file: HashingFile, layout: BaseLayout, max_rank: int
) -> tuple[AdapterSpec, Mapping[str, StoredTensor]]:
    """Return the spec, without its id, and the header of ``file``, which is left standing behind the header."""
    origin = _stated(folder, "base_fingerprint")
    config = read_config(folder)
    declared = config.targets(layout)
    header = read_header(file)
    targets = _targets(header, declared, layout, max_rank)
    return AdapterSpec(AdapterId(""), targets, file.size, origin, config.unknown), header


def _stated(folder: Path, field: str) -> str | None:
    """Return a string that the trainer left in :data:`ORIGIN`; None if it left none."""
    if ORIGIN not in present(folder):
        return None
    value = read_json(folder, ORIGIN).get(field)
    if value is not None and not isinstance(value, str):
        raise AdapterRejected(f"{field} is not a string", file=ORIGIN)
    return value


def _expected_sha256(folder: Path) -> dict[str, str]:
    """Return file -> the SHA-256 that the trainer recorded for it, for those for which it recorded one."""
    stated = {name: _stated(folder, field) for name, field in HASHED.items()}
    return {name: sha256 for name, sha256 in stated.items() if sha256 is not None}


def _check_unchanged(content: ContentReader, expected: Mapping[str, str]) -> None:
    """Raise AdapterRejected if config or weights are not those that the trainer evaluated."""
    for name, sha256 in expected.items():
        found = content.sha256(name)
        if found != sha256:
            reason = f"was changed after training: its SHA-256 is {found}, not {sha256[:80]} as {ORIGIN} says"
            raise AdapterRejected(f"{reason} ({HASHED[name]})", file=name)


def _targets(
    header: Mapping[str, StoredTensor], declared: Mapping[str, LoraTarget], layout: BaseLayout, max_rank: int
) -> dict[str, LoraTarget]:
    """Return the layers that have tensors, which must be exactly those that the config declares."""
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
    """Return layer -> keys of its A and its B."""
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
    """Return a layer's rank; check that its tensors' shapes fit the layer and each other, and their dtypes."""
    inputs, outputs = layout.linears[layer]
    for key in (key_a, key_b):
        if header[key].dtype not in TORCH_DTYPES:
            raise AdapterRejected(f"has dtype {header[key].dtype}, not F32, F16 or BF16", file=WEIGHTS, tensor=key)
    shape_a, shape_b = header[key_a].shape, header[key_b].shape
    if len(shape_a) != 2 or shape_a[1] != inputs:
        raise AdapterRejected(f"has shape {list(shape_a)}, not [rank, {inputs}]", file=WEIGHTS, tensor=key_a)
    if shape_b != (outputs, shape_a[0]):
        reason = f"has shape {list(shape_b)}, not [{outputs}, {shape_a[0]}] as the layer and lora_A say"
        raise AdapterRejected(reason, file=WEIGHTS, tensor=key_b)
    return shape_a[0]


def _check_library_opens(folder: Path) -> None:
    """Raise AdapterRejected if safetensors, with which PEFT reads, does not accept the header. Maps only the header."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise AdapterRejected(f"cannot be read: {error}", file=WEIGHTS) from error


def _find_bad_value(file: HashingFile, header: Mapping[str, StoredTensor], spec: AdapterSpec) -> AdapterRejected | None:
    """Read all tensors; return why their values cannot be served, or None if they can.

    Values must be finite, both as stored and scaled in the device's bfloat16, and some layer must change its output.
    """
    nonzero: set[LoraKey] = set()
    bad: AdapterRejected | None = None
    for key, tensor in read_tensors(file, header):
        found = lora_key(key)
        bad = bad or _not_finite(key, tensor, 1.0 if found.side == "A" else spec.targets[found.layer].scaling)
        if tensor.any():
            nonzero.add(found)
    if bad is None and not any({LoraKey(layer, "A"), LoraKey(layer, "B")} <= nonzero for layer in spec.targets):
        return AdapterRejected("changes nothing: every layer's lora_A or lora_B is all zero", file=WEIGHTS)
    return bad


def _not_finite(key: str, tensor: Tensor, scaling: float) -> AdapterRejected | None:
    if not torch.isfinite(tensor).all():
        kind = "NaN" if torch.isnan(tensor).any() else "infinity"
        return AdapterRejected(f"has {kind} in it", file=WEIGHTS, tensor=key)
    if not torch.isfinite((tensor.float() * scaling).bfloat16()).all():
        return AdapterRejected(f"overflows once it is scaled by {scaling:g}", file=WEIGHTS, tensor=key)
    return None
