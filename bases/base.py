"""The frozen base model: found, quantised to NF4 once, cached, checked and fingerprinted.

NF4 with double quantisation is QLoRA's (Dettmers et al. 2023), as bitsandbytes and transformers implement it; the
output layer and the embeddings stay as they are.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from bases.model_source import ModelSource, find_source
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
"""The file in a cached base that says what its contents must hash to."""
_CACHE_FORMAT = 1

Say = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A base model in memory, not yet run. What it can be asked is in ``layout``."""

    name: str
    """Its id in ``/v1/models``."""
    model: PreTrainedModel
    """In eval mode, frozen, on ``device``."""
    tokenizer: PreTrainedTokenizerBase
    layout: BaseLayout
    """Its fingerprint, and the linear layers that can carry LoRA."""
    max_model_len: int
    """Tokens of prompt and answer together."""
    eos_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    """Of activations, keys and values."""


def load_base(options: BaseOptions, say: Say = lambda _: None) -> Base:
    """The base that ``options`` name; ``say`` gets a line for each slow step.

    The first time, its weights are quantised (on the CPU, so that every machine's are alike) and kept. Raises
    ConfigError or BaseRejected.
    """
    # Torch counts the machine's cores where a container's share is less.
    torch.set_num_threads(min(torch.get_num_threads(), machine.usable_cores()))
    device = _device(options.device)
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    source = find_source(options.model)
    folder = _ready_folder(source, options, dtype, say)
    check_memory(folder, LOADED, device)
    say(f"loading {source.name} from {folder}")
    with _quiet(progress=False):
        model = _read_model(folder, dtype)
        base = make_base(model, read_tokenizer(folder), source.name, device, options.max_model_len)
    _check_undamaged(folder, base.layout.fingerprint)
    return base


def make_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
) -> Base:
    """A base from objects in memory, which become its own: frozen and moved to ``device``.

    Raises BaseRejected where packed rows through it would not give right answers, and ConfigError where
    ``max_model_len`` is more than it has.
    """
    if check_architecture(model.config) is not type(model):
        raise BaseRejected(f"{type(model).__name__} is no causal language model of transformers")
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


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: torch {torch.__version__} sees no CUDA device")
    use_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def _ready_folder(source: ModelSource, options: BaseOptions, dtype: torch.dtype, say: Say) -> Path:
    """The folder to load: the source itself where nothing is to be converted, else its entry in the cache."""
    if options.quantization == "none" and not source.gguf:
        check_source(source, options.max_model_len)
        return source.path
    bases = options.data / "bases"
    try:
        bases.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--data: {error}") from None
    folder = bases / f"{source.name}-{_key(source, options, dtype)}"
    with FileLock(bases / "lock"):
        if not folder.is_dir():
            for left_by_a_crash in bases.glob("tmp-*"):
                shutil.rmtree(left_by_a_crash)
            _prepare(source, folder, options, dtype, say)
    return folder


def _key(source: ModelSource, options: BaseOptions, dtype: torch.dtype) -> str:
    """Names a cached base by all that its bytes depend on."""
    depends = [_CACHE_FORMAT, source.identity(), options.quantization, str(dtype)]
    depends += [version("transformers"), version("bitsandbytes")]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]


def _prepare(source: ModelSource, folder: Path, options: BaseOptions, dtype: torch.dtype, say: Say) -> None:
    """Convert the source into ``folder``, which appears whole or not at all."""
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
                bnb_4bit_use_double_quant=False,  # double_quantise does it, alike on every processor
                bnb_4bit_compute_dtype=dtype,
            )
            model = _read_model(path, dtype, quantization_config=nf4)
            double_quantise(model)
            path = _save(model, read_tokenizer(path), Path(temporary, "quantised"))
        path.rename(folder)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write both to ``folder``, with what they must hash to when they are read again."""
    check_tokenizer(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / _FINGERPRINT).write_text(identify(model, tokenizer).fingerprint)
    apply_umask(folder)
    return folder


def _check_undamaged(folder: Path, found: str) -> None:
    """A cached base must be what was once quantised, bit by bit."""
    written = folder / _FINGERPRINT
    if written.is_file() and written.read_text() != found:
        raise BaseRejected(f"the cached base in {folder} is damaged; delete that folder and start again")


def _read_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, its weights unpacked."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=dtype
        )
    except Exception as error:  # of a file that is not whole: of any kind
        check_gguf(file)
        raise BaseRejected(f"transformers cannot load {file}: {reason(error)}") from error
    return model, tokenizer


def _read_model(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The model in a Hugging Face folder, from safetensors only, with every weight present."""
    with _refusals(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(problem):
            raise BaseRejected(f"its weights do not fit its config: {problem} {sorted(report[problem])[:3]}")
    return model


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What transformers cannot read is a base we cannot serve."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise BaseRejected(f"transformers cannot load {path}: {reason(error)}") from error


@contextmanager
def _quiet(*, progress: bool) -> Iterator[None]:
    """Only errors from transformers, with or without its progress bars, which are for terminals only."""
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
    """Every token that one of the three places says ends an answer."""
    ids: set[int] = set()
    for place in (model.generation_config, model.config, tokenizer):
        found = getattr(place, "eos_token_id", None)
        ids.update(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(ids)


def _layout(model: PreTrainedModel, identity: Identity) -> BaseLayout:
    """Every linear layer can carry LoRA, but for the output layer."""
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
