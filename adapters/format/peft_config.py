"""PEFT's ``adapter_config.json``: what it declares, and what in it we do not serve.

The rules (which layers, which rank, which scale) are those of PEFT 0.21, ``peft/tuners/tuners_utils.py`` and
``peft/tuners/lora/model.py``, restated.
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

from adapters.errors import AdapterRejected, shown
from adapters.format.files import CONFIG, read_json
from adapters.format.spec import BaseLayout, LoraTarget

_Value = TypeVar("_Value")

ALL_LINEAR = "all-linear"
MAX_ALPHA = 65536
MAX_PATTERN_LENGTH = 1000
MAX_REPEATS = 1000
MATCH_SECONDS = 2.0
_REPEAT = re.compile(r"\{(\d*),?(\d*)")
_INDEX = r"\.(?P<index>\d+)\..*"

_NOT_SERVED = {
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
"""Fields that change the output; served only where they are empty."""

_HARMLESS = frozenset({
    # where it comes from
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    # how it was trained, or is loaded
    "lora_dropout", "inference_mode", "runtime_config", "ensure_weight_tying", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
    # settings of methods that are refused above where they are in use
    "megatron_core", "qalora_group_size",
    # layers that store their weight transposed (Conv1D); PEFT looks at it nowhere else, and no base here has them
    "fan_in_fan_out",
    # of PEFT 0.1: a way to run it
    "merge_weights",
    # of ms-swift: its own name for the method, dtype in training, learning rates of LoRA+
    "swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",
    # of Axolotl: how the base was rounded in training, for its own merge
    "nvfp4_merge_aware",
})  # fmt: skip
"""Fields that leave the output as it is, whatever they say."""

_BIASES = (None, "none", "all", "lora_only")
"""Where it is neither of the first two, biases were trained along; the weights have those that there are."""

_FAITHFUL_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
"""Starting values that leave the base as it is. All others that PEFT has change the base's own weights before training,
so A and B mean nothing next to the base as published."""
_SUBTRACTED_INITS = ("pissa", "olora", "corda", "lora_ga")
"""Starting values, or beginnings of their names, that are subtracted from the base: PEFT can add them back."""
_MORE = 'see "Adapters that changed their base" in docs/registry.md'
_ADD_BACK = (
    'convert the adapter with PEFT, which needs it as it was before training: then `model.save_pretrained("init")`, '
    'and afterwards `model.save_pretrained("out", path_initial_model_for_weight_conversion="init")`; without that, '
    + _MORE
)
_SERVE_CHANGED = f"it cannot be converted; train again with init_lora_weights: true, or serve the base it made: {_MORE}"

MAX_UNKNOWN = 20
"""Fields that are not known, beyond which a config is none of PEFT's."""


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
        """Fields in use of which it is not known whether they change the output, as far as their names' beginnings."""
        extra = self.model_extra or {}
        return tuple(sorted(shown(name[:80]) for name, value in extra.items() if name not in _KNOWN and _in_use(value)))

    def targets(self, layout: BaseLayout) -> Mapping[str, LoraTarget]:
        """The layers of the base that the config declares, with rank and scaling.

        Raises :class:`AdapterRejected` where it declares a layer on which LoRA is not served.
        """
        patterns = _Patterns(MATCH_SECONDS)
        if not self._all_linear():
            for layer, reason in layout.unserved.items():
                if self._declares(layer, patterns):
                    raise AdapterRejected(f"target_modules names {layer}: {reason}", file=CONFIG)
        return {layer: self._target(layer, patterns) for layer in layout.linears if self._declares(layer, patterns)}

    def _all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def _declares(self, layer: str, patterns: "_Patterns") -> bool:
        if self.exclude_modules and patterns.name(self.exclude_modules, layer):
            return False
        if self._all_linear():
            return True
        if not patterns.name(self.target_modules, layer):
            return False
        # A layer named in full is meant whatever its index; a pattern has said already which indices it means.
        if isinstance(self.target_modules, str) or layer in self.target_modules:
            return True
        indices = self.layers_to_transform
        if indices is None or indices == []:
            return True
        return patterns.index(self.layers_pattern, layer) in ([indices] if isinstance(indices, int) else indices)

    def _target(self, layer: str, patterns: "_Patterns") -> LoraTarget:
        rank = patterns.lookup(self.rank_pattern or {}, layer, self.r)
        alpha = patterns.lookup(self.alpha_pattern or {}, layer, self.lora_alpha)
        return LoraTarget(rank, alpha / (math.sqrt(rank) if self.use_rslora else rank))


class _Patterns:
    """Matches layer names against patterns out of a file nobody has vouched for.

    A pattern can be written to backtrack for ever, so all matches of one config share one time limit.
    """

    def __init__(self, seconds: float) -> None:
        # Processor time: a busy machine does not make a good pattern a bad one.
        self._deadline = time.thread_time() + seconds
        self._compiled: dict[tuple[str, str, str], Any] = {}

    def name(self, modules: str | list[str], layer: str) -> bool:
        """A string is a pattern for the whole name; a list has whole names or endings at a dot."""
        if isinstance(modules, str):
            return self._match(modules, layer) is not None
        return any(layer == module or layer.endswith(f".{module}") for module in modules)

    def index(self, containers: str | list[str] | None, layer: str) -> int | None:
        """The layer's index: the first number, or the first after one of ``containers`` (such as ``layers``)."""
        if not containers:
            match = self._match(r".*?\.[^.]*", layer, after=_INDEX)
            return int(match["index"]) if match else None
        for container in [containers] if isinstance(containers, str) else containers:
            match = self._match(container, layer, before=r"(?:(?:^|.*?\.)", after=r"\.(?P<index>\d+)\.).*")
            if match:
                # In a pattern such as "layers|h", the alternative that matched may have no index.
                return int(match["index"]) if match["index"] else None
        return None

    def lookup(self, by_pattern: Mapping[str, _Value], layer: str, default: _Value) -> _Value:
        """The value of the first pattern that matches the name or an ending of it at a dot."""
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
            # Without the interpreter's lock, so that a slow pattern holds up nobody else.
            return compiled.fullmatch(text, timeout=left, concurrent=True)
        except TimeoutError as error:
            raise AdapterRejected(
                f"the pattern {reprlib.repr(pattern)} takes too long to match", file=CONFIG
            ) from error


def _compile(pattern: str, before: str, after: str) -> Any:
    """Compile with the syntax of ``re``, which PEFT uses, for ``regex``, which can be stopped."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise AdapterRejected(f"has a pattern of {len(pattern)} characters", file=CONFIG)
    # regex unrolls counted repeats; nested ones take all memory there is.
    counts = [int(count) for counts in _REPEAT.findall(pattern) for count in counts if count]
    if math.prod(max(count, 1) for count in counts) > MAX_REPEATS:
        raise AdapterRejected(f"the pattern {reprlib.repr(pattern)} repeats too often", file=CONFIG)
    try:
        re.compile(before + pattern + after)
        return regex.compile(before + pattern + after)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise AdapterRejected(f"{reprlib.repr(pattern)} is not a regular expression: {error}", file=CONFIG) from error


def read_config(folder: Path) -> LoraConfig:
    """Read and check ``adapter_config.json``. Raises :class:`AdapterRejected` that names what is not served.

    What ``unknown`` fields mean is for the caller to ask.
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
    _refuse_what_is_not_served(fields)
    try:
        return LoraConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        # A union's alternatives report under names of their own, which the reader of the file has never seen.
        field = str(first["loc"][0]) + ": " if first["loc"] else ""
        raise AdapterRejected(f"{field}{first['msg']}", file=CONFIG) from error


def check_fields(unknown: Sequence[str], any_fields: bool = False) -> None:
    """Raises :class:`AdapterRejected` for fields that are not known, unless any are taken, or for very many."""
    if len(unknown) > MAX_UNKNOWN:
        raise AdapterRejected(f"has {len(unknown)} fields that no PEFT config has, {unknown[0]} first", file=CONFIG)
    if unknown and not any_fields:
        one = len(unknown) == 1
        raise AdapterRejected(
            f"{', '.join(unknown)}: {'is' if one else 'are'} not known, and may change what the adapter does; where "
            f"{'it concerns' if one else 'they concern'} training only, say so with allow_unknown_fields: true "
            "(--allow-unknown-fields)",
            file=CONFIG,
            code="unknown_fields",
        )


def _refuse_what_is_not_served(fields: Mapping[str, Any]) -> None:
    for name, reason in _NOT_SERVED.items():
        if _in_use(fields.get(name)):
            raise AdapterRejected(f"{name}: {reason}", file=CONFIG)
    bias, init = fields.get("bias"), fields.get("init_lora_weights")
    if bias not in _BIASES:
        raise AdapterRejected(f"bias: must be none, all or lora_only (got {reprlib.repr(bias)})", file=CONFIG)
    if str(init).lower() not in _FAITHFUL_INITS:
        raise AdapterRejected(f"init_lora_weights: {reprlib.repr(init)} {_why_not(str(init).lower())}", file=CONFIG)


def _why_not(init: str) -> str:
    """Why an adapter that began with these values is not served, and what can be done."""
    changes = "changes the base's own weights, and the base here has them unchanged"
    if init.startswith(_SUBTRACTED_INITS):
        return f"{changes}; {_ADD_BACK}"
    if init == "loftq":
        return f"{changes}; {_SERVE_CHANGED}"
    return "is not known, and may change the base's own weights; where it does not, set it to true in the config"


def _in_use(value: Any) -> bool:
    """A field that is off or empty is taken for a feature that is not in use."""
    return value not in (None, False, "") and value != [] and value != {}


_KNOWN = _HARMLESS | _NOT_SERVED.keys() | LoraConfig.model_fields.keys() | {"bias", "init_lora_weights"}
"""Every field of which it is decided here whether it changes the output."""
