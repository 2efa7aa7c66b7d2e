"""An upload's weights are read twice between the disk and the device: once to check and hash them, once to load them.

Counted are the bytes that the kernel hands to this thread by read(2) and its kin (``rchar``), whoever asks for them.
It does not count what is read through a mapping, so the one mapping there is, safetensors', must not be asked for
tensors.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from adapters.format import verify as verify_module
from adapters.format.files import WEIGHTS
from adapters.format.spec import AdapterId, AdapterSpec, BaseLayout
from adapters.registry.database import open_sqlite
from adapters.registry.registry import Registry
from adapters.store.store import AdapterStore
from tests.adapter_folders import FINGERPRINT, LAYERS, ORIGIN, write_adapter
from tests.unit.adapters.registries import FakeHooks

SMALL_FILES = 128 << 10
"""Allowance in bytes for all other reads: config, SQLite's pages, Python's own files."""
LAYOUT = BaseLayout(FINGERPRINT, dict.fromkeys(LAYERS, (8192, 8192)))


def bytes_read() -> int:
    """Return the bytes that this thread has read with read(2) and similar calls."""
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


safe_open = verify_module.safe_open


class HeaderOnly:
    """Stands in for safetensors' ``safe_open``: allows only its check of the header."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._opened = safe_open(*arguments, **options)

    def __enter__(self) -> None:
        self._opened.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


@pytest.mark.parametrize("origin", [None, "with its SHA-256"])
def test_an_uploads_weights_are_read_twice(origin: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "safe_open", HeaderOnly)
    store = AdapterStore(tmp_path / "adapters", LAYOUT, 16)
    database = open_sqlite(tmp_path / "registry.sqlite3")
    counts: list[int] = []

    def dry_load(spec: AdapterSpec, keep: bool) -> dict[str, Any]:
        counts.append(bytes_read())
        loaded = store.read(spec.id)
        counts.append(bytes_read())
        assert loaded.spec == spec
        return {}

    registry = Registry(database, store, FakeHooks(FINGERPRINT, probe=dry_load))
    registry.open()
    with store.stage() as staging:
        folder = write_adapter(staging, LAYOUT, rank=16)
        if origin is not None:
            digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
            (folder / ORIGIN).write_text(f'{{"weights_sha256": "{digest}"}}')
        size = (folder / WEIGHTS).stat().st_size
        assert size > 16 * SMALL_FILES
        counts.append(bytes_read())
        registered = registry.register("legal", staging, "upload")
        counts.append(bytes_read())
    registry.close()
    database.close()
    before, checked, loaded, after = counts
    assert size <= checked - before < size + SMALL_FILES, "read to check and hash"
    assert size <= loaded - checked < size + SMALL_FILES, "read for the device"
    assert after - loaded < SMALL_FILES
    assert AdapterId(registered.version.content) in store
