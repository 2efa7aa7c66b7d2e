"""Archives, and a folder to unpack them in."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import AdapterRejected
from adapters.format.archive import unpack
from adapters.format.files import CONFIG, FILES, MAX_JSON_BYTES, WEIGHTS
from adapters.format.selection import Selection
from adapters.format.training_record import MAX_BYTES, SHOWN

LIMIT = 200_000
GOOD = {CONFIG: b'{"r": 4}', WEIGHTS: bytes(range(256)) * 700}
MIB = 1 << 20


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    return tar(*[entry(name, content) for name, content in files.items()], format=format)


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, **fields: object) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            for field, value in fields.items():
                setattr(info, field, value)
            archive.writestr(info, content)
    return file.getvalue()


FORMATS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar_of,
    "gnu tar": lambda files: tar_of(files, tarfile.GNU_FORMAT),
    "ustar": lambda files: tar_of(files, tarfile.USTAR_FORMAT),
    "tar.gz": lambda files: gzip.compress(tar_of(files)),
    "zip": zip_of,
    "stored zip": lambda files: zip_of(files, zipfile.ZIP_STORED),
}


class Bench:
    """Unpacks archives, and asserts that nothing outside the staging folder changes."""

    def __init__(self, root: Path) -> None:
        self.archive = root / "upload"
        self.staging = root / "staging"
        self.staging.mkdir()
        self._root = root

    def unpack(self, data: bytes) -> Selection:
        for path in self.staging.iterdir():
            path.unlink()
        self.archive.write_bytes(data)
        try:
            return unpack(self.archive, self.staging, LIMIT)
        finally:
            assert {path.name for path in self._root.iterdir()} == {"upload", "staging"}
            assert self.archive.read_bytes() == data
            for path in self.staging.iterdir():
                assert path.name in (*FILES, *SHOWN)
                assert path.is_file()
                assert not path.is_symlink()
                assert path.stat().st_size <= (
                    LIMIT if path.name == WEIGHTS else MAX_BYTES.get(path.name, MAX_JSON_BYTES)
                )

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.staging.iterdir()}

    def refused(self, data: bytes, reason: str) -> AdapterRejected:
        with pytest.raises(AdapterRejected, match=reason) as refusal:
            self.unpack(data)
        assert len(str(refusal.value)) < 500
        return refusal.value
