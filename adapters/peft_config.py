"""PEFT's ``adapter_config.json``: what it declares, and what in it we do not serve.

The rules (which layers, which rank, which scale) are those of PEFT 0.21, ``peft/tuners/tuners_utils.py`` and
``peft/tuners/lora/model.py``, restated.
"""

import math
import re
import reprlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import regex  # type: ignore[import-untyped, unused-ignore]
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from adapters.errors import AdapterRejected
from adapters.files import CONFIG, read_json
from adapters.spec import BaseLayout, LoraTarget

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
    "fan_in_fan_out": "layers that store their weight transposed (Conv1D) are not served",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA) is not served",
    "velora_config": "VeLoRA is not served",
    "monteclora_config": "Monteclora is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA is not served",
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
})  # fmt: skip

_FAITHFUL_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
"""Starting values that leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change the base's own weights
before training, so their A and B mean nothing next to the base as published."""


class LoraConfig(BaseModel):
    """The fields of PEFT's ``LoraConfig`` that decide the output of plain LoRA."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

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
    """Read and check ``adapter_config.json``. Raises :class:`AdapterRejected` that names what is not served."""
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


def _refuse_what_is_not_served(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name == "bias":
            if value not in ("none", None):
                raise AdapterRejected(f"bias: trained biases are not served (got {reprlib.repr(value)})", file=CONFIG)
        elif name == "init_lora_weights":
            if str(value).lower() not in _FAITHFUL_INITS:
                raise AdapterRejected(
                    f"init_lora_weights: {reprlib.repr(value)} changes the base's own weights, which is not "
                    "served; save the adapter with path_initial_model_for_weight_conversion",
                    file=CONFIG,
                )
        elif name in LoraConfig.model_fields or name in _HARMLESS:
            continue
        # An unknown field that is off or empty is taken for a feature that is not in use.
        elif value not in (None, False, "") and value != [] and value != {}:
            reason = _NOT_SERVED.get(name, "is not known, and may change what the adapter does")
            raise AdapterRejected(f"{name[:80]}: {reason}", file=CONFIG)
