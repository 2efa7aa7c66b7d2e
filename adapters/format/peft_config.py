"""Read PEFT's ``adapter_config.json``, and reject what is not served.

Which layers get which rank and scaling follows PEFT 0.21, ``peft/tuners/tuners_utils.py`` and
``peft/tuners/lora/model.py``.
"""

import math
import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import regex  # type: ignore[import-untyped, unused-ignore]
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from adapters.errors import AdapterRejected, printable
from adapters.format.files import CONFIG, read_json
from adapters.format.spec import BaseLayout, LoraTarget

_T = TypeVar("_T")

ALL_LINEAR = "all-linear"
MAX_ALPHA = 65536
MAX_PATTERN_LENGTH = 1000
MAX_REPEATS = 1000
MATCH_SECONDS = 2.0
_REPEAT = re.compile(r"\{(\d*),?(\d*)")
_INDEX = r"\.(?P<index>\d+)\..*"

_UNSUPPORTED_FIELDS = {
    "use_dora": "DoRA is not served",
    "modules_to_save": "fully trained modules are not served",
    "lora_bias": "trained biases are not served",
    "trainable_token_indices": "trained tokens are not served",
    "target_parameters": "LoRA on bare parameters is not served",
    "layer_replication": "layer replication is not served",
    "megatron_config": "Megatron layers are not served",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) is not served",
    "velora_config": "VeLoRA is not served",
    "monteclora_config": "Monteclora is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA is not served",
    # of PEFT 0.2 and ms-swift
    "enable_lora": "merged linear layers are not served",
    "use_merged_linear": "merged linear layers are not served",
    "use_qa_lora": "QA-LoRA is not served",
    "model_key_mapping": "weights under names of their own are not served",
}
"""Fields that change the output -> why the adapter is rejected if they are set."""

_NO_EFFECT_FIELDS = frozenset({
    # origin
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    # training and loading
    "lora_dropout", "inference_mode", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
    # settings of methods that are rejected above
    "megatron_core", "qalora_group_size",
    # for layers that store their weight transposed (Conv1D), which no base here has
    "fan_in_fan_out",
    # PEFT 0.1: whether inference merges the weights
    "merge_weights",
    # ms-swift: its name of the method, dtype in training, learning rates of LoRA+
    "swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    # Axolotl: the base's quantization in training, for its own merge
    "nvfp4_merge_aware",
})  # fmt: skip
"""Fields that never change the output."""

_BIASES = (None, "none", "all", "lora_only")
"""Accepted values of ``bias``. With the last two, trained biases are among the weights, and are rejected there."""

_BASE_PRESERVING_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
"""Values of ``init_lora_weights`` that leave the base's weights unchanged. All others in PEFT change them before
training, so that A and B are of no use with the published base."""
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Values of ``init_lora_weights``, or their prefixes, whose change of the base PEFT can convert back."""
_SEE_DOCS = 'see "Adapters that changed their base" in docs/registry.md'
_HOW_TO_CONVERT = (
    'convert the adapter with PEFT: `model.save_pretrained("init")` before training, and afterwards '
    '`model.save_pretrained("out", path_initial_model_for_weight_conversion="init")`; if there is no copy from before '
    f"training, {_SEE_DOCS}"
)
_NOT_CONVERTIBLE = (
    f"it cannot be converted; train again with init_lora_weights: true, or serve the changed base: {_SEE_DOCS}"
)

MAX_UNKNOWN_FIELDS = 20
"""Maximum number of unknown fields; with more, the file is no PEFT config."""


class LoraConfig(BaseModel):
    """The fields of PEFT's ``LoraConfig`` that decide the output of plain LoRA."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    r: PositiveInt
    lora_alpha: float = Field(gt=0, le=MAX_ALPHA)
    use_rslora: bool = False
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, float] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules to be a list")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for pattern, alpha in (self.alpha_pattern or {}).items():
            if not 0 < alpha <= MAX_ALPHA:
                raise ValueError(
                    f"alpha_pattern: {reprlib.repr(pattern)}: must be above 0 and at most {MAX_ALPHA} (got {alpha})"
                )
        return self

    @property
    def unknown(self) -> tuple[str, ...]:
        """Fields that are set and may change the output; their names are cut to 80 characters."""
        extra = self.model_extra or {}
        return tuple(
            sorted(
                printable(name[:80]) for name, value in extra.items() if name not in _KNOWN_FIELDS and _is_set(value)
            )
        )

    def targets(self, layout: BaseLayout) -> Mapping[str, LoraTarget]:
        """Return the layers of the base that the config declares, with rank and scaling.

        Raises :class:`AdapterRejected` if it declares a layer on which LoRA is not served.
        """
        patterns = _LayerPatterns(MATCH_SECONDS)
        if not self._all_linear():
            for layer, reason in layout.unserved.items():
                if self._is_declared(layer, patterns):
                    raise AdapterRejected(f"target_modules names {layer}: {reason}", file=CONFIG)
        return {layer: self._target(layer, patterns) for layer in layout.linears if self._is_declared(layer, patterns)}

    def _all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _is_declared(self, layer: str, patterns: "_LayerPatterns") -> bool:
        if self.exclude_modules and patterns.matches_modules(self.exclude_modules, layer):
            return False
        if self._all_linear():
            return True
        if not patterns.matches_modules(self.target_modules, layer):
            return False
        # layers_to_transform does not apply to a layer named in full, nor to a pattern.
        if isinstance(self.target_modules, str) or layer in self.target_modules:
            return True
        indices = self.layers_to_transform
        if indices is None or indices == []:
            return True
        return patterns.layer_index(self.layers_pattern, layer) in ([indices] if isinstance(indices, int) else indices)

    def _target(self, layer: str, patterns: "_LayerPatterns") -> LoraTarget:
        rank = patterns.value_for(self.rank_pattern or {}, layer, self.r)
        alpha = patterns.value_for(self.alpha_pattern or {}, layer, self.lora_alpha)
        return LoraTarget(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


class _LayerPatterns:
    """Matches layer names against untrusted patterns.

    A pattern may backtrack without end, so all matches of one config share one time limit.
    """

    def __init__(self, seconds: float) -> None:
        # CPU time, so that a good pattern is not rejected on a busy machine.
        self._deadline = time.thread_time() + seconds
        self._compiled: dict[tuple[str, str, str], Any] = {}

    def matches_modules(self, modules: str | list[str], layer: str) -> bool:
        """Return whether ``modules`` match: a string as a pattern for the whole name, a list as names or suffixes."""
        if isinstance(modules, str):
            return self._match(modules, layer) is not None
        return any(layer == module or layer.endswith(f".{module}") for module in modules)

    def layer_index(self, containers: str | list[str] | None, layer: str) -> int | None:
        """Return the layer's index: the first number, or the first after one of ``containers`` (such as ``layers``)."""
        if not containers:
            match = self._match(r".*?\.[^.]*", layer, after=_INDEX)
            return int(match["index"]) if match else None
        for container in [containers] if isinstance(containers, str) else containers:
            match = self._match(container, layer, before=r"(?:(?:^|.*?\.)", after=r"\.(?P<index>\d+)\.).*")
            if match:
                # In a pattern such as "layers|h", the alternative that matched may have no index.
                return int(match["index"]) if match["index"] else None
        return None

    def value_for(self, by_pattern: Mapping[str, _T], layer: str, default: _T) -> _T:
        """Return the value of the first pattern that matches the name or a suffix of it after a dot."""
        for pattern, value in by_pattern.items():
            if self._match(pattern, layer, before=r"(.*\.)?(", after=")"):
                return value
        return by_pattern.get(layer, default)

    def _match(self, pattern: str, text: str, before: str = "", after: str = "") -> Any:
        try:
            compiled = self._compiled.get((before, pattern, after))
            if compiled is None:
                compiled = self._compiled[before, pattern, after] = _compile(pattern, before, after)
            left = self._deadline - time.thread_time()
            if left <= 0:
                raise TimeoutError
            # concurrent: without the GIL, so that a slow pattern does not block other threads.
            return compiled.fullmatch(text, timeout=left, concurrent=True)
        except TimeoutError as error:
            raise AdapterRejected(
                f"the pattern {reprlib.repr(pattern)} takes too long to match; name the layers in a list", file=CONFIG
            ) from error


def _compile(pattern: str, before: str, after: str) -> Any:
    """Compile a pattern that is valid for ``re``, as in PEFT, with ``regex``, whose matches can time out."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise AdapterRejected(
            f"has a pattern of {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are allowed", file=CONFIG
        )
    # regex unrolls counted repeats, so nested ones could use up all memory.
    counts = [int(count) for counts in _REPEAT.findall(pattern) for count in counts if count]
    if math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
        raise AdapterRejected(f"the pattern {reprlib.repr(pattern)} repeats too often", file=CONFIG)
    try:
        re.compile(before + pattern + after)
        return regex.compile(before + pattern + after)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterRejected(f"{reprlib.repr(pattern)} is not a regular expression: {error}", file=CONFIG) from error


def read_config(folder: Path) -> LoraConfig:
    """Read and check ``adapter_config.json``. Raises :class:`AdapterRejected` for a field that is not served.

    Unknown fields are accepted here; the caller passes them to :func:`check_fields`.
    """
    fields = read_json(folder, CONFIG)
    method = fields.get("peft_type")
    if method != "LORA":
        reason = (
            f"the PEFT method {reprlib.repr(method)} is not served"
            if method
            else "is not a PEFT config: peft_type is missing"
        )
        raise AdapterRejected(reason, file=CONFIG)
    _reject_unsupported(fields)
    try:
        return LoraConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        # Only the field's name: pydantic appends names of a union's members, which do not occur in the file.
        field = str(first["loc"][0]) + ": " if first["loc"] else ""
        raise AdapterRejected(f"{field}{first['msg']}", file=CONFIG) from error


def check_fields(unknown: Sequence[str], any_fields: bool = False) -> None:
    """Raise :class:`AdapterRejected` for unknown fields, unless ``any_fields``; always for very many."""
    if len(unknown) > MAX_UNKNOWN_FIELDS:
        raise AdapterRejected(f"has {len(unknown)} fields that no PEFT config has, {unknown[0]} first", file=CONFIG)
    if unknown and not any_fields:
        one = len(unknown) == 1
        raise AdapterRejected(
            f"{', '.join(unknown)}: {'is' if one else 'are'} not known, and may change what the "
            f"adapter does; if {'it concerns' if one else 'they concern'} only training, accept the adapter with "
            "allow_unknown_fields: true (--allow-unknown-fields)",
            file=CONFIG,
            code="unknown_fields",
        )


def _reject_unsupported(fields: Mapping[str, Any]) -> None:
    for name, reason in _UNSUPPORTED_FIELDS.items():
        if _is_set(fields.get(name)):
            raise AdapterRejected(f"{name}: {reason}", file=CONFIG)
    bias, init = fields.get("bias"), fields.get("init_lora_weights")
    if bias not in _BIASES:
        raise AdapterRejected(f"bias: must be none, all or lora_only (got {reprlib.repr(bias)})", file=CONFIG)
    if str(init).lower() not in _BASE_PRESERVING_INITS:
        raise AdapterRejected(f"init_lora_weights: {reprlib.repr(init)} {_init_reason(str(init).lower())}", file=CONFIG)


def _init_reason(init: str) -> str:
    """Return why an adapter with this ``init_lora_weights`` is not served, and what to do."""
    changes = "changes the base's own weights before training, and this server's base has the original ones"
    if init.startswith(_CONVERTIBLE_INITS):
        return f"{changes}; {_HOW_TO_CONVERT}"
    if init == "loftq":
        return f"{changes}; {_NOT_CONVERTIBLE}"
    return "is not known, and may change the base's own weights; if it does not, set it to true in the config"


def _is_set(value: Any) -> bool:
    """Return whether a field is set to anything but off or empty."""
    return value not in (None, False, "") and value != [] and value != {}


_KNOWN_FIELDS = (
    _NO_EFFECT_FIELDS | _UNSUPPORTED_FIELDS.keys() | LoraConfig.model_fields.keys() | {"bias", "init_lora_weights"}
)
"""All fields whose effect on the output is known here."""
