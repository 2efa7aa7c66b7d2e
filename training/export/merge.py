"""Merges several adapters into one: weighted, layer by layer, by their updates ``scaling * B @ A``.

The methods are PEFT's, but applied to the updates. PEFT's own ``add_weighted_adapter`` applies ``linear``, ``ties`` and
``dare_ties`` to the A's and the B's separately, so that their product has cross terms that no adapter had; here a merge
with weights 1 and 0 gives the first adapter. TIES: Yadav et al. 2023. DARE: Yu et al. 2023.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig
from peft.utils.merge_utils import dare_ties, ties
from safetensors.torch import save_file
from torch import Tensor

from adapters.format.files import ORIGIN, WEIGHTS, read_json
from adapters.format.spec import AdapterSpec, BaseLayout
from adapters.format.verify import verify
from adapters.format.weights import AdapterWeights, read_weights
from bases.errors import ConfigError
from bases.file_modes import apply_umask
from training.progress_bar import Say, progress_bar
from training.publish.card import CHAT_TEMPLATE_FILE
from training.publish.manifest import file_hashes, write_manifest

Method = Literal["linear", "cat", "svd", "ties", "dare_ties"]
"""linear, cat: the exact weighted sum, whose rank is the sum of the ranks. svd: its best approximation at ``rank``.
ties: drops small entries, elects a sign for each entry, adds the entries of that sign. dare_ties: drops random entries
and scales up the rest instead. Both then approximate the result at ``rank``, as svd does."""

Origin = Mapping[str, Any]
"""The contents of an adapter's ``manylora.json``; empty if it has none."""

MAX_RANK = 65536
_EXACT = ("linear", "cat")
_BASE_FIELDS = (
    "format",
    "base_fingerprint",
    "base",
    "base_parts",
    "quantization",
    "tokenizer_sha256",
    "chat_template_sha256",
)
"""Fields of ``manylora.json`` that describe the base."""
_BASE_IDENTITY = ("base_parts", "quantization", "tokenizer_sha256")
"""The fields that do not change when a processor's rounding gives the same base another fingerprint."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A finished merge."""

    spec: AdapterSpec
    lost: float
    """Share of the merged update (in the Frobenius norm) that its rank cannot represent; 0 for linear and cat."""


def merge(
    adapters: Sequence[tuple[Path, float]],
    layout: BaseLayout,
    out: Path,
    *,
    method: Method = "linear",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    allow_unknown_fields: bool = False,
    say: Say = lambda _: None,
) -> Merge:
    """Merge ``adapters``, as (PEFT folder, weight), by ``method``, and write the PEFT folder ``out``.

    ``rank`` applies to svd, ties and dare_ties; None is the largest rank of the adapters. ``density`` is the share of
    entries that ties and dare_ties keep. A layer that only some adapters have is merged from those. ``say`` gets
    progress. Raises ConfigError or AdapterRejected; then ``out`` is not written.
    """
    check_merge(adapters, out, method, rank, density, any_base=allow_base_mismatch)
    folders = [folder for folder, _ in adapters]
    template, origins = _template(folders), [_on_this_base(origin, layout) for origin in _origins(folders)]
    if not allow_base_mismatch:
        _check_one_base(folders, origins)
    allowed = {"any_base": allow_base_mismatch, "any_fields": allow_unknown_fields}
    specs = [(folder, verify(folder, layout, MAX_RANK, **allowed), weight) for folder, weight in adapters]
    read = [(read_weights(folder, spec), weight) for folder, spec, weight in specs]
    target_rank = rank or max(weights.spec.rank for weights, _ in read)
    layers = [layer for layer in layout.linears if any(layer in weights.tensors for weights, _ in read)]
    merged, lost = {}, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with progress_bar(f"merging {len(read)} adapters, layer by layer", len(layers), say) as advance:
            for layer in layers:
                merged[layer], missing = _merge_layer(_parts(read, layer), method, target_rank, density)
                lost.append(missing)
                advance(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        _write(folder, merged)
        if template is not None:
            (folder / CHAT_TEMPLATE_FILE).write_bytes(template)
        made_of = [{"content": weights.spec.id, "weight": weight} for weights, weight in read]
        origin = {"merge": {"method": method, "adapters": made_of}, **_agreed(origins)}
        write_manifest(origin | file_hashes(folder), folder)
        spec = verify(folder, layout, MAX_RANK, any_base=allow_base_mismatch)
        folder.rename(out)
    total = math.hypot(*(norm for _, norm in lost))
    return Merge(spec, math.hypot(*(missing for missing, _ in lost)) / total if total else 0.0)


def check_merge(
    adapters: Sequence[tuple[Path, float]],
    out: Path,
    method: str,
    rank: int | None,
    density: float = 0.5,
    *,
    any_base: bool = False,
) -> None:
    """Check everything that :func:`merge` can check without a base. Raises ConfigError or AdapterRejected."""
    _check_options(adapters, out, method, rank, density)
    folders = [folder for folder, _ in adapters]
    _template(folders)
    if not any_base:
        _check_one_base(folders, _origins(folders), may_be_one=_same_base_parts)


def _check_options(
    adapters: Sequence[tuple[Path, float]], out: Path, method: str, rank: int | None, density: float
) -> None:
    if method not in get_args(Method):
        raise ConfigError(f"--method: must be one of {', '.join(get_args(Method))} (got {method!r})")
    if len(adapters) < 2:
        raise ConfigError("--merge: needs two adapters or more, NAME=WEIGHT,NAME=WEIGHT")
    for folder, weight in adapters:
        if not math.isfinite(weight) or weight == 0:
            raise ConfigError(f"--merge: the weight of {folder.name} must be a number other than 0 (got {weight})")
    if rank is not None and method in _EXACT:
        raise ConfigError(f"--rank: {method} keeps the sum of the adapters' ranks; use svd for a lower rank")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"--rank: must be 1 to {MAX_RANK} (got {rank})")
    if not 0 < density < 1:
        raise ConfigError(f"--density: must be above 0 and below 1 (got {density})")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out: {out} exists and is not an empty folder")


def _template(folders: Sequence[Path]) -> bytes | None:
    """Return the chat template that all adapters share, or None if none has one. Raises ConfigError."""
    files = [folder / CHAT_TEMPLATE_FILE for folder in folders]
    templates = {file.read_bytes() if file.is_file() else None for file in files}
    if len(templates) > 1:
        raise ConfigError(
            "--merge: the adapters were trained with different chat templates; a merged model can have only one"
        )
    return templates.pop()


def _origins(folders: Sequence[Path]) -> list[Origin]:
    """Return the contents of each ``manylora.json``."""
    return [read_json(folder, ORIGIN) if (folder / ORIGIN).is_file() else {} for folder in folders]


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter's contribution to one layer: ``weight * b @ a``."""

    a: Tensor
    """float32 [rank, in_features]"""
    b: Tensor
    """float32 [out_features, rank], scaling applied"""
    weight: float


def _parts(read: Sequence[tuple[AdapterWeights, float]], layer: str) -> list[_Part]:
    return [
        _Part(a.float(), b.float() * weights.spec.targets[layer].scaling, weight)
        for weights, weight in read
        if layer in weights.tensors
        for a, b in [weights.tensors[layer]]
    ]


def _merge_layer(
    parts: Sequence[_Part], method: Method, rank: int, density: float
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return (A, B) at scaling 1, and the norms of (the part of the update that they lack, the whole update)."""
    if method in ("linear", "cat", "svd"):
        a = torch.cat([part.a for part in parts])
        b = torch.cat([part.weight * part.b for part in parts], dim=1)
        return ((a, b), (0.0, 0.0)) if method in _EXACT else _reduced(a, b, rank)
    combine = ties if method == "ties" else dare_ties
    updates = [part.b @ part.a for part in parts]
    update = combine(updates, torch.tensor([part.weight for part in parts]), density)
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return _factored(u, s, vh, rank)


def _reduced(a: Tensor, b: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Return the best low-rank approximation of ``b @ a`` (Eckart and Young 1936), without computing the product."""
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _factored(q_b @ u, s, vh @ q_a.T, rank)


def _factored(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """Split the singular values evenly between A and B, so that neither overflows a small dtype."""
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank], u[:, :rank] * root), (s[rank:].norm().item(), s.norm().item())


def _write(folder: Path, merged: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write a PEFT folder with one rank; pad smaller layers with zeros, as vLLM does not support ``rank_pattern``."""
    rank = max(len(a) for a, _ in merged.values())
    tensors = {}
    for layer, (a, b) in merged.items():
        more = rank - len(a)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    # alpha = r: the scaling is in B.
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(merged), inference_mode=True
    )
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    apply_umask(folder)


def _check_one_base(
    folders: Sequence[Path], origins: Sequence[Origin], may_be_one: Callable[[Origin, Origin], bool] = lambda *_: False
) -> None:
    """Raise ConfigError if the adapters name different bases. One that names no base passes.

    ``may_be_one`` returns whether two adapters with different fingerprints may still have the same base.
    """
    named = [pair for pair in zip(folders, origins, strict=True) if pair[1].get("base_fingerprint") is not None]
    for folder, origin in named[1:]:
        first, expected = named[0]
        base, other = expected["base_fingerprint"], origin["base_fingerprint"]
        if base != other and not may_be_one(expected, origin):
            raise ConfigError(
                f"--merge: {first} was trained on the base {_short(base)} and {folder} on {_short(other)}: adapters of "
                "different bases cannot be merged"
            )


def _same_base_parts(one: Origin, other: Origin) -> bool:
    """Return whether the fields about the base that both have are equal; only the base knows its other fingerprints."""
    shared = [field for field in _BASE_IDENTITY if field in one and field in other]
    return bool(shared) and all(one[field] == other[field] for field in shared)


def _on_this_base(origin: Origin, layout: BaseLayout) -> Origin:
    """Return the origin with this base's own fingerprint if it has an equivalent one."""
    if origin.get("base_fingerprint") not in layout.equivalents:
        return origin
    return {**origin, "base_fingerprint": layout.fingerprint}


def _short(fingerprint: object) -> str:
    return f"fp_{str(fingerprint)[:12]}"


def _agreed(origins: Sequence[Origin]) -> dict[str, Any]:
    """Return the fields about the base that all adapters agree on."""
    first, *others = origins
    agreed = (field for field in _BASE_FIELDS if all(origin.get(field) == first.get(field) for origin in others))
    return {field: first[field] for field in agreed if field in first}
