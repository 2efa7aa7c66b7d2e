"""Loads the frozen base model: quantises it to NF4 once, caches it, checks it and fingerprints it.

NF4 with double quantisation is QLoRA's (Dettmers et al. 2023), as bitsandbytes and transformers implement it. The
output layer and the embeddings are not quantised.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from adapters.format.spec import BaseLayout
from bases import machine
from bases.architecture import check_architecture, check_context
from bases.double_quant import double_quantise
from bases.errors import BaseRejected, ConfigError
from bases.file_modes import apply_umask
from bases.fingerprint import Identity, identify
from bases.model_source import ModelSource, find_source, read_pooling_modes
from bases.nf4 import Linear4bit
from bases.options import BaseOptions
from bases.preflight import (
    LOADED,
    QUANTISED,
    UNPACKED,
    check_gguf,
    check_memory,
    check_source,
    check_tokenizer,
    context_length,
    read_tokenizer,
    reason,
)

_FINGERPRINT = "fingerprint"
"""File in a cached base with the fingerprint that it must have."""
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Base:
    """A base model in memory, before its first forward pass."""

    name: str
    """Its id in ``/v1/models``."""
    model: PreTrainedModel
    """In eval mode, frozen, on ``device``."""
    tokenizer: PreTrainedTokenizerBase
    layout: BaseLayout
    """Its fingerprint, and the linear layers that adapters may target."""
    max_model_len: int
    """Most tokens of prompt and answer together."""
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    """Dtype of activations, keys and values."""
    pooling_modes: tuple[str, ...] = ()
    """How its sentence-transformers files, if it has any, pool hidden states: ``lasttoken``, ``mean``, ..."""


def load_base(options: BaseOptions, say: Callable[[str], None] = lambda _: None) -> Base:
    """Load the base that ``options`` name. Calls ``say`` with a message before each slow step.

    The first time, it quantises the weights, on the CPU so that they are equal on every machine, and caches them.
    Raises ConfigError or BaseRejected.
    """
    _limit_threads()
    device = _device(options.device)
    dtype = _dtype(options)
    source = find_source(options.model)
    folder = _ready_folder(source, options, dtype, say)
    check_memory(folder, LOADED, device)
    say(f"loading {source.name} from {folder}")
    with _quiet(progress=False):
        model = _read_model(folder, dtype)
        base = make_base(model, read_tokenizer(folder), source.name, device, options.max_model_len)
    _check_undamaged(folder, base.layout.fingerprint)
    return base if source.gguf else replace(base, pooling_modes=read_pooling_modes(source.path))


def fetch_base(options: BaseOptions, say: Callable[[str], None] = lambda _: None) -> Path:
    """Download and quantise the base that ``options`` name, unless that is done already. Returns its folder.

    Then :func:`load_base` needs no network. Raises ConfigError or BaseRejected.
    """
    _limit_threads()
    return _ready_folder(find_source(options.model), options, _dtype(options), say)


def make_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
) -> Base:
    """Make a base from objects in memory. Takes over ``model``: freezes it and moves it to ``device``.

    Raises BaseRejected if the model cannot be served right, and ConfigError if ``max_model_len`` is more than the
    model's context.
    """
    if check_architecture(model.config) is not type(model):
        raise BaseRejected(f"{type(model).__name__} is not a causal language model of transformers")
    check_tokenizer(tokenizer)
    length = context_length(model.config, max_model_len)
    check_context(model.config, length)
    model.eval().requires_grad_(False)
    if model.device != torch.device(device):
        nn.Module.to(model, device)
    output = model.get_output_embeddings()
    if isinstance(output, Linear4bit):
        raise BaseRejected("its output layer is quantised")
    return Base(
        name=name,
        model=model,
        tokenizer=tokenizer,
        layout=_layout(model, identify(model, tokenizer)),
        max_model_len=length,
        eos_token_ids=_eos_token_ids(model, tokenizer),
        device=model.device,
        dtype=model.dtype,
    )


def _limit_threads() -> None:
    """Keep to a container's CPU quota: by default torch uses all of the machine's cores."""
    torch.set_num_threads(min(torch.get_num_threads(), machine.usable_cores()))


def _dtype(options: BaseOptions) -> torch.dtype:
    return torch.float32 if options.dtype == "fp32" else torch.bfloat16


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: torch {torch.__version__} sees no CUDA device")
    use_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def _ready_folder(source: ModelSource, options: BaseOptions, dtype: torch.dtype, say: Callable[[str], None]) -> Path:
    """Return the folder to load: the source if nothing has to be converted, else its entry in the cache."""
    if options.quantization == "none" and not source.gguf:
        check_source(source, options.max_model_len)
        return source.path
    bases = options.data_dir / "bases"
    try:
        bases.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data-dir: {error}") from None
    folder = bases / f"{source.name}-{_key(source, options, dtype)}"
    with FileLock(bases / "lock"):
        if not folder.is_dir():
            for left_by_a_crash in bases.glob("tmp-*"):
                shutil.rmtree(left_by_a_crash)
            _prepare(source, folder, options, dtype, say)
    return folder


def _key(source: ModelSource, options: BaseOptions, dtype: torch.dtype) -> str:
    """Return the cache key of a base: a digest of everything that its bytes depend on."""
    depends = [_CACHE_FORMAT, source.identity(), options.quantization, str(dtype)]
    depends += [version("transformers"), version("bitsandbytes")]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]


def _prepare(
    source: ModelSource, folder: Path, options: BaseOptions, dtype: torch.dtype, say: Callable[[str], None]
) -> None:
    """Convert the source into ``folder``. The folder appears only when it is complete."""
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder.parent) as temporary, _quiet(progress=True):
        path = source.path
        if source.gguf:
            check_memory(path, UNPACKED, torch.device("cpu"))
            say(f"unpacking {path.name} (once)")
            path = _save(*_read_gguf(path, dtype), Path(temporary, "unpacked"))
        if options.quantization == "nf4":
            check_source(ModelSource(source.name, path), options.max_model_len)
            check_memory(path, QUANTISED, torch.device("cpu"))
            say(f"quantising {source.name} to NF4 (once)")
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=False,  # double_quantise does it, with the same result on every processor
                bnb_4bit_compute_dtype=dtype,
            )
            model = _read_model(path, dtype, quantization_config=nf4)
            double_quantise(model)
            path = _save(model, read_tokenizer(path), Path(temporary, "quantised"))
        path.rename(folder)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Save both to ``folder`` with their fingerprint, and return the folder."""
    check_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / _FINGERPRINT).write_text(identify(model, tokenizer).fingerprint)
    apply_umask(folder)
    return folder


def _check_undamaged(folder: Path, found: str) -> None:
    """Raise BaseRejected if a cached base does not have the fingerprint with which it was saved."""
    written = folder / _FINGERPRINT
    if written.is_file() and written.read_text() != found:
        raise BaseRejected(f"the cached base in {folder} is damaged; delete that folder and start again")


def _read_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model of a GGUF file, with its weights unpacked to ``dtype``."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=dtype,
            trust_remote_code=False,
        )
    except Exception as error:  # an incomplete file raises errors of any kind
        check_gguf(file)
        raise BaseRejected(f"transformers cannot load {file}: {reason(error)}") from error
    return model, tokenizer


def _read_model(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Read the model in a Hugging Face folder. Raises BaseRejected unless all its weights are in safetensors files."""
    with _refusals(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(problem):
            raise BaseRejected(f"its weights do not match its config: {problem} {sorted(report[problem])[:3]}")
    return model


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """Raise BaseRejected for errors of transformers while it loads ``path``."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseRejected(f"transformers cannot load {path}: {reason(error)}") from error


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """Silence transformers' warnings, and its progress bars unless ``progress`` is set and stderr is a terminal."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not (progress and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end tokens of the generation config, the config and the tokenizer together."""
    ids: set[int] = set()
    for place in (model.generation_config, model.config, tokenizer):
        found = getattr(place, "eos_token_id", None)
        ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(ids)


def _layout(model: PreTrainedModel, identity: Identity) -> BaseLayout:
    """Return the layers that adapters may target: every linear layer except the output layer."""
    output = model.get_output_embeddings()
    linears: dict[str, tuple[int, int]] = {}
    unserved: dict[str, str] = {}
    for name, module in model.named_modules():
        if module is output:
            unserved[name] = "LoRA on the output layer is not served"
        elif isinstance(module, nn.Embedding):
            unserved[name] = "LoRA on embeddings is not served"
        elif isinstance(module, nn.Linear):
            linears[name] = (module.in_features, module.out_features)
    return BaseLayout(identity.fingerprint, linears, unserved, identity.equivalents, identity.parts)
